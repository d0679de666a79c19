//! The main thread: owns the runtime directory, the signals and the admin socket.
//!
//! Start: the runtime directory is made and judged, its lock taken, stale sockets removed by the
//! holder of the lock alone, FIFOs and sockets opened, threads started. Then it waits: a first
//! SIGTERM, SIGINT or SIGHUP drains, a later one stops at once; `status` is asked of the shard
//! and formatted here, also while draining.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{TryRecvError, bounded};
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Gid, Group, geteuid};
use poolbroker_proto::runtime_dir::RuntimeDir;

use crate::closer::Closer;
use crate::config::{
    ADMIN_REST_MS, ADMIN_TIMEOUT, COMMANDS_MAX, QUESTION_BYTES_MAX, SHARD_TIMEOUT, SIGNALS_TOGETHER,
};
use crate::config::{Config, SocketAccess};
use crate::mailbox::{MailSender, Mailbox, mailbox};
pub use crate::shard::Ending;
use crate::shard::{Command, OpenFifo, Shard, ShardParts};
use crate::timers::Time;
use crate::transport::fifo::{FifoError, open_fifo};
use crate::transport::{pipe, unix};
use crate::upstream::resolve::{Resolver, look_up};
use crate::upstream::sockopt;

/// Why the broker does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another one serves this directory.
    #[error(
        "another broker{pid} holds {path:?}: stop it, or choose another directory with \
         --runtime-dir"
    )]
    AlreadyRunning {
        /// The lock file.
        path: PathBuf,
        /// ` (pid N)`, where it is known.
        pid: String,
    },
    /// Others could replace what is in the runtime directory.
    #[error("the runtime directory {path:?} {problem}")]
    UnsafeDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Something else has the name of a socket.
    #[error("{path:?} is not a socket: look at it, then remove it")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A FIFO cannot be used.
    #[error(transparent)]
    Fifo(#[from] FifoError),
    /// A group of the configuration does not exist.
    #[error("the group {name:?} of {of} does not exist on this host")]
    NoGroup {
        /// The group.
        name: String,
        /// The socket or FIFO.
        of: PathBuf,
    },
    /// The kernel refuses.
    #[error("{what}: {cause}")]
    Kernel {
        /// What was to be done, with the name it was to be done to.
        what: String,
        /// Its error.
        cause: io::Error,
    },
}

fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> StartError {
    let what = what.into();
    move |cause| StartError::Kernel { what, cause }
}

/// The signals that end a broker, read through a descriptor from now on.
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks them. To be called before any thread is started: a thread inherits the mask, and
    /// one without it would take the signal, and the process with it.
    pub fn block() -> Result<Self, StartError> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = mask.thread_block().and_then(|()| SignalFd::with_flags(&mask, flags));
        signals.map(Signals).map_err(|error| kernel("signals")(error.into()))
    }
}

/// Runs a broker to its end.
pub fn run(
    config: Config,
    runtime_dir: RuntimeDir,
    signals: Signals,
) -> Result<Ending, StartError> {
    let descriptors_max = raise_descriptor_limit();
    make_directory(runtime_dir.path())?;
    let _lock = take_lock(&runtime_dir.lock_file())?;
    let (commands, inbox) =
        mailbox(COMMANDS_MAX).map_err(|error| kernel("a mailbox")(error.into()))?;
    let (endings, ended) = mailbox(1).map_err(|error| kernel("a mailbox")(error.into()))?;
    let fifos = open_fifos(&config, &runtime_dir)?;
    let client_socket = runtime_dir.client_socket();
    let listener = listen(&client_socket, &config.socket)?;
    let private = SocketAccess { mode: 0o600, group: None };
    let admin = UnixListener::from(listen(&runtime_dir.admin_socket(), &private)?);
    // Not known before Linux 6.16; descriptors that come are never received here.
    let _ = sockopt::refuse_descriptors(&admin);
    if !pipe::is_supported() {
        tracing::warn!("this kernel cannot read pipes without waiting: passed pipes will fail");
    }
    let resolved = commands.clone();
    let started = Instant::now();
    let clock = move || Time::from_start(started.elapsed());
    let interval = config.broker.resolve_interval;
    let resolver = Resolver::start(interval, clock, look_up, move |report| {
        resolved.send(Command::Resolved(report))
    })
    .map_err(kernel("the resolver thread"))?;
    let names: Vec<_> = config.upstreams.iter().map(|upstream| upstream.name.clone()).collect();
    let parts = ShardParts {
        config,
        runtime_dir: runtime_dir.path().to_path_buf(),
        listener,
        listener_path: client_socket.clone(),
        fifos,
        mailbox: inbox,
        resolver,
        closer: Closer::start().map_err(kernel("the closer thread"))?,
        descriptors_max,
    };
    let shard = start_shard(parts, endings)?;
    tracing::info!(
        runtime_dir = %runtime_dir.path().display(), upstreams = names.join(","), "serving"
    );
    let control = Control { signals, admin, commands, ended };
    let ending = control.serve();
    for path in [client_socket, runtime_dir.admin_socket()] {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "a socket could not be removed");
        }
    }
    finish(&shard, ending)
}

fn start_shard(
    parts: ShardParts,
    endings: MailSender<Result<Ending, io::Error>>,
) -> Result<JoinHandle<()>, StartError> {
    std::thread::Builder::new()
        .name("shard".into())
        .spawn(move || {
            // The sender is dropped, and wakes the reader, also when the shard panics.
            let endings = endings;
            let ending = Shard::new(parts).and_then(Shard::run);
            endings.send(ending.map_err(io::Error::from));
        })
        .map_err(kernel("the shard thread"))
}

fn finish(
    shard: &JoinHandle<()>,
    ending: Option<Result<Ending, io::Error>>,
) -> Result<Ending, StartError> {
    match ending {
        Some(Ok(ending)) => {
            tracing::info!("ended");
            Ok(ending)
        }
        Some(Err(cause)) => Err(StartError::Kernel { what: "the event loop".into(), cause }),
        None => {
            let thread = shard.thread().name().unwrap_or("shard").to_owned();
            let cause = io::Error::other("it panicked; please report what is printed above");
            Err(StartError::Kernel { what: format!("the {thread} thread"), cause })
        }
    }
}

// Start.

/// Raises the soft limit of descriptors to the hard one; what the process may have.
fn raise_descriptor_limit() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1024;
    };
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    usize::try_from(limit).unwrap_or(usize::MAX)
}

fn make_directory(path: &Path) -> Result<(), StartError> {
    match DirBuilder::new().mode(0o755).create(path) {
        Ok(()) => {
            // Whatever the umask: clients of other users must be able to pass through it.
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(path, permissions)
                .map_err(kernel(format!("the runtime directory {path:?}")))?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(kernel(format!("the runtime directory {path:?} cannot be made"))(error));
        }
    }
    let unsafe_directory =
        |problem: String| StartError::UnsafeDirectory { path: path.to_path_buf(), problem };
    let found =
        std::fs::metadata(path).map_err(kernel(format!("the runtime directory {path:?}")))?;
    if !found.is_dir() {
        return Err(unsafe_directory("is not a directory: choose another".into()));
    }
    let own = geteuid().as_raw();
    if found.uid() != own {
        return Err(unsafe_directory(format!(
            "belongs to uid {}, not to the broker's uid {own}, who could replace what is in it: \
             choose a directory of its own",
            found.uid()
        )));
    }
    if found.mode() & 0o022 != 0 {
        return Err(unsafe_directory(format!(
            "may be written by others (mode {:o}), who could replace what is in it: chmod go-w it",
            found.mode() & 0o7777
        )));
    }
    Ok(())
}

/// Makes this broker the only one of its directory, until the lock is dropped.
fn take_lock(path: &Path) -> Result<Flock<File>, StartError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
        .map_err(kernel(format!("the lock file {path:?}")))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            let pid = format!("{}\n", std::process::id());
            let written = lock.set_len(0).and_then(|()| lock.write_all(pid.as_bytes()));
            written.map_err(kernel(format!("the lock file {path:?}")))?;
            Ok(lock)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let is_known = file.read_to_string(&mut pid).is_ok() && !pid.trim().is_empty();
            let pid = if is_known { format!(" (pid {})", pid.trim()) } else { String::new() };
            Err(StartError::AlreadyRunning { path: path.to_path_buf(), pid })
        }
        Err((_, error)) => Err(kernel(format!("the lock file {path:?}"))(error.into())),
    }
}

/// Only the holder of the lock comes here: a socket that is there is stale (K8).
fn listen(path: &Path, access: &SocketAccess) -> Result<OwnedFd, StartError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            std::fs::remove_file(path).map_err(kernel(format!("the stale socket {path:?}")))?;
        }
        Ok(_) => {
            return Err(StartError::NotASocket { path: path.to_path_buf() });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(kernel(format!("the socket {path:?}"))(error)),
    }
    let group = find_group(access.group.as_deref(), path)?;
    unix::open_listener(path, access.mode, group)
        .map_err(|error| kernel(format!("the socket {path:?}"))(error.into()))
}

fn open_fifos(config: &Config, dir: &RuntimeDir) -> Result<Vec<OpenFifo>, StartError> {
    let mut fifos = Vec::new();
    for (upstream, config) in config.upstreams.iter().enumerate() {
        let Some(fifo) = &config.fifo else { continue };
        let path = dir.fifo(&config.name);
        let group = find_group(fifo.group.as_deref(), &path)?;
        let fd = open_fifo(&path, fifo.mode, group)?;
        fifos.push(OpenFifo { fd, path, upstream, framing: fifo.framing });
    }
    Ok(fifos)
}

fn find_group(name: Option<&str>, of: &Path) -> Result<Option<Gid>, StartError> {
    let Some(name) = name else { return Ok(None) };
    let found =
        Group::from_name(name).map_err(|error| kernel(format!("group {name:?}"))(error.into()))?;
    match found {
        Some(group) => Ok(Some(group.gid)),
        None => Err(StartError::NoGroup { name: name.to_owned(), of: of.to_path_buf() }),
    }
}

// Service.

struct Control {
    signals: Signals,
    admin: UnixListener,
    commands: MailSender<Command>,
    ended: Mailbox<Result<Ending, io::Error>>,
}

impl Control {
    /// Serves until the shard has ended; `None` when it did not say how.
    fn serve(&self) -> Option<Result<Ending, io::Error>> {
        let mut draining_since: Option<Instant> = None;
        let mut admin_rests = false;
        loop {
            // Without a free descriptor the admin socket stays readable: it rests for a moment.
            let (watched, timeout) = if admin_rests {
                (vec![self.signals.0.as_fd(), self.ended.as_fd()], ADMIN_REST_MS.into())
            } else {
                let all = vec![self.signals.0.as_fd(), self.ended.as_fd(), self.admin.as_fd()];
                (all, PollTimeout::NONE)
            };
            let polled = watched.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            if let Err(error) = poll(&mut polled.collect::<Vec<_>>(), timeout)
                && error != nix::errno::Errno::EINTR
            {
                return Some(Err(error.into()));
            }
            // Not cleared: a sender that is being dropped wakes a moment before it is gone.
            match self.ended.try_receive() {
                Ok(ending) => return Some(ending),
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => {}
            }
            while let Ok(Some(signal)) = self.signals.0.read_signal() {
                let (command, what) = match draining_since {
                    None => (Command::Drain, "draining"),
                    Some(since) if since.elapsed() < SIGNALS_TOGETHER => continue,
                    Some(_) => (Command::Stop, "stopping at once"),
                };
                tracing::info!(signal = signal.ssi_signo, "{what}");
                draining_since.get_or_insert_with(Instant::now);
                self.commands.send(command);
            }
            admin_rests = match self.admin.accept() {
                Ok((client, _)) => {
                    if let Err(error) = self.answer(client) {
                        tracing::debug!(%error, "an admin request failed");
                    }
                    false
                }
                Err(error) => error.kind() != io::ErrorKind::WouldBlock,
            };
        }
    }

    /// One question, one answer.
    fn answer(&self, mut client: UnixStream) -> io::Result<()> {
        client.set_nonblocking(false)?;
        client.set_write_timeout(Some(ADMIN_TIMEOUT))?;
        let deadline = Instant::now() + ADMIN_TIMEOUT;
        let mut question = Vec::new();
        let mut byte = [0u8; 1];
        while question.len() < QUESTION_BYTES_MAX {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            client.set_read_timeout(Some(left))?;
            if client.read(&mut byte)? == 0 || byte == *b"\n" {
                break;
            }
            question.push(byte[0]);
        }
        match question.trim_ascii() {
            b"status" => {
                let (answer, snapshot) = bounded(1);
                self.commands.send(Command::Status(answer));
                let snapshot = snapshot
                    .recv_timeout(SHARD_TIMEOUT)
                    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
                let mut json = serde_json::to_vec(&snapshot)?;
                json.push(b'\n');
                client.write_all(&json)
            }
            other => {
                let other = String::from_utf8_lossy(other).escape_debug().to_string();
                let error = format!("unknown admin request \"{other}\"; there is: status");
                let answer = serde_json::json!({ "error": error });
                client.write_all(format!("{answer}\n").as_bytes())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_held_by_one_and_names_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("broker.lock");
        let lock = take_lock(&path).unwrap();
        let refused = take_lock(&path).unwrap_err().to_string();
        assert!(refused.contains(&format!("pid {}", std::process::id())), "{refused}");
        drop(lock);
        take_lock(&path).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runtime");
        make_directory(&path).unwrap();
        make_directory(&path).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(&path, open).unwrap();
        let refused = make_directory(&path).unwrap_err().to_string();
        assert!(refused.contains("chmod go-w"), "{refused}");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let access = SocketAccess { mode: 0o600, group: None };
        let path = dir.path().join("s");
        for _ in 0..2 {
            listen(&path, &access).unwrap();
        }
        let file = dir.path().join("f");
        std::fs::write(&file, "data").unwrap();
        assert!(matches!(listen(&file, &access), Err(StartError::NotASocket { .. })));
        assert!(file.exists());
    }
}

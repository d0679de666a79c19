//! One running broker: the real executable in a directory of its own.
//!
//! A [`Broker`] is ready when its constructor returns: its admin socket answers. What it writes to
//! standard error goes to a file and is shown when the test that owns it panics. Dropping it kills
//! the process.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::binary::poolbroker_binary;
use crate::deadline::{PATIENCE, poll_for, wait_for};

/// How long SIGTERM may take: twice the default `drain_timeout`.
const TERMINATION_PATIENCE: Duration = Duration::from_secs(20);

/// Clock ticks per second in /proc/PID/stat: USER_HZ, 100 on every Linux that Rust supports.
const TICKS_PER_SECOND: u64 = 100;

/// A broker to be started.
#[derive(Debug, Default)]
pub struct Builder {
    args: Vec<OsString>,
    config: Option<String>,
    env: Vec<(OsString, OsString)>,
    shell: Vec<String>,
    runtime_dir: Option<PathBuf>,
}

impl Builder {
    /// Adds `--upstream name=url`.
    #[must_use]
    pub fn upstream(self, name: &str, url: &str) -> Self {
        self.arg("--upstream").arg(format!("{name}={url}"))
    }

    /// Writes `toml` to a file and passes it with `--config`.
    #[must_use]
    pub fn config(mut self, toml: &str) -> Self {
        self.config = Some(toml.to_owned());
        self
    }

    /// Adds an argument of `serve`.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// Starts it with this soft and hard limit of open descriptors.
    #[must_use]
    pub fn nofile(self, descriptors: u64) -> Self {
        self.shell(format!("ulimit -n {descriptors}"))
    }

    /// Starts it with this soft limit of open descriptors and the hard one unchanged.
    #[must_use]
    pub fn nofile_soft(self, descriptors: u64) -> Self {
        self.shell(format!("ulimit -S -n {descriptors}"))
    }

    /// Starts it with this umask, in octal.
    #[must_use]
    pub fn umask(self, umask: &str) -> Self {
        self.shell(format!("umask {umask}"))
    }

    /// Uses this runtime directory instead of a fresh one, and does not remove it.
    #[must_use]
    pub fn runtime_dir(mut self, dir: &Path) -> Self {
        self.runtime_dir = Some(dir.to_owned());
        self
    }

    /// Starts the broker and waits until it answers.
    ///
    /// # Panics
    /// When it ends instead.
    pub fn start(self) -> Broker {
        let launch = Launch::new(self);
        let child = launch.spawn();
        let mut broker = Broker { launch, child };
        broker.wait_until_ready();
        broker
    }

    /// Starts the broker, which must not come up: its exit status and what it wrote to standard
    /// error.
    ///
    /// # Panics
    /// When it has not ended after [`PATIENCE`].
    pub fn start_expecting_failure(self) -> (ExitStatus, String) {
        let launch = Launch::new(self);
        let mut child = launch.spawn();
        let Some(status) = wait_for_exit(&mut child, PATIENCE) else {
            end(&mut child);
            panic!("the broker came up: {}", launch.stderr());
        };
        (status, launch.stderr())
    }

    fn shell(mut self, command: String) -> Self {
        self.shell.push(command);
        self
    }
}

/// A running broker.
#[derive(Debug)]
pub struct Broker {
    launch: Launch,
    child: Child,
}

impl Broker {
    /// Starts a broker with these upstreams, each `NAME=URL`.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start<S: AsRef<str>>(upstreams: &[S]) -> Broker {
        let builder = upstreams
            .iter()
            .fold(Builder::default(), |builder, spec| builder.arg("--upstream").arg(spec.as_ref()));
        builder.start()
    }

    /// A broker to be started with more than upstreams.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Its runtime directory.
    pub fn runtime_dir(&self) -> &Path {
        &self.launch.runtime_dir
    }

    /// The FIFO of an upstream.
    pub fn fifo(&self, upstream: &str) -> PathBuf {
        self.runtime_dir().join(format!("{upstream}.fifo"))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard error so far.
    pub fn stderr(&self) -> String {
        self.launch.stderr()
    }

    /// `poolbroker SUBCOMMAND --runtime-dir DIR`, ready for more arguments.
    pub fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(poolbroker_binary());
        command.arg(subcommand).arg("--runtime-dir").arg(self.runtime_dir()).stdin(Stdio::null());
        command
    }

    /// The status, asked for over the admin socket.
    ///
    /// # Panics
    /// When the broker does not answer with JSON.
    pub fn status(&self) -> Value {
        match ask_status(self.runtime_dir()) {
            Ok(status) => status,
            Err(error) => panic!("no status: {error}"),
        }
    }

    /// The part of the status that is about one upstream.
    ///
    /// # Panics
    /// When there is no such upstream.
    pub fn upstream_status(&self, name: &str) -> Value {
        upstream_in(&self.status(), name).clone()
    }

    /// Polls the status until `condition` holds, and returns that status.
    ///
    /// # Panics
    /// When [`PATIENCE`] runs out.
    pub fn wait_until(&self, condition: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = poll_for(PATIENCE, || {
            last = self.status();
            condition(&last).then(|| last.clone())
        });
        match found {
            Some(status) => status,
            None => panic!("the status never became as expected: {last:#}"),
        }
    }

    /// Polls one upstream's part of the status until `condition` holds, and returns it.
    ///
    /// # Panics
    /// When [`PATIENCE`] runs out.
    pub fn wait_until_upstream(&self, name: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let status = self.wait_until(|status| condition(upstream_in(status, name)));
        upstream_in(&status, name).clone()
    }

    /// Checks both sums of the accounting for every upstream of `status`.
    ///
    /// # Panics
    /// When one is not equal.
    pub fn assert_sums(&self, status: &Value) {
        for upstream in list(status, "upstreams") {
            let one_way = ["sent", "dropped", "expired", "queued"];
            let requests = ["replied", "timed_out", "refused", "failed", "in_flight"];
            for (whole, parts) in [("accepted", &one_way[..]), ("requests", &requests[..])] {
                let sum: u64 = parts.iter().map(|part| total(upstream, part)).sum();
                assert_eq!(
                    total(upstream, whole),
                    sum,
                    "{whole} is not the sum of {parts:?}: {upstream:#}"
                );
            }
            assert!(
                total(upstream, "in_doubt") <= total(upstream, "sent"),
                "more in doubt than sent: {upstream:#}"
            );
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.rustix_pid(), signal).expect("the broker runs");
    }

    /// Makes it stand still, so that things can happen at once from its point of view.
    ///
    /// # Panics
    /// When it does not stop.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
        wait_for("the broker stands still", || {
            let stat = self.proc_file("stat");
            let (_, fields) = stat.rsplit_once(") ").expect("stat names the command");
            fields.starts_with('T').then_some(())
        });
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Panics
    /// When it has not ended after 20 seconds.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Waits for the end of the process, which something else brings about.
    ///
    /// # Panics
    /// When it has not ended after 20 seconds.
    pub fn wait(&mut self) -> ExitStatus {
        match wait_for_exit(&mut self.child, TERMINATION_PATIENCE) {
            Some(status) => status,
            None => panic!("the broker did not end within {TERMINATION_PATIENCE:?}"),
        }
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// SIGKILL, and reaps it.
    pub fn kill(&mut self) {
        end(&mut self.child);
    }

    /// Starts the broker again, after [`Broker::terminate`] or [`Broker::kill`], with the same
    /// directory and arguments.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn restart(&mut self) {
        assert!(!self.is_running(), "the broker still runs");
        self.child = self.launch.spawn();
        self.wait_until_ready();
    }

    /// Resident memory in bytes.
    pub fn rss_bytes(&self) -> u64 {
        let status = self.proc_file("status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("a running process has VmRSS");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("VmRSS is a number");
        kib * 1024
    }

    /// Open descriptors.
    pub fn fd_count(&self) -> usize {
        fs::read_dir(self.proc_path("fd")).expect("the broker runs").count()
    }

    /// How many descriptors its epoll instances watch (proc_pid_fdinfo(5)).
    pub fn watched_count(&self) -> usize {
        let infos = fs::read_dir(self.proc_path("fdinfo")).expect("the broker runs");
        // What it closes meanwhile has none.
        let infos = infos.filter_map(|info| fs::read_to_string(info.ok()?.path()).ok());
        infos.map(|info| info.lines().filter(|line| line.starts_with("tfd:")).count()).sum()
    }

    /// Threads.
    pub fn thread_count(&self) -> usize {
        fs::read_dir(self.proc_path("task")).expect("the broker runs").count()
    }

    /// Processor time used so far, user and system.
    pub fn cpu_time(&self) -> Duration {
        let stat = self.proc_file("stat");
        // The command's name may hold anything, also blanks and parentheses: proc_pid_stat(5).
        let (_, fields) = stat.rsplit_once(')').expect("stat names the command");
        let mut fields = fields.split_whitespace().skip(11);
        let mut ticks = || -> u64 {
            let field = fields.next().expect("stat has utime and stime");
            field.parse().expect("times are numbers")
        };
        let ticks = ticks() + ticks();
        Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
    }

    fn wait_until_ready(&mut self) {
        let mut exit = None;
        let ready = poll_for(PATIENCE, || {
            exit = self.child.try_wait().expect("a child can be waited for");
            let answered = || ask_status(self.runtime_dir()).is_ok();
            (exit.is_some() || answered()).then_some(())
        });
        match (ready, exit) {
            (Some(()), None) => {}
            (_, Some(status)) => panic!("the broker ended at once, {status}:\n{}", self.stderr()),
            (None, None) => panic!("the broker never answered:\n{}", self.stderr()),
        }
    }

    fn rustix_pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn proc_path(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.pid()))
    }

    fn proc_file(&self, file: &str) -> String {
        fs::read_to_string(self.proc_path(file)).expect("the broker runs")
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        end(&mut self.child);
        if thread::panicking() {
            eprintln!("---- the broker's standard error ----\n{}", self.stderr());
        }
    }
}

/// A number of the status, or the sum of an object of numbers by reason.
///
/// # Panics
/// When the field is missing or is neither.
pub fn total(object: &Value, field: &str) -> u64 {
    let value = &object[field];
    match (value.as_u64(), value.as_object()) {
        (Some(number), _) => number,
        (None, Some(by_reason)) => by_reason
            .values()
            .map(|count| count.as_u64().expect("a count by reason is a number"))
            .sum(),
        (None, None) => panic!("the status has no figure {field:?}: {object:#}"),
    }
}

/// The count of one reason in a field of counts by reason; 0 where the reason did not occur.
pub fn count_of(object: &Value, field: &str, reason: &str) -> u64 {
    object[field][reason].as_u64().unwrap_or(0)
}

/// A list of the status.
///
/// # Panics
/// When the field is missing or is none.
pub fn list<'a>(object: &'a Value, field: &str) -> &'a [Value] {
    match object[field].as_array() {
        Some(array) => array,
        None => panic!("the status has no list {field:?}: {object:#}"),
    }
}

/// The part of `status` about one upstream.
///
/// # Panics
/// When there is no such upstream.
pub fn upstream_in<'a>(status: &'a Value, name: &str) -> &'a Value {
    let upstreams = list(status, "upstreams");
    let found = upstreams.iter().find(|upstream| upstream["name"] == name);
    found.unwrap_or_else(|| panic!("no upstream {name:?} in the status: {status:#}"))
}

/// The part of `status` about the listener of that kind and upstream.
///
/// # Panics
/// When there is no such listener.
pub fn listener_in<'a>(status: &'a Value, kind: &str, upstream: &str) -> &'a Value {
    let listeners = list(status, "listeners");
    let found = listeners
        .iter()
        .find(|listener| listener["kind"] == kind && listener["upstream"] == upstream);
    found.unwrap_or_else(|| panic!("no {kind} listener of {upstream:?}: {status:#}"))
}

/// How to start a broker, any number of times, and the directory in which it lives.
#[derive(Debug)]
struct Launch {
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    shell: Vec<String>,
    runtime_dir: PathBuf,
    home: TempDir,
}

impl Launch {
    fn new(builder: Builder) -> Launch {
        // A short path: the address of a Unix socket has at most 107 bytes.
        let home = tempfile::Builder::new()
            .prefix("pb")
            .tempdir_in("/tmp")
            .expect("/tmp can be written to");
        let mut args = builder.args;
        if let Some(toml) = builder.config {
            let path = home.path().join("config.toml");
            fs::write(&path, toml).expect("a fresh directory can be written to");
            args.push("--config".into());
            args.push(path.into_os_string());
        }
        let runtime_dir = builder.runtime_dir.unwrap_or_else(|| home.path().join("run"));
        Launch { args, env: builder.env, shell: builder.shell, runtime_dir, home }
    }

    fn spawn(&self) -> Child {
        let mut command = match self.shell.is_empty() {
            true => Command::new(poolbroker_binary()),
            false => {
                let prelude = self.shell.join(" && ");
                let mut shell = Command::new("sh");
                shell
                    .args(["-c", &format!("{prelude} && exec \"$0\" \"$@\"")])
                    .arg(poolbroker_binary());
                shell
            }
        };
        command
            .arg("serve")
            .arg("--runtime-dir")
            .arg(&self.runtime_dir)
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(self.log_file("stdout"))
            .stderr(self.log_file("stderr"));
        command.spawn().expect("the broker's executable starts")
    }

    fn log_file(&self, name: &str) -> File {
        File::options()
            .create(true)
            .append(true)
            .open(self.home.path().join(name))
            .expect("a fresh directory can be written to")
    }

    fn stderr(&self) -> String {
        let bytes = fs::read(self.home.path().join("stderr")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn ask_status(runtime_dir: &Path) -> io::Result<Value> {
    let mut socket = UnixStream::connect(runtime_dir.join("admin.sock"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(b"status\n")?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}

fn wait_for_exit(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    poll_for(patience, || child.try_wait().expect("a child can be waited for"))
}

fn end(child: &mut Child) {
    // Both fail only when it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// Waits until a child process ends, with a deadline.
///
/// # Panics
/// When [`PATIENCE`] runs out.
pub fn wait_for_child(child: &mut Child) -> ExitStatus {
    wait_for("a child process ends", || child.try_wait().expect("a child can be waited for"))
}

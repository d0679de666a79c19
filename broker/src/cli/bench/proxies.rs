//! What others put between clients and a backend, for `bench requests`: haproxy and nginx pass a
//! stream on, nutcracker (twemproxy) shares one connection to a Redis; `bare` shares one, too, and
//! does nothing else ([`super::bare`]). Each listens on a Unix socket, like our broker, with one
//! thread.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use super::clock::CpuClock;
use crate::cli::exit::CommandError;
use crate::config::{BENCH_POLL_INTERVAL, CHILD_BROKER_TIMEOUT};

/// Where a system's programs are that are no one's commands.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/local/sbin", "/usr/bin", "/usr/local/bin"];

/// Where nginx may have its module for streams, if it is not built in.
const STREAM_MODULES: [&str; 2] = [
    "/usr/lib/nginx/modules/ngx_stream_module.so",
    "/usr/lib64/nginx/modules/ngx_stream_module.so",
];

/// A program that passes requests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Proxy {
    Bare,
    Haproxy,
    Nginx,
    Nutcracker,
}

impl Proxy {
    /// Those that serve for the whole run.
    pub const LASTING: [Proxy; 3] = [Proxy::Haproxy, Proxy::Nginx, Proxy::Nutcracker];

    /// The name of the program.
    pub const fn name(self) -> &'static str {
        match self {
            Proxy::Bare => "bare",
            Proxy::Haproxy => "haproxy",
            Proxy::Nginx => "nginx",
            Proxy::Nutcracker => "nutcracker",
        }
    }

    /// The program, if it is installed.
    fn program(self) -> Option<PathBuf> {
        match self {
            Proxy::Bare => std::env::current_exe().ok(),
            Proxy::Haproxy | Proxy::Nginx | Proxy::Nutcracker => installed(self.name()),
        }
    }

    fn configuration(self, socket: &Path, home: &Path, backend: SocketAddr) -> String {
        let (socket, home) = (socket.display(), home.display());
        match self {
            Proxy::Bare => String::new(),
            Proxy::Haproxy => format!(
                "global\n  nbthread 1\n  maxconn 4000\ndefaults\n  mode tcp\n  maxconn 4000\n  \
                 timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
                 listen bench\n  bind unix@{socket} backlog 4096\n  server backend {backend}\n"
            ),
            Proxy::Nginx => {
                let module = STREAM_MODULES.iter().find(|path| Path::new(path).exists());
                let module = module.map_or(String::new(), |path| format!("load_module {path};\n"));
                format!(
                    "{module}daemon off;\nmaster_process off;\npid {home}/nginx.pid;\n\
                     error_log stderr crit;\nevents {{ worker_connections 8192; }}\n\
                     stream {{ server {{ listen unix:{socket} backlog=4096; \
                     proxy_pass {backend}; }} }}\n"
                )
            }
            Proxy::Nutcracker => format!(
                "bench:\n  listen: {socket}\n  redis: true\n  server_connections: 1\n  \
                 backlog: 4096\n  servers:\n   - {backend}:1\n"
            ),
        }
    }

    fn arguments(
        self,
        file: &Path,
        socket: &Path,
        backend: SocketAddr,
    ) -> Result<Vec<String>, CommandError> {
        let file = file.display().to_string();
        let (socket, backend) = (socket.display().to_string(), backend.to_string());
        let words: &[&str] = match self {
            Proxy::Bare => &["bench-bare", &socket, &backend],
            Proxy::Haproxy => &["-db", "-f", &file],
            Proxy::Nginx => &["-c", &file],
            Proxy::Nutcracker => {
                // It insists on a port for its statistics.
                let port = free_address()?.port().to_string();
                let words = ["-c", &file, "-a", "127.0.0.1", "-s", &port, "-v", "2"];
                return Ok(words.map(str::to_owned).to_vec());
            }
        };
        Ok(words.iter().map(|word| (*word).to_owned()).collect())
    }
}

/// A process that the benchmark started; killed when it is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pub cpu: CpuClock,
}

impl Server {
    /// Starts a program, whose words go to a file.
    pub fn start(program: &Path, arguments: &[String], log: &Path) -> Result<Self, CommandError> {
        let failed =
            |error| CommandError::failed(format!("{} cannot be run: {error}", program.display()));
        let words = File::create(log).map_err(failed)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(words.try_clone().map_err(failed)?);
        let child = command.stderr(words).spawn().map_err(failed)?;
        let cpu = CpuClock::of(&child)?;
        Ok(Server { child, cpu })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has nothing of its own to put away.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address that nothing listens on.
pub fn free_address() -> Result<SocketAddr, CommandError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    listener
        .and_then(|listener| listener.local_addr())
        .map_err(|error| CommandError::failed(format!("no port is free: {error}")))
}

/// The program of that name, if it is installed.
pub fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(DIRECTORIES.map(PathBuf::from));
    directories.map(|directory| directory.join(name)).find(|program| program.is_file())
}

/// Starts a proxy in front of `backend`; none: it is not installed. Returns where it listens.
pub fn start(
    proxy: Proxy,
    home: &Path,
    name: &str,
    backend: SocketAddr,
) -> Result<Option<(Server, PathBuf)>, CommandError> {
    let Some(program) = proxy.program() else { return Ok(None) };
    let name = format!("{}-{name}", proxy.name());
    let (socket, file) = (home.join(format!("{name}.sock")), home.join(format!("{name}.conf")));
    let failed = |error| CommandError::failed(format!("{}: {error}", file.display()));
    fs::write(&file, proxy.configuration(&socket, home, backend)).map_err(failed)?;
    let log = home.join(format!("{name}.log"));
    let arguments = proxy.arguments(&file, &socket, backend)?;
    let mut server = Server::start(&program, &arguments, &log)?;
    let start = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        let ended = server.child.try_wait().ok().flatten();
        if ended.is_some() || start.elapsed() > CHILD_BROKER_TIMEOUT {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let said = said.lines().last().unwrap_or("it said nothing").to_owned();
            return Err(CommandError::failed(format!("{} does not serve: {said}", proxy.name())));
        }
        thread::sleep(BENCH_POLL_INTERVAL);
    }
    Ok(Some((server, socket)))
}

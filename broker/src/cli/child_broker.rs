//! A broker of one's own: a child process in a temporary directory, for commands that show or
//! measure a broker without touching the one that is running.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use poolbroker_client::{Client, Transport};
use poolbroker_proto::runtime_dir::RuntimeDir;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::exit::CommandError;
use crate::config::CHILD_BROKER_TIMEOUT;

const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// The broker process; killed when it is dropped without having been ended.
#[derive(Debug)]
pub struct ChildBroker {
    child: Child,
    executable: PathBuf,
    runtime_dir: RuntimeDir,
    home: TempDir,
}

impl ChildBroker {
    /// Makes the directory and starts `poolbroker serve` in it; `arguments` gets the directory and
    /// tells the further arguments.
    pub fn start<A: AsRef<OsStr>>(
        arguments: impl FnOnce(&Path) -> Result<Vec<A>, CommandError>,
    ) -> Result<Self, CommandError> {
        let home = tempfile::Builder::new().prefix("poolbroker-").tempdir();
        let home = home.map_err(failed("a temporary directory"))?;
        let runtime_dir = RuntimeDir::resolve(Some(home.path()));
        let runtime_dir = runtime_dir.map_err(|error| CommandError::failed(error.to_string()))?;
        let executable = std::env::current_exe().map_err(failed("this program's own path"))?;
        let mut command = Command::new(&executable);
        command.arg("--runtime-dir").arg(home.path()).args(["serve", "--log", "warn"]);
        command.args(arguments(home.path())?);
        let child = command.spawn().map_err(failed("the broker"))?;
        Ok(ChildBroker { child, executable, runtime_dir, home })
    }

    /// Connects to it once it is there.
    pub fn connect(&mut self, transport: Transport) -> Result<Client, CommandError> {
        let start = Instant::now();
        loop {
            let error = match Client::connect_in_with(self.runtime_dir.path(), transport) {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            if let Some(status) = self.child.try_wait().map_err(failed("the broker"))? {
                return Err(CommandError::failed(format!("the broker ended with {status}")));
            }
            if start.elapsed() > CHILD_BROKER_TIMEOUT {
                return Err(error.into());
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// The process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// This program.
    pub fn executable(&self) -> &Path {
        &self.executable
    }

    /// Where it listens.
    pub fn runtime_dir(&self) -> &RuntimeDir {
        &self.runtime_dir
    }

    /// The directory, which is removed with this.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Ends it by SIGTERM, which must end in order.
    pub fn end(mut self) -> Result<(), CommandError> {
        let failed = failed("the broker");
        kill_process(Pid::from_child(&self.child), Signal::TERM)
            .map_err(|error| failed(error.into()))?;
        let start = Instant::now();
        let ended = loop {
            match self.child.try_wait().map_err(&failed)? {
                None if start.elapsed() < CHILD_BROKER_TIMEOUT => thread::sleep(POLL_INTERVAL),
                ended => break ended,
            }
        };
        match ended {
            Some(status) if status.success() => Ok(()),
            status => Err(CommandError::failed(format!(
                "the broker did not end with 0 at SIGTERM but with {status:?}"
            ))),
        }
    }
}

impl Drop for ChildBroker {
    fn drop(&mut self) {
        // After `end` both fail, which is as it should be.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> CommandError {
    move |error| CommandError::failed(format!("{what}: {error}"))
}

//! strace(1) attached to a broker: answers some of its system calls itself, or kills it at one.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Command, Stdio};

use crate::Broker;

/// An strace that is attached to a broker.
#[derive(Debug)]
pub struct Strace {
    child: Child,
    output: BufReader<ChildStderr>,
}

impl Strace {
    /// Attaches it; `injection` is what stands behind `-e inject=`, and its call is what is traced.
    ///
    /// # Panics
    /// When strace cannot be run or attached.
    pub fn attach(broker: &Broker, injection: &str) -> Strace {
        let (call, _) =
            injection.split_once(':').expect("strace is installed and may trace the broker");
        let mut command = Command::new("strace");
        command.args(["-f", "-e", &format!("trace={call}"), "-e", &format!("inject={injection}")]);
        command.args(["-p", &broker.pid().to_string()]).stderr(Stdio::piped());
        let mut child = command.spawn().expect("strace is installed and may trace the broker");
        let mut output = BufReader::new(
            child.stderr.take().expect("strace is installed and may trace the broker"),
        );
        // "Process 7 attached with 5 threads".
        let mut line = String::new();
        while !line.contains("attached") {
            line.clear();
            assert!(
                output.read_line(&mut line).expect("strace is installed and may trace the broker")
                    > 0,
                "strace has ended"
            );
        }
        Strace { child, output }
    }

    /// Takes it away; what it has seen.
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn detach(mut self) -> String {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-INT", &pid])
                .status()
                .expect("strace is installed and may trace the broker")
                .success()
        );
        let mut calls = String::new();
        self.output
            .read_to_string(&mut calls)
            .expect("strace is installed and may trace the broker");
        self.child.wait().expect("strace is installed and may trace the broker");
        calls
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Wrong use teaches: each error says what, which name, and what to do, with the right exit code.
//!
//! Here with a broker that answers, or that will not start; what the commands find out by
//! themselves is tested beside them, in broker/tests/command_line.rs.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use poolbroker_tests::Broker;
use poolbroker_tests::binary::poolbroker_binary;
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::peers::{TcpEcho, UdpSink};

const FAILED: i32 = 1;
const USAGE: i32 = 2;
const NO_BROKER: i32 = 3;

/// Any user without privilege: `nobody`.
const NOBODY: u32 = 65_534;

#[test]
fn an_unknown_upstream_is_named_and_the_known_ones_listed() {
    let (_sink, broker) = broker();
    for args in [&["send", "metrix", "x"][..], &["request", "metrix", "x"], &["pipe", "metrix"]] {
        let output = broker.command(args[0]).args(&args[1..]).output().unwrap();
        expect(&output, FAILED, &["unknown upstream \"metrix\"", "there are: metrics"]);
    }
}

#[test]
fn a_request_to_a_write_only_upstream_is_explained() {
    let (_sink, broker) = broker();
    let output = broker.command("request").args(["metrics", "x"]).output().unwrap();
    expect(&output, FAILED, &["metrics", "write-only"]);
}

#[test]
fn a_user_without_permission_is_told_which_file_is_closed_to_him() {
    let (_sink, broker) = broker();
    let (program, args) = (poolbroker_binary(), ["send", "metrics", "x", "--runtime-dir"]);
    let place = tempfile::tempdir_in("/tmp").unwrap();
    let mut command = match rustix::process::geteuid().is_root() {
        true => {
            // Where another user can execute it, whatever the directory of the build allows.
            let copy = place.path().join("poolbroker");
            fs::copy(program, &copy).unwrap();
            fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
            let mut command = Command::new(copy);
            command.uid(NOBODY).gid(NOBODY).current_dir("/");
            command
        }
        false => {
            let socket = broker.runtime_dir().join("broker.sock");
            fs::set_permissions(socket, fs::Permissions::from_mode(0o0)).unwrap();
            Command::new(program)
        }
    };
    command.args(args).arg(broker.runtime_dir());
    // A child that another test is just starting may still hold the copy open for writing.
    let output = wait_for("the copy can be executed", || match command.output() {
        Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => None,
        output => Some(output.unwrap()),
    });
    let socket = broker.runtime_dir().join("broker.sock");
    expect(&output, FAILED, &[socket.to_str().unwrap(), "may not connect"]);
}

#[test]
fn a_broker_that_was_killed_is_no_broker() {
    let (_sink, mut broker) = broker();
    broker.kill();
    let dir = broker.runtime_dir().to_str().unwrap();
    for args in [&["status"][..], &["request", "metrics", "x"]] {
        let output = broker.command(args[0]).args(&args[1..]).output().unwrap();
        expect(&output, NO_BROKER, &[dir, "poolbroker serve"]);
    }
}

#[test]
fn serving_nothing_is_refused() {
    let (exit, stderr) = Broker::builder().start_expecting_failure();
    assert_eq!(exit.code(), Some(USAGE), "{stderr}");
    assert!(stderr.contains("--upstream"), "{stderr}");
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let file = tempfile::NamedTempFile::new_in("/tmp").unwrap();
    let dir = file.path().join("run");
    let (exit, stderr) = Broker::builder()
        .runtime_dir(&dir)
        .upstream("unused", "tcp://127.0.0.1:9")
        .start_expecting_failure();
    assert!(!exit.success(), "{stderr}");
    assert!(stderr.contains(dir.to_str().unwrap()), "{stderr}");
}

#[test]
fn no_colour_reaches_a_file() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    for args in [&["status"][..], &["request", "echo", "x"], &["send", "nope", "x"]] {
        let output = broker.command(args[0]).args(&args[1..]).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(!said.is_empty() && !said.contains(&0x1b), "{args:?}");
    }
}

fn broker() -> (UdpSink, Broker) {
    let sink = UdpSink::start();
    let broker = Broker::start(&[format!("metrics={}", sink.url_write_only())]);
    (sink, broker)
}

fn expect(output: &Output, code: i32, says: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(output.stdout, b"", "errors go to standard error");
    for says in says {
        assert!(stderr.contains(says), "{says:?} is not in {stderr}");
    }
}

//! What the command line promises where no broker is needed: help that teaches, errors that name
//! what is wrong and what to do, exit codes.

#![allow(clippy::unwrap_used, reason = "a step that fails fails its test")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

const SUB_COMMANDS: [&str; 11] = [
    "serve",
    "send",
    "request",
    "pipe",
    "status",
    "check",
    "demo",
    "bench",
    "bench one-way",
    "bench ring",
    "bench idle",
];

fn poolbroker<A: AsRef<OsStr>>(arguments: &[A]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_poolbroker"));
    command.args(arguments).stdin(Stdio::null());
    command.env_remove("XDG_RUNTIME_DIR").output().unwrap()
}

#[track_caller]
fn refused<A: AsRef<OsStr>>(arguments: &[A], exit: i32, says: &[&str]) {
    let output = poolbroker(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(exit), "{stderr}");
    assert!(stderr.starts_with("poolbroker: "), "{stderr}");
    for part in says {
        assert!(stderr.contains(part), "{part:?} is missing in: {stderr}");
    }
    assert!(output.stdout.is_empty(), "errors go to standard error alone");
}

fn empty_dir() -> (TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    (dir, path)
}

fn file(text: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pb.toml");
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

/// A FIFO that somebody reads: opened for both, so that no writer has to be waited for (fifo(7)).
fn fifo_with_reader(path: &Path) -> File {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn every_help_shows_examples_and_exit_codes() {
    let mut helps = vec![("", "--help"), ("", "-h")];
    for sub in SUB_COMMANDS {
        helps.extend([(sub, "--help"), (sub, "-h")]);
    }
    for (sub, option) in helps {
        let arguments = sub.split_whitespace().chain([option]);
        let output = poolbroker(&arguments.collect::<Vec<_>>());
        let help = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{sub} {option}");
        let (_, examples) = help.split_once("\nExamples:\n").unwrap();
        assert!(examples.contains(&format!("poolbroker {sub}")), "{sub} {option}: {help}");
        assert!(examples.contains("\n  5  in doubt"), "{sub} {option}: {help}");
    }
}

#[test]
fn the_help_of_serve_lists_every_section_of_limits_with_defaults() {
    let help = String::from_utf8(poolbroker(&["serve", "--help"]).stdout).unwrap();
    for line in [
        "  [upstream.NAME]",
        "    connections_max = 8  (from 1 to 10000 connections)",
        "    connect_timeout = \"5s\"  (from 1ms to 10m)",
        "  [limits]",
        "    drain_timeout = \"10s\"  (from 0s to 1h)",
        "  [dynamic]",
    ] {
        assert!(help.lines().any(|shown| shown == line), "{line:?} is missing in: {help}");
    }
}

#[test]
fn a_reader_that_left_is_no_error() {
    let (_home, path) = file("[upstream.a]\nurl = \"tcp://127.0.0.1:1\"\n");
    let check = ["check".as_ref(), path.as_os_str()];
    for arguments in [check.as_slice(), &["serve".as_ref(), "--help".as_ref()]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_poolbroker"));
        command.args(arguments).stdout(writer).stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn wrong_usage_is_exit_2_and_teaches() {
    let (_home, dir) = empty_dir();
    let dir = dir.as_str();
    refused::<&str>(&[], 2, &["Usage: poolbroker"]);
    refused(&["sned"], 2, &["'sned'", "send"]);
    refused(&["send"], 2, &["<UPSTREAM>"]);
    refused(&["request", "cache"], 2, &["<MESSAGE>"]);
    refused(&["send", "Cache", "x"], 2, &["\"Cache\"", "lower-case"]);
    refused(&["send", "tcp://127.0.0.1:1", "x"], 2, &["tcp://127.0.0.1:1", "lower-case"]);
    refused(&["send", "admin", "x"], 2, &["the broker's own"]);
    refused(&["send", "a", "x", "--via", "mq"], 2, &["unix, ring, pipe, fifo"]);
    refused(&["send", "a", "x", "--timeout", "5"], 2, &["500ms, 30s or 10m"]);
    refused(&["send", "a", "x", "--timeout", "0s"], 2, &["more than 0s"]);
    refused(&["request", "a", "x", "--timeout", "99999999999years"], 2, &["--timeout"]);
    refused(&["check"], 2, &["<FILE>"]);
    refused(&["status", "--runtime-dir"], 2, &["--runtime-dir"]);
    refused(&["serve", "--runtime-dir", dir, "--log", "loud"], 2, &["error, warn, info"]);
    refused(
        &["serve", "--runtime-dir", dir],
        2,
        &["no upstream is configured", "--upstream metrics=udp-write-only://"],
    );
}

#[test]
fn a_wrong_upstream_on_the_command_line_says_what_would_be_right() {
    let (_home, dir) = empty_dir();
    for (upstream, says) in [
        ("metrics", "is not NAME=URL; for example metrics="),
        ("Metrics=udp://127.0.0.1:1", "lower-case"),
        ("a=http://127.0.0.1:80", "unknown scheme \"http\"; there are: tcp, udp, udp-write-only"),
        (
            "a=tcp://127.0.0.1",
            "the port of \"127.0.0.1\" is missing; for example tcp://127.0.0.1:6379",
        ),
        ("a=tcp://127.0.0.1:65536", "\"65536\" is no number from 1 to 65535"),
        ("a=tcp://127.0.0.1:0", "\"0\" is no number from 1 to 65535"),
        ("a=tcp://127.0.0.1:80?framing=line", "there are: lines, crlf"),
        ("a=tcp://::1:80", "in brackets: [::1]"),
    ] {
        let arguments = ["serve", "--runtime-dir", &dir, "--upstream", upstream];
        refused(&arguments, 2, &["--upstream: ", says]);
    }
    let twice = ["--upstream", "a=udp://127.0.0.1:1", "--upstream", "a=udp://127.0.0.1:2"];
    let arguments = [["serve", "--runtime-dir", &dir].as_slice(), &twice].concat();
    refused(&arguments, 2, &["--upstream: a: this upstream is configured already"]);
}

#[test]
fn without_a_broker_the_socket_and_the_remedy_are_named() {
    let (_home, dir) = empty_dir();
    let client = format!("{dir}/broker.sock");
    let remedy = format!("poolbroker serve --runtime-dir {dir}");
    for arguments in [
        vec!["send", "metrics", "x"],
        vec!["send", "metrics"],
        vec!["send", "metrics", "x", "--via", "pipe"],
        vec!["request", "metrics", "x"],
        vec!["request", "metrics", "-"],
        vec!["pipe", "metrics"],
    ] {
        let arguments = [arguments.as_slice(), &["--runtime-dir", &dir]].concat();
        refused(&arguments, 3, &[&client, &remedy]);
    }
    let admin = format!("{dir}/admin.sock");
    refused(&["--runtime-dir", &dir, "status"], 3, &[&admin, &remedy]);
    refused(&["status", "--json", "--runtime-dir", &dir], 3, &[&admin, &remedy]);
    let fifo = format!("{dir}/metrics.fifo");
    let arguments = ["send", "metrics", "x", "--via", "fifo", "--runtime-dir", &dir];
    refused(&arguments, 3, &[&fifo, "no broker serves this directory"]);
}

#[test]
fn a_socket_that_a_dead_broker_left_is_no_broker() {
    let (home, dir) = empty_dir();
    for name in ["broker.sock", "admin.sock"] {
        drop(std::os::unix::net::UnixListener::bind(home.path().join(name)).unwrap());
    }
    refused(&["status", "--runtime-dir", &dir], 3, &["no broker listens on"]);
    refused(&["send", "a", "x", "--runtime-dir", &dir], 3, &["no broker listens on"]);
}

#[test]
fn a_path_that_no_socket_can_have_is_refused_before_anything_else() {
    let long = format!("/tmp/{}", "x".repeat(120));
    for arguments in
        [vec!["status"], vec!["send", "a", "x"], vec!["serve", "--upstream", "a=udp://127.0.0.1:1"]]
    {
        let arguments = [arguments.as_slice(), &["--runtime-dir", &long]].concat();
        refused(&arguments, 2, &["at most 107", "choose a shorter runtime directory"]);
    }
}

#[test]
fn without_any_runtime_directory_the_option_is_named() {
    if rustix::process::geteuid().is_root() {
        return; // Root has one in any case: /run/poolbroker.
    }
    let says = ["XDG_RUNTIME_DIR is not set", "--runtime-dir DIR"];
    refused(&["status"], 2, &says);
}

#[test]
fn a_fifo_path_with_something_else_is_never_written() {
    let (home, dir) = empty_dir();
    let fifo = home.path().join("metrics.fifo");
    let arguments = ["send", "metrics", "x", "--via", "fifo", "--runtime-dir", &dir];
    std::fs::write(&fifo, "kept").unwrap();
    refused(&arguments, 1, &["is not a FIFO, so nothing was written"]);
    assert_eq!(std::fs::read_to_string(&fifo).unwrap(), "kept");
    std::fs::remove_file(&fifo).unwrap();
    let elsewhere = home.path().join("elsewhere");
    let _reader = fifo_with_reader(&elsewhere);
    std::os::unix::fs::symlink(elsewhere, &fifo).unwrap();
    refused(&arguments, 1, &["is not a FIFO"]);
}

#[test]
fn a_fifo_takes_each_line_in_one_piece_and_refuses_longer_ones() {
    let (home, dir) = empty_dir();
    let fifo = home.path().join("metrics.fifo");
    drop(fifo_with_reader(&fifo));
    let send = ["send", "metrics", "--via", "fifo", "--runtime-dir", &dir];
    refused(&[send.as_slice(), &["x"]].concat(), 3, &["no broker reads", "poolbroker serve"]);

    std::fs::remove_file(&fifo).unwrap();
    let mut reader = fifo_with_reader(&fifo);
    let lines = format!("one\n\n{}\n{}\nlast", "x".repeat(4_095), "y".repeat(4_096));
    let input = home.path().join("input");
    std::fs::write(&input, lines).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_poolbroker"));
    command.args(send).stdin(File::open(&input).unwrap());
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("2 messages refused"), "{stderr}");
    let mut taken = vec![0; 65_536];
    let read = reader.read(&mut taken).unwrap();
    let expected = format!("one\n{}\nlast\n", "x".repeat(4_095));
    assert_eq!(&taken[..read], expected.as_bytes());

    let two_lines = [send.as_slice(), &["a\nFORGED"]].concat();
    refused(&two_lines, 1, &["contains a newline"]);
}

#[test]
fn a_configuration_is_checked_and_its_limits_are_printed() {
    let (_home, path) =
        file("[upstream.cache]\nurl = \"tcp://127.0.0.1:6379\"\nconnections_max = 3\n");
    let output = poolbroker(&["check".as_ref(), path.as_os_str()]);
    let shown = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{shown}");
    assert!(shown.starts_with("[upstream.cache] tcp://127.0.0.1:6379"), "{shown}");
    assert!(shown.contains("connections_max"), "{shown}");
    assert!(!shown.contains('\x1b'), "no colour into a pipe");
}

#[test]
fn a_bad_configuration_names_file_line_and_key() {
    let with_url = |line: &str| format!("[upstream.a]\nurl = \"tcp://127.0.0.1:1\"\n{line}\n");
    for (text, says) in [
        (with_url("conections_max = 1"), ":3: upstream.a: unknown key \"conections_max\""),
        (with_url("connections_max = \"1\""), ":3: upstream.a.connections_max: must be a whole"),
        (
            with_url("connections_max = -1"),
            ":3: upstream.a.connections_max: -1 is out of range: from 1 to 10000",
        ),
        (with_url("connections_max = 99999999999999999999"), ":3: upstream.a.connections_max: "),
        (with_url("connections_max = 0"), ":3: upstream.a.connections_max: 0 is out of range"),
        (with_url("connections_min = 9"), ":3: upstream.a.connections_min: 9 is more than"),
        (with_url("idle_timeout = \"soon\""), ":3: upstream.a.idle_timeout: must be a duration"),
        (with_url("fifo = { framing = \"raw\" }"), ":3: upstream.a.fifo.framing: raw marks no end"),
        (with_url("[upstream.a]"), ":3: not TOML: duplicate key"),
        ("[upstream.a]\n".into(), ":1: upstream.a.url: is missing"),
        ("\n[upstream.a]\nurl = \"ftp://x:1\"".into(), ":3: upstream.a.url: \"ftp://x:1\""),
        ("[upstream.a]\nurl = \"tcp://x:70000\"".into(), ":2: upstream.a.url: "),
        ("[upstream.broker]\nurl = \"tcp://x:1\"".into(), ":1: upstream.broker: "),
        (
            "[limits]\nfifo_record_bytes_max = 2\n".into(),
            ":2: limits.fifo_record_bytes_max: 2 is out of range",
        ),
        ("[limit]\n".into(), ":1: unknown key \"limit\"; did you mean \"limits\"?"),
        ("url = ".into(), ":1: not TOML: "),
    ] {
        let (_home, path) = file(&text);
        let says = format!("{}{says}", path.display());
        refused(&["check".as_ref(), path.as_os_str()], 2, &[&says]);
        let (_dir_home, dir) = empty_dir();
        let serve = ["serve", "--runtime-dir", &dir, "--config"].map(OsStr::new);
        refused(&[serve.as_slice(), &[path.as_os_str()]].concat(), 2, &[&says]);
    }
}

#[test]
fn a_configuration_that_cannot_be_read_is_named() {
    refused(&["check", "/nonexistent/pb.toml"], 2, &["/nonexistent/pb.toml: cannot be read"]);
    let (_home, dir) = empty_dir();
    refused(&["check", &dir], 2, &[&dir, "cannot be read"]);
    let (_home, path) = file("");
    std::fs::write(&path, b"\n\xff").unwrap();
    refused(&["check".as_ref(), path.as_os_str()], 2, &[":2: is not UTF-8"]);
}

#[test]
fn a_message_of_any_bytes_is_an_argument() {
    let (_home, dir) = empty_dir();
    let message = OsStr::from_bytes(b"\xff\xfe");
    let arguments = ["send", "a", "--runtime-dir", &dir].map(OsStr::new);
    refused(&[arguments.as_slice(), &[message]].concat(), 3, &["no broker listens on"]);
}

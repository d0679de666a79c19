//! Starting, crashing, being alone in a directory, and many sessions.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use poolbroker_tests::Broker;
use poolbroker_tests::binary::poolbroker_binary;
use poolbroker_tests::broker::{list, wait_for_child};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::limits::raise_descriptor_limit;
use poolbroker_tests::peers::TcpEcho;
use poolbroker_tests::raw::{RawClient, ask};

const MIB: u64 = 1024 * 1024;

#[test]
fn a_second_broker_is_refused_and_the_first_not_touched() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let (exit, stderr) = Broker::builder()
        .runtime_dir(broker.runtime_dir())
        .upstream("echo", &echo.url())
        .start_expecting_failure();
    assert!(!exit.success());
    let dir = broker.runtime_dir().to_str().unwrap();
    assert!(stderr.contains(dir) && stderr.contains("another broker"), "{stderr}");
    let handle = client.open("echo");
    assert_eq!(client.request(handle, 0, b"same").reply(), b"same");
    assert_eq!(ask(broker.runtime_dir(), "echo", b"new").reply(), b"new");
}

#[test]
fn of_two_brokers_started_at_once_exactly_one_survives() {
    for _ in 0..10 {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let mut both: Vec<Child> = (0..2).map(|_| serve(dir.path())).collect();
        let loser = wait_for("one of them gives way", || {
            both.iter_mut().position(|child| child.try_wait().unwrap().is_some())
        });
        let mut winner = both.remove(1 - loser);
        let mut loser = both.remove(0);
        assert!(!wait_for_child(&mut loser).success());
        wait_for("the other one serves", || {
            assert!(winner.try_wait().unwrap().is_none(), "both gave way");
            RawClient::try_connect(dir.path()).ok()
        });
        RawClient::welcomed(dir.path());
        winner.kill().unwrap();
        winner.wait().unwrap();
    }
}

#[test]
fn a_killed_broker_starts_again_in_its_directory() {
    let echo = TcpEcho::start();
    let mut broker = Broker::start(&[format!("echo={}", echo.url())]);
    for _ in 0..20 {
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        broker.kill();
        assert_eq!(client.until_closed(), [], "its clients see the end");
        broker.restart();
        assert_eq!(ask(broker.runtime_dir(), "echo", b"again").reply(), b"again");
    }
}

#[test]
fn stale_sockets_are_replaced() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    for name in ["broker.sock", "admin.sock"] {
        drop(UnixListener::bind(dir.path().join(name)).unwrap());
    }
    let broker =
        Broker::builder().runtime_dir(dir.path()).upstream("unused", "tcp://127.0.0.1:9").start();
    RawClient::welcomed(broker.runtime_dir());
}

#[test]
fn what_stands_at_the_path_of_a_socket_and_is_none_is_refused_and_left_alone() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let path = dir.path().join("broker.sock");
    let target = dir.path().join("somebody's file");
    fs::write(&target, "precious").unwrap();
    let squat: [&dyn Fn(); 3] =
        [&|| fs::write(&path, "precious").unwrap(), &|| fs::create_dir(&path).unwrap(), &|| {
            std::os::unix::fs::symlink(&target, &path).unwrap()
        }];
    for squat in squat {
        squat();
        let before = fs::symlink_metadata(&path).unwrap().file_type();
        let (exit, stderr) = Broker::builder()
            .runtime_dir(dir.path())
            .upstream("unused", "tcp://127.0.0.1:9")
            .start_expecting_failure();
        assert!(!exit.success());
        assert!(stderr.contains(path.to_str().unwrap()), "{stderr}");
        assert_eq!(fs::symlink_metadata(&path).unwrap().file_type(), before);
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        match before.is_dir() {
            true => fs::remove_dir(&path).unwrap(),
            false => fs::remove_file(&path).unwrap(),
        }
    }
}

#[test]
fn a_thousand_idle_sessions_cost_little_memory_and_no_processor_time() {
    const SESSIONS: usize = 1000;
    raise_descriptor_limit();
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    assert_eq!(ask(broker.runtime_dir(), "echo", b"warm").reply(), b"warm");
    broker.wait_until(|status| list(status, "sessions").is_empty());
    let (memory, descriptors) = (broker.rss_bytes(), broker.fd_count());
    let sessions: Vec<_> =
        (0..SESSIONS).map(|_| RawClient::welcomed(broker.runtime_dir())).collect();
    let grown = broker.rss_bytes().saturating_sub(memory);
    assert!(grown < 5 * MIB, "{SESSIONS} idle sessions cost {grown} bytes");
    assert_eq!(broker.fd_count() - descriptors, SESSIONS, "one descriptor per idle session");
    // The smallest time the kernel accounts is a tick of 10 ms: what is idle uses none.
    let used = broker.cpu_time();
    thread::sleep(Duration::from_secs(2));
    let used = broker.cpu_time() - used;
    assert!(used <= Duration::from_millis(20), "idle for 2 s, it used {used:?}");
    drop(sessions);
    wait_for("every descriptor is closed", || (broker.fd_count() == descriptors).then_some(()));
}

#[test]
fn eight_thousand_sessions_connect_though_the_soft_limit_is_low() {
    let limit = raise_descriptor_limit();
    // Four fifths of the descriptors are for sessions; both processes hold one for each.
    let sessions = 8000.min(usize::try_from(limit).unwrap_or(usize::MAX) / 5 * 4 - 200);
    let echo = TcpEcho::start();
    let broker = Broker::builder().upstream("echo", &echo.url()).nofile_soft(256).start();
    let connected: Vec<_> =
        (0..sessions).map(|_| RawClient::welcomed(broker.runtime_dir())).collect();
    assert_eq!(list(&broker.status(), "sessions").len(), connected.len());
    let (mut last, _) = connected.into_iter().next_back().unwrap();
    let handle = last.open("echo");
    assert_eq!(last.request(handle, 0, b"the last").reply(), b"the last");
}

#[test]
fn many_clients_may_connect_at_the_same_instant() {
    const THREADS: usize = 50;
    raise_descriptor_limit();
    let broker = Broker::start(&["unused=tcp://127.0.0.1:9"]);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let open: Vec<_> =
                    (0..40).map(|_| RawClient::connect(broker.runtime_dir())).collect();
                RawClient::welcomed(broker.runtime_dir());
                drop(open);
            });
        }
    });
    broker.wait_until(|status| list(status, "sessions").is_empty());
}

#[test]
fn running_out_of_descriptors_is_survived_without_spinning() {
    let echo = TcpEcho::start();
    let broker = Broker::builder().upstream("echo", &echo.url()).nofile(64).start();
    let (mut early, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = early.open("echo");
    assert_eq!(early.request(handle, 0, b"before").reply(), b"before");
    let crowd: Vec<_> = (0..200).map(|_| RawClient::connect(broker.runtime_dir())).collect();
    assert_eq!(early.request(handle, 0, b"during").reply(), b"during");
    // A loop that spins uses all of a processor; half of one is told apart safely.
    let used = broker.cpu_time();
    thread::sleep(Duration::from_secs(1));
    let used = broker.cpu_time() - used;
    assert!(used < Duration::from_millis(500), "it used {used:?} in 1 s");
    assert!(broker.stderr().lines().count() < 50, "{}", broker.stderr());
    drop(crowd);
    wait_for("new clients are served again", || RawClient::try_welcomed(broker.runtime_dir()));
    assert_eq!(early.request(handle, 0, b"after").reply(), b"after");
}

#[test]
fn those_who_never_shake_hands_are_closed_and_others_served_meanwhile() {
    let echo = TcpEcho::start();
    let broker = Broker::builder()
        .upstream("echo", &echo.url())
        .config("[limits]\nhandshake_timeout = \"500ms\"\n")
        .start();
    let silent: Vec<UnixStream> = (0..300)
        .map(|_| UnixStream::connect(broker.runtime_dir().join("broker.sock")).unwrap())
        .collect();
    assert_eq!(ask(broker.runtime_dir(), "echo", b"served").reply(), b"served");
    // Some of them begin to say hello, and stop.
    for mut socket in silent.iter().step_by(3) {
        socket.write_all(b"12345").unwrap();
    }
    for mut socket in silent {
        socket.set_read_timeout(Some(poolbroker_tests::deadline::PATIENCE)).unwrap();
        let mut said = Vec::new();
        socket.read_to_end(&mut said).unwrap();
    }
    broker.wait_until(|status| list(status, "sessions").is_empty());
}

#[test]
fn everything_is_given_back_when_clients_leave() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    assert_eq!(ask(broker.runtime_dir(), "echo", b"warm").reply(), b"warm");
    broker.wait_until(|status| list(status, "sessions").is_empty());
    let before = (broker.fd_count(), broker.thread_count());
    for _ in 0..500 {
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("echo");
        client.send_request(handle, 1, 0, b"never read");
    }
    broker.wait_until(|status| {
        list(status, "sessions").is_empty() && status["upstreams"][0]["in_flight"] == 0
    });
    let status = broker.status();
    broker.assert_sums(&status);
    let connections = list(&status["upstreams"][0], "connections").len();
    // One connection was open before; whatever the upstream has more now is accounted for.
    wait_for("descriptors and threads are given back", || {
        let now = (broker.fd_count(), broker.thread_count());
        (now.0 < before.0 + connections && now.1 == before.1).then_some(())
    });
}

fn serve(dir: &Path) -> Child {
    Command::new(poolbroker_binary())
        .args(["serve", "--upstream", "unused=tcp://127.0.0.1:9", "--runtime-dir"])
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

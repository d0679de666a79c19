//! The client library against a real broker: what a program sees while things go well and badly.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io::{Read, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use poolbroker_client::{Client, Error, Reason, Retry, Upstream};
use poolbroker_tests::Broker;
use poolbroker_tests::broker::total;
use poolbroker_tests::deadline::{PATIENCE, wait_for};
use poolbroker_tests::peers::{Manners, TcpEcho, TcpSink, UdpSink};

#[test]
fn a_child_that_dies_loses_nothing_of_what_it_had_written() {
    let sink = TcpSink::start();
    let (_broker, logs) = open("logs", &sink.url());
    let (writer, attached) = logs.pipe().unwrap();
    let mut child = Command::new("sh")
        .args(["-c", "i=0; while :; do echo line $i; i=$((i+1)); done"])
        .stdout(writer)
        .spawn()
        .unwrap();
    sink.wait_for(500);
    child.kill().unwrap();
    child.wait().unwrap();
    let detached = attached.wait(PATIENCE).unwrap();
    assert_eq!(detached.reason, Reason::EndOfInput);
    assert_eq!(detached.outcomes.sent, detached.outcomes.accepted);
    let count = usize::try_from(detached.outcomes.sent).unwrap();
    let written = (0..count).map(|number| format!("line {number}").into_bytes());
    assert!(sink.wait_for(count).into_iter().eq(written), "order or content changed");
}

#[test]
fn a_socketpair_is_a_stream_to_the_upstream() {
    let echo = TcpEcho::start();
    let (_broker, upstream) = open("echo", &echo.url());
    let (mut stream, attached) = upstream.socketpair().unwrap();
    stream.write_all(b"one\ntwo\n").unwrap();
    let mut replies = [0; 8];
    stream.read_exact(&mut replies).unwrap();
    assert_eq!(&replies, b"one\ntwo\n");
    drop(stream);
    attached.wait(PATIENCE).unwrap();
}

#[test]
fn many_requests_in_flight_each_get_their_own_reply() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let client = Client::connect_in(broker.runtime_dir()).unwrap();
    let upstream = client.upstream("echo").unwrap();
    let mut expected: Vec<_> = (0..500)
        .map(|number| {
            let body = format!("question {number}").into_bytes();
            (upstream.submit(&body, PATIENCE).unwrap(), body)
        })
        .collect();
    while !expected.is_empty() {
        let reply = client.next_reply(PATIENCE).unwrap();
        let place = expected.iter().position(|(id, _)| *id == reply.id).unwrap();
        assert_eq!(reply.result.unwrap(), expected.remove(place).1);
    }
}

#[test]
fn flush_tells_what_became_of_each_message() {
    let sink = UdpSink::start();
    let (broker, metrics) = open("metrics", &sink.url_write_only());
    let messages = (0..50).map(|number: u32| number.to_string());
    assert_eq!(metrics.send_all(messages).unwrap(), 50);
    let outcomes = metrics.flush(PATIENCE).unwrap();
    assert_eq!((outcomes.accepted, outcomes.sent), (50, 50), "{outcomes:?}");
    assert_eq!(sink.wait_for(50).len(), 50);
    let request = metrics.request(b"?", PATIENCE).unwrap_err();
    assert_eq!(request.retry(), Retry::NotSent, "{request}");
    assert!(request.to_string().contains("write-only"), "{request}");
    assert_eq!(total(&broker.upstream_status("metrics"), "requests"), 0);
}

#[test]
fn no_call_outlives_the_broker_by_more_than_its_deadline() {
    let echo = TcpEcho::behaving(Manners::Slow(Duration::from_millis(1)));
    let mut broker = Broker::start(&[format!("echo={}", echo.url())]);
    let dir = broker.runtime_dir().to_owned();
    let done = AtomicBool::new(false);
    let (replies, errors) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let Ok(upstream) = Client::connect_in(&dir).and_then(|c| c.upstream("echo"))
                    else {
                        continue;
                    };
                    // Ends by an error when the broker dies: a call that hung would hang the test.
                    loop {
                        match upstream.request(b"x", PATIENCE) {
                            Ok(reply) => {
                                assert_eq!(reply, b"x");
                                replies.fetch_add(1, Ordering::SeqCst);
                            }
                            Err(error) => {
                                assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
                                errors.fetch_add(1, Ordering::SeqCst);
                                break;
                            }
                        }
                        if done.load(Ordering::SeqCst) {
                            return;
                        }
                    }
                }
            });
        }
        for _ in 0..10 {
            let seen = replies.load(Ordering::SeqCst);
            wait_for("requests succeed", || {
                (replies.load(Ordering::SeqCst) > seen + 20).then_some(())
            });
            broker.kill();
            broker.restart();
        }
        done.store(true, Ordering::SeqCst);
    });
    assert!(errors.load(Ordering::SeqCst) >= 10);
}

#[test]
fn after_a_shutdown_taken_and_not_taken_add_up() {
    for round in 0..5 {
        let sink = TcpSink::start();
        let (mut broker, logs) = open("logs", &sink.url());
        let handed_over = thread::scope(|scope| {
            let sender = scope.spawn(|| {
                (0..u64::MAX)
                    .find(|number| logs.send(number.to_string().as_bytes()).is_err())
                    .unwrap()
            });
            sink.wait_for(100 * (round + 1));
            assert_eq!(broker.terminate().code(), Some(0), "{}", broker.stderr());
            sender.join().unwrap()
        });
        let not_taken = logs.not_taken().expect("the broker said goodbye");
        let taken = usize::try_from(logs.handed_over() - not_taken).unwrap();
        assert!(logs.handed_over() >= handed_over);
        let written = (0..taken).map(|number| number.to_string().into_bytes());
        assert!(sink.wait_for(taken).into_iter().eq(written), "order or content changed");
    }
}

#[test]
fn errors_name_what_failed() {
    let sink = TcpSink::start();
    let (broker, logs) = open("logs", &sink.url());
    let client = Client::connect_in(broker.runtime_dir()).unwrap();
    for (error, says) in [
        (client.upstream("nope").unwrap_err(), "nope"),
        (client.upstream("No").unwrap_err(), "No"),
        (client.open("tcp://127.0.0.1:1").unwrap_err(), "tcp://127.0.0.1:1"),
        (client.open("ftp://127.0.0.1:1").unwrap_err(), "ftp"),
        (logs.send(b"").unwrap_err(), "logs"),
        (logs.send(&vec![0; 2 << 20]).unwrap_err(), "1048576"),
    ] {
        assert!(error.to_string().contains(says), "{says:?} is not in {error}");
    }
    let nowhere = Client::connect_in("/tmp/no broker here").unwrap_err();
    assert!(matches!(nowhere, Error::NoBroker { .. }), "{nowhere:?}");
}

fn open(name: &str, url: &str) -> (Broker, Upstream) {
    let broker = Broker::start(&[format!("{name}={url}")]);
    let client = Client::connect_in(broker.runtime_dir()).unwrap();
    let upstream = client.upstream(name).unwrap();
    (broker, upstream)
}

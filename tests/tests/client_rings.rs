//! The client library through rings, against a real broker that dies, stops and comes back.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::HashMap;
use std::io::Write;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use poolbroker_client::{Client, Error, Outcomes, Retry, Transport, Upstream};
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{list, total};
use poolbroker_tests::deadline::{PATIENCE, wait_for};
use poolbroker_tests::peers::{Manners, Marks, TcpEcho, UdpSink};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const SMALL: Transport = Transport::Ring { bytes: 0 };

fn client(broker: &Broker) -> Client {
    Client::connect_in_with(broker.runtime_dir(), SMALL).unwrap()
}

fn sink() -> (UdpSink, Broker, Upstream) {
    let sink = UdpSink::start();
    let broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
    let upstream = client(&broker).upstream("sink").unwrap();
    (sink, broker, upstream)
}

fn total_of(outcomes: &Outcomes) -> u64 {
    outcomes.accepted + outcomes.refused_total()
}

#[test]
fn a_client_speaks_through_rings_as_it_does_over_the_socket() {
    let (sink, echo) = (UdpSink::start(), TcpEcho::start());
    let broker =
        Broker::start(&[format!("sink={}", sink.url_write_only()), format!("echo={}", echo.url())]);
    let client = client(&broker);
    let upstream = client.upstream("sink").unwrap();
    upstream.send(b"one").unwrap();
    upstream.try_send(b"two").unwrap();
    let many = (0..5_000).map(|number| number.to_string());
    assert_eq!(upstream.send_all(many).unwrap(), 5_000);
    let outcomes = upstream.flush(PATIENCE).unwrap();
    assert_eq!((outcomes.accepted, outcomes.sent, outcomes.untold), (5_002, 5_002, 0));
    assert_eq!(sink.wait_for(5_002)[..2], [b"one", b"two"]);
    let echo = client.upstream("echo").unwrap();
    assert_eq!(echo.request(b"hello", PATIENCE).unwrap(), b"hello");
    let (mut stream, attached) = echo.socketpair().unwrap();
    stream.write_all(b"by descriptor\n").unwrap();
    drop(stream);
    attached.wait(PATIENCE).unwrap();
    let status = broker.status();
    let transports: Vec<_> =
        list(&status, "sessions").iter().map(|session| session["transport"].clone()).collect();
    assert_eq!(transports, ["ring"]);
    broker.assert_sums(&status);
}

#[test]
fn a_client_moves_to_another_thread_and_is_shared_by_several() {
    let (sink, _broker, upstream) = sink();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let upstream = upstream.clone();
            scope.spawn(move || (0..1_000).for_each(|_| upstream.send(b"x").unwrap()));
        }
    });
    assert_eq!(upstream.flush(PATIENCE).unwrap().sent, 4_000);
    assert_eq!(sink.wait_for(4_000).len(), 4_000);
}

/// C18: every call ends by its deadline while the broker stands still.
#[test]
fn a_full_ring_is_told_at_once_or_at_the_deadline_and_nothing_is_lost() {
    let (sink, broker, upstream) = sink();
    let client = client(&broker);
    let stopped = client.upstream("sink").unwrap();
    upstream.send(b"x").unwrap();
    broker.pause();
    let mut count = 0u64;
    let full = loop {
        match stopped.try_send(&[b'x'; 200]) {
            Ok(()) => count += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(full, Error::Full { .. }), "{full}");
    assert_eq!(full.retry(), Retry::NotSent);
    assert!(count > 1_000, "{count} fit");
    client.set_send_timeout(Duration::from_millis(50));
    let late = stopped.send(&[b'x'; 200]).unwrap_err();
    assert!(matches!(late, Error::TimedOut { retry: Retry::NotSent, .. }), "{late}");
    let unanswered = stopped.flush(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(unanswered, Error::TimedOut { .. }), "{unanswered}");
    assert_eq!(stopped.handed_over(), count);
    broker.resume();
    assert_eq!(stopped.flush(PATIENCE).unwrap().sent, count);
    sink.wait_for(usize::try_from(count).unwrap() + 1);
}

#[test]
fn a_flush_holds_across_the_death_of_a_broker() {
    let (sink, mut broker, upstream) = sink();
    upstream.send_all((0..1_000).map(|number| number.to_string())).unwrap();
    sink.wait_for(1_000);
    broker.kill();
    // Nobody is there: these wait in the ring.
    for number in 1_000..1_500 {
        upstream.send(number.to_string().as_bytes()).unwrap();
    }
    let outcomes = std::thread::scope(|scope| {
        let flush = scope.spawn(|| upstream.flush(PATIENCE).unwrap());
        broker.restart();
        flush.join().unwrap()
    });
    assert_eq!((outcomes.accepted, outcomes.sent, outcomes.untold), (1_500, 1_500, 0));
    let redelivered = total(&broker.upstream_status("sink"), "redelivered");
    let messages = sink.wait_for(1_500 + usize::try_from(redelivered).unwrap());
    let mut distinct: Vec<u32> =
        messages.iter().map(|text| String::from_utf8_lossy(text).parse().unwrap()).collect();
    distinct.sort_unstable();
    distinct.dedup();
    assert!(distinct.into_iter().eq(0..1_500));
}

#[test]
fn what_a_dead_broker_did_not_send_is_not_called_sent() {
    let mut broker = Broker::builder()
        .config("[upstream.down]\nurl = \"tcp://127.0.0.1:1\"\nqueue_timeout = \"50ms\"\n")
        .start();
    let upstream = client(&broker).upstream("down").unwrap();
    for _ in 0..10 {
        upstream.send(b"nobody takes it").unwrap();
    }
    broker.wait_until_upstream("down", |upstream| total(upstream, "expired") == 10);
    broker.kill();
    broker.restart();
    let outcomes = upstream.flush(PATIENCE).unwrap();
    assert_eq!((outcomes.accepted, outcomes.sent, outcomes.untold), (10, 0, 10));
}

#[test]
fn a_request_of_a_dead_broker_fails_as_perhaps_carried_out_and_is_not_repeated() {
    let silent = TcpEcho::with(Marks::Lines, Manners::Slow(Duration::from_secs(600)));
    let mut broker = Broker::start(&[format!("echo={}", silent.url())]);
    let client = client(&broker);
    let echo = client.upstream("echo").unwrap();
    std::thread::scope(|scope| {
        let request = scope.spawn(|| echo.request(b"lost", PATIENCE));
        broker.wait_until_upstream("echo", |upstream| total(upstream, "in_flight") == 1);
        broker.kill();
        broker.restart();
        let lost = request.join().unwrap().unwrap_err();
        assert_eq!(lost.retry(), Retry::MaybeExecuted, "{lost}");
    });
    // The next call that waits goes on with the next broker.
    assert_eq!(echo.flush(PATIENCE).unwrap(), Outcomes::default());
    let status = broker.status();
    assert_eq!(total(&list(&status, "sessions")[0], "id"), client.session());
    assert_eq!(total(&broker.upstream_status("echo"), "requests"), 0, "never repeated");
}

#[test]
fn a_poll_wakes_for_a_reply() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let client = client(&broker);
    let upstream = client.upstream("echo").unwrap();
    for round in 0..100u64 {
        let body = round.to_string();
        let id = upstream.submit(body.as_bytes(), PATIENCE).unwrap();
        let reply = loop {
            if let Some(reply) = client.try_next_reply().unwrap() {
                break reply;
            }
            let mut fds = [PollFd::new(&client, PollFlags::IN)];
            let patience = Timespec::try_from(PATIENCE).unwrap();
            assert_eq!(poll(&mut fds, Some(&patience)).unwrap(), 1, "nothing woke round {round}");
        };
        assert_eq!((reply.id, reply.result.unwrap()), (id, body.into_bytes()));
    }
}

/// K1 with the library: what it counts and what arrives agree, however often the broker dies.
#[test]
fn totals_agree_with_the_sink_when_the_broker_is_killed_again_and_again() {
    const CLIENTS: u64 = 4;
    let (sink, mut broker, first) = sink();
    drop(first);
    let is_over = AtomicBool::new(false);
    let mut redelivered = 0;
    let runtime_dir = broker.runtime_dir().to_owned();
    let sent: u64 = std::thread::scope(|scope| {
        let streams: Vec<_> = (0..CLIENTS)
            .map(|name| {
                let (runtime_dir, is_over) = (&runtime_dir, &is_over);
                scope.spawn(move || {
                    let client = Client::connect_in_with(runtime_dir, SMALL).unwrap();
                    let upstream = client.upstream("sink").unwrap();
                    let (mut number, mut counted) = (0u64, 0);
                    while !is_over.load(Ordering::Relaxed) {
                        for _ in 0..50 {
                            upstream.send(format!("{name} {number}").as_bytes()).unwrap();
                            number += 1;
                        }
                        if number.is_multiple_of(1_000) {
                            let outcomes = upstream.flush(PATIENCE).unwrap();
                            assert_eq!(outcomes.sent, total_of(&outcomes), "{outcomes:?}");
                            counted += outcomes.sent;
                        }
                        std::thread::sleep(Duration::from_micros(500));
                    }
                    counted += upstream.flush(PATIENCE).unwrap().sent;
                    assert_eq!(counted, number);
                    number
                })
            })
            .collect();
        for kill in 0..8 {
            std::thread::sleep(Duration::from_millis(20 + kill * 7 % 30));
            redelivered += total(&broker.upstream_status("sink"), "redelivered");
            broker.kill();
            broker.restart();
        }
        is_over.store(true, Ordering::Relaxed);
        streams.into_iter().map(|stream| stream.join().unwrap()).sum()
    });
    redelivered += total(&broker.upstream_status("sink"), "redelivered");
    let mut counts: HashMap<Vec<u8>, u64> = HashMap::new();
    wait_for("every message", || {
        counts.clear();
        sink.received().into_iter().for_each(|message| *counts.entry(message).or_default() += 1);
        (counts.len() as u64 == sent).then_some(())
    });
    let twice: u64 = counts.values().map(|count| count - 1).sum();
    assert!(twice <= redelivered, "{twice} came twice, {redelivered} are counted");
}

#[test]
fn send_by_a_ring_tells_outcomes_and_survives_a_broker() {
    let (sink, mut broker, _upstream) = sink();
    let mut send = broker
        .command("send")
        .args(["sink", "--via", "ring"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = send.stdin.take().unwrap();
    for number in 0..500 {
        writeln!(input, "{number}").unwrap();
    }
    sink.wait_for(500);
    broker.kill();
    for number in 500..1_000 {
        writeln!(input, "{number}").unwrap();
    }
    broker.restart();
    drop(input);
    let output = send.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{:?}: {said}", output.status);
    let redelivered = total(&broker.upstream_status("sink"), "redelivered");
    sink.wait_for(1_000 + usize::try_from(redelivered).unwrap());

    broker.terminate();
    let begin = Instant::now();
    let output = broker.command("send").args(["sink", "x", "--via", "ring"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "no broker: {output:?} after {:?}", begin.elapsed());
}

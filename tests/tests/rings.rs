//! What a session through rings is promised: the same as one on a socket, and that what was
//! published outlives the client and the broker.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::{HashMap, HashSet};
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::reason::Reason;
use poolbroker_proto::ring::{CAPACITY_MIN, Urgency};
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{list, total};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::peers::{TcpEcho, TcpSink, UdpSink};
use poolbroker_tests::raw::RawClient;
use poolbroker_tests::raw_ring::{CAPACITY, RawRing, Resumed};
use poolbroker_tests::strace::Strace;

/// One run, as the default configuration has it.
const RUN: u64 = 64;

fn send_header(upstream: u16) -> FrameHeader {
    FrameHeader { upstream, ..FrameHeader::new(Kind::Send) }
}

#[test]
fn messages_requests_and_answers_go_through_the_rings() {
    let (sink, echo) = (UdpSink::start(), TcpEcho::start());
    let broker =
        Broker::start(&[format!("sink={}", sink.url_write_only()), format!("echo={}", echo.url())]);
    let mut client = RawRing::connect(broker.runtime_dir());
    let (sink_handle, echo_handle) = (client.open_upstream("sink"), client.open_upstream("echo"));
    for number in 0..10_000 {
        client.send(sink_handle, format!("message {number}").as_bytes());
    }
    let outcomes = client.flush(sink_handle);
    assert_eq!((outcomes.accepted, outcomes.sent), (10_000, 10_000));
    let messages = sink.wait_for(10_000);
    assert_eq!(messages[9_999], b"message 9999");
    for correlation in 100..200 {
        client.send_request(echo_handle, correlation, format!("{correlation}").as_bytes());
        let answer = client.next_frame().unwrap();
        assert_eq!((answer.header.kind, answer.header.correlation), (Kind::Reply, correlation));
        assert_eq!(answer.body, correlation.to_string().into_bytes());
    }
    let status = broker.status();
    assert_eq!(list(&status, "sessions")[0]["transport"], "ring");
    broker.assert_sums(&status);
}

#[test]
fn what_was_published_before_a_client_was_killed_is_delivered_and_nothing_else() {
    let sink = UdpSink::start();
    let broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
    let mut client = RawRing::connect(broker.runtime_dir());
    let handle = client.open_upstream("sink");
    // C3: a whole ring of them, which the broker has had no time to take.
    for number in 0..1_000 {
        client.write_unpublished(send_header(handle), format!("{number}").as_bytes());
    }
    // C2: the position is stored, the doorbell is not rung.
    let _ = client.producer.publish(Urgency::Relaxed);
    // C1: the record is written, its position is not stored.
    client.write_unpublished(send_header(handle), b"never published");
    drop(client);
    let messages = sink.wait_for(1_000);
    assert!(messages.into_iter().eq((0..1_000).map(|n: i32| n.to_string().into_bytes())));
    broker.wait_until(|status| list(status, "sessions").is_empty());
    assert_eq!(sink.received_count(), 1_000);
}

#[test]
fn a_client_that_stands_still_with_a_claimed_record_holds_up_nobody_and_goes_on_later() {
    let sink = UdpSink::start();
    let broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
    let (mut still, mut other) =
        (RawRing::connect(broker.runtime_dir()), RawRing::connect(broker.runtime_dir()));
    let (handle, other_handle) = (still.open_upstream("sink"), other.open_upstream("sink"));
    still.write_unpublished(send_header(handle), b"later");
    for _ in 0..1_000 {
        other.send(other_handle, b"now");
    }
    assert_eq!(other.flush(other_handle).sent, 1_000);
    assert_eq!(sink.wait_for(1_000), vec![b"now"; 1_000]);
    still.publish();
    assert_eq!(sink.wait_for(1_001)[1_000], b"later");
}

#[test]
fn replies_wait_in_the_broker_while_the_ring_is_full_and_all_arrive() {
    let echo = TcpEcho::start();
    let broker = Broker::builder()
        .config(&format!("[upstream.echo]\nurl = {:?}\nconnections_max = 64\n", echo.url()))
        .start();
    let mut client = RawRing::connect(broker.runtime_dir());
    let handle = client.open_upstream("echo");
    let body = vec![b'x'; 60_000];
    for correlation in 1..=16 {
        client.send_request(handle, correlation, &body);
    }
    broker.wait_until_upstream("echo", |upstream| total(upstream, "replied") == 16);
    let mut seen: Vec<u64> = (0..16)
        .map(|_| {
            let answer = client.next_frame().unwrap();
            assert_eq!((answer.header.kind, answer.body.len()), (Kind::Reply, body.len()));
            answer.header.correlation
        })
        .collect();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(1..=16));
}

#[test]
fn a_ring_that_is_too_short_too_long_or_odd_is_refused_with_the_bounds() {
    let broker = Broker::start(&["sink=udp-write-only://127.0.0.1:9"]);
    for bytes in [0, 4096, CAPACITY_MIN - 1, CAPACITY_MIN + 4096, 1 << 40] {
        let (client, _) = RawClient::welcomed(broker.runtime_dir());
        let refused = RawRing::open(client, bytes).unwrap_err();
        assert_eq!(refused.reason, Reason::BadRing);
        assert!(refused.text.contains(&CAPACITY_MIN.to_string()), "{}", refused.text);
    }
}

#[test]
fn ring_memory_is_charged_to_its_user_and_given_back() {
    let broker = Broker::builder()
        .upstream("sink", "udp-write-only://127.0.0.1:9")
        .config("[limits]\nring_bytes_max_per_uid = 2000000\n")
        .start();
    let open = || {
        let (client, _) = RawClient::welcomed(broker.runtime_dir());
        RawRing::open(client, CAPACITY)
    };
    let held: Vec<_> = (0..3).map(|_| open().unwrap()).collect();
    let refused = open().unwrap_err();
    assert_eq!(refused.reason, Reason::Quota);
    assert!(refused.text.contains("ring_bytes_max_per_uid"), "{}", refused.text);
    drop(held);
    wait_for("the quota to come back", || open().ok());
}

#[test]
fn what_a_dead_broker_never_touched_is_taken_by_the_next_one() {
    let (sink, echo) = (UdpSink::start(), TcpEcho::start());
    let mut broker =
        Broker::start(&[format!("sink={}", sink.url_write_only()), format!("echo={}", echo.url())]);
    let mut client = RawRing::connect(broker.runtime_dir());
    let (sink_handle, echo_handle) = (client.open_upstream("sink"), client.open_upstream("echo"));
    client.send(sink_handle, b"before");
    sink.wait_for(1);
    assert_eq!(client.flush(sink_handle).sent, 1);
    broker.kill();
    client.send(sink_handle, b"between");
    client.send_request(echo_handle, 5, b"asked of nobody");
    broker.restart();
    client.reattach(broker.runtime_dir(), &["sink", "echo"]);
    assert_eq!(sink.wait_for(2), [b"before".as_slice(), b"between"]);
    let answer = client.next_frame().unwrap();
    assert_eq!((answer.header.correlation, answer.body.as_slice()), (5, &b"asked of nobody"[..]));
    assert_eq!(total(&broker.upstream_status("sink"), "redelivered"), 0);
    let outcomes = client.flush(sink_handle);
    assert_eq!((outcomes.accepted, outcomes.sent), (1, 1), "of this broker alone");
}

#[test]
fn what_a_dead_broker_may_have_sent_is_sent_again_and_counted_but_requests_are_not() {
    // Nobody listens on port 1: what is taken for it waits in the broker.
    let echo = TcpEcho::start();
    let mut broker =
        Broker::start(&["down=tcp://127.0.0.1:1".to_owned(), format!("echo={}", echo.url())]);
    let mut client = RawRing::connect(broker.runtime_dir());
    let (down, echo_handle) = (client.open_upstream("down"), client.open_upstream("echo"));
    for number in 0..10 {
        client.send(down, format!("{number}").as_bytes());
    }
    client.send_request(echo_handle, 5, b"carried out");
    assert_eq!(client.next_frame().unwrap().header.correlation, 5);
    for number in 10..200 {
        client.send(down, format!("{number}").as_bytes());
    }
    broker.wait_until_upstream("down", |upstream| total(upstream, "queued") == RUN);
    broker.kill();
    broker.restart();
    client.reattach(broker.runtime_dir(), &["down", "echo"]);
    broker.wait_until_upstream("down", |upstream| total(upstream, "queued") == RUN);
    assert_eq!(total(&broker.upstream_status("down"), "redelivered"), RUN);
    assert_eq!(total(&broker.upstream_status("echo"), "requests"), 0);
}

#[test]
fn a_ring_is_attached_once_and_only_as_it_was_made() {
    let sink = UdpSink::start();
    let broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
    let mut client = RawRing::connect(broker.runtime_dir());
    let handle = client.open_upstream("sink");
    let refusal = |memory: &dyn std::os::fd::AsFd, capacity| match RawRing::resume(
        broker.runtime_dir(),
        memory.as_fd(),
        capacity,
        &["sink"],
    ) {
        Resumed::Refused(failure) => failure.reason,
        other => panic!("{other:?}"),
    };
    // C17: its session lives.
    assert_eq!(refusal(&client.memory, CAPACITY), Reason::RingAttached);
    assert_eq!(refusal(&client.memory, 2 * CAPACITY), Reason::BadRing);
    assert_eq!(refusal(&std::fs::File::open("/dev/zero").unwrap(), CAPACITY), Reason::BadRing);
    let (reader, _writer) = std::io::pipe().unwrap();
    assert_eq!(refusal(&reader, CAPACITY), Reason::BadRing);
    client.send(handle, b"undisturbed");
    assert_eq!(client.flush(handle).sent, 1);
}

#[test]
fn an_upstream_that_is_gone_after_a_restart_refuses_what_was_meant_for_it() {
    let sink = UdpSink::start();
    let mut broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
    let mut client = RawRing::connect(broker.runtime_dir());
    let handle = client.open_upstream("sink");
    broker.kill();
    client.send(handle, b"to another");
    client.send(handle + 1, b"to sink");
    broker.restart();
    client.reattach(broker.runtime_dir(), &["renamed", "sink"]);
    assert_eq!(sink.wait_for(1), [b"to sink"]);
    let outcomes = client.flush(handle);
    assert_eq!(outcomes.refused, [(Reason::UnknownUpstream, 1)]);
    assert_eq!(client.header.unsent(), 1);
}

#[test]
fn at_sigterm_a_ring_is_taken_to_its_end_and_the_rest_waits_for_the_next_broker() {
    let sink = UdpSink::start();
    let mut broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
    let mut client = RawRing::connect(broker.runtime_dir());
    let handle = client.open_upstream("sink");
    for number in 0..5_000 {
        client.send(handle, format!("{number}").as_bytes());
    }
    assert!(broker.terminate().success());
    assert!(client.producer.is_drained().unwrap());
    client.send(handle, b"5000");
    broker.restart();
    client.reattach(broker.runtime_dir(), &["sink"]);
    let messages = sink.wait_for(5_001);
    assert!(messages.into_iter().eq((0..=5_000).map(|n: i32| n.to_string().into_bytes())));
}

#[test]
fn a_client_that_streams_on_does_not_hold_up_the_end_and_loses_nothing() {
    let sink = UdpSink::start();
    let mut broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
    let mut client = RawRing::connect(broker.runtime_dir());
    let handle = client.open_upstream("sink");
    let is_over = AtomicBool::new(false);
    let mut sent = 0u64;
    std::thread::scope(|scope| {
        let stream = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let text = format!("{sent}");
                match client.producer.push(&send_header(handle), text.as_bytes()) {
                    Ok(()) => sent += 1,
                    Err(_) => std::thread::yield_now(),
                }
                client.publish();
            }
        });
        wait_for("the stream", || (sink.received_count() > 1_000).then_some(()));
        assert!(broker.terminate().success(), "{}", broker.stderr());
        is_over.store(true, Ordering::Relaxed);
        stream.join().unwrap();
    });
    broker.restart();
    client.reattach(broker.runtime_dir(), &["sink"]);
    wait_for("the rest", || client.producer.is_drained().unwrap().then_some(()));
    let messages = sink.wait_for(usize::try_from(sent).unwrap());
    assert!(messages.into_iter().eq((0..sent).map(|number| number.to_string().into_bytes())));
}

#[test]
fn what_waits_for_a_dead_upstream_costs_nothing_and_goes_on_when_it_is_back() {
    let mut sink = TcpSink::start();
    let broker = Broker::start(&[format!("sink={}", sink.url())]);
    let mut client = RawRing::connect(broker.runtime_dir());
    let handle = client.open_upstream("sink");
    // Both come often enough to be awake before the upstream goes.
    let mut fifo = OpenOptions::new().write(true).open(broker.fifo("sink")).unwrap();
    for number in 0..200 {
        client.send(handle, format!("ring {number}").as_bytes());
        writeln!(fifo, "fifo {number}").unwrap();
        std::thread::sleep(Duration::from_micros(200));
    }
    sink.wait_for(400);
    sink.stop();
    let mut in_ring = 200;
    while client.producer.push(&send_header(handle), format!("ring {in_ring}").as_bytes()).is_ok() {
        in_ring += 1;
        client.publish();
    }
    let writer = std::thread::spawn(move || {
        // More than the pipe and the broker's queue hold.
        (200..40_000).for_each(|number| writeln!(fifo, "fifo {number}").unwrap());
    });
    broker.wait_until_upstream("sink", |upstream| total(upstream, "queued") > RUN);
    std::thread::sleep(Duration::from_millis(500));
    let used = broker.cpu_time();
    std::thread::sleep(Duration::from_secs(5));
    let used = broker.cpu_time() - used;
    // Attempts to connect, a few times a second at most; 5,000 naps would cost more.
    assert!(used <= Duration::from_millis(20), "waiting for 5 s, it used {used:?}");
    sink.restart();
    writer.join().unwrap();
    broker.wait_until_upstream("sink", |upstream| total(upstream, "sent") == in_ring + 40_000);
    assert!(client.producer.is_drained().unwrap());
    let status = broker.status();
    broker.assert_sums(&status);
    assert_eq!(total(&broker.upstream_status("sink"), "accepted"), in_ring + 40_000);
}

/// K4: before and behind every send, as far as a crash can tell them apart.
#[test]
#[ignore = "needs strace; run by .ci/run with -- --ignored"]
fn nothing_is_lost_wherever_between_two_system_calls_the_broker_dies() {
    let mut redelivered_ever = 0;
    for call in ["sendmsg", "epoll_pwait2"] {
        for when in 1..=10 {
            let sink = UdpSink::start();
            let mut broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
            let mut client = RawRing::connect(broker.runtime_dir());
            let handle = client.open_upstream("sink");
            let strace = Strace::attach(&broker, &format!("{call}:signal=SIGKILL:when={when}"));
            let mut messages = 0usize;
            while broker.is_running() {
                assert!(messages < 1_000_000, "{call} {when} does not come");
                for _ in 0..RUN {
                    // All of one length, so that they go by sendmsg.
                    client.write_unpublished(
                        send_header(handle),
                        format!("{messages:06}").as_bytes(),
                    );
                    messages += 1;
                }
                client.publish();
                std::thread::sleep(Duration::from_micros(200));
            }
            drop(strace);
            broker.kill();
            broker.restart();
            client.reattach(broker.runtime_dir(), &["sink"]);
            wait_for("the ring to be taken", || {
                client.producer.is_drained().unwrap().then_some(())
            });
            let redelivered = total(&broker.upstream_status("sink"), "redelivered");
            redelivered_ever += redelivered;
            wait_for("every message", || {
                let distinct: HashSet<_> = sink.received().into_iter().collect();
                (distinct.len() == messages).then_some(())
            });
            let twice = sink.received_count() - messages;
            assert!(twice as u64 <= redelivered, "{call} {when}: {twice} twice, {redelivered}");
            assert!(redelivered <= RUN, "{call} {when}: {redelivered}");
        }
    }
    assert!(redelivered_ever > 0, "no crash fell between taking and sending");
}

/// K1, C18: eight clients stream while the broker is killed again and again.
#[test]
fn nothing_is_lost_when_the_broker_is_killed_under_streaming_rings() {
    const CLIENTS: u64 = 8;
    let kills = std::env::var("POOLBROKER_KILLS").map_or(10, |kills| kills.parse().unwrap());
    let sink = UdpSink::start();
    let mut broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
    let is_over = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    let mut redelivered = 0;
    let runtime_dir = broker.runtime_dir().to_owned();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (runtime_dir, is_over, sent) = (&runtime_dir, &is_over, &sent);
            scope.spawn(move || {
                let mut ring = RawRing::connect(runtime_dir);
                let handle = ring.open_upstream("sink");
                let mut number = 0u64;
                let go_on = |ring: &mut RawRing| {
                    if ring.client.is_closed() {
                        wait_for("the next broker", || RawClient::try_welcomed(runtime_dir));
                        ring.reattach(runtime_dir, &["sink"]);
                    }
                };
                while !is_over.load(Ordering::Relaxed) {
                    // Slow enough for a sink that keeps everything, fast enough to be in the
                    // middle of a run when the broker dies.
                    for _ in 0..20 {
                        let text = format!("{client} {number}");
                        while ring.producer.push(&send_header(handle), text.as_bytes()).is_err() {
                            go_on(&mut ring);
                            std::thread::yield_now();
                        }
                        ring.publish();
                        number += 1;
                    }
                    go_on(&mut ring);
                    std::thread::sleep(Duration::from_micros(500));
                }
                wait_for("everything to be taken", || {
                    go_on(&mut ring);
                    ring.producer.is_drained().unwrap().then_some(())
                });
                sent.fetch_add(number, Ordering::Relaxed);
            });
        }
        for kill in 0..kills {
            std::thread::sleep(Duration::from_millis(20 + kill * 7 % 30));
            redelivered += total(&broker.upstream_status("sink"), "redelivered");
            broker.kill();
            broker.restart();
        }
        broker.wait_until_upstream("sink", |upstream| total(upstream, "sent") > 0);
        is_over.store(true, Ordering::Relaxed);
    });
    redelivered += total(&broker.upstream_status("sink"), "redelivered");
    let sent = sent.load(Ordering::Relaxed);
    let mut counts: HashMap<Vec<u8>, u64> = HashMap::new();
    wait_for("every message", || {
        counts.clear();
        for message in sink.received() {
            *counts.entry(message).or_default() += 1;
        }
        (counts.len() as u64 == sent).then_some(())
    });
    let twice: u64 = counts.values().map(|count| count - 1).sum();
    println!("{kills} kills: {sent} sent, 0 lost, {twice} twice, {redelivered} redelivered");
    assert!(twice <= redelivered, "{twice} came twice, {redelivered} are counted");
    assert!(redelivered <= RUN * CLIENTS * kills, "{redelivered} in {kills} kills");
}

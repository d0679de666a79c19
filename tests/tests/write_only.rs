//! Write-only UDP: what comes back is discarded, counted, and costs nothing.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use poolbroker_proto::message::Retry;
use poolbroker_proto::reason::Reason;
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{list, total};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::peers::UdpSink;
use poolbroker_tests::raw::{RawClient, ask};
use poolbroker_tests::udp_table::udp_sockets_to;

/// Small enough for a receive buffer that nobody was allowed to enlarge.
const BURST: usize = 64;

#[test]
fn a_hundred_thousand_replies_hold_no_memory_and_are_counted_exactly() {
    const MESSAGES: usize = 1000;
    let sink = UdpSink::answering(100);
    let (broker, mut client, handle) = start(&sink);
    for first in (0..MESSAGES).step_by(BURST) {
        let burst = first..(first + BURST).min(MESSAGES);
        let end = burst.end;
        for number in burst {
            client.send(handle, format!("message {number}").as_bytes());
        }
        sink.wait_for(end);
        assert_nothing_queued(&sink);
    }
    wait_for("every reply is sent", || {
        (sink.replies_sent() == 100 * MESSAGES as u64).then_some(())
    });
    assert_nothing_queued(&sink);
    let upstream = broker.wait_until_upstream("metrics", |upstream| {
        total(upstream, "replies_discarded") == sink.replies_sent()
    });
    assert_eq!(upstream["discard"], "filter");
    let by_connection: u64 = list(&upstream, "connections")
        .iter()
        .map(|connection| total(connection, "replies_discarded"))
        .sum();
    assert_eq!(by_connection, sink.replies_sent(), "{upstream:#}");
}

#[test]
fn a_request_is_refused_by_name() {
    let sink = UdpSink::start();
    let (broker, mut client, handle) = start(&sink);
    let failure = client.request(handle, 0, b"?").failure();
    assert_eq!(failure.reason, Reason::WriteOnly, "{failure:?}");
    assert_eq!(failure.retry, Retry::NotSent);
    let output = broker.command("request").args(["metrics", "?"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("metrics") && stderr.contains("write-only"), "{stderr}");
    client.send(handle, b"last");
    assert_eq!(sink.wait_for(1), [b"last"], "nothing of the requests was sent");
}

#[test]
fn the_first_datagram_after_a_peer_comes_back_arrives() {
    let mut sink = UdpSink::start();
    let (broker, mut client, handle) = start(&sink);
    for round in 1..=20 {
        sink.stop();
        client.send(handle, b"into the void");
        let outcomes = client.flush(handle);
        assert_eq!(outcomes.queued(), 0, "{outcomes:?}");
        sink.restart();
        client.send(handle, b"back again");
        assert_eq!(sink.wait_for(round), vec![b"back again"; round]);
    }
    let status = broker.status();
    broker.assert_sums(&status);
}

#[test]
fn the_error_of_one_datagram_never_costs_the_next_one() {
    let mut sink = UdpSink::start();
    let (broker, ..) = start(&sink);
    let mut clients: Vec<_> = (0..4)
        .map(|_| {
            let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
            let handle = client.open("metrics");
            (client, handle)
        })
        .collect();
    sink.stop();
    // While it stands still everything arrives, so that it then sends far more in one go than one
    // system call takes: the first of each call finds the error of the last of the call before.
    broker.pause();
    for (client, handle) in &mut clients {
        for _ in 0..BURST {
            client.send(*handle, b"into the void");
        }
    }
    broker.resume();
    for (client, handle) in &mut clients {
        let outcomes = client.flush(*handle);
        assert_eq!(outcomes.sent, BURST as u64, "{outcomes:?}");
    }
    let upstream = broker.upstream_status("metrics");
    assert!(total(&upstream, "icmp_refused") > 0, "{upstream:#}");
}

#[test]
fn messages_of_all_sizes_arrive_in_order_and_whole() {
    let sink = UdpSink::start();
    let (_broker, mut client, handle) = start(&sink);
    let mut written = Vec::new();
    while written.len() < 20 * BURST {
        // Runs of equal sizes go out in one segmented send, others one by one: both, mixed.
        let (size, repeat) = (fastrand::usize(1..1500), fastrand::usize(1..8));
        for _ in 0..repeat {
            let mut body = format!("{} ", written.len()).into_bytes();
            body.resize(body.len() + size, b'.');
            client.send(handle, &body);
            written.push(body);
        }
        sink.wait_for(written.len());
    }
    assert!(sink.received() == written, "order or content changed");
}

#[test]
fn the_longest_datagram_passes_and_a_longer_one_is_refused() {
    const LONGEST: usize = 65_507;
    let sink = UdpSink::start();
    let (broker, mut client, handle) = start(&sink);
    client.send(handle, &[b'a'; LONGEST]);
    client.send(handle, &[b'b'; LONGEST + 1]);
    client.send(handle, b"c");
    let outcomes = client.flush(handle);
    assert_eq!((outcomes.accepted, outcomes.sent), (2, 2), "{outcomes:?}");
    assert_eq!(outcomes.refused, [(Reason::TooLong, 1)]);
    assert_eq!(sink.wait_for(2), [&[b'a'; LONGEST][..], b"c"]);
    let status = broker.status();
    broker.assert_sums(&status);
}

#[test]
fn an_empty_message_is_refused_and_the_session_goes_on() {
    let sink = UdpSink::start();
    let (_broker, mut client, handle) = start(&sink);
    client.send(handle, b"");
    client.send(handle, b"next");
    let outcomes = client.flush(handle);
    assert_eq!(outcomes.refused, [(Reason::Empty, 1)]);
    assert_eq!(sink.wait_for(1), [b"next"]);
}

#[test]
fn all_sends_of_a_session_use_one_connection_that_the_status_shows() {
    let sink = UdpSink::start();
    let (broker, mut client, handle) = start(&sink);
    for _ in 0..BURST {
        client.send(handle, b"12345");
    }
    client.flush(handle);
    let upstream = broker.upstream_status("metrics");
    let [connection] = list(&upstream, "connections") else {
        panic!("one connection: {upstream:#}");
    };
    assert_eq!(connection["protocol"], "udp-write-only");
    assert_eq!(connection["role"], "one_way");
    assert_eq!(connection["remote"], format!("127.0.0.1:{}", sink.port()));
    assert_eq!(total(connection, "messages_out"), BURST as u64);
    assert_eq!(total(connection, "bytes_out"), 5 * BURST as u64);
    let sockets = udp_sockets_to(sink.port());
    assert_eq!(sockets.len(), 1, "{sockets:?}");
    let local = format!("127.0.0.1:{}", sockets[0].local_port);
    assert_eq!(connection["local"], local);
}

#[test]
fn a_plain_udp_upstream_takes_sends_too() {
    let sink = UdpSink::answering(1);
    let broker = Broker::start(&[format!("plain={}", sink.url())]);
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("plain");
    for number in 0..10 {
        client.send(handle, format!("{number}").as_bytes());
    }
    assert_eq!(sink.wait_for(10).len(), 10);
    // The answers to the sends wait nowhere to be taken for this one.
    assert_eq!(ask(broker.runtime_dir(), "plain", b"question").reply(), b"question");
    broker.wait_until_upstream("plain", |upstream| total(upstream, "replies_discarded") == 10);
}

fn start(sink: &UdpSink) -> (Broker, RawClient, u16) {
    let broker = Broker::start(&[format!("metrics={}", sink.url_write_only())]);
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("metrics");
    (broker, client, handle)
}

fn assert_nothing_queued(sink: &UdpSink) {
    for socket in udp_sockets_to(sink.port()) {
        assert_eq!(socket.receive_queue_bytes, 0, "{socket:?}");
    }
}

//! How datagrams leave and come: lanes, joined messages, batches that the kernel refuses in part.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::{BTreeMap, BTreeSet};

use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::reason::Reason;
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, list, total};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::peers::{TcpSink, UdpSink};
use poolbroker_tests::raw::{RawClient, frame};
use poolbroker_tests::strace::Strace;
use poolbroker_tests::udp_table::udp_sockets_to;

/// Messages of one client in one go: a whole GSO send.
const BURST: usize = 64;

// Lanes.

#[test]
fn several_one_way_connections_spread_the_sessions_and_keep_the_order_of_each() {
    const LANES: usize = 4;
    const ROUNDS: usize = 10;
    let sink = UdpSink::start();
    let more = format!("one_way_connections = {LANES}");
    let broker = start("metrics", &sink.url_write_only(), &more);
    let mut clients = clients(&broker, "metrics", 2 * LANES);
    for round in 0..ROUNDS {
        for (number, (client, handle)) in clients.iter_mut().enumerate() {
            for message in 0..BURST / 4 {
                let message = round * BURST / 4 + message;
                client.send(*handle, format!("{number} {message}").as_bytes());
            }
        }
        sink.wait_for((round + 1) * 2 * LANES * BURST / 4);
    }
    assert_in_order(&sink.received(), 2 * LANES, ROUNDS * BURST / 4);
    let sockets = udp_sockets_to(sink.port());
    let ports: BTreeSet<_> = sockets.iter().map(|socket| socket.local_port).collect();
    assert_eq!(ports.len(), LANES, "{sockets:?}");
    let upstream = broker.upstream_status("metrics");
    let sent: Vec<_> =
        list(&upstream, "connections").iter().map(|conn| total(conn, "messages_out")).collect();
    assert_eq!(sent, [2 * (ROUNDS * BURST / 4) as u64; LANES], "two clients each");
    broker.assert_sums(&broker.status());
}

#[test]
fn each_session_keeps_its_order_over_tcp_lanes_that_are_lost_and_opened_again() {
    const LANES: usize = 3;
    const ROUNDS: usize = 20;
    let mut sink = TcpSink::start();
    let more =
        format!("one_way_connections = {LANES}\nbackoff_max = \"10ms\"\nbackoff_base = \"1ms\"");
    let broker = start("log", &sink.url(), &more);
    let mut clients = clients(&broker, "log", LANES);
    for round in 0..ROUNDS {
        for (number, (client, handle)) in clients.iter_mut().enumerate() {
            client.send(*handle, format!("{number} {round}").as_bytes());
        }
        if round == ROUNDS / 2 {
            sink.wait_for((round + 1) * LANES);
            assert_eq!(sink.connections_open(), LANES);
            sink.stop();
            broker.wait_until_upstream("log", |upstream| {
                let conns = list(upstream, "connections");
                conns.iter().all(|conn| conn["state"] == "connecting")
            });
        }
    }
    let waiting = (LANES * (ROUNDS - ROUNDS / 2 - 1)) as u64;
    broker.wait_until_upstream("log", |upstream| total(upstream, "queued") == waiting);
    sink.restart();
    for (client, handle) in &mut clients {
        let outcomes = client.flush(*handle);
        assert_eq!((outcomes.sent, outcomes.in_doubt), (ROUNDS as u64, 0));
    }
    assert_in_order(&sink.wait_for(ROUNDS * LANES), LANES, ROUNDS);
    broker.assert_sums(&broker.status());
}

// Joined messages.

#[test]
fn small_messages_share_datagrams_up_to_max_bytes_in_order() {
    let sink = UdpSink::start();
    let broker = start("metrics", &sink.url_write_only(), "coalesce = { max_delay = \"1s\" }");
    let (mut client, handle) = client(&broker, "metrics");
    let messages: Vec<_> = (0..220).map(|number| format!("{number:064}")).collect();
    // All at once, from the point of view of the broker.
    broker.pause();
    messages.iter().for_each(|message| client.send(handle, message.as_bytes()));
    broker.resume();
    // 22 of them and 21 separators are 1,429 bytes, the most that fit into 1,432.
    let datagrams = sink.wait_for(messages.len() / 22);
    assert!(datagrams.iter().all(|datagram| datagram.len() == 1_429));
    assert_eq!(datagrams.join(&b'\n'), messages.join("\n").as_bytes());
    let outcomes = client.flush(handle);
    assert_eq!((outcomes.accepted, outcomes.sent), (220, 220), "outcomes are per message");
}

#[test]
fn joined_datagrams_of_all_sizes_hold_every_message_once_in_order() {
    const MESSAGES: usize = 3_000;
    let sink = UdpSink::start();
    let coalesce =
        "coalesce = { separator = \"\\r\\n\", max_bytes = 200 }\none_way_connections = 2";
    let broker = start("metrics", &sink.url_write_only(), coalesce);
    let mut clients = clients(&broker, "metrics", 2);
    for number in 0..MESSAGES {
        let size = if number % 50 == 0 { 400 } else { fastrand::usize(0..90) };
        for (index, (client, handle)) in clients.iter_mut().enumerate() {
            client.send(*handle, format!("{index} {number} {}", ".".repeat(size)).as_bytes());
        }
        if number % 250 == 0 {
            // Not more than a receive buffer takes.
            clients.iter_mut().for_each(|(client, handle)| drop(client.flush(*handle)));
        }
    }
    for (client, handle) in &mut clients {
        assert_eq!(client.flush(*handle).sent, MESSAGES as u64);
    }
    let datagrams = wait_for("every message arrives", || {
        let datagrams = sink.received();
        (cut(&datagrams, "\r\n").len() == 2 * MESSAGES).then_some(datagrams)
    });
    assert_in_order(&cut(&datagrams, "\r\n"), 2, MESSAGES);
    let is_alone = |datagram: &[u8]| !datagram.windows(2).any(|bytes| bytes == b"\r\n");
    let is_fit = |datagram: &Vec<u8>| datagram.len() <= 200 || is_alone(datagram);
    assert!(datagrams.iter().all(is_fit), "only one message alone is longer");
    assert!(datagrams.len() < MESSAGES, "{} datagrams", datagrams.len());
}

#[test]
fn a_message_that_waits_for_company_goes_after_max_delay() {
    let sink = UdpSink::start();
    let broker = start("metrics", &sink.url_write_only(), "coalesce = { max_delay = \"20ms\" }");
    let (mut client, handle) = client(&broker, "metrics");
    for round in 1..=3 {
        client.send(handle, b"alone");
        assert_eq!(sink.wait_for(round), vec![b"alone"; round]);
    }
}

#[test]
fn what_waits_for_company_is_sent_at_shutdown_even_without_time_to_drain() {
    let sink = UdpSink::start();
    let more = "coalesce = { max_delay = \"1s\" }\n[limits]\ndrain_timeout = \"0s\"";
    let mut broker = start("metrics", &sink.url_write_only(), more);
    let (mut client, handle) = client(&broker, "metrics");
    [b"a", b"b", b"c"].iter().for_each(|body| client.send(handle, *body));
    broker.wait_until_upstream("metrics", |upstream| total(upstream, "accepted") == 3);
    assert_eq!(broker.terminate().code(), Some(0));
    assert_eq!(cut(&sink.wait_for(1), "\n"), [b"a", b"b", b"c"]);
}

#[test]
fn a_body_that_contains_the_separator_is_refused_and_the_next_one_passes() {
    for (separator, forged) in [("\\n", &b"a\nb"[..]), ("::", b"a::b"), ("::", b"a:")] {
        let sink = UdpSink::start();
        let coalesce = format!("coalesce = {{ separator = \"{separator}\" }}");
        let broker = start("metrics", &sink.url_write_only(), &coalesce);
        let (mut client, handle) = client(&broker, "metrics");
        client.send(handle, forged);
        client.send(handle, b"c");
        let outcomes = client.flush(handle);
        assert_eq!(outcomes.refused, [(Reason::Delimiter, 1)]);
        assert_eq!((outcomes.accepted, outcomes.sent), (1, 1));
        assert_eq!(sink.wait_for(1), [b"c"]);
    }
}

#[test]
fn a_plain_udp_upstream_joins_sends_and_leaves_requests_alone() {
    let sink = UdpSink::answering(1);
    let more = "coalesce = { max_delay = \"1s\", max_bytes = 5 }";
    let broker = start("plain", &sink.url(), more);
    let (mut client, handle) = client(&broker, "plain");
    broker.pause();
    client.send(handle, b"ab");
    client.send_request(handle, 1, 0, b"q\nr");
    client.send(handle, b"cd");
    broker.resume();
    assert_eq!(client.next_answer().1.reply(), b"q\nr");
    assert_eq!(sink.wait_for(2), [&b"q\nr"[..], b"ab\ncd"]);
}

// Replies.

#[test]
fn replies_too_many_reach_nobody_and_are_counted_exactly() {
    const REQUESTS: u64 = 20;
    const ANSWERS: u64 = 30;
    let sink = UdpSink::answering(ANSWERS);
    let broker = start("plain", &sink.url(), "");
    let (mut client, handle) = client(&broker, "plain");
    for number in 1..=REQUESTS {
        let question = format!("question {number}");
        assert_eq!(client.request(handle, 0, question.as_bytes()).reply(), question.as_bytes());
        // Those that were read with the right one, those that waited when it was noticed, and those
        // that the filter dropped later. Without ids, one that came behind the next request would
        // be taken for its reply.
        broker.wait_until_upstream("plain", |upstream| {
            total(upstream, "replies_discarded") == (ANSWERS - 1) * number
        });
    }
    assert_eq!(total(&broker.upstream_status("plain"), "replied"), REQUESTS);
    broker.assert_sums(&broker.status());
}

// What the kernel refuses, brought about by strace(1), which answers in its place.

#[test]
#[ignore = "needs strace; run by .ci/run with -- --ignored"]
fn a_batch_that_gso_refuses_is_sent_again_once_and_in_order() {
    for error in ["EIO", "EINVAL", "EMSGSIZE"] {
        for coalesce in ["", "coalesce = { max_bytes = 20 }"] {
            let sink = UdpSink::start();
            let broker = start("metrics", &sink.url_write_only(), coalesce);
            let strace = Strace::attach(&broker, &format!("sendmsg:error={error}:when=3"));
            let sent = send_bursts(&broker, &sink, 10);
            assert_eq!(cut(&sink.received(), "\n"), sent);
            let calls = strace.detach();
            assert_eq!(calls.matches("(INJECTED)").count(), 1, "{calls}");
            // The size is remembered for the route: nothing of it is tried by GSO again.
            assert_eq!(calls.matches("sendmsg(").count(), 3, "{calls}");
            let upstream = broker.upstream_status("metrics");
            assert_eq!(total(&upstream, "sent"), sent.len() as u64, "{upstream:#}");
        }
    }
}

#[test]
#[ignore = "needs strace; run by .ci/run with -- --ignored"]
fn gso_is_tried_again_on_a_socket_that_is_opened_anew() {
    let sink = UdpSink::start();
    let broker = start("metrics", &sink.url_write_only(), "idle_timeout = \"50ms\"");
    let strace = Strace::attach(&broker, "sendmsg:error=EINVAL:when=1");
    let mut sent = send_bursts(&broker, &sink, 1);
    broker.wait_until_upstream("metrics", |upstream| list(upstream, "connections").is_empty());
    sent.extend(send_bursts(&broker, &sink, 1));
    assert_eq!(sink.received(), sent);
    let calls = strace.detach();
    assert_eq!(calls.matches("(INJECTED)").count(), 1, "{calls}");
    assert_eq!(calls.matches("sendmsg(").count(), 2, "{calls}");
}

#[test]
#[ignore = "needs strace; run by .ci/run with -- --ignored"]
fn a_datagram_that_is_too_big_costs_itself_alone_wherever_it_stands_in_a_batch() {
    let sink = UdpSink::start();
    let broker = start("metrics", &sink.url_write_only(), "");
    // The sendmmsg that resumes behind a partial one is told the error of its first datagram.
    let strace = Strace::attach(&broker, "sendmmsg:error=EMSGSIZE:when=2");
    let (mut client, handle) = client(&broker, "metrics");
    let bodies: Vec<_> = (0..3 * BURST).map(|number| "x".repeat(1 + number % 7)).collect();
    let mut expected = Vec::new();
    for (round, bodies) in bodies.chunks(BURST).enumerate() {
        for (number, body) in bodies.iter().enumerate() {
            let body = format!("0 {} {body}", round * BURST + number).into_bytes();
            client.send(handle, &body);
            expected.push(body);
        }
        assert_eq!(client.flush(handle).queued(), 0);
    }
    let received = sink.wait_for(expected.len() - 1);
    let lost: Vec<_> = expected.iter().filter(|body| !received.contains(body)).collect();
    assert_eq!(lost.len(), 1, "{lost:?}");
    expected.retain(|body| received.contains(body));
    assert!(received == expected, "order or content changed");
    assert!(strace.detach().contains("(INJECTED)"));
    let upstream = broker.upstream_status("metrics");
    assert_eq!(count_of(&upstream, "dropped", "too_big"), 1, "{upstream:#}");
    broker.assert_sums(&broker.status());
}

fn start(name: &str, url: &str, more: &str) -> Broker {
    Broker::builder().config(&format!("[upstream.{name}]\nurl = \"{url}\"\n{more}\n")).start()
}

fn client(broker: &Broker, upstream: &str) -> (RawClient, u16) {
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open(upstream);
    (client, handle)
}

fn clients(broker: &Broker, upstream: &str, count: usize) -> Vec<(RawClient, u16)> {
    (0..count).map(|_| client(broker, upstream)).collect()
}

/// Sends that many bursts of equal messages, each in one go, and waits for each; what was sent.
fn send_bursts(broker: &Broker, sink: &UdpSink, count: usize) -> Vec<Vec<u8>> {
    let (mut client, handle) = client(broker, "metrics");
    let mut sent = Vec::new();
    for _ in 0..count {
        let burst: Vec<_> =
            (0..BURST).map(|number| format!("{:08}", sent.len() + number).into_bytes()).collect();
        let header = FrameHeader { upstream: handle, ..FrameHeader::new(Kind::Send) };
        let frames: Vec<_> = burst.iter().map(|body| frame(header, body)).collect();
        client.send_bytes(&frames.concat());
        sent.extend(burst);
        assert_eq!(client.flush(handle).sent, sent.len() as u64);
    }
    wait_for("every message arrives", || {
        (cut(&sink.received(), "\n").len() >= sent.len()).then_some(())
    });
    sent
}

/// The messages in datagrams.
fn cut(datagrams: &[Vec<u8>], separator: &str) -> Vec<Vec<u8>> {
    let text = |datagram: &Vec<u8>| String::from_utf8(datagram.clone()).unwrap();
    let messages = |datagram: &Vec<u8>| {
        text(datagram).split(separator).map(|part| part.as_bytes().to_vec()).collect::<Vec<_>>()
    };
    datagrams.iter().flat_map(messages).collect()
}

/// Messages are "CLIENT NUMBER ...": each client's numbers from 0 on, each once, in order.
fn assert_in_order(messages: &[Vec<u8>], clients: usize, count: usize) {
    for client in 0..clients {
        assert_eq!(numbers_of(messages, client), (0..count).collect::<Vec<_>>(), "of {client}");
    }
}

fn numbers_of(messages: &[Vec<u8>], client: usize) -> Vec<usize> {
    let mut numbers: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for message in messages {
        let text = std::str::from_utf8(message).unwrap();
        let mut words = text.split(' ').map(|word| word.parse::<usize>().unwrap_or(usize::MAX));
        numbers.entry(words.next().unwrap()).or_default().push(words.next().unwrap());
    }
    numbers.remove(&client).unwrap_or_default()
}

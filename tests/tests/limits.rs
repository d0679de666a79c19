//! Each limit of the pool, by its name: what the real broker does when it is reached.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use poolbroker_client::{Client, Reason, Upstream};
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, list, total};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::peers::{Manners, Marks, TcpBlackHole, TcpEcho, UdpEcho};
use rustix::net::sockopt;
use serde_json::Value;

const LONG: Duration = Duration::from_secs(20);

/// An echo of lines with these manners, and a broker in front of it with these limits.
fn serve(manners: Manners, limits: &str) -> (TcpEcho, Broker) {
    let peer = TcpEcho::with(Marks::Lines, manners);
    let config = format!("[upstream.it]\nurl = \"{}\"\n{limits}\n", peer.url());
    (peer, Broker::builder().config(&config).start())
}

fn connect(broker: &Broker) -> (Client, Upstream) {
    let client = Client::connect_in(broker.runtime_dir()).unwrap();
    let upstream = client.upstream("it").unwrap();
    (client, upstream)
}

fn closed(broker: &Broker, reason: &str, count: u64) -> Value {
    broker.wait_until_upstream("it", |it| count_of(it, "connections_closed", reason) == count)
}

#[test]
fn connections_min() {
    let limits = "connections_min = 2\nidle_timeout = \"50ms\"\nlifetime = \"0s\"";
    let (peer, broker) = serve(Manners::Prompt, limits);
    broker.wait_until_upstream("it", |it| list(it, "connections").len() == 2);
    thread::sleep(Duration::from_millis(200));
    assert_eq!(peer.connections_open(), 2, "kept though nobody uses them");
    // One that the peer closes is replaced.
    drop(peer);
}

#[test]
fn connections_max() {
    let slow = Manners::Slow(Duration::from_millis(50));
    let (peer, broker) = serve(slow, "connections_max = 2");
    let (client, it) = connect(&broker);
    (0..6).for_each(|_| _ = it.submit(b"x", LONG).unwrap());
    let start = Instant::now();
    for _ in 0..6 {
        client.next_reply(LONG).unwrap().result.unwrap();
        assert!(peer.connections_open() <= 2);
    }
    assert!(start.elapsed() >= Duration::from_millis(120), "two at a time");
    assert_eq!(total(&broker.upstream_status("it"), "connections_opened"), 2);
}

#[test]
fn connecting_max() {
    let hole = TcpBlackHole::start();
    let config = format!(
        "[upstream.it]\nurl = \"{}\"\nconnecting_max = 2\nconnections_max = 8\n\
         wait_timeout = \"300ms\"\n",
        hole.url()
    );
    let broker = Broker::builder().config(&config).start();
    let (client, it) = connect(&broker);
    (0..6).for_each(|_| _ = it.submit(b"x", LONG).unwrap());
    let status = broker.wait_until_upstream("it", |it| it["waiters"] == 6);
    assert_eq!(list(&status, "connections").len(), 2, "{status:#}");
    for _ in 0..6 {
        let failed = client.next_reply(LONG).unwrap().result.unwrap_err();
        assert_eq!(failed.reason(), Some(Reason::WaitTimeout), "{failed}");
    }
}

#[test]
fn waiters_max() {
    let slow = Manners::Slow(Duration::from_millis(100));
    let (_peer, broker) = serve(slow, "connections_max = 1\nwaiters_max = 2");
    let (client, it) = connect(&broker);
    // The connection is up: one goes on it, and does not wait.
    it.request(b"x", LONG).unwrap();
    (0..4).for_each(|_| _ = it.submit(b"x", LONG).unwrap());
    let results: Vec<_> = (0..4).map(|_| client.next_reply(LONG).unwrap().result).collect();
    let refused: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert_eq!(refused.len(), 1, "one is on the connection, two wait");
    assert_eq!(refused[0].reason(), Some(Reason::WaitersFull));
    assert!(refused[0].to_string().contains("waiters_max = 2"), "{}", refused[0]);
}

#[test]
fn wait_timeout() {
    let slow = Manners::Slow(Duration::from_millis(500));
    let (_peer, broker) = serve(slow, "connections_max = 1\nwait_timeout = \"100ms\"");
    let (client, it) = connect(&broker);
    let first = it.submit(b"first", LONG).unwrap();
    it.submit(b"second", LONG).unwrap();
    let status = broker.wait_until_upstream("it", |it| it["maxwait_ms"].as_u64() > Some(20));
    assert_eq!(status["waiters"], 1, "{status:#}");
    let reply = client.next_reply(LONG).unwrap();
    let refused = reply.result.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::WaitTimeout), "{refused}");
    assert!(refused.to_string().contains("nothing of it was sent"), "{refused}");
    assert_eq!(client.next_reply(LONG).unwrap().id, first);
}

#[test]
fn connect_timeout() {
    let hole = TcpBlackHole::start();
    let config = format!(
        "[upstream.it]\nurl = \"{}\"\nconnect_timeout = \"100ms\"\n\
         breaker_failures = 1\n",
        hole.url()
    );
    let broker = Broker::builder().config(&config).start();
    let (_client, it) = connect(&broker);
    let failed = it.request(b"x", LONG).unwrap_err();
    assert_eq!(failed.reason(), Some(Reason::ConnectTimeout), "{failed}");
    closed(&broker, "connect_timeout", 1);
}

#[test]
fn request_timeout() {
    let (_peer, broker) = serve(Manners::NeverReplies, "request_timeout = \"100ms\"");
    let (_client, it) = connect(&broker);
    let failed = it.request(b"x", LONG).unwrap_err();
    assert_eq!(failed.reason(), Some(Reason::RequestTimeout), "{failed}");
    assert!(failed.to_string().contains("may have been"), "{failed}");
    closed(&broker, "request_timeout", 1);
}

#[test]
fn idle_timeout() {
    let (_peer, broker) = serve(Manners::Prompt, "idle_timeout = \"100ms\"");
    let (_client, it) = connect(&broker);
    it.request(b"x", LONG).unwrap();
    let status = closed(&broker, "idle_timeout", 1);
    assert!(list(&status, "connections").is_empty(), "{status:#}");
}

#[test]
fn lifetime() {
    let (peer, broker) = serve(Manners::Prompt, "lifetime = \"100ms\"\nidle_timeout = \"0s\"");
    let (_client, it) = connect(&broker);
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(500) {
        it.request(b"x", LONG).unwrap();
    }
    // With 10 % of jitter there were at least four of them.
    assert!(peer.connections_ever() >= 4, "{}", peer.connections_ever());
    assert!(count_of(&broker.upstream_status("it"), "connections_closed", "lifetime") >= 3);
}

#[test]
fn pipeline_depth() {
    let (peer, broker) = serve(Manners::NeverReplies, "connections_max = 1\npipeline_depth = 3");
    let (_client, it) = connect(&broker);
    (0..4).for_each(|_| _ = it.submit(b"x", LONG).unwrap());
    broker.wait_until_upstream("it", |it| it["waiters"] == 1 && it["in_flight"] == 4);
    poolbroker_tests::deadline::wait_for("three are written", || {
        (peer.messages() == 3).then_some(())
    });
    thread::sleep(Duration::from_millis(50));
    assert_eq!(peer.messages(), 3, "and not the fourth");
}

#[test]
fn requests_per_connection_max() {
    for depth in [1, 4] {
        let limits = format!(
            "connections_max = 1\nrequests_per_connection_max = 3\npipeline_depth = {depth}"
        );
        let (peer, broker) = serve(Manners::Prompt, &limits);
        let (client, it) = connect(&broker);
        (0..9).for_each(|_| _ = it.submit(b"x", LONG).unwrap());
        (0..9).for_each(|_| _ = client.next_reply(LONG).unwrap().result.unwrap());
        closed(&broker, "uses_max", 3);
        assert_eq!(peer.connections_ever(), 3);
    }
}

#[test]
fn message_bytes_max() {
    let (_peer, broker) = serve(Manners::Prompt, "message_bytes_max = 100");
    let (_client, it) = connect(&broker);
    assert_eq!(it.request(&[b'x'; 100], LONG).unwrap(), [b'x'; 100]);
    let refused = it.request(&[b'x'; 101], LONG).unwrap_err();
    assert!(refused.to_string().contains("message_bytes_max is 100"), "{refused}");
}

#[test]
fn breaker_failures() {
    let (mut peer, broker) = serve(
        Manners::Prompt,
        "breaker_failures = 2\nbackoff_base = \"10s\"\nbackoff_max = \"10s\"",
    );
    let (_client, it) = connect(&broker);
    peer.stop();
    let mut last = None;
    for _ in 0..2 {
        last = Some(it.request(b"x", Duration::from_secs(15)).unwrap_err());
    }
    assert_eq!(last.unwrap().reason(), Some(Reason::ConnectRefused));
    let start = Instant::now();
    let fast = it.request(b"x", LONG).unwrap_err();
    assert_eq!(fast.reason(), Some(Reason::ConnectRefused), "the cached reason: {fast}");
    assert!(start.elapsed() < Duration::from_secs(1));
}

/// U16: it accepts every connection, and resets it.
#[test]
fn breaker_failures_of_a_peer_that_flaps() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let accepted = Arc::new(AtomicU64::new(0));
    let (counting, is_well) = (Arc::clone(&accepted), Arc::new(AtomicBool::new(false)));
    let turned = Arc::clone(&is_well);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            counting.fetch_add(1, Ordering::SeqCst);
            match turned.load(Ordering::SeqCst) {
                true => _ = io::copy(&mut &stream, &mut &stream),
                // Closed with a reset.
                false => sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap(),
            }
        }
    });
    let config = format!(
        "[upstream.it]\nurl = \"tcp://127.0.0.1:{port}\"\nbreaker_failures = 3\n\
         backoff_base = \"200ms\"\nbackoff_max = \"200ms\"\nconnections_max = 1\n"
    );
    let broker = Broker::builder().config(&config).start();
    let (_client, it) = connect(&broker);
    let mut requests = 0;
    while broker.upstream_status("it")["breaker"] == "closed" {
        it.request(b"x", LONG).unwrap_err();
        requests += 1;
        assert!(requests < 50, "the breaker never opens");
    }
    let before = accepted.load(Ordering::SeqCst);
    for _ in 0..100 {
        it.request(b"x", LONG).unwrap_err();
    }
    // The half-open probe tries now and then; nobody else does.
    let tried = accepted.load(Ordering::SeqCst) - before;
    assert!(tried < 20, "{tried} connections for 100 requests");
    is_well.store(true, Ordering::SeqCst);
    wait_for("the peer is well", || it.request(b"x", LONG).ok());
    assert_eq!(broker.upstream_status("it")["breaker"], "closed");
}

#[test]
fn retry_budget_percent() {
    // Each request costs a connection, and is repeated twice where the budget allows.
    for (percent, repeated) in [(0, 0), (100, 20)] {
        let limits = format!("idempotent = true\nretry_budget_percent = {percent}");
        let (_peer, broker) = serve(Manners::ResetsInReply, &limits);
        let (_client, it) = connect(&broker);
        for _ in 0..10 {
            it.request(b"x", LONG).unwrap_err();
        }
        let status = broker.upstream_status("it");
        assert!(status["retried"].as_u64() <= Some(repeated), "{status:#}");
        assert_eq!(status["retried"].as_u64() > Some(0), percent > 0, "{status:#}");
    }
}

#[test]
fn retransmits() {
    let peer = UdpEcho::start();
    let config = format!(
        "[upstream.it]\nurl = \"{}?id_offset=0&id_width=2\"\nretransmits = 2\n\
         retransmit_interval = \"50ms\"\nrequest_timeout = \"400ms\"\n",
        "udp://192.0.2.1:9"
    );
    drop(peer);
    let broker = Broker::builder().config(&config).start();
    let (_client, it) = connect(&broker);
    let failed = it.request(b"id", LONG).unwrap_err();
    let status = broker.upstream_status("it");
    // Where there is no route to that network, it fails at once.
    let is_sent = failed.reason() == Some(Reason::RequestTimeout);
    assert_eq!(status["retransmitted"], if is_sent { 2 } else { 0 }, "{failed} {status:#}");
}

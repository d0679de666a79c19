//! Leases: a connection of the pool as a socket of one's own, lent once at a time, given back clean,
//! taken back otherwise.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use poolbroker_client::{Client, Error, Lease, Reason, Transport, Upstream};
use poolbroker_tests::Broker;
use poolbroker_tests::peers::{TcpEcho, UdpEcho, UdpSink};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(20);
const RING: Transport = Transport::Ring { bytes: 256 * 1024 };

fn config(name: &str, url: &str, rest: &str) -> String {
    format!("[upstream.{name}]\nurl = \"{url}\"\nlease = true\n{rest}\n")
}

fn connect(broker: &Broker, transport: Transport, name: &str) -> Upstream {
    let client = Client::connect_in_with(broker.runtime_dir(), transport).unwrap();
    client.upstream(name).unwrap()
}

fn exchange(lease: &Lease, line: &str) -> String {
    let mut stream = lease.tcp().unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply).unwrap();
    reply.trim_end().to_owned()
}

#[track_caller]
fn assert_identities(status: &Value) {
    let leases = &status["leases"];
    let count = |name: &str| leases[name].as_u64().unwrap();
    let sum = |name: &str| {
        leases[name].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!(count("asked"), count("granted") + sum("refused") + count("waiting"), "{leases}");
    assert_eq!(count("granted"), count("returned") + sum("ended") + count("held"), "{leases}");
}

#[test]
fn a_lease_is_the_connection_itself_and_comes_back_for_the_next_one() {
    let peer = TcpEcho::start();
    for transport in [Transport::Unix, RING] {
        let broker = Broker::builder().config(&config("echo", &peer.url(), "")).start();
        let echo = connect(&broker, transport, "echo");
        let mut local = Vec::new();
        for round in 0..3 {
            let lease = echo.lease(LONG).unwrap();
            let line = format!("round {round}");
            assert_eq!(exchange(&lease, &line), line);
            local.push(lease.tcp().unwrap().local_addr().unwrap());
            let status = broker.wait_until_upstream("echo", |it| it["leases"]["held"] == 1);
            let conn = &status["connections"][0];
            assert_eq!((&conn["state"], &conn["role"]), (&"leased".into(), &"exchange".into()));
            assert!(conn["session"].as_u64().is_some(), "{conn}");
            lease.release().unwrap();
        }
        assert!(local.iter().all(|address| *address == local[0]), "one connection: {local:?}");
        let status = broker.wait_until_upstream("echo", |it| it["leases"]["returned"] == 3);
        assert_identities(&status);
    }
}

#[test]
fn requests_go_on_beside_a_lease_and_never_over_a_connection_that_was_lent() {
    let peer = TcpEcho::start();
    let broker = Broker::builder().config(&config("echo", &peer.url(), "")).start();
    let echo = connect(&broker, Transport::Unix, "echo");
    let lease = echo.lease(LONG).unwrap();
    assert_eq!(exchange(&lease, "mine"), "mine");
    assert_eq!(echo.request(b"everybody's", LONG).unwrap(), b"everybody's");
    let kept = lease.tcp().unwrap().try_clone().unwrap();
    lease.release().unwrap();
    broker.wait_until_upstream("echo", |it| it["leases"]["returned"] == 1);
    // Its former holder still has it, and writes what would answer nobody's question.
    (&kept).write_all(b"forged\n").unwrap();
    for number in 0..50 {
        let body = format!("request {number}");
        assert_eq!(echo.request(body.as_bytes(), LONG).unwrap(), body.as_bytes());
    }
    assert_eq!(broker.upstream_status("echo")["replied"], 51);
}

#[test]
fn a_lease_that_is_not_given_back_clean_is_closed() {
    let peer = TcpEcho::start();
    let broker = Broker::builder().config(&config("echo", &peer.url(), "")).start();
    let echo = connect(&broker, Transport::Unix, "echo");
    drop(echo.lease(LONG).unwrap());
    broker.wait_until_upstream("echo", |it| it["leases"]["ended"]["lease_ended"] == 1);

    let unread = echo.lease(LONG).unwrap();
    unread.tcp().unwrap().write_all(b"never read\n").unwrap();
    // The reply is there.
    unread.tcp().unwrap().peek(&mut [0; 1]).unwrap();
    unread.release().unwrap();
    let status =
        broker.wait_until_upstream("echo", |it| it["leases"]["ended"]["lease_unclean"] == 1);
    assert_identities(&status);
    assert_eq!(echo.request(b"fine", LONG).unwrap(), b"fine");
}

#[test]
fn a_lease_ends_with_its_deadline_and_with_its_holder() {
    let peer = TcpEcho::start();
    let broker = Broker::builder().config(&config("echo", &peer.url(), "")).start();
    let echo = connect(&broker, Transport::Unix, "echo");
    let lease = echo.lease(Duration::from_millis(100)).unwrap();
    // Revoked: whoever holds it meets the end.
    assert_eq!(lease.tcp().unwrap().read(&mut [0; 1]).unwrap(), 0);
    broker.wait_until_upstream("echo", |it| it["leases"]["ended"]["lease_expired"] == 1);
    drop(lease);

    let other = connect(&broker, Transport::Unix, "echo");
    let lease = other.lease(LONG).unwrap();
    let copy: TcpStream = lease.tcp().unwrap().try_clone().unwrap();
    std::mem::forget(lease);
    let session = other.clone();
    drop((other, session));
    // The client of that lease still lives in it; a process that dies takes all of it along.
    assert_eq!(broker.upstream_status("echo")["leases"]["held"], 1);
    drop(copy);
}

#[test]
fn leases_wait_in_turn_and_are_refused_with_the_remedy() {
    let peer = TcpEcho::start();
    let limits = "connections_max = 1\nwait_timeout = \"100ms\"";
    let broker = Broker::builder()
        .config(&config("echo", &peer.url(), limits))
        .upstream("plain", &peer.url())
        .start();
    let echo = connect(&broker, Transport::Unix, "echo");
    let held = echo.lease(LONG).unwrap();
    let other = connect(&broker, Transport::Unix, "echo");
    let refused = other.lease(LONG).unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::WaitTimeout), "{refused}");
    let waiting = std::thread::spawn(move || other.lease(LONG));
    broker.wait_until_upstream("echo", |it| it["leases"]["waiting"] == 1);
    held.release().unwrap();
    waiting.join().unwrap().unwrap().release().unwrap();

    let plain = connect(&broker, Transport::Unix, "plain");
    let refused = plain.lease(LONG).unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    assert!(refused.to_string().contains("lease = true"), "{refused}");
    assert_identities(&broker.upstream_status("echo"));
}

#[test]
fn datagram_sockets_are_lent_and_a_write_only_one_stays_deaf() {
    let (echo, sink) = (UdpEcho::start(), UdpSink::start());
    let broker = Broker::builder()
        .config(
            &[config("dns", &echo.url(), ""), config("metrics", &sink.url_write_only(), "")]
                .concat(),
        )
        .start();
    let dns = connect(&broker, Transport::Unix, "dns");
    let lease = dns.lease(LONG).unwrap();
    let socket = lease.udp().unwrap();
    socket.send(b"query").unwrap();
    let mut reply = [0; 16];
    let bytes = socket.recv(&mut reply).unwrap();
    assert_eq!(&reply[..bytes], b"query");
    lease.release().unwrap();

    let metrics = connect(&broker, Transport::Unix, "metrics");
    let lease = metrics.lease(LONG).unwrap();
    let socket = lease.udp().unwrap();
    socket.send(b"a:1|c").unwrap();
    assert_eq!(sink.wait_for(1), [b"a:1|c"]);
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(socket.recv(&mut reply).is_err(), "nothing is ever received");
    lease.release().unwrap();
    assert_identities(&broker.wait_until_upstream("metrics", |it| it["leases"]["returned"] == 1));
}

#[test]
fn a_shutdown_leaves_a_lease_to_its_holder() {
    let peer = TcpEcho::start();
    let mut broker = Broker::builder().config(&config("echo", &peer.url(), "")).start();
    let echo = connect(&broker, Transport::Unix, "echo");
    let lease = echo.lease(LONG).unwrap();
    assert!(broker.terminate().success());
    assert_eq!(exchange(&lease, "still there"), "still there");
}

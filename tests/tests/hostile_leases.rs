//! Borrowers that mean harm: they lose their leases, and nobody else loses anything.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::time::Duration;

use poolbroker_client::{Client, Reason, Upstream};
use poolbroker_proto::fd;
use poolbroker_proto::frame::{Deframer, FrameHeader, Kind};
use poolbroker_proto::message::{ClientMessage, encode};
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, list, total};
use poolbroker_tests::peers::{TcpEcho, TcpSink};
use poolbroker_tests::raw::{RawClient, ask, control, frame};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt;

const LONG: Duration = Duration::from_secs(20);
const MIB: u64 = 1024 * 1024;

fn connect(broker: &Broker, name: &str) -> Upstream {
    Client::connect_in(broker.runtime_dir()).unwrap().upstream(name).unwrap()
}

#[test]
fn a_borrower_that_lingers_stops_nobody() {
    let (mute, echo) = (TcpSink::start(), TcpEcho::start());
    mute.pause();
    let broker = Broker::builder()
        .config(&format!("[upstream.mute]\nurl = \"{}\"\nlease = true\n", mute.url()))
        .upstream("echo", &echo.url())
        .start();
    let lease = connect(&broker, "mute").lease(LONG).unwrap();
    let mut stream = lease.tcp().unwrap();
    // Whoever closes it last would wait that long for what is unsent: longer than the test does.
    sockopt::set_socket_linger(stream, Some(Duration::from_secs(300))).unwrap();
    sockopt::set_tcp_user_timeout(stream, 0).unwrap();
    stream.set_nonblocking(true).unwrap();
    let full = loop {
        if let Err(error) = stream.write(&[0; 65536]) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    drop(lease);
    broker.wait_until_upstream("mute", |it| count_of(&it["leases"], "ended", "lease_ended") == 1);
    assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
    mute.resume();
}

#[test]
fn refusals_that_nobody_reads_cost_no_memory() {
    let echo = TcpEcho::start();
    let broker = Broker::builder().upstream("echo", &echo.url()).start();
    let before = broker.rss_bytes();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    let (header, body) = control(5, handle, &ClientMessage::Lease);
    let questions = frame(header, &body).repeat(1000);
    client.socket().set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    // Until the broker takes no more, or has taken far more than it may keep answers to.
    let mut socket = client.socket();
    let asked = (0..1000).take_while(|_| socket.write_all(&questions).is_ok()).count();
    assert!(asked < 1000, "it reads on though nobody reads its answers");
    let grown = broker.rss_bytes().saturating_sub(before);
    assert!(grown < 16 * MIB, "grown by {grown} bytes");
    assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
}

#[test]
fn descriptors_that_nobody_reads_are_few() {
    let echo = TcpEcho::start();
    let broker = Broker::builder()
        .config(&format!("[upstream.echo]\nurl = \"{}\"\nlease = true\n", echo.url()))
        .start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    let body = encode(&ClientMessage::Lease).unwrap();
    for correlation in 1..=200 {
        let header =
            FrameHeader { kind: Kind::Control, upstream: handle, correlation, timeout_ms: 10 };
        client.send_frame(header, &body);
        // One at a time, so that each finds a connection free.
        broker.wait_until_upstream("echo", |it| {
            total(&it["leases"], "asked") == correlation
                && total(&it["leases"], "held") + total(&it["leases"], "waiting") == 0
        });
    }
    let leases = &broker.upstream_status("echo")["leases"];
    let unread = count_of(leases, "ended", "lease_expired");
    assert!(unread <= 16, "passed to somebody who does not read: {leases}");
    assert_eq!(count_of(leases, "ended", "reply_undeliverable"), 200 - unread, "{leases}");
    // They go on once they read, and each descriptor stands where its answer does.
    let deframer = Deframer::new(1000);
    let (mut bytes, mut answers, mut refusals, mut passed) = (Vec::new(), 0, 0, 0);
    let mut block = [0; 4096];
    while let Ok(received) = fd::receive(client.socket(), &mut block) {
        bytes.extend_from_slice(&block[..received.bytes]);
        passed += received.descriptors.len() as u64;
    }
    let mut rest = &bytes[..];
    while let Some(frame) = deframer.next_frame(rest).unwrap() {
        rest = &rest[frame.frame_bytes..];
        match frame.header.kind {
            Kind::Control => answers += 1,
            _ => refusals += 1,
        }
    }
    assert_eq!((answers, passed, refusals), (unread, unread, 200 - unread));
    let header =
        FrameHeader { kind: Kind::Control, upstream: handle, correlation: 201, timeout_ms: 0 };
    client.send_frame(header, &body);
    poll(&mut [PollFd::new(client.socket(), PollFlags::IN)], None).unwrap();
    let received = fd::receive(client.socket(), &mut block).unwrap();
    assert_eq!(received.descriptors.len(), 1, "whoever reads is served again");
}

#[test]
fn who_borrows_all_that_may_be_lent_leaves_a_connection_for_requests() {
    let echo = TcpEcho::start();
    for (limits, most) in [("connections_max = 4", 3), ("connections_max = 4\nleases_max = 2", 2)] {
        let config = format!(
            "[upstream.echo]\nurl = \"{}\"\nlease = true\nwait_timeout = \"100ms\"\n{limits}\n",
            echo.url()
        );
        let broker = Broker::builder().config(&config).start();
        let greedy = connect(&broker, "echo");
        let held: Vec<_> = (0..most).map(|_| greedy.lease(LONG).unwrap()).collect();
        let refused = greedy.lease(LONG).unwrap_err();
        assert_eq!(refused.reason(), Some(Reason::WaitTimeout), "{refused}");
        assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
        drop(held);
    }
}

#[test]
fn what_borrowers_do_to_connections_is_not_the_fault_of_the_address() {
    let echo = TcpEcho::start();
    let config =
        format!("[upstream.echo]\nurl = \"{}\"\nlease = true\nbreaker_failures = 3\n", echo.url());
    let broker = Broker::builder().config(&config).start();
    let upstream = connect(&broker, "echo");
    for _ in 0..10 {
        let lease = upstream.lease(LONG).unwrap();
        let kept = lease.tcp().unwrap().try_clone().unwrap();
        lease.release().unwrap();
        broker.wait_until_upstream("echo", |it| total(&it["leases"], "held") == 0);
        kept.shutdown(Shutdown::Both).unwrap();
        broker.wait_until_upstream("echo", |it| list(it, "connections").is_empty());
    }
    let status = broker.upstream_status("echo");
    assert_eq!(status["breaker"], "closed", "{status}");
    assert_eq!(upstream.request(b"alive", LONG).unwrap(), b"alive");
}

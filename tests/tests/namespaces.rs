//! Few local ports and narrow paths: in a network namespace of one's own. Ignored by `cargo test`,
//! since making a namespace takes root or a kernel that lets users do it.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use poolbroker_proto::message::Retry;
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, list, total};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::namespace::inside;
use poolbroker_tests::peers::{Manners, TcpEcho, UdpEcho, UdpSink};
use poolbroker_tests::raw::{Answer, RawClient, ask};
use poolbroker_tests::raw_ring::RawRing;

#[test]
#[ignore = "needs root for a network namespace; run by .ci/run with -- --ignored"]
fn late_udp_replies_reach_nobody_though_ports_are_used_again() {
    with_ports("40000 40031", "late_udp_replies_reach_nobody_though_ports_are_used_again", || {
        const REQUESTS: u64 = 100_000;
        // The peer answers 50 ms after the request has timed out.
        let echo = UdpEcho::late_every(400, Duration::from_millis(100));
        let config = format!(
            "[upstream.echo]\nurl = \"{}\"\nrequest_timeout = \"50ms\"\n\
             late_reply_window = \"150ms\"\n",
            echo.url()
        );
        let broker = Broker::builder().config(&config).start();
        let (own, failed) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
                    let handle = client.open("echo");
                    while own.load(Ordering::Relaxed) + failed.load(Ordering::Relaxed) < REQUESTS {
                        let token = format!("{:032x}", fastrand::u128(..));
                        match client.request(handle, 0, token.as_bytes()) {
                            Answer::Reply(body) => {
                                assert_eq!(body, token.as_bytes(), "another request's reply");
                                own.fetch_add(1, Ordering::Relaxed);
                            }
                            Answer::Failed(_) => {
                                failed.fetch_add(1, Ordering::Relaxed);
                            }
                            Answer::Closed => panic!("the session ended"),
                        }
                    }
                });
            }
        });
        let (own, failed) = (own.into_inner(), failed.into_inner());
        println!("{own} replies, {failed} failures");
        assert!(own > REQUESTS / 10 * 9, "{own} replies, {failed} failures");
        let status = broker.status();
        broker.assert_sums(&status);
        let upstream = broker.upstream_status("echo");
        // More sockets were used than there are ports: every port was drawn again and again.
        assert!(total(&upstream, "connections_opened") > 128, "{upstream:#}");
        assert!(total(&upstream, "replies_discarded") > 0, "{upstream:#}");
    });
}

#[test]
#[ignore = "needs root for a network namespace; run by .ci/run with -- --ignored"]
fn without_a_free_port_the_open_connections_keep_serving() {
    with_ports("40000 40003", "without_a_free_port_the_open_connections_keep_serving", || {
        let echo = TcpEcho::behaving(Manners::Slow(Duration::from_millis(20)));
        let broker = Broker::start(&[format!("echo={}", echo.url())]);
        let replied = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
                    let handle = client.open("echo");
                    for _ in 0..50 {
                        assert_eq!(client.request(handle, 0, b"x").reply(), b"x");
                        replied.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(replied.into_inner(), 600);
        let upstream = broker.upstream_status("echo");
        assert!(count_of(&upstream, "connections_closed", "no_ports") > 0, "{upstream:#}");
        assert_eq!(list(&upstream, "connections").len(), 4, "{upstream:#}");
    });
}

#[test]
#[ignore = "needs root for a network namespace; run by .ci/run with -- --ignored"]
fn udp_without_a_free_port_recovers_when_one_is_free() {
    with_ports("40000 40001", "udp_without_a_free_port_recovers_when_one_is_free", || {
        let echo = UdpEcho::late_every(1, Duration::from_millis(300));
        let config =
            format!("[upstream.echo]\nurl = \"{}\"\nlate_reply_window = \"600ms\"\n", echo.url());
        let broker = Broker::builder().config(&config).start();
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("echo");
        for _ in 0..2 {
            client.request(handle, 100, b"late").failure();
        }
        echo.behave(0, Duration::ZERO);
        let reply = wait_for("a port becomes free", || {
            match ask(broker.runtime_dir(), "echo", b"at last") {
                Answer::Reply(body) => Some(body),
                Answer::Failed(_) | Answer::Closed => None,
            }
        });
        assert_eq!(reply, b"at last");
        let status = broker.status();
        broker.assert_sums(&status);
    });
}

#[test]
#[ignore = "needs root for a network namespace; run by .ci/run with -- --ignored"]
fn runs_of_datagrams_longer_than_the_path_takes_are_sent_one_by_one() {
    let name = "runs_of_datagrams_longer_than_the_path_takes_are_sent_one_by_one";
    with_ports("40000 50000", name, || {
        let lowered = Command::new("ip").args(["link", "set", "lo", "mtu", "1500"]).status();
        assert!(lowered.unwrap().success());
        let sink = UdpSink::start();
        let broker = Broker::start(&[format!("metrics={}", sink.url_write_only())]);
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("metrics");
        let mut written = Vec::new();
        // A segmented send of pieces that need fragments is refused by the kernel; up to 1472 bytes
        // fit the path.
        for size in [1472, 1473, 2000, 100, 30_000, 1472] {
            for number in 0..20 {
                let mut body = format!("{number} of {size} ").into_bytes();
                body.resize(size, b'.');
                client.send(handle, &body);
                written.push(body);
            }
            sink.wait_for(written.len());
        }
        assert!(sink.received() == written, "order or content changed");
        let outcomes = client.flush(handle);
        assert_eq!(outcomes.sent, written.len() as u64, "{outcomes:?}");
    });
}

/// U12: what went by GSO a moment ago does not any more.
#[test]
#[ignore = "needs root for a network namespace; run by .ci/run with -- --ignored"]
fn a_path_that_narrows_under_traffic_loses_and_doubles_nothing() {
    let name = "a_path_that_narrows_under_traffic_loses_and_doubles_nothing";
    with_ports("40000 50000", name, || {
        let sink = UdpSink::start();
        let broker = Broker::start(&[format!("metrics={}", sink.url_write_only())]);
        let mut client = RawRing::connect(broker.runtime_dir());
        let handle = client.open_upstream("metrics");
        let mut written = Vec::new();
        for mtu in [65_536, 1_500, 1_280, 600, 65_536] {
            let mtu_text = mtu.to_string();
            let set = Command::new("ip").args(["link", "set", "lo", "mtu", &mtu_text]).status();
            assert!(set.unwrap().success());
            for number in 0..500 {
                let mut body = format!("{number} at {mtu} ").into_bytes();
                body.resize(1_200, b'.');
                client.send(handle, &body);
                written.push(body);
            }
            sink.wait_for(written.len());
        }
        assert!(sink.received() == written, "order or content changed");
        let outcomes = client.flush(handle);
        assert_eq!(outcomes.sent, written.len() as u64, "{outcomes:?}");
    });
}

/// U10: a local queue that is full is noticed, waited for, and at last counted.
#[test]
#[ignore = "needs root for a network namespace; run by .ci/run with -- --ignored"]
fn what_a_full_local_queue_refuses_is_sent_later_or_counted() {
    let name = "what_a_full_local_queue_refuses_is_sent_later_or_counted";
    with_ports("40000 50000", name, || {
        let shape = "qdisc add dev lo root tbf rate 100kbit burst 1600 limit 3000";
        let shaped = Command::new("tc").args(shape.split(' ')).status();
        assert!(shaped.unwrap().success());
        let sink = UdpSink::start();
        // This queue would cut a segmented send apart, and call what is left of it sent.
        let config = format!(
            "[upstream.metrics]\nurl = \"{}\"\ngso_segments_max = 1\n",
            sink.url_write_only()
        );
        let broker = Broker::builder().config(&config).start();
        let mut client = RawRing::connect(broker.runtime_dir());
        let handle = client.open_upstream("metrics");
        for _ in 0..200 {
            client.send(handle, &[b'.'; 700]);
        }
        let outcomes = client.flush(handle);
        // It takes longer for one to leave than a message is tried: some wait, some are given up.
        assert!(outcomes.sent > 10 && outcomes.dropped_total() > 10, "{outcomes:?}");
        assert_eq!(outcomes.accepted, 200);
        assert_eq!(outcomes.sent + outcomes.dropped_total(), 200);
        let received = sink.wait_for(usize::try_from(outcomes.sent).unwrap());
        assert_eq!(received.len() as u64, outcomes.sent, "what is called sent has arrived");
        let upstream = broker.upstream_status("metrics");
        assert_eq!(count_of(&upstream, "dropped", "enobufs"), outcomes.dropped_total());
        broker.assert_sums(&broker.status());
    });
}

/// U6: nothing arrives any more, and nobody says so.
#[test]
#[ignore = "needs root for a network namespace; run by .ci/run with -- --ignored"]
fn a_peer_that_vanishes_fails_its_requests_and_is_found_by_those_that_wait() {
    let name = "a_peer_that_vanishes_fails_its_requests_and_is_found_by_those_that_wait";
    inside("true", name, || {
        let host = Host::start();
        let config = "[upstream.echo]\nurl = \"tcp://10.77.0.2:7\"\nconnections_max = 1\n\
             request_timeout = \"1h\"\nwait_timeout = \"1h\"\nconnect_timeout = \"1s\"\n\
             tcp_user_timeout = \"2s\"\nkeepalive_idle = \"1s\"\nkeepalive_interval = \"1s\"\n\
             keepalive_probes = 2\n";
        let broker = Broker::builder().config(config).start();
        assert_eq!(ask(broker.runtime_dir(), "echo", b"warm").reply(), b"warm");
        host.run("ip link set v1 down");
        // Sent into the dark: who knows what became of it.
        let failure = ask(broker.runtime_dir(), "echo", b"lost").failure();
        assert_eq!(failure.retry, Retry::MaybeExecuted, "{failure:?}");
        host.run("ip link set v1 up");
        assert_eq!(ask(broker.runtime_dir(), "echo", b"back").reply(), b"back");
        // One that only waits is found by the probes of the kernel.
        host.run("ip link set v1 down");
        broker.wait_until_upstream("echo", |upstream| list(upstream, "connections").is_empty());
        host.run("ip link set v1 up");
        assert_eq!(ask(broker.runtime_dir(), "echo", b"again").reply(), b"again");
        broker.assert_sums(&broker.status());
    });
}

/// Another host, 10.77.0.2, that echoes lines on port 7.
struct Host {
    namespace: Child,
    echo: Child,
}

impl Host {
    fn start() -> Host {
        let namespace = Command::new("unshare").args(["--net", "sleep", "1000"]).spawn().unwrap();
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        let theirs = format!("/proc/{}/ns/net", namespace.id());
        wait_for("another network", || fs::read_link(&theirs).ok().filter(|ns| *ns != own));
        let link = format!(
            "ip link add v0 type veth peer name v1 netns {} && ip addr add 10.77.0.1/24 dev v0 && \
             ip link set v0 up",
            namespace.id()
        );
        assert!(Command::new("sh").args(["-c", &link]).status().unwrap().success());
        let echo = within(&namespace, "exec socat TCP-LISTEN:7,fork,reuseaddr EXEC:cat");
        let mut host = Host { namespace, echo };
        host.run("ip addr add 10.77.0.2/24 dev v1 && ip link set v1 up");
        wait_for("the echo", || TcpStream::connect("10.77.0.2:7").ok());
        assert!(host.echo.try_wait().unwrap().is_none());
        host
    }

    fn run(&self, script: &str) {
        assert!(within(&self.namespace, script).wait().unwrap().success(), "{script}");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for child in [&mut self.echo, &mut self.namespace] {
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

fn within(namespace: &Child, script: &str) -> Child {
    let target = namespace.id().to_string();
    let mut nsenter = Command::new("nsenter");
    nsenter.args(["--target", &target, "--net", "sh", "-c", script]).spawn().unwrap()
}

/// Runs `body` with this range of local ports.
fn with_ports(range: &str, name: &str, body: impl FnOnce()) {
    inside(&format!("echo {range} > /proc/sys/net/ipv4/ip_local_port_range"), name, body);
}

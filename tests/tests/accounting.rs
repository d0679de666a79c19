//! The sums of the accounting: equal at every moment, and true in the end.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use poolbroker_tests::Broker;
use poolbroker_tests::broker::{listener_in, total, upstream_in};
use poolbroker_tests::peers::{Manners, TcpEcho, TcpSink, UdpSink, unused_port};
use poolbroker_tests::raw::{Answer, RawClient};

const POLLS: usize = 100;

#[test]
fn both_sums_are_equal_at_every_moment_under_mixed_load() {
    let metrics = UdpSink::answering(2);
    let logs = TcpSink::start();
    logs.answer_each(b"?");
    let echo =
        TcpEcho::behaving(Manners::SlowEvery { every: 10, delay: Duration::from_millis(60) });
    let config = format!(
        "[upstream.metrics]\nurl = \"{}\"\n[upstream.logs]\nurl = \"{}\"\n\
         [upstream.echo]\nurl = \"{}\"\nconnections_max = 2\nwaiters_max = 2\n\
         [upstream.down]\nurl = \"tcp://127.0.0.1:{}\"\nqueue_timeout = \"50ms\"\n\
         overflow = \"drop-newest\"\nqueue_bytes_max = 4096\n",
        metrics.url_write_only(),
        logs.url(),
        echo.url(),
        unused_port()
    );
    let broker = Broker::builder().config(&config).start();
    let load = Load::default();
    thread::scope(|scope| {
        scope.spawn(|| load.send(&broker, "metrics", &load.metrics));
        scope.spawn(|| load.send(&broker, "logs", &load.logs));
        scope.spawn(|| load.send(&broker, "down", &load.down));
        scope.spawn(|| load.write(&broker, &load.logs));
        for _ in 0..6 {
            scope.spawn(|| load.request(&broker));
        }
        let mut polls = 0;
        while polls < POLLS || !load.has_begun() {
            broker.assert_sums(&broker.status());
            polls += 1;
        }
        load.done.store(true, Ordering::SeqCst);
    });

    let status = broker.wait_until(|status| {
        let upstreams = status["upstreams"].as_array().unwrap();
        upstreams.iter().all(|upstream| total(upstream, "queued") == 0)
    });
    broker.assert_sums(&status);
    for (name, counter) in [("metrics", &load.metrics), ("logs", &load.logs), ("down", &load.down)]
    {
        let upstream = upstream_in(&status, name);
        assert_eq!(total(upstream, "accepted"), counter.load(Ordering::SeqCst), "{name}");
    }
    let down = upstream_in(&status, "down");
    assert_eq!(total(down, "sent"), 0, "{down:#}");
    assert!(total(down, "expired") > 0 && total(down, "dropped") > 0, "{down:#}");
    let logs_sent = usize::try_from(total(upstream_in(&status, "logs"), "sent")).unwrap();
    assert_eq!(logs.wait_for(logs_sent).len(), logs_sent);
    let echo = upstream_in(&status, "echo");
    assert_eq!(total(echo, "in_flight"), 0, "{echo:#}");
    assert_eq!(total(echo, "replied"), load.replied.load(Ordering::SeqCst));
    assert_eq!(total(echo, "requests"), load.requests.load(Ordering::SeqCst));
}

#[test]
fn each_door_counts_what_came_through_it() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let (mut client, session) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("logs");
    for body in [&b"one"[..], b"two", b"", b"torn\napart"] {
        client.send(handle, body);
    }
    let outcomes = client.flush(handle);
    assert_eq!((outcomes.accepted, outcomes.refused_total()), (2, 2), "{outcomes:?}");
    let mut fifo = File::options().write(true).open(broker.fifo("logs")).unwrap();
    fifo.write_all(b"three\n\n").unwrap();
    sink.wait_for(3);
    let status =
        broker.wait_until(|status| total(listener_in(status, "fifo", "logs"), "refused") == 1);
    let sessions = status["sessions"].as_array().unwrap();
    let own = sessions.iter().find(|entry| entry["id"] == session).unwrap();
    assert_eq!((total(own, "accepted"), total(own, "refused")), (2, 2));
    assert_eq!(own["transport"], "unix");
    assert_eq!(own["pid"], std::process::id());
    assert_eq!(own["uid"], rustix::process::getuid().as_raw());
    assert_eq!(total(listener_in(&status, "fifo", "logs"), "accepted"), 1);
    assert_eq!(total(upstream_in(&status, "logs"), "accepted"), 3);
}

#[test]
fn the_status_is_about_this_broker() {
    let broker = Broker::start(&["unused=tcp://127.0.0.1:9"]);
    let status = broker.status();
    assert_eq!(status["pid"], broker.pid());
    assert_eq!(status["runtime_dir"], broker.runtime_dir().to_str().unwrap());
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert!(status["uptime_s"].is_number(), "{status:#}");
    assert_eq!(status["upstreams"][0]["name"], "unused");
    assert_eq!(status["upstreams"][0]["addresses"], serde_json::json!(["127.0.0.1:9"]));
}

/// What the load has done so far.
#[derive(Default)]
struct Load {
    done: AtomicBool,
    metrics: AtomicU64,
    logs: AtomicU64,
    down: AtomicU64,
    requests: AtomicU64,
    replied: AtomicU64,
}

impl Load {
    fn has_begun(&self) -> bool {
        let all = [&self.metrics, &self.logs, &self.down, &self.replied];
        all.iter().all(|counter| counter.load(Ordering::SeqCst) > 0)
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::SeqCst)
    }

    fn send(&self, broker: &Broker, upstream: &str, counter: &AtomicU64) {
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open(upstream);
        let mut accepted = 0;
        while !self.is_done() {
            for _ in 0..200 {
                client.send(handle, b"a message of some length, but not of much");
                client.send(handle, b"");
            }
            let outcomes = client.flush(handle);
            assert_eq!(outcomes.queued(), 0, "a flush waits for every outcome: {outcomes:?}");
            assert_eq!(outcomes.refused_total(), outcomes.accepted, "{outcomes:?}");
            counter.fetch_add(outcomes.accepted - accepted, Ordering::SeqCst);
            accepted = outcomes.accepted;
        }
    }

    fn write(&self, broker: &Broker, counter: &AtomicU64) {
        let mut fifo = File::options().write(true).open(broker.fifo("logs")).unwrap();
        while !self.is_done() {
            fifo.write_all(b"a line\n").unwrap();
            counter.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn request(&self, broker: &Broker) {
        while !self.is_done() {
            let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
            let handle = client.open("echo");
            for _ in 0..10 {
                self.requests.fetch_add(1, Ordering::SeqCst);
                if let Answer::Reply(_) = client.request(handle, 50, b"question") {
                    self.replied.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
    }
}

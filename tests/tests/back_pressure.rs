//! An upstream that is slow, stuck or down: what is meant for it waits in bounds, and nobody else
//! notices.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::message::{BrokerMessage, ClientMessage};
use poolbroker_proto::reason::Reason;
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, list, listener_in, total};
use poolbroker_tests::deadline::PATIENCE;
use poolbroker_tests::peers::{Manners, TcpEcho, TcpSink, UdpSink, unused_port};
use poolbroker_tests::raw::{RawClient, ask, frame};

const MIB: u64 = 1024 * 1024;

#[test]
fn a_stuck_upstream_holds_up_only_what_is_meant_for_it() {
    const LINES: usize = 100_000;
    let (sink, echo) = (TcpSink::start(), TcpEcho::start());
    sink.pause();
    let broker = Broker::start(&[format!("stuck={}", sink.url()), format!("echo={}", echo.url())]);
    let before = broker.rss_bytes();
    let line = |number: usize| format!("{number:0>199}");
    thread::scope(|scope| {
        let fifo = broker.fifo("stuck");
        scope.spawn(move || {
            let mut fifo = writer(&fifo);
            for number in 0..LINES {
                // 200 bytes each, 20 MB in all: far more than every buffer on the way.
                fifo.write_all(format!("{}\n", line(number)).as_bytes()).unwrap();
            }
        });
        let status = broker.wait_until(|status| total(&status["upstreams"][0], "queued") > 0);
        broker.assert_sums(&status);
        for _ in 0..100 {
            assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
        }
        let stuck = broker.upstream_status("stuck");
        let queued_bytes = total(&stuck, "queued") * 200;
        assert!(queued_bytes <= MIB, "queued: {queued_bytes} bytes");
        assert!(total(&stuck, "accepted") < LINES as u64, "{stuck:#}");
        let grown = broker.rss_bytes().saturating_sub(before);
        assert!(grown < 16 * MIB, "grown by {grown} bytes");
        sink.resume();
    });
    let arrived = sink.wait_for(LINES);
    let in_order =
        arrived.iter().enumerate().all(|(number, record)| record == line(number).as_bytes());
    assert!(in_order && arrived.len() == LINES, "order or content changed");
    let status = broker.status();
    broker.assert_sums(&status);
}

/// U20: the client does not read its replies, and then the upstream does not read its requests.
#[test]
fn nothing_is_stuck_for_ever_when_neither_side_reads() {
    const REQUESTS: u64 = 400;
    let (mute, echo) = (TcpEcho::behaving(Manners::NeverReads), TcpEcho::start());
    let config = format!(
        "[upstream.mute]\nurl = \"{}\"\nrequest_timeout = \"300ms\"\nwait_timeout = \"300ms\"\n\
         [upstream.echo]\nurl = \"{}\"\n",
        mute.url(),
        echo.url()
    );
    let broker = Broker::builder().config(&config).start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let (full, well) = (client.open("mute"), client.open("echo"));
    let body = vec![b'x'; 64 * 1024];
    let mut writer = client.duplicate();
    thread::scope(|scope| {
        scope.spawn(|| {
            for id in 1..=REQUESTS {
                writer.send_request(if id % 2 == 0 { full } else { well }, id, 0, &body);
            }
        });
        // Nothing is read meanwhile: both of its ways are full, and others are served.
        broker.wait_until_upstream("mute", |it| total(it, "timed_out") > 0);
        assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
        // Each request ends once: with its reply, or by its deadline, or refused.
        let mut ended: Vec<_> = (0..REQUESTS).map(|_| client.next_answer().0).collect();
        ended.sort_unstable();
        assert!(ended.iter().copied().eq(1..=REQUESTS), "{ended:?}");
    });
    broker.assert_sums(&broker.status());
}

#[test]
fn what_waits_for_room_or_for_a_buffer_costs_no_processor_time() {
    let (mute, sink) = (TcpSink::start(), TcpSink::start());
    mute.pause();
    let hosts = format!("127.0.0.1:{},127.0.0.1:{}", mute.port(), sink.port());
    let config = format!(
        "[upstream.down]\nurl = \"tcp://127.0.0.1:{}?framing=raw\"\n\
         [upstream.all]\nurl = \"tcp://{hosts}?framing=raw\"\nmode = \"broadcast\"\n\
         [limits]\nqueued_bytes_max_per_uid = 2097152\npartial_timeout = \"10m\"\n",
        unused_port()
    );
    let broker = Broker::builder().config(&config).start();
    let idles = |what: &str| {
        thread::sleep(Duration::from_millis(100));
        let before = broker.cpu_time();
        thread::sleep(Duration::from_millis(500));
        let used = broker.cpu_time() - before;
        assert!(used < Duration::from_millis(150), "{what}: {used:?} of processor time in 500 ms");
    };
    let large = [vec![b'x'; 300 * 1024], vec![b'\n']].concat();
    // One that fits in no queue but an empty one, behind a short one that stays.
    let mut down = RawClient::welcomed(broker.runtime_dir()).0;
    let handle = down.open("down");
    down.send(handle, b"short");
    broker.wait_until_upstream("down", |it| total(it, "queued") == 1);
    down.send(handle, &large);
    idles("blocked at an upstream that is down");
    let mut all = RawClient::welcomed(broker.runtime_dir()).0;
    let handle = all.open("all");
    thread::scope(|scope| {
        let writer = scope.spawn(|| (0..100).for_each(|_| all.send(handle, &large)));
        thread::sleep(Duration::from_millis(500));
        idles("blocked at one host of a broadcast");
        mute.resume();
        writer.join().unwrap();
    });
    // Half-sent frames hold buffers until the user has none left for the others.
    let mut clients: Vec<_> =
        (0..60).map(|_| RawClient::welcomed(broker.runtime_dir()).0).collect();
    let handles: Vec<_> = clients.iter_mut().map(|client| client.open("all")).collect();
    for (client, upstream) in clients.iter_mut().zip(handles) {
        let header = FrameHeader { upstream, ..FrameHeader::new(Kind::Send) };
        client.send_bytes(&frame(header, &large)[..60_000]);
    }
    idles("starved of buffers");
    drop(clients);
}

#[test]
fn a_client_that_never_stops_sending_starves_nobody() {
    let (sink, echo) = (UdpSink::start(), TcpEcho::start());
    let broker = Broker::start(&[
        format!("metrics={}", sink.url_write_only()),
        format!("echo={}", echo.url()),
    ]);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for body in [&b"x"[..], &[b'y'; 20_000]] {
            let (broker, done) = (&broker, &done);
            scope.spawn(move || {
                let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
                let handle = client.open("metrics");
                while !done.load(Ordering::SeqCst) {
                    client.send(handle, body);
                }
            });
        }
        broker.wait_until_upstream("metrics", |upstream| total(upstream, "sent") > 10_000);
        for _ in 0..100 {
            assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
        }
        broker.assert_sums(&broker.status());
        done.store(true, Ordering::SeqCst);
    });
}

#[test]
fn messages_wait_for_an_upstream_that_is_down_and_arrive_in_order() {
    let mut sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let mut fifo = writer(&broker.fifo("logs"));
    let mut written = 0..;
    let mut write = |count: usize| {
        for number in written.by_ref().take(count) {
            fifo.write_all(format!("{number}\n").as_bytes()).unwrap();
        }
    };
    write(1000);
    sink.wait_for(1000);
    for round in 1..=3 {
        sink.stop();
        broker.wait_until_upstream("logs", |upstream| {
            let connections = list(upstream, "connections").iter();
            connections.filter(|connection| connection["state"] != "connecting").count() == 0
        });
        write(1000);
        let upstream = broker.wait_until_upstream("logs", |upstream| {
            total(upstream, "accepted") == 1000 * (round + 1)
        });
        assert_eq!(total(&upstream, "queued"), 1000, "{upstream:#}");
        sink.restart();
        let count = 1000 * usize::try_from(round + 1).unwrap();
        sink.wait_for(count);
    }
    let arrived = sink.received().into_iter();
    let expected = (0..4000).map(|number: u32| number.to_string().into_bytes());
    assert!(arrived.eq(expected), "order or content changed");
    let upstream = broker.upstream_status("logs");
    assert_eq!(total(&upstream, "sent"), 4000, "{upstream:#}");
}

#[test]
fn a_connection_that_breaks_is_followed_by_one_that_starts_at_a_message() {
    let mut sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let body = |number: u32| format!("{number} {}", "x".repeat(3000));
    thread::scope(|scope| {
        let fifo = broker.fifo("logs");
        scope.spawn(move || {
            let mut fifo = writer(&fifo);
            for number in 0..3000 {
                fifo.write_all(format!("{}\n", body(number)).as_bytes()).unwrap();
            }
        });
        for round in 1..=5 {
            sink.wait_for(round * 200);
            sink.stop();
            sink.restart();
        }
    });
    broker.wait_until_upstream("logs", |upstream| {
        total(upstream, "accepted") == 3000 && total(upstream, "queued") == 0
    });
    // What the sink's kernel had taken and the sink had not read is lost, and nothing else changes.
    let mut next = 0;
    let arrived = || sink.received().last().map(|record| record == body(2999).as_bytes());
    poolbroker_tests::deadline::wait_for("the last record arrives", || {
        arrived().filter(|last| *last)
    });
    for record in sink.received() {
        let text = String::from_utf8(record).unwrap();
        let number: u32 = text.split(' ').next().unwrap().parse().unwrap();
        assert!(number >= next, "{number} came again or behind {next}");
        assert!(text == body(number), "record {number} is damaged");
        next = number + 1;
    }
    let status = broker.status();
    broker.assert_sums(&status);
}

#[test]
fn a_connection_that_still_ends_never_tears_a_message_of_its_successor() {
    let peer = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = format!(
        "[upstream.logs]\nurl = \"tcp://{}\"\nidle_timeout = \"100ms\"\n\
         finish_timeout = \"600ms\"\nqueue_bytes_max = 2097152\n",
        peer.local_addr().unwrap()
    );
    let broker = Broker::builder().config(&config).start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("logs");
    client.send(handle, b"first");
    let (mut first, _) = peer.accept().unwrap();
    first.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = [0; 6];
    first.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"first\n");
    // It ends for idleness, and only its own half: this peer keeps the other one open.
    assert_eq!(first.read(&mut line).unwrap(), 0);
    // More than the kernel takes at once, and different everywhere.
    let body: Vec<u8> = (0..120_000).flat_map(|n| format!("{n:07},").into_bytes()).collect();
    client.send(handle, &body);
    let (mut second, _) = peer.accept().unwrap();
    second.set_read_timeout(Some(PATIENCE)).unwrap();
    broker.wait_until_upstream("logs", |upstream| total(upstream, "connections_closed") > 0);
    let mut arrived = vec![0; body.len() + 1];
    second.read_exact(&mut arrived).unwrap();
    assert!(arrived == [&body[..], b"\n"].concat(), "the message was torn");
}

#[test]
fn a_message_that_waits_too_long_expires() {
    let broker = down("queue_timeout = \"100ms\"");
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("down");
    for _ in 0..10 {
        client.send(handle, b"in vain");
    }
    let outcomes = client.flush(handle);
    assert_eq!((outcomes.accepted, outcomes.expired), (10, 10), "{outcomes:?}");
    let output = broker.command("send").args(["down", "in vain"]).output().unwrap();
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("down"), "the upstream is named: {stderr}");
}

#[test]
fn a_full_queue_blocks_or_drops_as_configured() {
    for overflow in ["drop-newest", "drop-oldest"] {
        let mut sink = TcpSink::start();
        sink.stop();
        let config = format!(
            "[upstream.logs]\nurl = \"{}\"\noverflow = \"{overflow}\"\nqueue_bytes_max = 4096\n",
            sink.url()
        );
        let broker = Broker::builder().config(&config).start();
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("logs");
        for number in 0..1000 {
            client.send(handle, format!("{number:0>100}").as_bytes());
        }
        let upstream =
            broker.wait_until_upstream("logs", |upstream| total(upstream, "accepted") == 1000);
        let dropped = count_of(&upstream, "dropped", "queue_full");
        assert!((900..1000).contains(&dropped), "{overflow}: {upstream:#}");
        sink.restart();
        broker.wait_until_upstream("logs", |upstream| total(upstream, "queued") == 0);
        let status = broker.status();
        broker.assert_sums(&status);
        let upstream = broker.upstream_status("logs");
        assert_eq!(total(&upstream, "sent"), 1000 - dropped, "{overflow}: {upstream:#}");
        let kept = usize::try_from(1000 - dropped).unwrap();
        let arrived: Vec<usize> = sink
            .wait_for(kept)
            .iter()
            .map(|record| std::str::from_utf8(record).unwrap().parse().unwrap())
            .collect();
        match overflow {
            "drop-newest" => assert_eq!(arrived, Vec::from_iter(0..kept)),
            _ => assert_eq!(arrived, Vec::from_iter(1000 - kept..1000)),
        }
    }
}

#[test]
fn a_message_that_is_refused_drops_nobody_elses() {
    let broker = down("queue_timeout = \"0s\"\noverflow = \"drop-oldest\"\nqueue_bytes_max = 4096");
    let (mut good, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = good.open("down");
    for _ in 0..4 {
        good.send(handle, &[b'a'; 1000]);
    }
    broker.wait_until_upstream("down", |upstream| total(upstream, "queued") == 4);
    let (mut bad, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = bad.open("down");
    // As long as the whole queue, and two lines.
    bad.send(handle, &[&[b'x'; 2000][..], b"\n", &[b'x'; 2000]].concat());
    let outcomes = bad.flush(handle);
    assert_eq!(outcomes.refused, [(Reason::Delimiter, 1)], "{outcomes:?}");
    let upstream = broker.upstream_status("down");
    assert_eq!((total(&upstream, "queued"), total(&upstream, "dropped")), (4, 0), "{upstream:#}");
}

#[test]
fn a_flush_waits_for_what_was_sent_before_it_though_later_messages_are_dropped() {
    let mut sink = TcpSink::start();
    sink.stop();
    let config = format!(
        "[upstream.logs]\nurl = \"{}\"\nqueue_timeout = \"0s\"\noverflow = \"drop-newest\"\n\
         queue_bytes_max = 4096\n",
        sink.url()
    );
    let broker = Broker::builder().config(&config).start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("logs");
    for _ in 0..4 {
        client.send(handle, &[b'a'; 1000]);
    }
    client.send_control(5, handle, &ClientMessage::Flush);
    for _ in 0..4 {
        client.send(handle, &[b'b'; 1000]);
    }
    broker.wait_until_upstream("logs", |upstream| {
        (total(upstream, "queued"), total(upstream, "dropped")) == (4, 4)
    });
    sink.restart();
    let answer = client.next_frame().unwrap();
    assert_eq!(answer.header.correlation, 5);
    match answer.control() {
        BrokerMessage::Flushed(outcomes) => {
            assert_eq!((outcomes.sent, outcomes.dropped_total()), (4, 4), "{outcomes:?}");
        }
        other => panic!("the broker did not flush but said {other:?}"),
    }
}

#[test]
fn a_fifo_of_an_upstream_that_is_down_holds_its_writers_back() {
    let broker = down("queue_timeout = \"0s\"\nqueue_bytes_max = 4096");
    let mut fifo = writer(&broker.fifo("down"));
    rustix::fs::fcntl_setfl(&fifo, rustix::fs::OFlags::NONBLOCK).unwrap();
    let line = [[b'x'; 99].as_slice(), b"\n"].concat();
    let mut written = 0;
    // Both the queue and the FIFO itself are full when nothing goes in and nothing leaves.
    poolbroker_tests::deadline::wait_for("the FIFO fills up", || {
        while fifo.write_all(&line).is_ok() {
            written += 1;
        }
        let accepted = total(listener_in(&broker.status(), "fifo", "down"), "accepted");
        (accepted > 0 && fifo.write_all(&line).is_err()).then_some(())
    });
    let upstream = broker.upstream_status("down");
    assert!(total(&upstream, "queued") * 100 <= 64 * 1024, "{upstream:#}");
    assert_eq!(total(&upstream, "dropped"), 0, "{upstream:#}");
    assert!(written > 500, "{written} lines fit");
}

fn down(limits: &str) -> Broker {
    let port = poolbroker_tests::peers::unused_port();
    let config = format!("[upstream.down]\nurl = \"tcp://127.0.0.1:{port}\"\n{limits}\n");
    Broker::builder().config(&config).start()
}

fn writer(fifo: &Path) -> File {
    File::options().write(true).open(fifo).unwrap()
}

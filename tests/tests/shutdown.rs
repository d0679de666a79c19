//! SIGTERM: what was accepted, and what stands in FIFOs, pipes and sockets, is sent first.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::message::{Attachment, BrokerMessage};
use poolbroker_proto::reason::Reason;
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{list, total, wait_for_child};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::peers::{Manners, TcpEcho, TcpSink, UdpBlackHole, UdpSink};
use poolbroker_tests::raw::{Attach, RawClient, frame};
use rustix::process::Signal;

#[test]
fn everything_written_to_a_fifo_before_sigterm_is_sent_in_order() {
    for round in 0..5 {
        let sink = TcpSink::start();
        sink.answer_each(b"?");
        let mut broker = Broker::start(&[format!("logs={}", sink.url())]);
        let mut fifo = File::options().write(true).open(broker.fifo("logs")).unwrap();
        let count = 20_000 + round;
        for number in 0..count {
            fifo.write_all(format!("{number}\n").as_bytes()).unwrap();
        }
        assert_eq!(broker.terminate().code(), Some(0), "{}", broker.stderr());
        let arrived = sink.wait_for(count).into_iter();
        let written = (0..count).map(|number| number.to_string().into_bytes());
        assert!(arrived.eq(written), "order or content changed");
        wait_for("the connection ends", || (sink.connections_open() == 0).then_some(()));
        assert_eq!(sink.connections_reset(), 0, "unread answers must not cause a reset");
    }
}

#[test]
fn everything_in_sockets_and_pipes_before_sigterm_is_sent_in_order() {
    const COUNT: usize = 5000;
    let (by_socket, by_pipe) = (TcpSink::start(), TcpSink::start());
    let mut broker =
        Broker::start(&[format!("socket={}", by_socket.url()), format!("pipe={}", by_pipe.url())]);
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let (socket, pipe) = (client.open("socket"), client.open("pipe"));
    let (reader, mut writer) = io::pipe().unwrap();
    let attached = client.attach(pipe, Attachment::Pipe, reader.as_fd());
    assert!(matches!(attached, Attach::Taken { .. }), "{attached:?}");
    for number in 0..COUNT {
        writer.write_all(format!("{number}\n").as_bytes()).unwrap();
        client.send(socket, number.to_string().as_bytes());
    }
    assert_eq!(broker.terminate().code(), Some(0), "{}", broker.stderr());
    for sink in [&by_socket, &by_pipe] {
        let arrived = sink.wait_for(COUNT).into_iter();
        let written = (0..COUNT).map(|number| number.to_string().into_bytes());
        assert!(arrived.eq(written), "order or content changed");
    }
    let last = client.until_closed().pop().expect("the broker says goodbye");
    match last.control() {
        BrokerMessage::Goodbye { reason, upstreams } => {
            assert!([Reason::ShuttingDown, Reason::Drained].contains(&reason), "{reason:?}");
            let own = upstreams.iter().find(|(handle, _)| *handle == socket);
            let (_, outcomes) = own.expect("the upstream that was used is named");
            assert_eq!((outcomes.accepted, outcomes.sent), (COUNT as u64, COUNT as u64));
        }
        other => panic!("the broker did not say goodbye but {other:?}"),
    }
}

#[test]
fn what_goodbye_calls_taken_was_sent_and_the_rest_was_not() {
    let sink = TcpSink::start();
    let mut broker = Broker::start(&[format!("logs={}", sink.url())]);
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("logs");
    let mut sending = client.duplicate();
    let exit = thread::scope(|scope| {
        scope.spawn(move || {
            // Until the broker stops reading: whatever it had not taken fails or is lost here.
            for number in 0..200_000 {
                sending.send(handle, number.to_string().as_bytes());
            }
        });
        sink.wait_for(1000);
        broker.terminate()
    });
    assert_eq!(exit.code(), Some(0), "{}", broker.stderr());
    let last = client.until_closed().pop().expect("the broker says goodbye");
    let BrokerMessage::Goodbye { upstreams, .. } = last.control() else {
        panic!("the broker did not say goodbye but {last:?}");
    };
    let (_, outcomes) = &upstreams[0];
    assert_eq!(outcomes.sent, outcomes.accepted, "{outcomes:?}");
    let taken = usize::try_from(outcomes.accepted + outcomes.refused_total()).unwrap();
    let arrived = sink.wait_for(taken).into_iter();
    let expected = (0..taken).map(|number| number.to_string().into_bytes());
    assert!(arrived.eq(expected), "order or content changed");
}

#[test]
fn everything_for_udp_is_sent_before_the_end() {
    const COUNT: usize = 60;
    for _ in 0..10 {
        let sink = UdpSink::answering(1);
        let mut broker = Broker::start(&[format!("metrics={}", sink.url_write_only())]);
        let mut fifo = File::options().write(true).open(broker.fifo("metrics")).unwrap();
        for number in 0..COUNT {
            fifo.write_all(format!("{number}\n").as_bytes()).unwrap();
        }
        assert_eq!(broker.terminate().code(), Some(0), "{}", broker.stderr());
        let arrived = sink.wait_for(COUNT).into_iter();
        let written = (0..COUNT).map(|number| number.to_string().into_bytes());
        assert!(arrived.eq(written), "order or content changed");
    }
}

#[test]
fn requests_under_way_get_their_replies_and_the_status_answers_meanwhile() {
    let echo = TcpEcho::behaving(Manners::Slow(Duration::from_secs(3)));
    let mut broker = Broker::start(&[format!("echo={}", echo.url())]);
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    for correlation in 1..=4 {
        client.send_request(handle, correlation, 0, b"under way");
    }
    wait_for("all are under way", || (echo.messages() == 4).then_some(()));
    broker.signal(Signal::TERM);
    broker.wait_until(|status| status["state"] == "draining");
    wait_for("new sessions are turned away", || {
        let refused = RawClient::try_welcomed(broker.runtime_dir()).is_none();
        refused.then_some(())
    });
    let status = broker.status();
    broker.assert_sums(&status);
    assert_eq!(total(&status["upstreams"][0], "in_flight"), 4);
    let mut answered: Vec<u64> = (0..4)
        .map(|_| {
            let (correlation, answer) = client.next_answer();
            assert_eq!(answer.reply(), b"under way");
            correlation
        })
        .collect();
    answered.sort();
    assert_eq!(answered, [1, 2, 3, 4]);
    assert_eq!(broker.wait().code(), Some(0), "{}", broker.stderr());
}

#[test]
fn what_cannot_be_sent_within_drain_timeout_is_dropped_and_named() {
    let sink = TcpSink::start();
    sink.pause();
    let (mut broker, _client) = stuck(&sink, "drain_timeout = \"300ms\"");
    let exit = broker.terminate();
    assert_eq!(exit.code(), Some(1), "{}", broker.stderr());
    let stderr = broker.stderr();
    let names_both = |line: &str| line.contains("logs") && line.contains("drain_timeout");
    assert!(stderr.lines().any(names_both), "upstream and reason are named: {stderr}");
}

#[test]
fn a_pipe_cut_off_by_drain_timeout_loses_what_is_counted_and_no_part_of_a_line_goes_on() {
    const LINES: usize = 40_000;
    let line = |number: usize| format!("P{number:06}!");
    let mut sink = TcpSink::start();
    sink.stop();
    let config = format!(
        "[upstream.logs]\nurl = \"{}\"\nqueue_timeout = \"0s\"\nqueue_bytes_max = 4096\n\
         [limits]\ndrain_timeout = \"300ms\"\n",
        sink.url()
    );
    let mut broker = Broker::builder().config(&config).start();
    let (reader, mut writer) = io::pipe().unwrap();
    let mut command = broker.command("pipe");
    command.args(["logs", "--timeout", "1m"]).stdin(reader).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // Its own copy of the read end would keep the pipe open.
    drop(command);
    // They fit in no buffers on the way, so the next broker reads the rest.
    let writing = thread::spawn(move || {
        for number in 0..LINES {
            writer.write_all(format!("{}\n", line(number)).as_bytes()).unwrap();
        }
    });
    broker.wait_until_upstream("logs", |upstream| total(upstream, "queued") > 0);
    assert_eq!(broker.terminate().code(), Some(1), "{}", broker.stderr());
    sink.restart();
    broker.restart();
    let exit = wait_for_child(&mut child);
    writing.join().unwrap();
    let stderr = io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert_eq!(exit.code(), Some(1), "{stderr}");
    let lost = counts_in(&stderr, "dropped") + counts_in(&stderr, "refused");
    assert!(lost > 0 && lost < LINES, "{stderr}");
    let arrived = sink.wait_for(LINES - lost).into_iter();
    let rest = (lost..LINES).map(|number| line(number).into_bytes());
    assert!(arrived.eq(rest), "{lost} were lost, and not exactly the others arrived");
}

#[test]
fn a_udp_socket_that_waits_for_a_late_reply_does_not_hold_up_the_end() {
    let hole = UdpBlackHole::start();
    let config = format!(
        "[upstream.hole]\nurl = \"{}\"\nlate_reply_window = \"10m\"\nlifetime = \"0s\"\n\
         [limits]\ndrain_timeout = \"1h\"\n",
        hole.url()
    );
    let mut broker = Broker::builder().config(&config).start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("hole");
    let failure = client.request(handle, 100, b"anybody?").failure();
    assert_eq!(failure.reason, Reason::RequestTimeout, "{failure:?}");
    broker.wait_until_upstream("hole", |upstream| {
        list(upstream, "connections").iter().any(|socket| socket["state"] == "draining")
    });
    assert_eq!(broker.terminate().code(), Some(0), "{}", broker.stderr());
}

#[test]
fn an_admin_client_that_never_finishes_its_question_does_not_hold_up_the_end() {
    let mut broker = Broker::start(&["unused=tcp://127.0.0.1:9"]);
    let before = broker.fd_count();
    let mut admin = UnixStream::connect(broker.runtime_dir().join("admin.sock")).unwrap();
    admin.write_all(b"s").unwrap();
    wait_for("the client is being served", || (broker.fd_count() > before).then_some(()));
    // A byte in less than the time it has for the whole question, until it is closed.
    let dripping = thread::spawn(move || {
        while admin.write_all(b"s").is_ok() {
            thread::sleep(Duration::from_millis(300));
        }
    });
    assert_eq!(broker.terminate().code(), Some(0), "{}", broker.stderr());
    dripping.join().unwrap();
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for second in [Signal::TERM, Signal::INT] {
        let sink = TcpSink::start();
        sink.pause();
        let (mut broker, _client) = stuck(&sink, "drain_timeout = \"1h\"");
        broker.signal(Signal::TERM);
        // Whoever stops a group of processes may signal one of them twice.
        broker.signal(Signal::HUP);
        thread::sleep(Duration::from_millis(200));
        assert!(broker.is_running(), "{}", broker.stderr());
        broker.signal(second);
        let exit = broker.wait();
        assert!(!exit.success(), "{exit}");
    }
}

#[test]
fn an_idle_broker_ends_at_once_and_leaves_nothing_that_looks_alive() {
    let mut broker = Broker::start(&["down=tcp://127.0.0.1:9"]);
    assert_eq!(broker.terminate().code(), Some(0), "{}", broker.stderr());
    for socket in ["broker.sock", "admin.sock"] {
        let path = broker.runtime_dir().join(socket);
        assert!(std::os::unix::net::UnixStream::connect(&path).is_err(), "{path:?}");
    }
    broker.restart();
    assert_eq!(broker.terminate().code(), Some(0), "{}", broker.stderr());
}

/// The sum of the counts in the lines `UPSTREAM: N messages VERB: REASON`.
fn counts_in(stderr: &str, verb: &str) -> usize {
    let of_verb = stderr.lines().filter_map(|line| {
        let (count, rest) = line.split_once(" message")?;
        let is_it = rest.trim_start_matches('s').starts_with(&format!(" {verb}: "));
        is_it.then(|| count.rsplit(' ').next().unwrap().parse::<usize>().unwrap())
    });
    of_verb.sum()
}

/// A broker with more to send than every buffer on the way to the paused sink can hold, and the
/// client that sent it.
fn stuck(sink: &TcpSink, limits: &str) -> (Broker, RawClient) {
    let config = format!(
        "[upstream.logs]\nurl = \"{}\"\nqueue_timeout = \"0s\"\n[limits]\n{limits}\n",
        sink.url()
    );
    let broker = Broker::builder().config(&config).start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("logs");
    let header = FrameHeader { upstream: handle, ..FrameHeader::new(Kind::Send) };
    let message = frame(header, &[b'x'; 60_000]);
    client.socket().set_nonblocking(true).unwrap();
    let (mut unsent, mut sent_before) = (Vec::new(), 0);
    wait_for("nothing goes on any more", || {
        let mut is_stuck = true;
        loop {
            if unsent.is_empty() {
                unsent = message.clone();
            }
            match client.socket().write(&unsent) {
                Ok(count) => drop(unsent.drain(..count)),
                Err(_) => break,
            }
            is_stuck = false;
        }
        let upstream = broker.upstream_status("logs");
        let sent = total(&upstream, "sent");
        is_stuck &= sent > 0 && sent == sent_before && total(&upstream, "queued") > 0;
        sent_before = sent;
        is_stuck.then_some(())
    });
    (broker, client)
}

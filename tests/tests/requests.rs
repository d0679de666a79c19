//! Requests: one reply each, to exactly the process that asked, whatever the upstream and the
//! other clients do.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use poolbroker_proto::frame::{FrameHeader, Kind, hello};
use poolbroker_proto::message::{BrokerMessage, ClientMessage, Retry};
use poolbroker_proto::reason::Reason;
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, list, total};
use poolbroker_tests::deadline::{PATIENCE, wait_for};
use poolbroker_tests::peers::{
    FORGED, Manners, Marks, TcpBlackHole, TcpEcho, TcpSink, UdpBlackHole, UdpEcho, UdpSink,
    unused_port,
};
use poolbroker_tests::raw::{self, Answer, RawClient, ask};

#[test]
fn the_command_prints_the_reply() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let output = broker.command("request").args(["echo", "hello"]).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stdout, b"hello\n");
    let output = broker.command("request").args(["-n", "echo", "hello"]).output().unwrap();
    assert_eq!(output.stdout, b"hello");

    let mut child = broker
        .command("request")
        .args(["echo", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"from stdin").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stdout, b"from stdin\n");
}

#[test]
fn a_session_in_one_breath_is_answered_though_its_reply_does_not_come() {
    let silent = TcpBlackHole::start();
    let broker = Broker::start(&[format!("silent={}", silent.url())]);
    let mut breath = raw::frame(FrameHeader::new(Kind::Hello), &hello());
    let (header, body) = raw::control(1, 0, &ClientMessage::Open { name: "silent".to_owned() });
    breath.extend(raw::frame(header, &body));
    let header = FrameHeader { correlation: 2, ..FrameHeader::new(Kind::Request) };
    breath.extend(raw::frame(header, b"anybody?"));
    let mut client = RawClient::connect(broker.runtime_dir());
    client.send_bytes(&breath);
    let mut answers = (0..2).map(|_| client.next_frame().unwrap().control());
    assert!(matches!(answers.next(), Some(BrokerMessage::Welcome { .. })));
    assert!(matches!(answers.next(), Some(BrokerMessage::Opened { handle: 0, .. })));
    assert_eq!(broker.upstream_status("silent")["in_flight"], 1);
}

#[test]
fn every_framing_brings_the_reply_back() {
    let (lines, crlf) = (TcpEcho::start(), TcpEcho::with(Marks::Crlf, Manners::Prompt));
    let counted = TcpEcho::with(Marks::U32be, Manners::Prompt);
    let udp = UdpEcho::start();
    let broker = Broker::start(&[
        format!("lines={}", lines.url()),
        format!("crlf={}", crlf.url()),
        format!("counted={}", counted.url()),
        format!("udp={}", udp.url()),
    ]);
    let text = b"some text";
    for upstream in ["lines", "crlf", "counted", "udp"] {
        assert_eq!(ask(broker.runtime_dir(), upstream, text).reply(), text);
    }
    let binary: Vec<u8> = (0..=255).cycle().take(60_000).collect();
    for upstream in ["counted", "udp"] {
        assert_eq!(ask(broker.runtime_dir(), upstream, &binary).reply(), binary);
    }
}

#[test]
fn many_clients_share_no_more_connections_than_connections_max() {
    let echo = TcpEcho::start();
    let broker = with_limits(&echo.url(), "connections_max = 4");
    let clients = storm(&broker, 16, 200, 0);
    assert_eq!(clients, Totals { own: 16 * 200, failed: 0 });
    assert!(echo.connections_ever() <= 4, "{}", echo.connections_ever());
    let status = broker.status();
    broker.assert_sums(&status);
    let upstream = broker.upstream_status("echo");
    assert_eq!(total(&upstream, "replied"), 16 * 200);
    let connections = list(&upstream, "connections");
    assert_eq!(connections.len(), echo.connections_open());
    for connection in connections {
        assert_eq!(connection["protocol"], "tcp");
        assert_eq!(connection["role"], "exchange");
        assert_eq!(connection["remote"], format!("127.0.0.1:{}", echo.port()));
        let local = connection["local"].as_str().unwrap();
        assert!(local.starts_with("127.0.0.1:"), "{connection:#}");
        let fd = connection["fd"].as_u64().unwrap();
        let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", broker.pid())).unwrap();
        assert!(link.to_str().unwrap().starts_with("socket:"), "{link:?}");
    }
}

#[test]
fn requests_one_after_the_other_go_to_all_addresses_in_turn() {
    for balance in ["round-robin", "least-outstanding"] {
        let mut peers = [(); 3].map(|()| TcpEcho::start());
        let hosts = peers.each_ref().map(|peer| format!("127.0.0.1:{}", peer.port())).join(",");
        let broker = with_limits(&format!("tcp://{hosts}"), &format!("balance = \"{balance}\""));
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("echo");
        for number in 0..60 {
            let body = format!("request {number}");
            assert_eq!(client.request(handle, 0, body.as_bytes()).reply(), body.as_bytes());
        }
        let shares = peers.each_ref().map(TcpEcho::messages);
        assert!(shares.iter().all(|share| *share >= 10), "{balance}: {shares:?}");
        // One that is gone costs the others nothing, and has its share again.
        peers[0].stop();
        broker.wait_until_upstream("echo", |it| list(it, "connections").len() < 3);
        for _ in 0..20 {
            assert_eq!(client.request(handle, 0, b"two are left").reply(), b"two are left");
        }
        peers[0].restart();
        let before = peers[0].messages();
        wait_for("the first one has its share", || {
            let _ = client.request(handle, 0, b"three again");
            (peers[0].messages() > before).then_some(())
        });
    }
}

#[test]
fn a_late_tcp_reply_never_reaches_another_request() {
    let echo =
        TcpEcho::behaving(Manners::SlowEvery { every: 7, delay: Duration::from_millis(400) });
    let broker = with_limits(&echo.url(), "connections_max = 4");
    let clients = storm(&broker, 16, 50, 300);
    assert!(clients.own > 0 && clients.failed > 0, "{clients:?}");
    let status = broker.status();
    broker.assert_sums(&status);
    assert_eq!(total(&broker.upstream_status("echo"), "timed_out"), clients.failed);
}

#[test]
fn a_late_udp_reply_never_reaches_another_request() {
    let echo = UdpEcho::late_every(7, Duration::from_millis(150));
    let broker = with_limits(&echo.url(), "connections_max = 4");
    let clients = storm(&broker, 16, 100, 100);
    assert!(clients.own > 0 && clients.failed > 0, "{clients:?}");
    let status = broker.status();
    broker.assert_sums(&status);
    assert_eq!(total(&broker.upstream_status("echo"), "timed_out"), clients.failed);
}

#[test]
fn the_socket_of_an_unanswered_udp_request_stays_bound_and_hears_nothing() {
    let echo = UdpEcho::late_every(1, Duration::from_millis(200));
    let broker = with_limits(&echo.url(), "late_reply_window = \"10m\"\nlifetime = \"0s\"");
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    let failure = client.request(handle, 50, b"late").failure();
    assert_eq!(failure.reason, Reason::RequestTimeout, "{failure:?}");
    assert_eq!(failure.retry, Retry::MaybeExecuted);
    wait_for("the late reply is sent", || (echo.replied() == 1).then_some(()));
    let upstream =
        broker.wait_until_upstream("echo", |upstream| total(upstream, "replies_discarded") == 1);
    let [retired] = list(&upstream, "connections") else {
        panic!("one socket: {upstream:#}");
    };
    assert_eq!(retired["state"], "draining", "{retired:#}");
    let sockets = poolbroker_tests::udp_table::udp_sockets_to(echo.port());
    assert_eq!(sockets.len(), 1, "{sockets:?}");
    assert_eq!(sockets[0].receive_queue_bytes, 0);
}

#[test]
fn a_second_reply_to_an_idle_udp_socket_is_never_taken_for_the_next_one() {
    let sink = UdpSink::answering(2);
    let broker = with_limits(&sink.url(), "connections_max = 1");
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    for number in 1..=20u64 {
        let token = format!("token {number}");
        assert_eq!(client.request(handle, 0, token.as_bytes()).reply(), token.as_bytes());
        // Either way the second reply is seen: discarded, or the reason for closing the socket.
        broker.wait_until_upstream("echo", |upstream| {
            let discarded = total(upstream, "replies_discarded");
            discarded.max(count_of(upstream, "connections_closed", "unsolicited")) >= number
        });
    }
}

#[test]
fn the_second_of_two_replies_never_reaches_the_next_in_line() {
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let url = format!("udp://{}", peer.local_addr().unwrap());
    let broker = with_limits(&url, "connections_max = 1");
    let (mut first, _) = RawClient::welcomed(broker.runtime_dir());
    let (mut next, _) = RawClient::welcomed(broker.runtime_dir());
    let handles = (first.open("echo"), next.open("echo"));
    first.send_request(handles.0, 1, 0, b"first");
    let mut datagram = [0; 16];
    let (length, socket) = peer.recv_from(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"first");
    next.send_request(handles.1, 1, 0, b"next");
    broker.wait_until_upstream("echo", |upstream| total(upstream, "waiters") == 1);
    broker.pause();
    for _ in 0..2 {
        peer.send_to(b"reply to the first", socket).unwrap();
    }
    broker.resume();
    assert_eq!(first.next_answer().1.reply(), b"reply to the first");
    let (length, socket) = peer.recv_from(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"next");
    peer.send_to(b"reply to the next", socket).unwrap();
    assert_eq!(next.next_answer().1.reply(), b"reply to the next");
}

#[test]
fn a_connection_closed_while_nobody_looked_is_not_used() {
    let peer = TcpListener::bind("127.0.0.1:0").unwrap();
    let broker = with_limits(&format!("tcp://{}", peer.local_addr().unwrap()), "");
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    // Closed while idle, with and without bytes that nobody asked for.
    for last_words in [&b""[..], b"unasked\n"] {
        client.send_request(handle, 1, 0, b"question");
        let (mut connection, _) = peer.accept().unwrap();
        connection.read_exact(&mut [0; 9]).unwrap();
        connection.write_all(b"answer\n").unwrap();
        assert_eq!(client.next_answer().1.reply(), b"answer");
        broker.pause();
        connection.write_all(last_words).unwrap();
        drop(connection);
        client.send_request(handle, 2, 0, b"question");
        broker.resume();
        let (mut connection, _) = peer.accept().unwrap();
        connection.read_exact(&mut [0; 9]).unwrap();
        connection.write_all(b"answer\n").unwrap();
        assert_eq!(client.next_answer(), (2, Answer::Reply(b"answer".to_vec())));
        drop(connection);
        broker.wait_until_upstream("echo", |upstream| list(upstream, "connections").is_empty());
    }
}

#[test]
fn clients_that_leave_in_the_middle_disturb_nobody() {
    let echo = TcpEcho::behaving(Manners::Slow(Duration::from_millis(5)));
    let broker = with_limits(&echo.url(), "connections_max = 1");
    let done = AtomicBool::new(false);
    let clients = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
                let handle = client.open("echo");
                client.send_request(handle, 1, 0, b"of a client that leaves");
                thread::sleep(Duration::from_millis(fastrand::u64(0..20)));
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let mut process = broker
                    .command("request")
                    .args(["echo", "of a killed process"])
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                thread::sleep(Duration::from_millis(fastrand::u64(0..40)));
                kill(&mut process);
            }
        });
        let clients = storm(&broker, 8, 25, 0);
        done.store(true, Ordering::SeqCst);
        clients
    });
    assert_eq!(clients, Totals { own: 8 * 25, failed: 0 });
    let status = broker.wait_until(|status| {
        list(status, "sessions").is_empty() && total(&status["upstreams"][0], "in_flight") == 0
    });
    broker.assert_sums(&status);
}

#[test]
fn a_connection_that_its_peer_closed_is_not_used_again() {
    let echo = TcpEcho::behaving(Manners::ClosesAfterReply);
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let clients = storm(&broker, 4, 100, 0);
    assert_eq!(clients, Totals { own: 400, failed: 0 });
    assert_eq!(echo.connections_ever(), 400);
    assert_eq!(echo.messages(), 400, "no request was sent twice");
}

#[test]
fn bytes_behind_a_complete_reply_reach_nobody() {
    let echo = TcpEcho::behaving(Manners::ForgesSecondReply);
    let broker = with_limits(&echo.url(), "connections_max = 1");
    let clients = storm(&broker, 4, 50, 0);
    assert_eq!(clients, Totals { own: 200, failed: 0 });
    let upstream = broker.upstream_status("echo");
    assert!(count_of(&upstream, "connections_closed", "unsolicited") > 0, "{upstream:#}");
}

#[test]
fn a_reply_cut_by_a_reset_is_a_failure_and_never_a_short_reply() {
    let echo = TcpEcho::behaving(Manners::ResetsInReply);
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let mut cut = 0;
    for _ in 0..10 {
        let failure = ask(broker.runtime_dir(), "echo", b"a body of some length").failure();
        match failure.retry {
            Retry::MaybeExecuted => {
                assert_eq!(failure.reason, Reason::ConnectionLost, "{failure:?}");
                cut += 1;
            }
            // After some such failures the upstream is left alone for a while.
            Retry::NotSent => {}
        }
        assert!(failure.text.contains("echo"), "the text names the upstream: {failure:?}");
    }
    assert!(cut > 0);
    echo.behave(Manners::Prompt);
    let reply = wait_for("the upstream is tried again", || {
        match ask(broker.runtime_dir(), "echo", b"again") {
            Answer::Reply(body) => Some(body),
            Answer::Failed(_) | Answer::Closed => None,
        }
    });
    assert_eq!(reply, b"again");
}

#[test]
fn a_reply_that_drips_or_never_ends_or_never_comes_is_given_up() {
    let echo = TcpEcho::start();
    let broker = with_limits(&echo.url(), "request_timeout = \"300ms\"\nmessage_bytes_max = 65536");
    for (manners, reason) in [
        (Manners::Drips(Duration::from_millis(50)), Reason::RequestTimeout),
        (Manners::NeverReplies, Reason::RequestTimeout),
        (Manners::NeverEnds, Reason::ReplyTooLong),
    ] {
        echo.behave(manners);
        let failure = ask(broker.runtime_dir(), "echo", &[b'x'; 100]).failure();
        assert_eq!(failure.reason, reason, "{manners:?}: {failure:?}");
        assert_eq!(failure.retry, Retry::MaybeExecuted);
        echo.behave(Manners::Prompt);
        assert_eq!(ask(broker.runtime_dir(), "echo", b"next").reply(), b"next");
    }
    let status = broker.status();
    broker.assert_sums(&status);
}

#[test]
fn the_waiting_line_has_an_end() {
    let echo = TcpEcho::behaving(Manners::NeverReplies);
    let broker = with_limits(&echo.url(), "connections_max = 1\nwaiters_max = 2");
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    client.send_request(handle, 1, 0, b"in exchange");
    wait_for("the first request is being served", || (echo.messages() == 1).then_some(()));
    for waiting in [2, 3] {
        client.send_request(handle, waiting, 0, b"waiting");
    }
    client.send_request(handle, 4, 0, b"too many");
    let (correlation, answer) = client.next_answer();
    let failure = answer.failure();
    assert_eq!((correlation, failure.reason), (4, Reason::WaitersFull));
    assert_eq!(failure.retry, Retry::NotSent);
    let upstream = broker.upstream_status("echo");
    assert_eq!((total(&upstream, "waiters"), total(&upstream, "in_flight")), (2, 3));
}

#[test]
fn bodies_that_wait_are_charged_to_their_user_and_given_back() {
    const QUOTA: u64 = 8 * 1024 * 1024;
    const SENT: u64 = 20;
    let body = vec![b'x'; 1_000_000];
    let echo = TcpEcho::behaving(Manners::NeverReplies);
    let broker = with_limits(
        &echo.url(),
        &format!(
            "connections_max = 1\nwait_timeout = \"1h\"\nrequest_timeout = \"1h\"\n\
             [limits]\nqueued_bytes_max_per_uid = {QUOTA}"
        ),
    );
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    for correlation in 1..=SENT {
        client.send_request(handle, correlation, 0, &body);
    }
    let fit = QUOTA / 1_000_000;
    for _ in fit..SENT {
        let failure = client.next_answer().1.failure();
        assert_eq!(failure.reason, Reason::Quota, "{failure:?}");
        assert_eq!(failure.retry, Retry::NotSent);
    }
    let upstream = broker.upstream_status("echo");
    let in_flight = total(&upstream, "in_flight");
    assert!((1..=fit).contains(&in_flight), "{upstream:#}");
    echo.behave(Manners::Prompt);
    drop(client);
    broker.wait_until_upstream("echo", |upstream| total(upstream, "in_flight") == 0);
    assert!(ask(broker.runtime_dir(), "echo", &body).reply() == body);
}

#[test]
fn replies_that_are_not_read_are_charged_to_their_user_and_given_back() {
    const QUOTA: u64 = 8 * 1024 * 1024;
    const CLIENTS: u64 = 24;
    const REPLY_BYTES: usize = 1_000_000;
    // Short questions, so that only the replies matter.
    let peer = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp://{}", peer.local_addr().unwrap());
    thread::spawn(move || {
        for connection in peer.incoming() {
            let connection = connection.unwrap();
            thread::spawn(move || answer_at_length(&connection, REPLY_BYTES));
        }
    });
    let broker = with_limits(&url, &format!("[limits]\nqueued_bytes_max_per_uid = {QUOTA}"));
    let mut clients = Vec::new();
    for done in 1..=CLIENTS {
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("echo");
        client.send_request(handle, 1, 0, b"?");
        clients.push(client);
        broker.wait_until_upstream("echo", |upstream| {
            total(upstream, "requests") == done && total(upstream, "in_flight") == 0
        });
    }
    let status = broker.status();
    broker.assert_sums(&status);
    let unread: u64 =
        list(&status, "sessions").iter().map(|session| total(session, "queued_bytes")).sum();
    assert!(unread <= QUOTA, "{unread} bytes");
    let replied = total(&broker.upstream_status("echo"), "replied");
    assert!((1..CLIENTS).contains(&replied), "{replied} replies were kept");
    let mut read = 0;
    for client in &mut clients {
        match client.next_answer().1 {
            Answer::Reply(body) => {
                assert!(body == vec![b'x'; REPLY_BYTES], "a reply is damaged");
                read += 1;
            }
            Answer::Failed(failure) => {
                assert_eq!(failure.retry, Retry::MaybeExecuted, "{failure:?}");
            }
            Answer::Closed => panic!("the session ended"),
        }
    }
    assert_eq!(read, replied);
    assert_eq!(ask(broker.runtime_dir(), "echo", b"?").reply().len(), REPLY_BYTES);
}

#[test]
fn waiting_for_a_connection_ends_after_wait_timeout() {
    let echo = TcpEcho::behaving(Manners::NeverReplies);
    let broker = with_limits(&echo.url(), "connections_max = 1\nwait_timeout = \"100ms\"");
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    client.send_request(handle, 1, 0, b"in exchange");
    client.send_request(handle, 2, 0, b"waiting");
    let (correlation, answer) = client.next_answer();
    let failure = answer.failure();
    assert_eq!((correlation, failure.reason), (2, Reason::WaitTimeout));
    assert_eq!(failure.retry, Retry::NotSent);
}

#[test]
fn a_black_hole_times_out_and_leaves_other_upstreams_alone() {
    let (hole, echo) = (TcpBlackHole::start(), TcpEcho::start());
    let config = format!(
        "[upstream.hole]\nurl = \"{}\"\nconnect_timeout = \"300ms\"\nconnecting_max = 2\n\
         wait_timeout = \"2s\"\n[upstream.echo]\nurl = \"{}\"\n",
        hole.url(),
        echo.url()
    );
    let broker = Broker::builder().config(&config).start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("hole");
    for correlation in 1..=10 {
        client.send_request(handle, correlation, 0, b"into the hole");
    }
    let connecting = |upstream: &serde_json::Value| {
        let connections = list(upstream, "connections").iter();
        connections.filter(|connection| connection["state"] == "connecting").count()
    };
    broker.wait_until_upstream("hole", |upstream| connecting(upstream) == 2);
    assert_eq!(storm(&broker, 2, 50, 0), Totals { own: 100, failed: 0 });
    assert!(connecting(&broker.upstream_status("hole")) <= 2);
    for _ in 1..=10 {
        let failure = client.next_answer().1.failure();
        assert_eq!(failure.retry, Retry::NotSent, "{failure:?}");
        assert!(failure.text.contains("hole"), "{failure:?}");
    }
    let hole = broker.upstream_status("hole");
    assert!(count_of(&hole, "connections_closed", "connect_timeout") > 0, "{hole:#}");
}

#[test]
fn a_silent_udp_upstream_fails_the_request_and_not_the_broker() {
    let (silent, echo) = (UdpBlackHole::start(), UdpEcho::start());
    let broker =
        Broker::start(&[format!("silent={}", silent.url()), format!("echo={}", echo.url())]);
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("silent");
    let failure = client.request(handle, 100, b"anybody?").failure();
    assert_eq!(failure.reason, Reason::RequestTimeout, "{failure:?}");
    assert_eq!(ask(broker.runtime_dir(), "echo", b"here").reply(), b"here");
}

#[test]
fn a_udp_request_to_a_closed_port_fails_as_refused_and_never_waits_for_its_timeout() {
    let broker = Broker::start(&[format!("gone=udp://127.0.0.1:{}", unused_port())]);
    for _ in 0..3 {
        let failure = ask(broker.runtime_dir(), "gone", b"anybody?").failure();
        assert_eq!(failure.reason, Reason::ConnectRefused, "{failure:?}");
        assert!(failure.text.contains("gone"), "{failure:?}");
    }
}

#[test]
fn an_upstream_that_is_down_is_named_and_serves_again_by_itself() {
    let mut echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    assert_eq!(ask(broker.runtime_dir(), "echo", b"up").reply(), b"up");
    echo.stop();
    let failure = wait_for("requests fail", || match ask(broker.runtime_dir(), "echo", b"x") {
        Answer::Failed(failure) => Some(failure),
        Answer::Reply(_) | Answer::Closed => None,
    });
    for name in ["echo", &echo.port().to_string()] {
        assert!(failure.text.contains(name), "{name} is named: {failure:?}");
    }
    let output = broker.command("request").args(["echo", "x"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr.contains("echo"), "{stderr}");
    echo.restart();
    let reply = wait_for("service resumes", || match ask(broker.runtime_dir(), "echo", b"back") {
        Answer::Reply(body) => Some(body),
        Answer::Failed(_) | Answer::Closed => None,
    });
    assert_eq!(reply, b"back");
    let status = broker.status();
    broker.assert_sums(&status);
}

#[test]
fn a_refused_connection_is_a_failure_that_may_be_repeated() {
    let url = format!("tcp://127.0.0.1:{}", unused_port());
    let broker = Broker::start(&[format!("down={url}")]);
    let output = broker.command("request").args(["down", "x", "--timeout", "3s"]).output().unwrap();
    assert!([Some(1), Some(4)].contains(&output.status.code()), "{output:?}");
    let failure = ask(broker.runtime_dir(), "down", b"x").failure();
    assert_eq!(failure.retry, Retry::NotSent, "{failure:?}");
}

#[test]
fn sends_that_provoke_answers_never_disturb_a_request() {
    let echo = TcpEcho::start();
    let broker = with_limits(&echo.url(), "connections_max = 3");
    let done = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    let clients = thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
                let handle = client.open("echo");
                while !done.load(Ordering::SeqCst) {
                    for _ in 0..20 {
                        client.send(handle, b"a send that is answered");
                    }
                    sent.fetch_add(20, Ordering::SeqCst);
                    let outcomes = client.flush(handle);
                    assert_eq!(outcomes.sent, outcomes.accepted, "{outcomes:?}");
                }
            });
        }
        let clients = storm(&broker, 4, 200, 0);
        done.store(true, Ordering::SeqCst);
        clients
    });
    assert_eq!(clients, Totals { own: 800, failed: 0 });
    let sent = sent.load(Ordering::SeqCst);
    let upstream =
        broker.wait_until_upstream("echo", |upstream| total(upstream, "replies_discarded") >= 1);
    assert_eq!(total(&upstream, "sent"), sent);
    let one_way = list(&upstream, "connections").iter();
    let one_way = one_way.filter(|connection| connection["role"] == "one_way");
    assert_eq!(one_way.count(), 1, "{upstream:#}");
}

#[test]
fn requests_without_a_reply_are_done_one_after_the_other_though_nothing_wakes_the_broker() {
    let sink = TcpSink::start();
    let url = format!("tcp://127.0.0.1:{}?framing=memcached", sink.port());
    let broker = with_limits(&url, "connections_max = 1");
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    for id in 1..=40 {
        client.send_request(handle, id, 0, b"incr visits 1 noreply");
    }
    for id in 1..=40 {
        assert_eq!(client.next_answer(), (id, Answer::Reply(Vec::new())));
    }
    assert_eq!(sink.wait_for(40).len(), 40);
}

#[test]
fn the_same_id_in_two_sessions_means_two_requests() {
    let echo = TcpEcho::behaving(Manners::Slow(Duration::from_millis(50)));
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let mut clients: Vec<_> = (0..4)
        .map(|number| {
            let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
            let handle = client.open("echo");
            client.send_request(handle, 7, 0, format!("of client {number}").as_bytes());
            client
        })
        .collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let (correlation, answer) = client.next_answer();
        assert_eq!(correlation, 7);
        assert_eq!(answer.reply(), format!("of client {number}").as_bytes());
    }
}

/// What became of many requests.
#[derive(Debug, PartialEq, Eq)]
struct Totals {
    own: u64,
    failed: u64,
}

/// `clients` at once make `requests` each, one after the other, with a body that occurs only once.
/// A reply that belongs to another request fails the test.
fn storm(broker: &Broker, clients: usize, requests: usize, timeout_ms: u32) -> Totals {
    let (own, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
                let handle = client.open("echo");
                for _ in 0..requests {
                    let token = format!("{:032x}", fastrand::u128(..));
                    match client.request(handle, timeout_ms, token.as_bytes()) {
                        Answer::Reply(body) => {
                            assert_ne!(body, FORGED, "a forged reply was delivered");
                            assert_eq!(body, token.as_bytes(), "another request's reply");
                            own.fetch_add(1, Ordering::SeqCst);
                        }
                        Answer::Failed(_) => {
                            failed.fetch_add(1, Ordering::SeqCst);
                        }
                        Answer::Closed => panic!("the session ended"),
                    }
                }
            });
        }
    });
    Totals { own: own.into_inner(), failed: failed.into_inner() }
}

/// Answers each line with a line of `reply_bytes`.
fn answer_at_length(mut connection: &TcpStream, reply_bytes: usize) {
    let reply = [&vec![b'x'; reply_bytes][..], b"\n"].concat();
    for question in BufReader::new(connection).lines() {
        if question.and_then(|_| connection.write_all(&reply)).is_err() {
            return;
        }
    }
}

fn with_limits(url: &str, limits: &str) -> Broker {
    let config = format!("[upstream.echo]\nurl = \"{url}\"\n{limits}\n");
    Broker::builder().config(&config).start()
}

/// Answers each HTTP request; behind one that says `Connection: close` it hangs up, as servers do.
fn serve_http(connection: &TcpStream) {
    let mut lines = BufReader::new(connection).lines().map_while(Result::ok);
    while lines.next().is_some() {
        let fields = lines.by_ref().take_while(|line| !line.is_empty());
        let closes = fields.filter(|line| line == "Connection: close").count() > 0;
        // Time for others to come behind it.
        thread::sleep(Duration::from_millis(200));
        let reply = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        if { connection }.write_all(reply.as_bytes()).is_err() || closes {
            return;
        }
    }
}

#[test]
fn nothing_is_pipelined_behind_a_request_that_closes_the_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp://{}?framing=http1", listener.local_addr().unwrap());
    thread::spawn(move || {
        for connection in listener.incoming() {
            serve_http(&connection.unwrap());
        }
    });
    let broker = with_limits(&url, "connections_max = 1\npipeline_depth = 16");
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let upstream = client.open("echo");
    let plain = b"POST /pay HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n";
    client.request(upstream, 0, plain).reply();
    client.send_request(upstream, 1, 0, plain);
    client.send_request(upstream, 2, 0, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    (3..6).for_each(|id| client.send_request(upstream, id, 0, plain));
    for id in 1..6 {
        let (answered, answer) = client.next_answer();
        assert_eq!(answered, id);
        assert!(answer.reply().ends_with(b"ok"));
    }
    let status = broker.upstream_status("echo");
    assert_eq!(count_of(&status, "connections_closed", "request_ends_connection"), 1);
    assert_eq!((total(&status, "replied"), total(&status, "connections_opened")), (6, 2));
    assert_eq!(status["breaker"], "closed");
}

#[test]
fn nothing_is_pipelined_behind_a_reply_that_ends_with_its_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp://{}?framing=http1", listener.local_addr().unwrap());
    let server = thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        assert!(first.read(&mut [0; 1024]).unwrap() > 0);
        first.write_all(b"HTTP/1.1 200 OK\r\n\r\nbegun, ").unwrap();
        let (mut second, _) = listener.accept().unwrap();
        assert!(second.read(&mut [0; 1024]).unwrap() > 0);
        second.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        first.write_all(b"ended").unwrap();
        second
    });
    let broker = with_limits(&url, "connections_max = 2\npipeline_depth = 16");
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let upstream = client.open("echo");
    let question = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    client.send_request(upstream, 1, 0, question);
    broker.wait_until_upstream("echo", |status| {
        list(status, "connections").iter().any(|conn| total(conn, "bytes_in") > 0)
    });
    client.send_request(upstream, 2, 0, question);
    let mut replies = [client.next_answer(), client.next_answer()];
    replies.sort_by_key(|(id, _)| *id);
    let [(_, first), (_, second)] = replies;
    assert!(first.reply().ends_with(b"begun, ended"));
    assert!(second.reply().ends_with(b"ok"));
    server.join().unwrap();
}

#[test]
fn a_request_on_which_servers_may_differ_is_named_and_not_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp://{}?framing=http1", listener.local_addr().unwrap());
    let broker = with_limits(&url, "pipeline_depth = 16");
    let smuggling = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\
        Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    let named = "Content-Length beside Transfer-Encoding";
    for (request, named) in [
        (&smuggling[..], named),
        (b"head / HTTP/1.1\r\nHost: x\r\n\r\n", "a method HEAD that is not in capitals"),
        (b"Connect x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n", "CONNECT; use a lease"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n\r\n", "Upgrade; use a lease"),
    ] {
        let failure = ask(broker.runtime_dir(), "echo", request).failure();
        assert!(failure.text.contains(named), "{failure:?}");
        assert_eq!(failure.retry, Retry::NotSent);
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "nobody connected");
}

fn kill(process: &mut Child) {
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn a_process_in_the_shell_can_ask_many_times() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let program = broker.command("request").get_program().to_owned();
    let script = format!(
        "for i in 1 2 3 4 5; do '{}' request --runtime-dir '{}' echo $i || exit 1; done",
        program.to_str().unwrap(),
        broker.runtime_dir().display()
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(output.stdout, b"1\n2\n3\n4\n5\n", "{output:?}");
    assert_eq!(echo.connections_ever(), 1, "the connection stayed warm");
}

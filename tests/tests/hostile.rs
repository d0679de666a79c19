//! Clients that break the protocol: they lose their session, and nobody else loses anything.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use poolbroker_proto::frame::{FrameHeader, HEADER_BYTES, Kind, VERSION, hello};
use poolbroker_proto::message::{BrokerMessage, ClientMessage, Retry};
use poolbroker_proto::reason::Reason;
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{list, total};
use poolbroker_tests::deadline::PATIENCE;
use poolbroker_tests::peers::{Manners, Marks, TcpEcho, TcpSink};
use poolbroker_tests::raw::{OwnedFrame, RawClient, ask, control, frame};

const MIB: u64 = 1024 * 1024;

#[test]
fn frames_of_every_announced_length_are_judged_without_allocating_them() {
    let (echo, broker) = start();
    let before = broker.rss_bytes();
    for kind in 0..=8u8 {
        for length in [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 1 << 31, u32::MAX] {
            let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
            let handle = client.open("echo");
            let mut header = [0; HEADER_BYTES];
            header[0..4].copy_from_slice(&u32::to_le_bytes(length));
            header[4] = kind;
            header[6..8].copy_from_slice(&handle.to_le_bytes());
            header[8..16].copy_from_slice(&7u64.to_le_bytes());
            client.send_bytes(&header);
            client.send_bytes(b"only the beginning of a body");
            if length > 1 << 20 {
                let reason = goodbye(&mut client);
                assert_eq!(reason, Reason::BadFrame, "kind {kind}, length {length}");
            }
        }
    }
    assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
    let grown = broker.rss_bytes().saturating_sub(before);
    assert!(grown < 16 * MIB, "grown by {grown} bytes");
    broker.wait_until(|status| list(status, "sessions").is_empty());
    drop(echo);
}

#[test]
fn a_frame_may_arrive_byte_by_byte() {
    let (_echo, broker) = start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    let request =
        FrameHeader { upstream: handle, correlation: 5, ..FrameHeader::new(Kind::Request) };
    for byte in frame(request, b"byte by byte") {
        client.send_bytes(&[byte]);
    }
    let (correlation, answer) = client.next_answer();
    assert_eq!((correlation, answer.reply()), (5, b"byte by byte".to_vec()));
}

#[test]
fn half_a_frame_of_a_client_that_leaves_goes_nowhere() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    for keep in [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5] {
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("logs");
        let header = FrameHeader { upstream: handle, ..FrameHeader::new(Kind::Send) };
        client.send(handle, b"whole");
        client.send_bytes(&frame(header, b"only half of it")[..keep]);
    }
    broker.wait_until(|status| list(status, "sessions").is_empty());
    broker.wait_until_upstream("logs", |upstream| total(upstream, "sent") == 4);
    assert_eq!(sink.wait_for(4), vec![b"whole"; 4]);
}

#[test]
fn all_that_a_client_wrote_before_it_left_is_taken() {
    // More than one turn takes.
    const COUNT: usize = 5000;
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    broker.pause();
    let mut client = RawClient::connect(broker.runtime_dir());
    let mut bytes = hello_frame(&hello());
    let (header, body) = control(1, 0, &ClientMessage::Open { name: "logs".into() });
    bytes.extend(frame(header, &body));
    let body = |number: usize| number.to_string().into_bytes();
    for number in 0..COUNT {
        bytes.extend(frame(FrameHeader::new(Kind::Send), &body(number)));
    }
    client.send_bytes(&bytes);
    // Nobody is there any more to be told of the welcome.
    drop(client);
    broker.resume();
    assert!(sink.wait_for(COUNT).into_iter().eq((0..COUNT).map(body)), "order or content changed");
    broker.wait_until(|status| list(status, "sessions").is_empty());
}

#[test]
fn what_a_blocked_client_wrote_is_taken_though_its_reply_finds_nobody() {
    const COUNT: usize = 20;
    let mut sink = TcpSink::start();
    sink.stop();
    let peer = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = format!(
        "[upstream.logs]\nurl = \"{}\"\nqueue_timeout = \"0s\"\nqueue_bytes_max = 4096\n\
         [upstream.slow]\nurl = \"tcp://{}\"\n",
        sink.url(),
        peer.local_addr().unwrap()
    );
    let broker = Broker::builder().config(&config).start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let (logs, slow) = (client.open("logs"), client.open("slow"));
    client.send_request(slow, 9, 0, b"question");
    let (mut connection, _) = peer.accept().unwrap();
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    connection.read_exact(&mut [0; 9]).unwrap();
    let body = |number: usize| format!("{number:01000}").into_bytes();
    for number in 0..COUNT {
        client.send(logs, &body(number));
    }
    let upstream = broker.wait_until_upstream("logs", |upstream| total(upstream, "queued") == 4);
    assert_eq!(total(&upstream, "accepted"), 4, "the rest waits in the session: {upstream:#}");
    drop(client);
    connection.write_all(b"reply\n").unwrap();
    broker.wait_until_upstream("slow", |upstream| total(upstream, "in_flight") == 0);
    sink.restart();
    assert!(sink.wait_for(COUNT).into_iter().eq((0..COUNT).map(body)), "order or content changed");
    broker.wait_until(|status| list(status, "sessions").is_empty());
}

#[test]
fn half_a_frame_that_is_not_continued_ends_the_session() {
    let echo = TcpEcho::start();
    let broker = Broker::builder()
        .upstream("echo", &echo.url())
        .config("[limits]\npartial_timeout = \"200ms\"\n")
        .start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    client.send_bytes(&hello_frame(&hello())[..HEADER_BYTES / 2]);
    client.until_closed();
    // Silence between frames is no fault.
    let (mut patient, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = patient.open("echo");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(patient.request(handle, 0, b"still here").reply(), b"still here");
}

#[test]
fn whoever_speaks_something_else_is_closed() {
    let (_echo, broker) = start();
    let mut wrong_magic = hello();
    wrong_magic[0] ^= 1;
    let openings: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"*1\r\n$4\r\nPING\r\n*1\r\n$4\r\nPING\r\n",
        &[0; 64],
        &hello_frame(&wrong_magic),
        &frame(FrameHeader::new(Kind::Send), b"without a greeting"),
    ];
    for opening in openings {
        let mut client = RawClient::connect(broker.runtime_dir());
        client.send_bytes(opening);
        assert_eq!(goodbye(&mut client), Reason::BadFrame, "{opening:?}");
    }
    let mut twice = RawClient::welcomed(broker.runtime_dir()).0;
    twice.send_bytes(&hello_frame(&hello()));
    assert_eq!(goodbye(&mut twice), Reason::BadFrame);
    assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
}

#[test]
fn another_version_is_told_so() {
    let (_echo, broker) = start();
    for version in [0, VERSION + 1, u16::MAX] {
        let mut body = hello();
        body[4..6].copy_from_slice(&version.to_le_bytes());
        let mut client = RawClient::connect(broker.runtime_dir());
        client.send_bytes(&hello_frame(&body));
        assert_eq!(goodbye(&mut client), Reason::VersionMismatch, "version {version}");
    }
}

#[test]
fn unknown_names_and_handles_are_refused_by_name() {
    let (_echo, broker) = start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    for name in
        ["nope", "..", "broker", "admin", "", "echo\0", &"x".repeat(60_000), &"\x1b".repeat(60_000)]
    {
        let name = name.to_owned();
        client.send_control(1, 0, &ClientMessage::Open { name: name.clone() });
        let failure = client.next_frame().unwrap().failure();
        assert_eq!(failure.reason, Reason::UnknownUpstream, "{name:?}");
        assert!(failure.text.len() < 1000, "text of a client is cut short");
    }
    for handle in [0, 1, 999, u16::MAX] {
        let failure = client.request(handle, 0, b"nobody opened this").failure();
        assert_eq!(failure.reason, Reason::UnknownUpstream, "handle {handle}");
        assert_eq!(failure.retry, Retry::NotSent);
    }
    let handle = client.open("echo");
    assert_eq!(client.request(handle, 0, b"fine").reply(), b"fine");
}

#[test]
fn an_id_in_use_is_refused_and_the_request_under_way_completes() {
    let echo = TcpEcho::behaving(Manners::Slow(Duration::from_millis(300)));
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    client.send_request(handle, 7, 0, b"the first");
    client.send_request(handle, 7, 0, b"the second");
    let (correlation, answer) = client.next_answer();
    let failure = answer.failure();
    assert_eq!((correlation, failure.reason), (7, Reason::DuplicateId));
    assert_eq!(failure.retry, Retry::NotSent);
    let (correlation, answer) = client.next_answer();
    assert_eq!((correlation, answer.reply()), (7, b"the first".to_vec()));
    assert_eq!(client.request(handle, 0, b"free again").reply(), b"free again");
}

#[test]
fn more_requests_in_flight_than_allowed_are_refused() {
    let echo = TcpEcho::behaving(Manners::NeverReplies);
    let broker = Broker::builder()
        .upstream("echo", &echo.url())
        .config("[limits]\nrequests_in_flight_max = 10\n")
        .start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    for correlation in 1..=11 {
        client.send_request(handle, correlation, 0, b"?");
    }
    let (correlation, answer) = client.next_answer();
    assert_eq!((correlation, answer.failure().reason), (11, Reason::Quota));
}

#[test]
fn descriptors_beyond_the_quota_end_the_sessions_that_sent_them_and_no_other() {
    const WITHIN: usize = 8;
    let echo = TcpEcho::start();
    let broker = Broker::builder()
        .upstream("echo", &echo.url())
        .config("[limits]\ndescriptors_in_flight_max_per_uid = 64\ndescriptor_timeout = \"1m\"\n")
        .start();
    let pipes: Vec<_> = (0..8).map(|_| std::io::pipe().unwrap()).collect();
    let fds: Vec<BorrowedFd<'_>> = pipes.iter().map(|(reader, _)| reader.as_fd()).collect();
    let clients: Vec<RawClient> =
        (0..WITHIN + 2).map(|_| RawClient::welcomed(broker.runtime_dir()).0).collect();
    for client in &clients {
        // The beginning of a frame that never becomes complete: nothing claims them.
        client.send_with(b"x", &fds).unwrap();
    }
    broker.wait_until(|status| list(status, "sessions").len() == WITHIN);
    assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
    drop(clients);
    broker.wait_until(|status| list(status, "sessions").is_empty());
}

#[test]
fn one_message_never_becomes_two() {
    for (marks, forbidden) in [
        (Marks::Lines, &[&b"a\nFORGED"[..], b"\n", b"FORGED\n"][..]),
        (Marks::Crlf, &[b"a\r\nFORGED", b"a\nFORGED", b"a\rFORGED"]),
        (Marks::U32be, &[]),
    ] {
        let sink = TcpSink::with(marks);
        let broker = Broker::start(&[format!("logs={}", sink.url())]);
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("logs");
        for body in forbidden {
            client.send(handle, body);
        }
        let odd = [&b"\0"[..], b"\x1b]0;title\x07", b"\xff\xfe", b"plain"];
        for body in odd {
            client.send(handle, body);
        }
        let outcomes = client.flush(handle);
        assert_eq!(outcomes.sent, odd.len() as u64, "{marks:?}: {outcomes:?}");
        let refused = forbidden.len() as u64;
        assert_eq!(outcomes.refused_total(), refused, "{marks:?}: {outcomes:?}");
        assert_eq!(sink.wait_for(odd.len()), odd, "{marks:?}");
        let failures: Vec<_> =
            forbidden.iter().map(|body| client.request(handle, 0, body).failure().reason).collect();
        assert_eq!(failures, vec![Reason::Delimiter; forbidden.len()]);
    }
}

#[test]
fn addresses_that_are_not_configured_are_out_of_reach() {
    let echo = TcpEcho::start();
    let url = echo.url();
    let closed = Broker::start(&["unused=tcp://127.0.0.1:9"]);
    let open = Broker::builder().config("[dynamic]\nallow = [\"127.0.0.0/8\"]\n").start();
    let (mut client, _) = RawClient::welcomed(closed.runtime_dir());
    for url in [&url[..], "tcp://169.254.169.254:80", "udp://127.0.0.1:53"] {
        assert_eq!(open_url(&mut client, url), Err(Reason::NotAllowed), "{url}");
    }
    let (mut client, _) = RawClient::welcomed(open.runtime_dir());
    for url in ["tcp://169.254.169.254:80", "tcp://10.0.0.1:80", "tcp://[::1]:80"] {
        assert_eq!(open_url(&mut client, url), Err(Reason::NotAllowed), "{url}");
    }
    assert_eq!(open_url(&mut client, "http://127.0.0.1"), Err(Reason::InvalidUrl));
    let handle = open_url(&mut client, &url).unwrap();
    assert_eq!(client.request(handle, 0, b"allowed").reply(), b"allowed");
}

#[test]
fn a_client_that_reads_no_replies_is_bounded_and_alone() {
    let echo = TcpEcho::with(Marks::U32be, Manners::Prompt);
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    assert_eq!(ask(broker.runtime_dir(), "echo", b"warm").reply(), b"warm");
    let before = broker.rss_bytes();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("echo");
    let request = |correlation| {
        let header =
            FrameHeader { upstream: handle, correlation, ..FrameHeader::new(Kind::Request) };
        frame(header, &[b'x'; 60_000])
    };
    client.socket().set_nonblocking(true).unwrap();
    let mut correlation = 1;
    let mut unsent = request(correlation);
    // Far more than the session may hold; the broker stops reading it, or closes it.
    poolbroker_tests::deadline::poll_for(Duration::from_secs(3), || {
        while let Ok(count) = std::io::Write::write(&mut client.socket(), &unsent) {
            unsent.drain(..count);
            if unsent.is_empty() {
                correlation += 1;
                unsent = request(correlation);
            }
        }
        (correlation > 3000).then_some(())
    });
    let grown = broker.rss_bytes().saturating_sub(before);
    assert!(grown < 100 * MIB, "grown by {grown} bytes for {correlation} requests");
    for _ in 0..50 {
        assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
    }
    drop(client);
    broker.wait_until(|status| list(status, "sessions").is_empty());
    let status = broker.wait_until(|status| status["upstreams"][0]["in_flight"] == 0);
    broker.assert_sums(&status);
}

#[test]
fn noise_never_harms_anybody_else() {
    let (_echo, broker) = start();
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..300 {
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("echo");
        let mut noise = vec![0; random.usize(1..300)];
        random.fill(&mut noise);
        match random.u8(0..3) {
            0 => client.send_bytes(&noise),
            1 => client.send_frame(FrameHeader::new(Kind::Control), &noise),
            _ => {
                let (header, mut body) = control(1, handle, &ClientMessage::Flush);
                body.extend_from_slice(&noise);
                client.send_frame(header, &body);
            }
        }
    }
    assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive", "seed {seed}");
    broker.wait_until(|status| list(status, "sessions").is_empty());
    let status = broker.status();
    broker.assert_sums(&status);
}

fn start() -> (TcpEcho, Broker) {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    (echo, broker)
}

fn hello_frame(body: &[u8]) -> Vec<u8> {
    frame(FrameHeader::new(Kind::Hello), body)
}

fn open_url(client: &mut RawClient, url: &str) -> Result<u16, Reason> {
    let url = url.to_owned();
    client.send_control(1, 0, &ClientMessage::OpenUrl { url });
    let answer = client.next_frame().unwrap();
    match answer.header.kind {
        Kind::Failure => Err(answer.failure().reason),
        _ => match answer.control() {
            BrokerMessage::Opened { handle, .. } => Ok(handle),
            other => panic!("neither opened nor refused: {other:?}"),
        },
    }
}

/// Why the broker ends the session: its last words, a failure or a goodbye or both.
fn goodbye(client: &mut RawClient) -> Reason {
    let said: Vec<OwnedFrame> = client.until_closed();
    let reasons: Vec<Reason> = said
        .iter()
        .filter_map(|frame| match frame.header.kind {
            Kind::Failure => Some(frame.failure().reason),
            _ => match frame.control() {
                BrokerMessage::Goodbye { reason, .. } => Some(reason),
                _ => None,
            },
        })
        .collect();
    let last = *reasons.last().expect("the broker says why it closes");
    assert!(reasons.iter().all(|reason| *reason == last), "{reasons:?}");
    last
}

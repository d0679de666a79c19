//! Pipes and other descriptors that clients hand over: read to the end, never trusted.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::env;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::message::{Attachment, ClientMessage};
use poolbroker_proto::reason::Reason;
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{list, total, wait_for_child};
use poolbroker_tests::deadline::{PATIENCE, wait_for};
use poolbroker_tests::peers::{Manners, TcpEcho, TcpSink, UdpSink};
use poolbroker_tests::raw::{Attach, RawClient, ask, control, frame};
use rustix::fs::OFlags;

#[test]
fn seq_into_the_pipe_command_arrives_complete_and_in_order() {
    const LINES: usize = 200_000;
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let mut seq =
        Command::new("seq").arg(LINES.to_string()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = seq.stdout.take().unwrap();
    let mut command = broker.command("pipe");
    let mut command = command.arg("logs").stdin(lines).spawn().unwrap();
    assert_eq!(wait_for_child(&mut command).code(), Some(0));
    wait_for_child(&mut seq);
    let arrived = sink.wait_for(LINES).into_iter().map(text);
    let written = (1..=LINES).map(|number| number.to_string());
    assert!(arrived.eq(written), "order or content changed");
    assert_eq!(total(&broker.upstream_status("logs"), "sent"), LINES as u64);
}

#[test]
fn no_byte_passes_through_the_pipe_command_itself() {
    const LINES: usize = 40_000;
    let line = [b'x'; 100];
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let (reader, mut writer) = io::pipe().unwrap();
    let mut command = broker.command("pipe");
    let mut command = command.arg("logs").stdin(reader).spawn().unwrap();
    for _ in 0..LINES {
        writer.write_all(&[&line[..], b"\n"].concat()).unwrap();
    }
    sink.wait_for(LINES);
    let counters = fs::read_to_string(format!("/proc/{}/io", command.id())).unwrap();
    let read: usize = counters
        .lines()
        .find_map(|counter| counter.strip_prefix("rchar: "))
        .unwrap()
        .parse()
        .unwrap();
    assert!(read < LINES * line.len() / 4, "the command read {read} bytes");
    drop(writer);
    assert_eq!(wait_for_child(&mut command).code(), Some(0));
}

#[test]
fn the_pipe_command_reads_and_sends_a_file() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "one\ntwo\nthree").unwrap();
    let status = broker
        .command("pipe")
        .arg("logs")
        .stdin(File::open(file.path()).unwrap())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    assert_eq!(sink.wait_for(3), [&b"one"[..], b"two", b"three"]);
}

#[test]
fn all_that_a_killed_child_had_written_arrives() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let (mut client, handle) = client(&broker, "logs");
    let (reader, writer) = io::pipe().unwrap();
    let session = attach(&mut client, handle, Attachment::Pipe, &reader);
    drop(reader);
    let mut child = Command::new("sh")
        .args(["-c", "i=0; while :; do echo line $i; i=$((i+1)); done"])
        .stdout(writer)
        .spawn()
        .unwrap();
    sink.wait_for(1000);
    child.kill().unwrap();
    child.wait().unwrap();
    let (ended, reason, outcomes) = client.next_detached();
    assert_eq!((ended, reason), (session, Reason::EndOfInput));
    assert_eq!(outcomes.sent, outcomes.accepted, "{outcomes:?}");
    assert_eq!(outcomes.refused, []);
    let count = usize::try_from(outcomes.sent).unwrap();
    let arrived = sink.wait_for(count).into_iter().map(text);
    let written = (0..count).map(|number| format!("line {number}"));
    assert!(arrived.eq(written), "order or content changed");
}

#[test]
fn the_unterminated_end_of_a_pipe_is_a_message() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let (mut client, handle) = client(&broker, "logs");
    let (reader, mut writer) = io::pipe().unwrap();
    attach(&mut client, handle, Attachment::Pipe, &reader);
    writer.write_all(b"whole\nno newline behind it").unwrap();
    drop(writer);
    let (_, reason, outcomes) = client.next_detached();
    assert_eq!((reason, outcomes.sent), (Reason::EndOfInput, 2));
    assert_eq!(sink.wait_for(2)[1], b"no newline behind it");
}

#[test]
fn a_pipe_outlives_the_client_that_handed_it_over() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let (mut client, handle) = client(&broker, "logs");
    let (reader, mut writer) = io::pipe().unwrap();
    let session = attach(&mut client, handle, Attachment::Pipe, &reader);
    drop((client, reader));
    broker.wait_until(|status| list(status, "sessions").len() == 1);
    let status = broker.status();
    let [left] = list(&status, "sessions") else {
        panic!("one session: {status:#}");
    };
    assert_eq!((total(left, "id"), &left["transport"]), (session, &"pipe".into()));
    writer.write_all(b"still read\n").unwrap();
    assert_eq!(sink.wait_for(1), [b"still read"]);
    drop(writer);
    broker.wait_until(|status| list(status, "sessions").is_empty());
}

#[test]
fn a_socketpair_carries_requests_in_and_replies_out() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let (mut client, handle) = client(&broker, "echo");
    let (mut own, passed) = UnixStream::pair().unwrap();
    attach(&mut client, handle, Attachment::Socketpair, &passed);
    drop(passed);
    for number in 0..200 {
        own.write_all(format!("question {number}\n").as_bytes()).unwrap();
    }
    let mut replies = BufReader::new(own.try_clone().unwrap()).lines();
    for number in 0..200 {
        let reply = replies.next().unwrap().unwrap();
        assert_eq!(reply, format!("question {number}"));
    }
    own.shutdown(Shutdown::Write).unwrap();
    let (_, reason, _) = client.next_detached();
    assert!([Reason::EndOfInput, Reason::ClientGone].contains(&reason), "{reason:?}");
}

#[test]
fn a_socketpair_ends_for_both_though_its_client_kept_a_copy() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let (mut client, handle) = client(&broker, "echo");
    let before = broker.watched_count();
    let (mut own, passed) = UnixStream::pair().unwrap();
    attach(&mut client, handle, Attachment::Socketpair, &passed);
    own.shutdown(Shutdown::Write).unwrap();
    client.next_detached();
    own.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(own.read(&mut [0]).unwrap(), 0, "the end shows");
    // The pidfd of the client stays watched as long as the client is there.
    wait_for("it is not watched", || (broker.watched_count() <= before + 1).then_some(()));
    drop(passed);
}

#[test]
fn a_socketpair_speaks_the_protocol_of_its_upstream_both_ways() {
    for (framing, before, question, reply) in [
        ("resp", "", "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", "$1\r\nv\r\n"),
        ("memcached", "", "get k\r\n", "VALUE k 0 1\r\nv\r\nEND\r\n"),
        ("memcached", "set k 0 0 1 noreply\r\nv\r\n", "get k\r\n", "END\r\n"),
        (
            "http1",
            "",
            "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes",
        ),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("tcp://{}?framing={framing}", listener.local_addr().unwrap());
        let broker = Broker::start(&[format!("it={url}")]);
        let (mut client, handle) = client(&broker, "it");
        let (mut own, passed) = UnixStream::pair().unwrap();
        attach(&mut client, handle, Attachment::Socketpair, &passed);
        own.set_read_timeout(Some(PATIENCE)).unwrap();
        own.write_all((before.to_owned() + question).as_bytes()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let mut asked = vec![0; before.len() + question.len()];
        peer.read_exact(&mut asked).unwrap();
        peer.write_all(reply.as_bytes()).unwrap();
        let mut answer = vec![0; reply.len()];
        own.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), reply);
    }
}

#[test]
fn a_failed_request_ends_its_socketpair() {
    let echo = TcpEcho::behaving(Manners::ResetsInReply);
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let (mut client, handle) = client(&broker, "echo");
    let (mut own, passed) = UnixStream::pair().unwrap();
    attach(&mut client, handle, Attachment::Socketpair, &passed);
    drop(passed);
    own.write_all(b"question\n").unwrap();
    let (_, reason, _) = client.next_detached();
    assert_eq!(reason, Reason::RequestFailed);
    let mut reply = Vec::new();
    // Either end of the stream will do; a part of the reply would not.
    let _ = own.read_to_end(&mut reply);
    assert_eq!(reply, b"");
}

#[test]
fn what_cannot_be_read_as_a_session_is_refused() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let before = broker.fd_count();
    let (reader, writer) = io::pipe().unwrap();
    let (one_end, _other_end) = UnixStream::pair().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let file = tempfile::tempfile().unwrap();
    let (directory, zero) = (File::open("/").unwrap(), File::open("/dev/zero").unwrap());
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let cases = [
        ("a file", Attachment::Pipe, file.as_fd()),
        ("a directory", Attachment::Pipe, directory.as_fd()),
        ("/dev/zero", Attachment::Pipe, zero.as_fd()),
        ("a socket as pipe", Attachment::Pipe, one_end.as_fd()),
        ("a TCP socket", Attachment::Socketpair, listener.as_fd()),
        ("a datagram socket", Attachment::Socketpair, datagram.as_fd()),
        ("the write end of a pipe", Attachment::Pipe, writer.as_fd()),
        ("a pipe as socketpair", Attachment::Socketpair, reader.as_fd()),
    ];
    for (what, attachment, descriptor) in cases {
        let (mut client, handle) = client(&broker, "logs");
        match client.attach(handle, attachment, descriptor) {
            Attach::Refused(failure) => {
                assert_eq!(failure.reason, Reason::BadDescriptor, "{what}: {failure:?}");
            }
            other => panic!("{what} was not refused: {other:?}"),
        }
    }
    wait_for("every descriptor is closed", || (broker.fd_count() == before).then_some(()));
}

#[test]
fn a_pipe_made_blocking_and_drained_by_its_client_stops_nobody() {
    let (sink, echo) = (TcpSink::start(), TcpEcho::start());
    let broker = Broker::start(&[format!("logs={}", sink.url()), format!("echo={}", echo.url())]);
    let (mut client, handle) = client(&broker, "logs");
    let (reader, mut writer) = io::pipe().unwrap();
    attach(&mut client, handle, Attachment::Pipe, &reader);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // The flag belongs to the open pipe, which the broker shares.
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                rustix::fs::fcntl_setfl(&reader, OFlags::empty()).unwrap();
            }
        });
        // Whatever the broker was woken for may be gone when it looks.
        scope.spawn(|| steal(&reader));
        for _ in 0..200 {
            writer.write_all(b"now you see me\n").unwrap();
            assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
        }
        done.store(true, Ordering::SeqCst);
        drop(writer);
    });
    drop(reader);
    let (_, reason, outcomes) = client.next_detached();
    assert!([Reason::EndOfInput, Reason::ReadError].contains(&reason), "{reason:?}");
    assert_eq!(outcomes.sent, outcomes.accepted, "{outcomes:?}");
}

#[test]
fn a_client_that_passed_its_own_connection_ends_with_its_process() {
    // Meant for this test's own child process: the directory of the broker.
    const DIR: &str = "POOLBROKER_TEST_PASSES_ITSELF_TO";
    let pass_itself = |dir: &Path, attachment| {
        let (mut client, _) = RawClient::welcomed(dir);
        let handle = client.open("echo");
        let (header, body) = control(9, handle, &ClientMessage::Attach { attachment });
        let own_end = client.socket().try_clone().unwrap();
        let sent = client.send_with(&frame(header, &body), &[own_end.as_fd()]);
        sent.unwrap();
        client
    };
    if let Some(dir) = env::var_os(DIR) {
        let _kept = pass_itself(Path::new(&dir), Attachment::Socketpair);
        let _also = pass_itself(Path::new(&dir), Attachment::Pipe);
        std::process::exit(0);
    }
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let name = "a_client_that_passed_its_own_connection_ends_with_its_process";
    let status = Command::new(env::current_exe().unwrap())
        .args(["--exact", name])
        .env(DIR, broker.runtime_dir())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    broker.wait_until(|status| list(status, "sessions").is_empty());
}

#[test]
fn a_descriptor_that_is_never_claimed_does_not_keep_its_session_alive() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    for length in [1, 5] {
        // It comes with the beginning of a frame that never becomes complete.
        let (client, _) = client(&broker, "echo");
        let own_end = client.socket().try_clone().unwrap();
        let partial = frame(FrameHeader::new(Kind::Send), b"xyz");
        let sent = client.send_with(&partial[..length], &[own_end.as_fd()]);
        sent.unwrap();
        drop((client, own_end));
        broker.wait_until(|status| list(status, "sessions").is_empty());
    }
}

#[test]
fn a_descriptor_whose_close_blocks_holds_up_nobody() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    let (mut client, handle) = client(&broker, "echo");
    // The last close of this socket waits, as long as the linger says, for bytes that nobody reads.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let lingering = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    rustix::net::sockopt::set_socket_linger(&lingering, Some(Duration::from_secs(40))).unwrap();
    lingering.set_nonblocking(true).unwrap();
    while (&lingering).write(&[0; 65536]).is_ok() {}
    let answer = {
        let attachment = Attachment::Socketpair;
        let (header, body) = control(9, handle, &ClientMessage::Attach { attachment });
        client.send_with(&frame(header, &body), &[lingering.as_fd()]).unwrap();
        drop(lingering);
        client.next_frame().unwrap().failure()
    };
    assert_eq!(answer.reason, Reason::BadDescriptor, "{answer:?}");
    for _ in 0..20 {
        assert_eq!(client.request(handle, 10_000, b"alive").reply(), b"alive");
    }
}

#[test]
fn a_flood_of_descriptors_leaves_none_behind() {
    let echo = TcpEcho::start();
    let broker = Broker::start(&[format!("echo={}", echo.url())]);
    assert_eq!(ask(broker.runtime_dir(), "echo", b"warm").reply(), b"warm");
    let before = broker.wait_until(|status| list(status, "sessions").is_empty());
    let before = (broker.fd_count(), before["sessions"].clone());
    let (reader, writer) = io::pipe().unwrap();
    for count in [2, 8, 9, 64, 253] {
        for _ in 0..20 {
            let (client, handle) = client(&broker, "echo");
            let attachment = Attachment::Pipe;
            let (header, body) = control(9, handle, &ClientMessage::Attach { attachment });
            let descriptors = vec![reader.as_fd(); count];
            // The kernel may refuse at the sender; then nothing reached the broker.
            let _ = client.send_with(&frame(header, &body), &descriptors);
        }
        assert_eq!(ask(broker.runtime_dir(), "echo", b"alive").reply(), b"alive");
    }
    // What was taken is read to its end.
    drop(writer);
    wait_for("every descriptor is closed", || (broker.fd_count() == before.0).then_some(()));
    assert_eq!(broker.status()["sessions"], before.1);
}

#[test]
fn descriptors_that_no_message_announces_end_the_session() {
    let sink = UdpSink::start();
    let broker = Broker::start(&[format!("metrics={}", sink.url_write_only())]);
    let (mut other, other_handle) = client(&broker, "metrics");
    other.send(other_handle, b"opens the connection");
    other.flush(other_handle);
    let before = broker.fd_count();
    let (reader, _writer) = io::pipe().unwrap();
    let (mut client, handle) = client(&broker, "metrics");
    let header = FrameHeader { upstream: handle, ..FrameHeader::new(Kind::Send) };
    client.send_with(&frame(header, b"with a stowaway"), &[reader.as_fd()]).unwrap();
    client.until_closed();
    wait_for("its descriptors are closed", || (broker.fd_count() == before).then_some(()));
}

#[test]
fn an_attachment_without_its_descriptor_is_refused() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let (mut client, handle) = client(&broker, "logs");
    let attachment = Attachment::Pipe;
    client.send_control(9, handle, &ClientMessage::Attach { attachment });
    let failure = client.next_frame().unwrap().failure();
    assert_eq!(failure.reason, Reason::DescriptorMissing, "{failure:?}");
}

#[test]
fn the_admin_socket_takes_no_descriptors() {
    let broker = Broker::start(&["unused=tcp://127.0.0.1:9"]);
    broker.status();
    let before = broker.fd_count();
    let (reader, _writer) = io::pipe().unwrap();
    for _ in 0..20 {
        let admin = UnixStream::connect(broker.runtime_dir().join("admin.sock")).unwrap();
        // The kernel refuses to pass it, or the broker throws it away.
        let _ = poolbroker_proto::fd::send(&admin, b"status\n", &[reader.as_fd()]);
    }
    broker.status();
    wait_for("every descriptor is closed", || (broker.fd_count() == before).then_some(()));
}

fn client(broker: &Broker, upstream: &str) -> (RawClient, u16) {
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open(upstream);
    (client, handle)
}

fn attach(
    client: &mut RawClient,
    upstream: u16,
    attachment: Attachment,
    descriptor: &impl AsFd,
) -> u64 {
    match client.attach(upstream, attachment, descriptor.as_fd()) {
        Attach::Taken { session } => session,
        other => panic!("the descriptor was not taken: {other:?}"),
    }
}

/// Takes bytes out of the pipe until its write end is closed.
fn steal(reader: &PipeReader) {
    let mut reader = reader;
    loop {
        match reader.read(&mut [0; 64]) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    }
}

fn text(record: Vec<u8>) -> String {
    String::from_utf8(record).unwrap()
}

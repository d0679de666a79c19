//! FIFOs: `echo x > NAME.fifo` from any shell.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, listener_in, total};
use poolbroker_tests::peers::{Marks, TcpSink, UdpSink};

#[test]
fn a_thousand_parallel_shells_write_a_line_each_and_each_arrives_once() {
    const SHELLS: usize = 1000;
    const AT_ONCE: usize = 32;
    let sink = UdpSink::answering(1);
    let broker = Broker::start(&[format!("metrics={}", sink.url_write_only())]);
    let fifo = broker.fifo("metrics");
    thread::scope(|scope| {
        for worker in 0..AT_ONCE {
            let fifo = &fifo;
            scope.spawn(move || {
                for number in (worker..SHELLS).step_by(AT_ONCE) {
                    shell(&format!("echo msg{number} > {}", fifo.display()));
                }
            });
        }
    });
    sink.wait_for(SHELLS);
    let status = broker.wait_until(|status| {
        total(&status["upstreams"][0], "sent") == SHELLS as u64
            && total(&status["upstreams"][0], "replies_discarded") == sink.replies_sent()
    });
    broker.assert_sums(&status);
    let listener = listener_in(&status, "fifo", "metrics");
    assert_eq!(total(listener, "accepted"), SHELLS as u64);
    assert_eq!(listener["path"], fifo.to_str().unwrap());

    let mut arrived: Vec<String> = sink.received().into_iter().map(text).collect();
    let mut written: Vec<String> = (0..SHELLS).map(|number| format!("msg{number}")).collect();
    arrived.sort();
    written.sort();
    assert_eq!(arrived, written);
}

#[test]
fn lines_of_one_writer_keep_their_order() {
    let (sink, broker) = line_sink();
    let fifo = broker.fifo("logs");
    shell(&format!("seq 100000 > {}", fifo.display()));
    let arrived = sink.wait_for(100_000).into_iter().map(text);
    let written = (1..=100_000).map(|number: u32| number.to_string());
    assert!(arrived.eq(written), "order or content changed");
}

#[test]
fn a_line_written_byte_by_byte_is_one_message() {
    let (sink, broker) = line_sink();
    let mut fifo = writer(&broker.fifo("logs"));
    for byte in b"byte by byte\nnext\n" {
        fifo.write_all(&[*byte]).unwrap();
    }
    assert_eq!(sink.wait_for(2), [&b"byte by byte"[..], b"next"]);
}

#[test]
fn packets_are_read_to_the_last_and_hold_up_no_other_writer() {
    let (sink, broker) = line_sink();
    let fifo = broker.fifo("logs");
    let mut packets = writer(&fifo);
    // Each write is a packet then, and ends a read early (O_DIRECT in pipe(2)).
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::DIRECT;
    rustix::fs::fcntl_setfl(&packets, flags).unwrap();
    broker.pause();
    for number in 0..10 {
        packets.write_all(format!("packet {number}\n").as_bytes()).unwrap();
    }
    broker.resume();
    let arrived = sink.wait_for(10).into_iter().map(text);
    assert!(arrived.eq((0..10).map(|number| format!("packet {number}"))));
    writer(&fifo).write_all(b"of another writer\n").unwrap();
    assert_eq!(sink.wait_for(11)[10], b"of another writer");
}

#[test]
fn empty_lines_are_counted_and_change_nothing() {
    let (sink, broker) = line_sink();
    let mut fifo = writer(&broker.fifo("logs"));
    fifo.write_all(&[b'\n'; 1000]).unwrap();
    fifo.write_all(b"real\n").unwrap();
    assert_eq!(sink.wait_for(1), [b"real"]);
    let status = broker.wait_until(|status| refused(status, "empty") == 1000);
    assert_eq!(total(listener_in(&status, "fifo", "logs"), "accepted"), 1);
}

#[test]
fn a_record_that_is_too_long_is_dropped_to_its_delimiter_and_counted_once() {
    let (sink, broker) = line_sink();
    let fifo = broker.fifo("logs");
    let fifo = fifo.display();
    shell(&format!("{{ head -c 1000000 /dev/zero | tr '\\0' A; echo; echo OK; }} > {fifo}"));
    assert_eq!(sink.wait_for(1), [b"OK"]);
    let status = broker.wait_until(|status| refused(status, "too_long") > 0);
    assert_eq!(refused(&status, "too_long"), 1);
    assert_eq!(total(listener_in(&status, "fifo", "logs"), "accepted"), 1);
}

/// A FIFO that is written so often that the loop looks at it by itself, and brings no message.
#[test]
fn a_record_that_is_dropped_is_read_to_its_end_however_it_is_written() {
    let sink = TcpSink::start();
    let broker = Broker::builder()
        .upstream("logs", &sink.url())
        .config("[limits]\npartial_timeout = \"600s\"\n")
        .start();
    let mut fifo = writer(&broker.fifo("logs"));
    // Not this thread: it would wait for ever for a broker that does not read.
    thread::spawn(move || {
        for _ in 0..2_000 {
            fifo.write_all(&[b'A'; 100]).unwrap();
            thread::sleep(Duration::from_micros(10));
        }
        fifo.write_all(&[b'A'; 1_000_000]).unwrap();
        fifo.write_all(b"\nOK\n").unwrap();
    });
    assert_eq!(sink.wait_for(1), [b"OK"]);
    broker.wait_until(|status| refused(status, "too_long") == 1);
}

#[test]
fn a_record_may_fill_pipe_buf_with_its_delimiter_and_no_more() {
    const PIPE_BUF: usize = 4096;
    let (sink, broker) = line_sink();
    let mut fifo = writer(&broker.fifo("logs"));
    let longest = vec![b'x'; PIPE_BUF - 1];
    let too_long = vec![b'y'; PIPE_BUF];
    for record in [&longest, &too_long, &longest] {
        fifo.write_all(&[&record[..], b"\n"].concat()).unwrap();
    }
    assert_eq!(sink.wait_for(2), [&longest[..], &longest]);
    broker.wait_until(|status| refused(status, "too_long") == 1);
}

#[test]
fn the_torn_line_of_a_killed_writer_is_discarded_and_never_joined_to_the_next() {
    let sink = TcpSink::start();
    let broker = Broker::builder()
        .upstream("logs", &sink.url())
        .config("[limits]\npartial_timeout = \"200ms\"\n")
        .start();
    let fifo = broker.fifo("logs");
    let script = format!("exec > {}; printf 'one\\ntwo\\nhal'; kill -9 $$", fifo.display());
    let status = Command::new("sh").args(["-c", &script]).status().unwrap();
    assert_eq!(status.code(), None, "the writer was killed");
    broker.wait_until(|status| refused(status, "partial") == 1);
    writer(&fifo).write_all(b"three\n").unwrap();
    assert_eq!(sink.wait_for(3), [&b"one"[..], b"two", b"three"]);
}

#[test]
fn a_line_that_waits_for_its_end_is_completed_by_the_next_write() {
    let (sink, broker) = line_sink();
    let fifo = broker.fifo("logs");
    writer(&fifo).write_all(b"first\nunfinished, ").unwrap();
    sink.wait_for(1);
    writer(&fifo).write_all(b"finished\n").unwrap();
    assert_eq!(sink.wait_for(2)[1], b"unfinished, finished");
    assert_eq!(refused(&broker.status(), "partial"), 0);
}

#[test]
fn a_line_that_would_be_two_messages_upstream_is_refused() {
    let sink = TcpSink::with(Marks::Crlf);
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let mut fifo = writer(&broker.fifo("logs"));
    fifo.write_all(b"a\rFORGED\nb\0\x1b]0;\xff\n").unwrap();
    assert_eq!(sink.wait_for(1), [b"b\0\x1b]0;\xff"]);
    broker.wait_until(|status| refused(status, "delimiter") == 1);
}

#[test]
fn a_framed_fifo_carries_any_bytes() {
    let sink = TcpSink::with(Marks::U32be);
    let config =
        format!("[upstream.logs]\nurl = \"{}\"\nfifo = {{ framing = \"u16be\" }}\n", sink.url());
    let broker = Broker::builder().config(&config).start();
    let mut fifo = writer(&broker.fifo("logs"));
    fifo.write_all(b"\0\x04a\nb\0\0\x03end").unwrap();
    assert_eq!(sink.wait_for(2), [&b"a\nb\0"[..], b"end"]);
}

#[test]
fn modes_are_as_configured_whatever_the_umask() {
    let sink = UdpSink::start();
    let url = sink.url_write_only();
    for umask in ["0", "077"] {
        let config = format!(
            "[upstream.open]\nurl = \"{url}\"\nfifo = {{ mode = \"0622\" }}\n\
             [upstream.private]\nurl = \"{url}\"\n"
        );
        let broker = Broker::builder().config(&config).umask(umask).start();
        for (name, mode) in [
            ("open.fifo", 0o622),
            ("private.fifo", 0o600),
            ("broker.sock", 0o600),
            ("admin.sock", 0o600),
        ] {
            let path = broker.runtime_dir().join(name);
            let found = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(found, mode, "{name} under umask {umask}: {found:o}");
        }
    }
}

#[test]
fn the_socket_is_opened_to_others_only_as_configured() {
    let broker = Broker::builder()
        .upstream("unused", "tcp://127.0.0.1:9")
        .config("[socket]\nmode = \"0666\"\n")
        .umask("077")
        .start();
    let mode_of = |name| {
        let path = broker.runtime_dir().join(name);
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!((mode_of("broker.sock"), mode_of("admin.sock")), (0o666, 0o600));
}

#[test]
fn a_path_that_is_no_fifo_is_refused_with_the_remedy_and_left_alone() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let path = dir.path().join("logs.fifo");
    fs::write(&path, "a script ran before the broker\n").unwrap();
    let (status, stderr) = Broker::builder()
        .runtime_dir(dir.path())
        .upstream("logs", "tcp://127.0.0.1:9")
        .start_expecting_failure();
    assert!(!status.success());
    assert!(stderr.contains(path.to_str().unwrap()), "{stderr}");
    assert!(stderr.contains("not a FIFO"), "{stderr}");
    assert!(stderr.contains("remove"), "the remedy is named: {stderr}");
    let untouched = fs::read_to_string(&path).unwrap();
    assert_eq!(untouched, "a script ran before the broker\n");
}

#[test]
fn an_upstream_without_fifo_has_none() {
    let broker = Broker::builder()
        .config("[upstream.logs]\nurl = \"tcp://127.0.0.1:9\"\nfifo = false\n")
        .upstream("other", "tcp://127.0.0.1:9")
        .start();
    assert!(!broker.fifo("logs").exists());
    let other = fs::metadata(broker.fifo("other")).unwrap();
    assert!(other.file_type().is_fifo());
}

fn line_sink() -> (TcpSink, Broker) {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    (sink, broker)
}

fn shell(script: &str) {
    let status = Command::new("sh").args(["-c", script]).status().unwrap();
    assert!(status.success(), "{script}: {status}");
}

fn writer(fifo: &Path) -> File {
    File::options().write(true).open(fifo).unwrap()
}

fn refused(status: &serde_json::Value, reason: &str) -> u64 {
    count_of(listener_in(status, "fifo", "logs"), "refused", reason)
}

fn text(record: Vec<u8>) -> String {
    String::from_utf8(record).unwrap()
}

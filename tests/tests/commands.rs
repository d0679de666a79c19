//! The commands as a shell uses them: send, pipe, status, demo.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io::Write;
use std::process::{Command, Stdio};

use poolbroker_tests::Broker;
use poolbroker_tests::binary::poolbroker_binary;
use poolbroker_tests::broker::total;
use poolbroker_tests::peers::{TcpEcho, TcpSink, UdpSink};

#[test]
fn send_takes_one_message_as_argument_and_many_as_lines() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let status = broker.command("send").args(["logs", "one"]).status().unwrap();
    assert_eq!(status.code(), Some(0));
    assert_eq!(sink.wait_for(1), [b"one"]);
    let mut child = broker.command("send").arg("logs").stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let lines: String = (0..10_000).map(|number| format!("line {number}\n")).collect();
    stdin.write_all(lines.as_bytes()).unwrap();
    drop(stdin);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let expected = lines.lines().map(|line| line.as_bytes().to_vec());
    assert!(sink.wait_for(10_001).into_iter().skip(1).eq(expected), "order or content changed");
    assert_eq!(total(&broker.upstream_status("logs"), "sent"), 10_001);
}

#[test]
fn every_way_to_send_arrives() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let ways = ["unix", "pipe", "fifo"];
    for (number, way) in ways.into_iter().enumerate() {
        let output = broker.command("send").args(["logs", way, "--via", way]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{way}: {output:?}");
        assert_eq!(sink.wait_for(number + 1)[number], way.as_bytes());
    }
}

#[test]
fn a_refused_message_makes_send_fail_and_the_others_go() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("logs={}", sink.url())]);
    let too_long = "x".repeat(1024 * 1024 + 1);
    let mut child = broker
        .command("send")
        .arg("logs")
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(format!("first\n{too_long}\nlast\n").as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!output.stderr.is_empty(), "the error is said");
    assert_eq!(sink.wait_for(2), [b"first".to_vec(), b"last".to_vec()]);
}

#[test]
fn status_is_a_table_for_people_and_json_for_programs() {
    let (echo, sink) = (TcpEcho::start(), UdpSink::start());
    let broker = Broker::start(&[
        format!("echo={}", echo.url()),
        format!("metrics={}", sink.url_write_only()),
    ]);
    broker.command("request").args(["echo", "x"]).output().unwrap();
    let table = broker.command("status").output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    for shown in ["echo", "metrics", "udp-write-only", &format!("127.0.0.1:{}", echo.port())] {
        assert!(table.contains(shown), "{shown} is not in\n{table}");
    }
    let json = broker.command("status").arg("--json").output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    broker.assert_sums(&json);
    let (asked, now) = (&json["upstreams"][0], broker.upstream_status("echo"));
    assert_eq!((&asked["name"], &asked["replied"]), (&now["name"], &now["replied"]));
    assert_eq!(asked["connections"][0]["fd"], now["connections"][0]["fd"]);
}

#[test]
fn the_demo_needs_nothing_and_shows_every_kind() {
    let output =
        Command::new(poolbroker_binary()).arg("demo").stdin(Stdio::null()).output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for kind in ["tcp", "udp", "udp-write-only", "FIFO", "pipe", "client socket"] {
        assert!(shown.contains(kind), "{kind} is not in\n{shown}");
    }
}

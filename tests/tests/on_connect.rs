//! What a fresh connection says before it is used: `on_connect`.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::time::Duration;

use poolbroker_client::{Client, Reason};
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{Builder, count_of};
use poolbroker_tests::peers::TcpEcho;
use poolbroker_tests::raw::ask;

const LONG: Duration = Duration::from_secs(20);
const SECRET: &str = "correct-horse-battery";

fn builder(peer: &TcpEcho, steps: &str) -> Builder {
    Broker::builder().env("THE_SECRET", SECRET).config(&format!(
        "[upstream.it]\nurl = \"{}\"\nconnections_max = 1\non_connect = [{steps}]\n",
        peer.url()
    ))
}

#[test]
fn every_fresh_connection_says_it_first_and_no_request_gets_its_replies() {
    let mut peer = TcpEcho::start();
    let steps = "{ send = \"AUTH {secret}\", secret = { env = \"THE_SECRET\" }, expect = \"AUTH\" }, \
                 { send = \"SELECT 3\", expect = \"\" }";
    let broker = builder(&peer, steps).start();
    for round in 1..=3 {
        for number in 0..5 {
            let body = format!("request {number}");
            let reply = ask(broker.runtime_dir(), "it", body.as_bytes()).reply();
            assert_eq!(reply, body.as_bytes());
        }
        assert_eq!(peer.connections_ever(), round);
        assert_eq!(peer.messages(), round * 7, "two greetings and five requests each time");
        peer.stop();
        broker.wait_until_upstream("it", |it| it["connections"].as_array().unwrap().is_empty());
        peer.restart();
    }
}

#[test]
fn a_wrong_reply_is_a_connect_that_failed_and_secrets_are_never_shown() {
    let peer = TcpEcho::start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("secret");
    fs::write(&file, format!("{SECRET}\n")).unwrap();
    for secret in ["{ env = \"THE_SECRET\" }".to_owned(), format!("{{ file = {file:?} }}")] {
        let step = format!("{{ send = \"AUTH {{secret}}\", secret = {secret}, expect = \"+OK\" }}");
        let broker = builder(&peer, &step).start();
        let client = Client::connect_in(broker.runtime_dir()).unwrap();
        let refused = client.upstream("it").unwrap().request(b"ping", LONG).unwrap_err();
        assert_eq!(refused.reason(), Some(Reason::OnConnect), "{refused}");
        let status = broker
            .wait_until_upstream("it", |it| count_of(it, "connections_closed", "on_connect") > 0);
        let shown =
            [refused.to_string(), status.to_string(), broker.status().to_string(), broker.stderr()];
        // The framing knows no commands: any word may be the secret.
        for told in ["not as expected", "step=1", "sent=\"\"", "expect=+OK"] {
            assert!(shown[3].contains(told), "{told}: {}", shown[3]);
        }
        for text in shown {
            assert!(!text.contains(SECRET), "{text}");
        }
    }
}

#[test]
fn a_secret_that_is_not_there_is_told_before_anything_is_served() {
    let peer = TcpEcho::start();
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    for (secret, named) in [
        ("{ env = \"NO_SUCH_SECRET\" }".to_owned(), "NO_SUCH_SECRET"),
        (format!("{{ file = {missing:?} }}"), "missing"),
    ] {
        let step = format!("{{ send = \"AUTH {{secret}}\", secret = {secret}, expect = \"\" }}");
        let (exit, text) = builder(&peer, &step).start_expecting_failure();
        assert_eq!(exit.code(), Some(2), "{text}");
        assert!(text.contains(named) && text.contains("on_connect"), "{text}");
    }
}

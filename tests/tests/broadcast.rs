//! mode = "broadcast": one message to every host, and an outcome for each.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::time::Duration;

use poolbroker_client::{Client, Error, Reason, Transport};
use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, total};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::peers::{TcpSink, UdpSink, unused_port};
use poolbroker_tests::raw::{self, RawClient};

const LONG: Duration = Duration::from_secs(20);
const RING: Transport = Transport::Ring { bytes: 256 * 1024 };

fn address(url: &str) -> String {
    url.split("://").nth(1).unwrap().split('?').next().unwrap().to_owned()
}

#[test]
fn every_host_gets_every_message_and_each_copy_is_counted() {
    for transport in [Transport::Unix, RING] {
        let (one, two) = (UdpSink::start(), UdpSink::start());
        let (a, b) = (address(&one.url_write_only()), address(&two.url_write_only()));
        let config =
            format!("[upstream.all]\nurl = \"udp-write-only://{a},{b}\"\nmode = \"broadcast\"\n");
        let broker = Broker::builder().config(&config).start();
        let client = Client::connect_in_with(broker.runtime_dir(), transport).unwrap();
        let all = client.upstream("all").unwrap();
        for number in 0..100 {
            all.send(format!("m{number}").as_bytes()).unwrap();
        }
        let outcomes = all.flush(LONG).unwrap();
        assert_eq!((outcomes.accepted, outcomes.copies, outcomes.sent), (200, 100, 200));
        let expected: Vec<_> = (0..100).map(|n| format!("m{n}").into_bytes()).collect();
        assert_eq!(one.wait_for(100), expected);
        assert_eq!(two.wait_for(100), expected);
        for name in [format!("all@{a}"), format!("all@{b}")] {
            assert_eq!(total(&broker.upstream_status(&name), "sent"), 100);
        }
        broker.assert_sums(&broker.status());
        let refused = all.request(b"x", LONG).unwrap_err();
        let is_told = matches!(refused, Error::WriteOnly { .. })
            || refused.reason() == Some(Reason::Broadcast);
        assert!(is_told, "{refused}");
    }
}

#[test]
fn a_host_that_is_down_has_its_own_outcome_and_its_fifo_is_one() {
    let sink = TcpSink::start();
    let (up, down) = (address(&sink.url()), format!("127.0.0.1:{}", unused_port()));
    let config = format!(
        "[upstream.all]\nurl = \"tcp://{up},{down}\"\nmode = \"broadcast\"\n\
         overflow = \"drop-newest\"\nqueue_bytes_max = 4096\nqueue_timeout = \"300ms\"\n"
    );
    let broker = Broker::builder().config(&config).start();
    let line = "x".repeat(100);
    let name = |host: &str| format!("all@{host}");
    for number in 1..=100 {
        fs::write(broker.fifo("all"), format!("{line}\n")).unwrap();
        // The one that is up is never full; the other one soon is.
        if number % 10 == 1 {
            broker.wait_until_upstream(&name(&up), |it| it["sent"] == number);
        }
    }
    let good = broker.wait_until_upstream(&name(&up), |it| it["sent"] == 100);
    assert_eq!(total(&good, "accepted"), 100);
    let bad = broker.wait_until_upstream(&name(&down), |it| it["queued"] == 0);
    assert_eq!((total(&bad, "accepted"), total(&bad, "sent")), (100, 0), "{bad:#}");
    assert!(count_of(&bad, "dropped", "queue_full") > 0, "{bad:#}");
    assert_eq!(count_of(&bad, "dropped", "queue_full") + total(&bad, "expired"), 100);
    let status = broker.status();
    broker.assert_sums(&status);
    let fifo = status["listeners"].as_array().unwrap().iter().find(|it| it["kind"] == "fifo");
    assert_eq!(fifo.unwrap()["upstream"], "all");
}

#[test]
fn a_message_that_no_host_may_have_is_refused_though_the_queue_of_one_is_full() {
    let sink = TcpSink::start();
    let (up, down) = (address(&sink.url()), format!("127.0.0.1:{}", unused_port()));
    let config = format!(
        "[upstream.all]\nurl = \"tcp://{down},{up}\"\nmode = \"broadcast\"\n\
         overflow = \"drop-newest\"\nqueue_bytes_max = 4096\nqueue_timeout = \"1s\"\n"
    );
    let broker = Broker::builder().config(&config).start();
    let client = Client::connect_in_with(broker.runtime_dir(), Transport::Unix).unwrap();
    let all = client.upstream("all").unwrap();
    for number in 1..=60 {
        all.send(&[b'x'; 100]).unwrap();
        broker.wait_until_upstream(&format!("all@{up}"), |it| it["sent"] == number);
    }
    let full = broker.upstream_status(&format!("all@{down}"));
    assert!(count_of(&full, "dropped", "queue_full") > 0, "{full:#}");
    all.send(&[b"two lines\n".as_slice(); 10].concat()).unwrap();
    let outcomes = all.flush(LONG).unwrap();
    assert_eq!((outcomes.accepted, outcomes.refused), (120, vec![(Reason::Delimiter, 1)]));
    broker.assert_sums(&broker.status());
}

#[test]
fn a_host_that_is_down_keeps_the_newest_also_of_one_run() {
    let mut sinks = [TcpSink::start(), TcpSink::start()];
    let [one, two] = [&sinks[0], &sinks[1]].map(|sink| address(&sink.url()));
    let config = format!(
        "[upstream.all]\nurl = \"tcp://{one},{two}\"\nmode = \"broadcast\"\n\
         overflow = \"drop-oldest\"\nqueue_bytes_max = 4096\n"
    );
    sinks.iter_mut().for_each(TcpSink::stop);
    let broker = Broker::builder().config(&config).start();
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("all");
    let header = FrameHeader { upstream: handle, ..FrameHeader::new(Kind::Send) };
    let body = |number: usize| format!("{number:0>100}").into_bytes();
    let frames: Vec<_> = (0..60).flat_map(|number| raw::frame(header, &body(number))).collect();
    client.send_bytes(&frames);
    broker.wait_until(|status| {
        let copies = status["upstreams"].as_array().unwrap().iter().skip(1);
        copies.into_iter().all(|copy| total(copy, "accepted") == 60)
    });
    sinks.iter_mut().for_each(TcpSink::restart);
    for sink in &sinks {
        wait_for("the newest", || sink.received().contains(&body(59)).then_some(()));
    }
}

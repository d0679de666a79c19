//! Host names: T3, T4 and T5, with a real DNS server in a network of the test's own. Ignored by
//! `cargo test`, since namespaces take root and the DNS server is dnsmasq; .ci/run runs them.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, list, total};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::namespace::inside;
use poolbroker_tests::raw::{Answer, RawClient, ask};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Names are asked of 127.0.0.1 alone, which is given a second.
const RESOLV: &str = "mount --make-rprivate / && mount -t tmpfs none /mnt && \
    echo 'nameserver 127.0.0.1\noptions timeout:1 attempts:1' > /mnt/resolv.conf && \
    echo 'hosts: dns' > /mnt/nsswitch.conf && \
    mount --bind /mnt/resolv.conf /etc/resolv.conf && \
    mount --bind /mnt/nsswitch.conf /etc/nsswitch.conf";

const PORT: u16 = 7007;

struct DnsServer {
    dir: TempDir,
    child: Child,
}

impl DnsServer {
    /// One that knows `svc.test` by these addresses.
    fn start(addresses: &[&str]) -> DnsServer {
        let dir = TempDir::new().unwrap();
        let hosts = dir.path().join("hosts");
        fs::write(&hosts, hosts_of(addresses)).unwrap();
        let mut command = Command::new("/usr/sbin/dnsmasq");
        command.args([
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
        ]);
        command.args(["--user=root", "--local=/test/", "--listen-address=127.0.0.1"]);
        command.arg(format!("--addn-hosts={}", hosts.display())).stderr(Stdio::null());
        let child = command.spawn().expect("dnsmasq is installed");
        wait_for("the DNS server", || std::net::TcpStream::connect("127.0.0.1:53").ok());
        DnsServer { dir, child }
    }

    fn set(&self, addresses: &[&str]) {
        fs::write(self.dir.path().join("hosts"), hosts_of(addresses)).unwrap();
        self.signal(Signal::HUP);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn hosts_of(addresses: &[&str]) -> String {
    addresses.iter().map(|address| format!("{address} svc.test\n")).collect()
}

/// Answers each line with the address it came to.
fn server(address: &'static str) {
    let listener = TcpListener::bind((address, PORT)).unwrap();
    thread::spawn(move || {
        for connection in listener.incoming() {
            let connection = connection.unwrap();
            thread::spawn(move || {
                for _ in BufReader::new(&connection).lines().map_while(Result::ok) {
                    (&connection).write_all(format!("{address}\n").as_bytes()).unwrap();
                }
            });
        }
    });
}

fn start_broker(keys: &str) -> Broker {
    let config = format!(
        "[limits]\nresolve_interval = \"1s\"\n\
         [upstream.svc]\nurl = \"tcp://svc.test:{PORT}\"\nwait_timeout = \"20s\"\n{keys}"
    );
    Broker::builder().config(&config).start()
}

fn reply(broker: &Broker) -> String {
    match ask(broker.runtime_dir(), "svc", b"who") {
        Answer::Reply(body) => String::from_utf8(body).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn name_in(upstream: &Value) -> &Value {
    &list(upstream, "names")[0]
}

#[test]
#[ignore = "needs root and dnsmasq; run by .ci/run with -- --ignored"]
fn a_record_that_changes_moves_connections_and_loses_no_request() {
    inside(RESOLV, "a_record_that_changes_moves_connections_and_loses_no_request", || {
        server("127.0.0.2");
        server("127.0.0.3");
        let dns = DnsServer::start(&["127.0.0.2"]);
        let broker = start_broker("");
        assert_eq!(reply(&broker), "127.0.0.2");
        dns.set(&["127.0.0.3"]);
        wait_for("the new address", || (reply(&broker) == "127.0.0.3").then_some(()));
        let upstream = broker.wait_until_upstream("svc", |upstream| {
            count_of(upstream, "connections_closed", "address_gone") > 0
        });
        let connections = list(&upstream, "connections");
        assert!(connections.iter().all(|conn| conn["remote"] == format!("127.0.0.3:{PORT}")));
        assert_eq!(upstream["addresses"], serde_json::json!([format!("127.0.0.3:{PORT}")]));
        assert_eq!(total(&upstream, "requests"), total(&upstream, "replied"), "{upstream:#}");
    });
}

#[test]
#[ignore = "needs root and dnsmasq; run by .ci/run with -- --ignored"]
fn a_dns_server_that_is_silent_or_knows_nothing_holds_up_nobody() {
    inside(RESOLV, "a_dns_server_that_is_silent_or_knows_nothing_holds_up_nobody", || {
        server("127.0.0.2");
        let dns = DnsServer::start(&["127.0.0.2"]);
        // A connection per request, so that each needs the address.
        let broker = start_broker("requests_per_connection_max = 1\n");
        assert_eq!(reply(&broker), "127.0.0.2");
        let fails_again = |than: u64| {
            let failed = move |upstream: &Value| total(name_in(upstream), "failures") > than;
            broker.wait_until_upstream("svc", failed)
        };
        dns.signal(Signal::STOP);
        let upstream = fails_again(0);
        assert!(total(name_in(&upstream), "lookup_ms") >= 1_000, "{upstream:#}");
        let before = total(name_in(&upstream), "lookups");
        let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
        let handle = client.open("svc");
        let mut answered = 0;
        wait_for("lookups that take a second each", || {
            for _ in 0..100 {
                assert_eq!(client.request(handle, 0, b"who").reply(), b"127.0.0.2");
            }
            answered += 100;
            (total(name_in(&broker.upstream_status("svc")), "lookups") > before + 1).then_some(())
        });
        assert!(answered > 200, "only {answered} requests during two lookups of a second");
        // NXDOMAIN, and then addresses that nobody should connect to.
        dns.set(&[]);
        dns.signal(Signal::CONT);
        let upstream = fails_again(total(name_in(&upstream), "failures") + 2);
        assert_eq!(reply(&broker), "127.0.0.2");
        dns.set(&["0.0.0.0"]);
        let told = |upstream: &Value| {
            let error = name_in(upstream)["error"].as_str();
            error.is_some_and(|error| error.contains("0.0.0.0"))
        };
        broker.wait_until_upstream("svc", told);
        assert_eq!(reply(&broker), "127.0.0.2");
        assert_eq!(total(name_in(&upstream), "addresses"), 1);
        dns.set(&["127.0.0.2"]);
        broker.wait_until_upstream("svc", |upstream| name_in(upstream)["error"].is_null());
        broker.assert_sums(&broker.status());
    });
}

#[test]
#[ignore = "needs root and dnsmasq; run by .ci/run with -- --ignored"]
fn a_name_may_have_many_addresses_and_forbidden_ones() {
    inside(RESOLV, "a_name_may_have_many_addresses_and_forbidden_ones", || {
        server("127.0.0.2");
        let many: Vec<_> = (2..102).map(|last| format!("127.0.0.{last}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let dns = DnsServer::start(&many);
        let broker = start_broker("resolve_allow = [\"127.0.0.0/29\"]\n");
        // 127.0.0.2 to 127.0.0.7, and one of them is up.
        assert_eq!(reply(&broker), "127.0.0.2");
        let upstream = broker.upstream_status("svc");
        assert_eq!(list(&upstream, "addresses").len(), 6, "{upstream:#}");
        let broker = start_broker("");
        let upstream =
            broker.wait_until_upstream("svc", |upstream| !list(upstream, "addresses").is_empty());
        assert_eq!(list(&upstream, "addresses").len(), 16, "{upstream:#}");
        drop(dns);
    });
}

/// A host that has just started: its network comes later than the broker.
#[test]
#[ignore = "needs root and dnsmasq; run by .ci/run with -- --ignored"]
fn a_request_waits_for_a_name_that_is_resolved_late() {
    inside(RESOLV, "a_request_waits_for_a_name_that_is_resolved_late", || {
        server("127.0.0.2");
        let broker = start_broker("");
        let upstream = broker.wait_until_upstream("svc", |upstream| {
            list(upstream, "names").first().is_some_and(|name| total(name, "failures") > 0)
        });
        let Answer::Failed(failure) = ask(broker.runtime_dir(), "svc", b"who") else {
            panic!("nobody knows the name: {upstream:#}");
        };
        println!("{failure:?}");
        let _dns = DnsServer::start(&["127.0.0.2"]);
        let found = wait_for("the name", || match ask(broker.runtime_dir(), "svc", b"who") {
            Answer::Reply(body) => Some(body),
            Answer::Failed(_) | Answer::Closed => {
                thread::sleep(Duration::from_millis(50));
                None
            }
        });
        assert_eq!(found, b"127.0.0.2");
    });
}

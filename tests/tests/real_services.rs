//! Real services instead of peers of our own. Ignored by `cargo test`, since they need programs that
//! a machine with only cargo lacks; .ci/run installs those and runs them. They fail when the
//! program is missing: a test that skips itself proves nothing.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use poolbroker_tests::Broker;
use poolbroker_tests::broker::{count_of, list, total};
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::peers::unused_port;
use tempfile::TempDir;

#[test]
#[ignore = "needs redis-server; run by .ci/run with -- --ignored"]
fn redis_answers_a_ping() {
    let redis = Redis::start();
    let broker = redis.broker(8);
    let output = broker.command("request").args(["cache", "PING"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stdout, b"+PONG\n");
}

#[test]
#[ignore = "needs redis-server; run by .ci/run with -- --ignored"]
fn redis_sees_no_more_connections_than_connections_max_and_every_reply_is_its_own() {
    const PROCESSES: usize = 16;
    const REQUESTS: usize = 625;
    const CONNECTIONS_MAX: u64 = 6;
    let redis = Redis::start();
    let broker = redis.broker(CONNECTIONS_MAX);
    let program = broker.command("request").get_program().to_owned();
    let program = program.to_str().unwrap();
    let dir = broker.runtime_dir().display();
    let loop_of = |count: usize, command: &str| {
        let script = format!(
            "i=0; while [ $i -lt {count} ]; do \
             '{program}' {command} || exit 1; i=$((i+1)); done"
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut askers: Vec<Child> = (0..PROCESSES)
        .map(|_| loop_of(REQUESTS, &format!("request --runtime-dir {dir} cache 'INCR counter'")))
        .collect();
    // These are answered too, with +OK, which no counter ever is.
    let senders: Vec<Child> = (0..4)
        .map(|_| loop_of(200, &format!("send --runtime-dir {dir} cache 'SET noise x'")))
        .collect();

    let mut most_at_once = 0;
    while askers.iter_mut().any(|asker| asker.try_wait().unwrap().is_none()) {
        most_at_once = most_at_once.max(redis.clients().len() as u64);
    }
    assert!((1..=CONNECTIONS_MAX).contains(&most_at_once), "{most_at_once} at once");
    let mut replies = BTreeSet::new();
    for asker in askers {
        let output = asker.wait_with_output().unwrap();
        assert!(output.status.success(), "a request failed");
        let text = String::from_utf8(output.stdout).unwrap();
        let own: Vec<usize> =
            text.lines().map(|reply| reply.strip_prefix(':').unwrap().parse().unwrap()).collect();
        assert_eq!(own.len(), REQUESTS);
        assert!(own.is_sorted(), "the counter goes up for each process");
        replies.extend(own);
    }
    for sender in senders {
        assert!(sender.wait_with_output().unwrap().status.success(), "a send failed");
    }
    let expected: BTreeSet<usize> = (1..=PROCESSES * REQUESTS).collect();
    assert!(replies == expected, "every reply came to one request");

    let status = broker.status();
    broker.assert_sums(&status);
    let upstream = broker.upstream_status("cache");
    let made_room = count_of(&upstream, "connections_closed", "make_room");
    let opened = total(&upstream, "connections_opened");
    assert!(opened - made_room <= CONNECTIONS_MAX, "{upstream:#}");
    assert_eq!(total(&upstream, "replied"), (PROCESSES * REQUESTS) as u64);
    assert_eq!(total(&upstream, "sent"), 800);
    let shown: BTreeSet<String> = list(&upstream, "connections")
        .iter()
        .map(|connection| connection["local"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(redis.clients(), shown);
}

#[test]
#[ignore = "needs rsyslogd; run by .ci/run with -- --ignored"]
fn a_syslog_daemon_counts_what_went_through_the_fifo() {
    const LINES: usize = 10_000;
    let syslog = Syslog::start();
    let broker = Broker::start(&[format!("syslog=udp-write-only://127.0.0.1:{}", syslog.port)]);
    let script = format!(
        "i=0; while [ $i -lt {LINES} ]; do echo \"<13>message $i of a script\"; i=$((i+1)); done > {}",
        broker.fifo("syslog").display()
    );
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    wait_for("the daemon has written every line", || (syslog.lines().len() >= LINES).then_some(()));
    let expected = (0..LINES).map(|number| format!("<13>message {number} of a script"));
    assert!(syslog.lines().into_iter().eq(expected), "order or content changed");
    let upstream = broker.upstream_status("syslog");
    assert_eq!(
        (total(&upstream, "accepted"), total(&upstream, "sent")),
        (LINES as u64, LINES as u64)
    );
}

#[test]
#[ignore = "needs socat; run by .ci/run with -- --ignored"]
fn a_million_lines_arrive_by_every_way_in_a_time_that_is_told() {
    const LINES: usize = 1_000_000;
    let times = |way: &str, command: &dyn Fn(&Broker, u16) -> String| {
        let sink = LineCounter::start();
        let broker = Broker::start(&[format!("sink=tcp://127.0.0.1:{}", sink.port)]);
        let script = command(&broker, sink.port);
        let begin = Instant::now();
        let shell = Command::new("sh").args(["-c", &script]).status().unwrap();
        assert!(shell.success(), "{way}: {script}");
        wait_for("every line has arrived", || (sink.lines() >= LINES).then_some(()));
        let took = begin.elapsed();
        assert_eq!(sink.lines(), LINES, "{way}");
        took
    };
    let program = poolbroker_tests::binary::poolbroker_binary().display();
    let socat = times("socat", &|_, port| format!("seq {LINES} | socat -u - TCP:127.0.0.1:{port}"));
    let fifo =
        times("fifo", &|broker, _| format!("seq {LINES} > {}", broker.fifo("sink").display()));
    let pipe = times("pipe", &|broker, _| {
        let dir = broker.runtime_dir().display();
        format!("seq {LINES} | {program} pipe --runtime-dir {dir} sink")
    });
    let send = times("send", &|broker, _| {
        let dir = broker.runtime_dir().display();
        format!("seq {LINES} | {program} send --runtime-dir {dir} sink")
    });
    let ratio = |time: Duration| time.as_secs_f64() / socat.as_secs_f64();
    println!(
        "{LINES} lines: socat {socat:.2?}; fifo {fifo:.2?} ({:.1} x); pipe {pipe:.2?} ({:.1} x); \
         send {send:.2?} ({:.1} x)",
        ratio(fifo),
        ratio(pipe),
        ratio(send)
    );
}

/// A redis-server of its own, without persistence.
struct Redis {
    process: Child,
    port: u16,
    _dir: TempDir,
}

impl Redis {
    fn start() -> Redis {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let port = unused_port();
        let process = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        wait_for("redis-server listens", || TcpStream::connect(("127.0.0.1", port)).ok());
        Redis { process, port, _dir: dir }
    }

    fn broker(&self, connections_max: u64) -> Broker {
        let config = format!(
            "[upstream.cache]\nurl = \"tcp://127.0.0.1:{}?framing=crlf\"\n\
             connections_max = {connections_max}\n",
            self.port
        );
        Broker::builder().config(&config).start()
    }

    /// The addresses of its clients, without the one that asks.
    fn clients(&self) -> BTreeSet<String> {
        let output = Command::new("redis-cli")
            .args(["-p", &self.port.to_string(), "client", "list"])
            .output()
            .expect("redis-cli is installed");
        let text = String::from_utf8(output.stdout).unwrap();
        let others = text.lines().filter(|line| !line.contains(" cmd=client"));
        let address = |line: &str| {
            let field = line.split(' ').find_map(|field| field.strip_prefix("addr="));
            field.unwrap().to_owned()
        };
        others.map(address).collect()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An rsyslogd of its own that writes what it receives to a file.
struct Syslog {
    process: Child,
    port: u16,
    dir: TempDir,
}

impl Syslog {
    fn start() -> Syslog {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let port = unused_port();
        let at = |name: &str| dir.path().join(name);
        // A copy, since distributions confine the daemon by its path to the directories of the
        // system's own log.
        let program = at("rsyslogd");
        fs::copy(find_rsyslogd(), &program).expect("rsyslogd can be copied");
        let config = format!(
            "module(load=\"imudp\")\n\
             input(type=\"imudp\" address=\"127.0.0.1\" port=\"{port}\" rcvbufSize=\"16m\")\n\
             template(name=\"raw\" type=\"string\" string=\"%rawmsg%\\n\")\n\
             action(type=\"omfile\" file=\"{}\" template=\"raw\")\n",
            at("log").display()
        );
        fs::write(at("rsyslog.conf"), config).unwrap();
        let process = Command::new(program)
            .args(["-n", "-f"])
            .arg(at("rsyslog.conf"))
            .arg("-i")
            .arg(at("pid"))
            .spawn()
            .expect("rsyslogd starts");
        wait_for("rsyslogd receives", || {
            let sockets = poolbroker_tests::udp_table::udp_sockets();
            sockets.into_iter().find(|socket| socket.local_port == port)
        });
        Syslog { process, port, dir }
    }

    /// The lines it wrote that came from the network.
    fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let ours = text.lines().filter(|line| line.starts_with("<13>message"));
        ours.map(str::to_owned).collect()
    }
}

impl Drop for Syslog {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn find_rsyslogd() -> PathBuf {
    let places = ["/usr/sbin/rsyslogd", "/sbin/rsyslogd"].map(PathBuf::from);
    let found = places.into_iter().find(|path| path.exists());
    found.expect("rsyslogd is installed")
}

/// A TCP sink that only counts the lines of one connection, so that it does not slow what is
/// measured.
struct LineCounter {
    port: u16,
    lines: Arc<AtomicUsize>,
}

impl LineCounter {
    fn start() -> LineCounter {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let lines = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&lines);
        thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut chunk = vec![0; 256 * 1024];
            while let Ok(count @ 1..) = connection.read(&mut chunk) {
                let ends = chunk[..count].iter().filter(|byte| **byte == b'\n');
                counter.fetch_add(ends.count(), Ordering::Relaxed);
            }
        });
        LineCounter { port, lines }
    }

    fn lines(&self) -> usize {
        self.lines.load(Ordering::Relaxed)
    }
}

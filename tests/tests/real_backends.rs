//! The pool in front of real servers: Redis, nginx, memcached, a DNS server. Ignored by `cargo test`,
//! since they need programs that a machine with only cargo lacks; .ci/run installs those and runs
//! them. They fail when the program is missing: a test that skips itself proves nothing.
//!
//! POOLBROKER_SECONDS says how long the servers with restarts are used, 6 by default.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use poolbroker_client::{Client, Reason};
use poolbroker_proto::framing::{Cut, Cutter, Expect, Framing, ReplyCut, ReplyCutter, Verdict};
use poolbroker_tests::Broker;
use poolbroker_tests::broker::total;
use poolbroker_tests::deadline::wait_for;
use poolbroker_tests::peers::unused_port;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(20);
const PROCESSES: usize = 64;

/// A server of a package, in a directory of its own.
struct Server {
    dir: TempDir,
    port: u16,
    start: fn(&Path, u16) -> Command,
    child: Option<Child>,
}

impl Server {
    fn start(start: fn(&Path, u16) -> Command) -> Server {
        let mut server =
            Server { dir: TempDir::new().unwrap(), port: unused_port(), start, child: None };
        server.restart();
        server
    }

    fn restart(&mut self) {
        self.kill();
        let mut command = (self.start)(self.dir.path(), self.port);
        let log = fs::File::create(self.dir.path().join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}")));
        let port = self.port;
        wait_for("the server listens", || TcpStream::connect(("127.0.0.1", port)).ok());
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn redis(dir: &Path, port: u16) -> Command {
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--save", "", "--appendonly", "no", "--dir"]);
    command.arg(dir);
    command
}

fn memcached(_: &Path, port: u16) -> Command {
    let mut command = Command::new("memcached");
    command.args(["-u", "nobody", "-l", "127.0.0.1", "-p", &port.to_string()]);
    command
}

fn nginx(dir: &Path, port: u16) -> Command {
    let page = dir.join("page");
    fs::create_dir_all(&page).unwrap();
    fs::write(page.join("index.html"), "the page\n").unwrap();
    let file = dir.join("nginx.conf");
    let dir = dir.display();
    fs::write(
        &file,
        format!(
            "daemon off;\nmaster_process off;\npid {dir}/pid;\nerror_log stderr;\nevents {{}}\n\
             http {{ access_log off; keepalive_requests 100;\n\
             server {{ listen 127.0.0.1:{port}; root {}; }} }}\n",
            page.display()
        ),
    )
    .unwrap();
    let mut command = Command::new("/usr/sbin/nginx");
    command.arg("-c").arg(file);
    command
}

/// It answers by TCP, too, which shows that it is up.
fn dnsmasq(_: &Path, port: u16) -> Command {
    let mut command = Command::new("/usr/sbin/dnsmasq");
    command.args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null"]);
    command.args(["--user=root", "--listen-address=127.0.0.1", "--bind-interfaces"]);
    command.args(["--address=/poolbroker.test/192.0.2.7", &format!("--port={port}")]);
    command
}

/// What stands between redis-benchmark and its Redis, and writes down what is asked.
fn recorder(redis: u16) -> (u16, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, seen) = (listener.local_addr().unwrap().port(), Arc::default());
    let record = Arc::clone(&seen);
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut server) =
                (client.unwrap(), TcpStream::connect(("127.0.0.1", redis)).unwrap());
            let (mut replies, mut back) =
                (server.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut replies, &mut back));
            let record: Arc<Mutex<Vec<u8>>> = Arc::clone(&record);
            thread::spawn(move || {
                let mut block = [0; 65_536];
                while let Ok(bytes) = client.read(&mut block) {
                    if bytes == 0 || server.write_all(&block[..bytes]).is_err() {
                        return;
                    }
                    record.lock().unwrap().extend_from_slice(&block[..bytes]);
                }
            });
        }
    });
    (port, seen)
}

/// The commands of redis-benchmark in their order.
fn benchmark_commands() -> Vec<Vec<u8>> {
    let server = Server::start(redis);
    let (port, seen) = recorder(server.port);
    let mut benchmark = Command::new("redis-benchmark");
    benchmark.args(["-p", &port.to_string(), "-c", "1", "-n", "20", "-q"]);
    assert!(benchmark.stdout(Stdio::null()).status().unwrap().success());
    let (stream, mut commands) = (seen.lock().unwrap().clone(), Vec::new());
    let (mut cutter, mut at) = (Cutter::new(Framing::Resp, 1 << 20), 0);
    while let Cut::Message { body, consumed } = cutter.next_cut(&stream[at..]) {
        commands.push(stream[at..][body].to_vec());
        at += consumed;
    }
    assert_eq!(at, stream.len(), "every byte belongs to a command");
    commands
}

#[test]
#[ignore = "needs redis-server; run by .ci/run with -- --ignored"]
fn what_redis_benchmark_asks_is_answered_byte_for_byte_as_directly() {
    let commands = benchmark_commands();
    assert!(commands.len() > 300, "{}", commands.len());
    let (direct, pooled) = (Server::start(redis), Server::start(redis));
    let url = format!("tcp://127.0.0.1:{}?framing=resp", pooled.port);
    for depth in [1, 16] {
        let config = format!("[upstream.cache]\nurl = \"{url}\"\npipeline_depth = {depth}\n");
        let broker = Broker::builder().config(&config).start();
        let cache = Client::connect_in(broker.runtime_dir()).unwrap().upstream("cache").unwrap();
        let stream = TcpStream::connect(("127.0.0.1", direct.port)).unwrap();
        let (mut replies, mut stream) = (BufReader::new(stream.try_clone().unwrap()), stream);
        for command in &commands {
            // The line end of an inline command is the framing's.
            let end: &[u8] = if command.starts_with(b"*") { b"" } else { b"\r\n" };
            stream.write_all(&[command, end].concat()).unwrap();
            let expected = direct_reply(&mut replies);
            let reply = cache.request(command, LONG).unwrap();
            assert_eq!(reply.escape_ascii().to_string(), expected.escape_ascii().to_string());
        }
        println!("{} commands, pipeline_depth = {depth}: the same replies", commands.len());
    }
}

/// One reply of RESP2, by other code than what is tested.
fn direct_reply(replies: &mut impl BufRead) -> Vec<u8> {
    let mut reply = Vec::new();
    replies.read_until(b'\n', &mut reply).unwrap();
    let number = || -> i64 { std::str::from_utf8(&reply[1..]).unwrap().trim().parse().unwrap() };
    match reply[0] {
        b'$' if number() >= 0 => {
            let mut body = vec![0; number() as usize + 2];
            replies.read_exact(&mut body).unwrap();
            reply.extend_from_slice(&body);
        }
        b'*' if number() > 0 => {
            let elements: Vec<_> = (0..number()).map(|_| direct_reply(replies)).collect();
            reply.extend(elements.concat());
        }
        _ => {}
    }
    reply
}

fn guarded_redis(dir: &Path, port: u16) -> Command {
    let mut command = redis(dir, port);
    command.args(["--requirepass", "open sesame"]);
    command
}

#[test]
#[ignore = "needs redis-server; run by .ci/run with -- --ignored"]
fn redis_lets_a_connection_in_by_what_it_says_first() {
    let mut server = Server::start(guarded_redis);
    let start = |steps: &str| {
        let url = format!("tcp://127.0.0.1:{}?framing=resp", server.port);
        let limits = "idempotent = true\nconnect_timeout = \"2s\"";
        let config = format!("[upstream.cache]\nurl = \"{url}\"\n{limits}\n{steps}\n");
        Broker::builder().env("THE_SECRET", "open sesame").config(&config).start()
    };
    let ask = |broker: &Broker, command: &[u8]| {
        let cache = Client::connect_in(broker.runtime_dir()).unwrap().upstream("cache").unwrap();
        cache.request(command, LONG)
    };
    let stranger = start("");
    let reply = ask(&stranger, b"SET key value").unwrap();
    assert!(reply.starts_with(b"-NOAUTH"), "{}", reply.escape_ascii());
    let wrong = start("on_connect = [{ send = \"AUTH sesame\" }]");
    let refused = ask(&wrong, b"PING").unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::OnConnect), "{refused}");

    let auth = "{ send = \"AUTH {secret}\", secret = { env = \"THE_SECRET\" } }";
    let hello = "{ send = \"HELLO 3\" }, { send = \"SELECT 3\", expect = \"+OK\" }";
    let broker = start(&format!("on_connect = [{auth}, {hello}]"));
    for _ in 0..2 {
        assert_eq!(ask(&broker, b"SET key value").unwrap(), b"+OK\r\n");
        let info = ask(&broker, b"CLIENT INFO").unwrap();
        let info = String::from_utf8(info).unwrap();
        assert!(info.contains(" db=3 ") && info.contains(" resp=3"), "{info}");
        server.restart();
    }
}

#[test]
#[ignore = "needs redis-server; run by .ci/run with -- --ignored"]
fn five_hundred_processes_share_eight_connections_to_redis() {
    const ALL: usize = 500;
    let server = Server::start(redis);
    let config = format!(
        "[upstream.cache]\nurl = \"tcp://127.0.0.1:{}?framing=resp\"\nconnections_max = 8\n",
        server.port
    );
    let broker = Broker::builder().config(&config).start();
    let askers: Vec<Child> = (0..ALL)
        .map(|_| {
            let mut command = broker.command("request");
            command.args(["--timeout", "20s", "cache", "INCR counter"]);
            command.stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    let (mut replies, mut stream) = (BufReader::new(stream.try_clone().unwrap()), stream);
    let mut most = 0;
    let mut numbers = Vec::new();
    for asker in askers {
        stream.write_all(b"CLIENT LIST\r\n").unwrap();
        let list = direct_reply(&mut replies);
        // Less this one, and the line of the length.
        most = most
            .max(list.split(|byte| *byte == b'\n').filter(|l| l.starts_with(b"id=")).count() - 1);
        let output = asker.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        numbers.push(text.trim().strip_prefix(':').unwrap().parse::<usize>().unwrap());
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=ALL).collect::<Vec<_>>());
    assert!((1..=8).contains(&most), "{most} connections at once");
    let status = broker.upstream_status("cache");
    assert!(total(&status, "connections_opened") <= 8, "{status:#}");
}

/// 64 shells ask in a loop while the server is killed and started again, twice. `ask` is the rest of
/// a command line that succeeds if the reply is right. Checks that each request had one outcome.
fn ask_through_restarts(server: &mut Server, config: &str, ask: &str) {
    let seconds = std::env::var("POOLBROKER_SECONDS").ok().and_then(|text| text.parse().ok());
    let seconds: u64 = seconds.unwrap_or(6);
    let broker = Broker::builder().config(config).start();
    let program = broker.command("request").get_program().to_owned();
    let script = format!(
        "ask() {{ '{}' request --runtime-dir {} --timeout 5s {ask}; }}\n\
         end=$(( $(date +%s) + {seconds} )); right=0; wrong=0; failed=0; late=0\n\
         while [ $(date +%s) -lt $end ]; do\n\
         out=$(mktemp {}/XXXXXX); ask > $out 2>> {}/errors; code=$?\n\
         case $code in\n\
         0) if check < $out; then right=$((right+1)); else wrong=$((wrong+1)); fi;;\n\
         1) failed=$((failed+1)); sleep 0.05;; 4) late=$((late+1));; *) wrong=$((wrong+1));; esac\n\
         rm -f $out\n\
         done; echo $right $wrong $failed $late",
        program.display(),
        broker.runtime_dir().display(),
        server.dir.path().display(),
        server.dir.path().display(),
    );
    let checked = format!("{}\n{script}", check_of(config));
    let shells: Vec<Child> = (0..PROCESSES)
        .map(|_| {
            Command::new("bash").args(["-c", &checked]).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for _ in 0..2 {
        thread::sleep(Duration::from_secs(seconds) / 3);
        server.restart();
    }
    let mut all = [0; 4];
    for shell in shells {
        let output = shell.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let counts = text.split_whitespace().map(|word| word.parse::<u64>().unwrap());
        all.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    let [right, wrong, failed, late] = all;
    println!("{right} right, {wrong} wrong, {failed} failed, {late} timed out");
    assert_eq!(wrong, 0, "a reply was another's, or a command went wrong");
    assert!(right > 100 && right > failed, "{all:?}");
    let status = broker.wait_until_upstream("it", |it| it["in_flight"] == 0);
    let ended = |key: &str| match &status[key] {
        serde_json::Value::Object(reasons) => {
            reasons.values().map(|count| count.as_u64().unwrap()).sum::<u64>()
        }
        count => count.as_u64().unwrap(),
    };
    assert_eq!(ended("replied"), right, "{status:#}");
    assert_eq!(ended("refused") + ended("failed"), failed, "{status:#}");
    assert_eq!(ended("timed_out"), late, "{status:#}");
    assert_eq!(total(&status, "requests"), right + failed + late);
    broker.assert_sums(&broker.status());
}

/// How the shell knows a right reply.
fn check_of(config: &str) -> &'static str {
    if config.contains("http1") {
        "check() { grep -q 'the page'; }"
    } else if config.contains("memcached") {
        "check() { grep -qE '^VALUE k 0 5|^END'; }"
    } else {
        // The id of its own question, one answer, and the address.
        "check() { [ \"$(head -c 4 | od -An -tx1 | tr -d ' ')\" = \"$id\"8580 ]; }\n\
         id=$(printf %04x $RANDOM); q=$(mktemp); trap 'rm -f $q' EXIT\n\
         { printf \"\\\\x${id:0:2}\\\\x${id:2:2}\"; printf '\\x01\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00\
\\x0apoolbroker\\x04test\\x00\\x00\\x01\\x00\\x01'; } > $q"
    }
}

#[test]
#[ignore = "needs nginx; run by .ci/run with -- --ignored"]
fn nginx_is_used_by_many_through_restarts() {
    let mut server = Server::start(nginx);
    let config = format!(
        "[upstream.it]\nurl = \"tcp://127.0.0.1:{}?framing=http1\"\nidempotent = true\n",
        server.port
    );
    ask_through_restarts(&mut server, &config, "it $'GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'");
}

#[test]
#[ignore = "needs memcached; run by .ci/run with -- --ignored"]
fn memcached_is_used_by_many_through_restarts() {
    let mut server = Server::start(memcached);
    let config = format!(
        "[upstream.it]\nurl = \"tcp://127.0.0.1:{}?framing=memcached\"\npipeline_depth = 8\n",
        server.port
    );
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream.write_all(b"set k 0 0 5\r\nvalue\r\n").unwrap();
    ask_through_restarts(&mut server, &config, "it 'get k'");
}

/// A command line, often one that memcached knows, and perhaps data behind it.
fn any_memcached_command(random: &mut fastrand::Rng) -> Vec<u8> {
    const NAMES: &[&str] = &[
        "get",
        "gets",
        "gat",
        "gats",
        "set",
        "add",
        "replace",
        "append",
        "prepend",
        "cas",
        "ms",
        "mg",
        "md",
        "ma",
        "me",
        "mn",
        "delete",
        "incr",
        "decr",
        "touch",
        "flush_all",
        "verbosity",
        "cache_memlimit",
        "version",
        "slabs",
        "lru",
        "lru_crawler",
        "stats",
        "watch",
        "quit",
    ];
    const WORDS: &[&str] = &[
        "k",
        "k",
        "other",
        "0",
        "1",
        "2",
        "00",
        "02",
        "-1",
        "+1",
        "1x",
        "x",
        "4294967296",
        "2147483648",
        "18446744073709551615",
        "18446744073709551616",
        "noreply",
        "noreply",
        "v",
        "q",
        "b",
        "k",
        "T0",
        "Tx",
        "N30",
        "O1",
        "I",
        "MS",
        "MQ",
        "S2",
        "c",
        "f",
        "s",
        "automove",
        "reassign",
        "enable",
        "disable",
        "crawl",
        "all",
        "sleep",
        "100",
        "tocrawl",
        "mode",
        "flat",
        "segmented",
        "tune",
        "temp_ttl",
        "items",
        "slabs",
        "sizes",
        "sizes_enable",
        "cachedump",
        "detail",
        "on",
        "off",
        "dump",
        "settings",
        "conns",
        "reset",
        "0.1",
        "2.0",
        "50",
        "extstore",
    ];
    let mut line = " ".repeat(usize::from(random.u8(..8) == 0));
    line.push_str(NAMES[random.usize(..NAMES.len())]);
    for _ in 0..random.u8(..7) {
        line.push_str(if random.u8(..8) == 0 { "  " } else { " " });
        line.push_str(WORDS[random.usize(..WORDS.len())]);
    }
    line.push_str(["\r\n", "\r\n", "\n", " \r\n"][random.usize(..4)]);
    if random.bool() {
        line.push_str(["\r\n", "mn\r\n", "m\r\n"][random.usize(..3)]);
    }
    line.into_bytes()
}

/// A connection to a server, without a broker.
struct Direct {
    stream: TcpStream,
    framing: Framing,
    buffer: Vec<u8>,
}

impl Direct {
    fn connect(server: &Server, framing: Framing) -> Direct {
        let stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Direct { stream, framing, buffer: Vec::new() }
    }

    fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// The next reply, as it came.
    fn reply(&mut self, expect: Expect, context: &str) -> Vec<u8> {
        let buffer = &mut self.buffer;
        let mut cutter = ReplyCutter::new(self.framing, 16 << 20);
        loop {
            match cutter.next_reply(Some(expect), buffer) {
                ReplyCut::Reply { body, consumed, .. } => {
                    let reply = buffer[body].to_vec();
                    buffer.drain(..consumed);
                    return reply;
                }
                ReplyCut::Incomplete => {
                    let mut block = [0; 65_536];
                    let bytes = self.stream.read(&mut block);
                    let bytes = bytes.unwrap_or_else(|error| panic!("{context}: {error}"));
                    assert!(bytes > 0, "{context}: the server hung up");
                    buffer.extend_from_slice(&block[..bytes]);
                }
                other => panic!("{context}: {other:?} of {}", buffer.escape_ascii()),
            }
        }
    }
}

#[test]
#[ignore = "needs memcached; run by .ci/run with -- --ignored"]
fn memcached_gives_each_command_the_reply_that_its_framing_expects() {
    let server = Server::start(memcached);
    let mut direct = Direct::connect(&server, Framing::Memcached);
    let seed = std::env::var("POOLBROKER_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random = fastrand::Rng::with_seed(seed.unwrap_or(1));
    let known = include_str!("memcached_commands.txt").lines();
    let known = known.map(|line| line.replace("\\n", "\r\n").into_bytes());
    let commands = known.chain((0..20_000).map(|_| any_memcached_command(&mut random)));
    let mut taken = 0;
    for command in commands {
        let shown = command.escape_ascii().to_string();
        let expect = match Framing::Memcached.classify(&command) {
            Verdict::One(expect) => Some(expect),
            Verdict::None => None,
            Verdict::Last(_) | Verdict::Refused { .. } => continue,
        };
        taken += 1;
        let mut bytes = Vec::new();
        Framing::Memcached.encode(&command, &mut bytes).unwrap();
        bytes.extend_from_slice(b"version\r\n");
        direct.write(&bytes);
        let reply = expect.map(|expect| direct.reply(expect, &shown)).unwrap_or_default();
        let behind = direct.reply(Expect::Plain, &shown);
        let (reply, behind) = (reply.escape_ascii(), behind.escape_ascii().to_string());
        assert!(behind.starts_with("VERSION "), "{shown}: {reply} and then {behind}");
        assert!(direct.buffer.is_empty(), "{shown}: {reply}, {behind}, and then more");
    }
    assert!(taken > 2_000, "{taken}");
}

/// What Redis says of a connection, but for what every command changes.
fn redis_connection(direct: &mut Direct, context: &str) -> String {
    direct.write(b"CLIENT INFO\r\n");
    let info = direct.reply(Expect::Plain, context);
    let info = String::from_utf8_lossy(&info).into_owned();
    const STATE: [&str; 10] =
        ["name=", "db=", "flags=", "sub=", "psub=", "ssub=", "multi=", "user=", "redir=", "resp="];
    let fields = info.split_whitespace();
    let fields = fields.filter(|field| STATE.iter().any(|name| field.starts_with(name)));
    fields.collect::<Vec<_>>().join(" ")
}

#[test]
#[ignore = "needs redis; run by .ci/run with -- --ignored"]
fn no_command_of_redis_that_is_let_through_changes_the_connection_or_its_order() {
    // They change the server for good, not the connection.
    const LEFT_OUT: [&str; 9] = [
        "acl",
        "client|kill",
        "client|pause",
        "cluster",
        "config",
        "debug",
        "failover",
        "replicaof",
        "slaveof",
    ];
    const ARGUMENTS: [&str; 9] =
        ["", " k", " 1", " k 1", " k 0 1", " 1 k", " on", " 0 k LEFT", " GROUP g c STREAMS k >"];
    let server = Server::start(redis);
    let mut direct = Direct::connect(&server, Framing::Resp);
    direct.write(b"COMMAND LIST\r\n");
    let names = direct.reply(Expect::Plain, "the list");
    let names = String::from_utf8(names).unwrap();
    let mut names: Vec<_> =
        names.lines().filter(|line| !line.starts_with(['*', '$'])).map(str::to_owned).collect();
    assert!(names.len() > 200, "{names:?}");
    for with in ["client", "script", "object", "pubsub", "xinfo", "xgroup", "memory", "latency"] {
        direct.write(format!("{with} HELP\r\n"));
        let help = direct.reply(Expect::Plain, with);
        let help = String::from_utf8(help).unwrap();
        let words = help.lines().filter_map(|line| line.strip_prefix('+')?.split(' ').next());
        let words = words.filter(|word| word.chars().all(|c| c.is_ascii_uppercase() || c == '-'));
        names.extend(words.map(|word| format!("{with}|{}", word.to_lowercase())));
    }
    names.retain(|name| !LEFT_OUT.contains(&name.as_str()));
    let before = redis_connection(&mut direct, "the start");
    let mut refused = std::collections::BTreeSet::new();
    for name in &names {
        for arguments in ARGUMENTS {
            let line = name.replace('|', " ") + arguments;
            let mut bytes = Vec::new();
            match Framing::Resp.classify(line.as_bytes()) {
                Verdict::One(_) => Framing::Resp.encode(line.as_bytes(), &mut bytes).unwrap(),
                verdict => {
                    assert!(matches!(verdict, Verdict::Refused { .. }), "{line}: {verdict:?}");
                    refused.insert(name);
                    continue;
                }
            }
            bytes.extend_from_slice(b"ECHO behind\r\n");
            direct.write(&bytes);
            direct.reply(Expect::Plain, &line);
            let behind = direct.reply(Expect::Plain, &line);
            assert_eq!(behind.escape_ascii().to_string(), "$6\\r\\nbehind\\r\\n", "{line}");
            assert_eq!(redis_connection(&mut direct, &line), before, "{line}");
        }
    }
    assert!(refused.len() >= 35, "{refused:?}");
}

#[test]
#[ignore = "needs dnsmasq; run by .ci/run with -- --ignored"]
fn a_dns_server_is_used_by_many_through_restarts() {
    let mut server = Server::start(dnsmasq);
    let config = format!(
        "[upstream.it]\nurl = \"udp://127.0.0.1:{}?id_offset=0&id_width=2\"\n\
         retransmits = 3\nretransmit_interval = \"300ms\"\n",
        server.port
    );
    ask_through_restarts(&mut server, &config, "it - < $q");
}

#[test]
#[ignore = "needs dnsmasq; run by .ci/run with -- --ignored"]
fn one_socket_carries_the_questions_of_all_to_a_dns_server() {
    let server = Server::start(dnsmasq);
    let config = format!(
        "[upstream.dns]\nurl = \"udp://127.0.0.1:{}?id_offset=0&id_width=2\"\n",
        server.port
    );
    let broker = Broker::builder().config(&config).start();
    let client = Client::connect_in(broker.runtime_dir()).unwrap();
    let dns = client.upstream("dns").unwrap();
    let query = |id: u16| {
        let question =
            b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x0apoolbroker\x04test\x00\x00\x01\x00\x01";
        [&id.to_be_bytes()[..], question].concat()
    };
    // All with the same two ids: whoever asked has its own back.
    let asked: Vec<_> =
        (0..200).map(|n| (dns.submit(&query(n % 2), LONG).unwrap(), n % 2)).collect();
    for _ in &asked {
        let reply = client.next_reply(LONG).unwrap();
        let (_, id) = asked.iter().find(|(asked, _)| *asked == reply.id).unwrap();
        let body = reply.result.unwrap();
        assert_eq!(&body[..2], &id.to_be_bytes());
        assert!(body.ends_with(&[192, 0, 2, 7]), "{}", body.escape_ascii());
    }
    let status = broker.upstream_status("dns");
    assert_eq!(total(&status, "connections_opened"), 1, "{status:#}");
}

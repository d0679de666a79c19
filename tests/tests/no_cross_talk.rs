//! No reply reaches another request, whatever happens to clients and replies (U1, U2, U4, U8, U19,
//! C10): random tokens through every way of matching, while a part of the clients give up early and a
//! part of them are gone before their replies come.
//!
//! POOLBROKER_REQUESTS says how many requests are made in all.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use poolbroker_client::{Client, Error, Transport};
use poolbroker_tests::Broker;
use poolbroker_tests::peers::{Manners, Marks, TcpEcho};
use serde_json::Value;

const WORKERS: u64 = 8;
const WINDOW: usize = 8;
const PATIENT: Duration = Duration::from_secs(20);

/// Requests of one case.
fn requests() -> u64 {
    let all = std::env::var("POOLBROKER_REQUESTS").ok().and_then(|text| text.parse().ok());
    all.unwrap_or(40_000) / 5
}

/// xorshift64*: tokens nobody can guess from each other are not needed, only different ones.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn is_one_in(&mut self, chances: u64) -> bool {
        self.roll().is_multiple_of(chances)
    }
}

/// What became of the requests of a storm.
#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    asked: u64,
    replied: u64,
    failed: u64,
    /// Of clients that were gone.
    left: u64,
}

/// Asks with tokens of 128 bits in hexadecimal behind `head`; the reply must be the same body.
fn storm(runtime_dir: &Path, upstream: &str, head: &'static [u8], requests: u64) -> Totals {
    let worker = |number: u64| {
        let (runtime_dir, upstream) = (runtime_dir.to_owned(), upstream.to_owned());
        thread::spawn(move || {
            let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ (number + 1));
            let mut totals = Totals::default();
            while totals.asked < requests / WORKERS {
                let transport = match dice.is_one_in(3) {
                    true => Transport::Ring { bytes: 256 * 1024 },
                    false => Transport::Unix,
                };
                let client = Client::connect_in_with(&runtime_dir, transport).unwrap();
                live(&client, &upstream, head, requests / WORKERS, &mut dice, &mut totals);
            }
            totals
        })
    };
    let workers: Vec<_> = (0..WORKERS).map(worker).collect();
    workers.into_iter().fold(Totals::default(), |all, worker| {
        let one = worker.join().unwrap();
        Totals {
            asked: all.asked + one.asked,
            replied: all.replied + one.replied,
            failed: all.failed + one.failed,
            left: all.left + one.left,
        }
    })
}

/// One client, until it is gone: one window in 20 it does not wait for.
fn live(
    client: &Client,
    upstream: &str,
    head: &[u8],
    requests: u64,
    dice: &mut Dice,
    totals: &mut Totals,
) {
    let upstream = client.upstream(upstream).unwrap();
    while totals.asked < requests {
        let mut pending = Vec::new();
        for _ in 0..WINDOW {
            let token = format!("{:016x}{:016x}", dice.roll(), dice.roll());
            let body = [head, token.as_bytes()].concat();
            let deadline = match dice.is_one_in(20) {
                true => Duration::from_millis(1 + dice.roll() % 3),
                false => PATIENT,
            };
            let id = upstream.submit(&body, deadline).unwrap();
            pending.push((id, body));
            totals.asked += 1;
        }
        if dice.is_one_in(20) {
            totals.left += pending.len() as u64;
            return;
        }
        while !pending.is_empty() {
            let reply = client.next_reply(PATIENT).unwrap();
            let at = pending.iter().position(|(id, _)| *id == reply.id).expect("asked for once");
            let (_, body) = pending.swap_remove(at);
            match reply.result {
                Ok(reply) => {
                    assert_eq!(String::from_utf8_lossy(&reply), String::from_utf8_lossy(&body));
                    totals.replied += 1;
                }
                Err(Error::Failed { .. } | Error::TimedOut { .. }) => totals.failed += 1,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[track_caller]
fn check(broker: &Broker, name: &str, totals: Totals) {
    println!("{name}: {totals:?}");
    assert_eq!(totals.asked, totals.replied + totals.failed + totals.left);
    assert!(totals.replied > totals.asked / 2, "{totals:?}");
    assert!(totals.failed > 0 && totals.left > 0, "nothing was put to the test: {totals:?}");
    let status = broker.wait_until_upstream(name, |it| it["in_flight"] == 0);
    assert!(status["replied"].as_u64() >= Some(totals.replied), "{status:#}");
    broker.assert_sums(&broker.status());
    let connections = |status: &Value| status["connections"].as_array().unwrap().len();
    assert!(connections(&status) < 2_000, "{status:#}");
}

fn serve(config: &str) -> Broker {
    Broker::builder().config(config).start()
}

#[test]
fn exclusive_connections_keep_replies_apart() {
    let delay = Duration::from_millis(3);
    let peer = TcpEcho::with(Marks::Lines, Manners::SlowEvery { every: 50, delay });
    let broker = serve(&format!("[upstream.a]\nurl = \"{}\"\n", peer.url()));
    check(&broker, "a", storm(broker.runtime_dir(), "a", b"", requests()));
}

#[test]
fn pipelined_connections_keep_replies_in_order_and_swallow_those_nobody_awaits() {
    let delay = Duration::from_millis(3);
    let peer = TcpEcho::with(Marks::Lines, Manners::SlowEvery { every: 400, delay });
    let config = format!("[upstream.a]\nurl = \"{}\"\npipeline_depth = 32\n", peer.url());
    let broker = serve(&config);
    check(&broker, "a", storm(broker.runtime_dir(), "a", b"", requests()));
    let status = broker.upstream_status("a");
    assert!(status["connections"].as_array().unwrap().len() <= 8);
}

#[test]
fn pipelined_requests_are_repeated_only_where_they_may_be() {
    let delay = Duration::from_millis(2);
    let peer = TcpEcho::with(Marks::Lines, Manners::SlowEvery { every: 400, delay });
    let config = format!(
        "[upstream.a]\nurl = \"{}\"\npipeline_depth = 32\nidempotent = true\n\
         requests_per_connection_max = 500\nlifetime = \"200ms\"\n",
        peer.url()
    );
    let broker = serve(&config);
    check(&broker, "a", storm(broker.runtime_dir(), "a", b"", requests()));
}

/// Answers messages of a 32-bit length in an order of its own, now and then much later.
fn shuffling_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || shuffle(stream.unwrap()));
        }
    });
    port
}

fn shuffle(mut stream: TcpStream) {
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let mut dice = Dice(u64::from(stream.peer_addr().unwrap().port()) | 1);
    let (mut unread, mut block) = (Vec::new(), vec![0; 65_536]);
    let (mut held, mut late) = (Vec::<Vec<u8>>::new(), Vec::<(Instant, Vec<u8>)>::new());
    loop {
        match stream.read(&mut block) {
            Ok(0) => return,
            Ok(bytes) => unread.extend_from_slice(&block[..bytes]),
            Err(_) => {}
        }
        while let Some(length) = unread.first_chunk::<4>() {
            let whole = 4 + u32::from_be_bytes(*length) as usize;
            if unread.len() < whole {
                break;
            }
            held.push(unread.drain(..whole).collect());
        }
        let mut out = Vec::new();
        while !held.is_empty() {
            let message = held.swap_remove((dice.roll() % held.len() as u64) as usize);
            match dice.is_one_in(30) {
                true => late.push((Instant::now() + Duration::from_millis(4), message)),
                false => out.extend_from_slice(&message),
            }
        }
        let due = late.extract_if(.., |(at, _)| *at <= Instant::now());
        due.for_each(|(_, message)| out.extend_from_slice(&message));
        if stream.write_all(&out).is_err() {
            return;
        }
    }
}

#[test]
fn replies_in_any_order_find_their_requests_by_id() {
    let port = shuffling_server();
    let config = format!(
        "[upstream.a]\nurl = \"tcp://127.0.0.1:{port}?framing=u32be&id_offset=0&id_width=4\"\n\
         pipeline_depth = 32\n"
    );
    let broker = serve(&config);
    // Everybody has the same id: the broker keeps them apart and gives it back.
    check(&broker, "a", storm(broker.runtime_dir(), "a", b"same", requests()));
}

#[test]
fn datagrams_late_twice_or_forged_find_nobody_but_their_own_request() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let mut dice = Dice(7);
        let (mut block, mut held) = ([0; 2_048], Vec::new());
        loop {
            if let Ok((bytes, from)) = socket.recv_from(&mut block) {
                held.push((from, block[..bytes].to_vec()));
            }
            if held.len() > 4 || dice.is_one_in(4) {
                while held.len() > usize::from(dice.is_one_in(3)) {
                    let at = (dice.roll() % held.len() as u64) as usize;
                    let (to, reply): (_, Vec<u8>) = held.swap_remove(at);
                    // A forged id, and a reply of an id that is too short to have one.
                    if dice.is_one_in(10) {
                        let forged = [&dice.roll().to_be_bytes()[..4], b"forged"].concat();
                        let _ = socket.send_to(&forged, to);
                        let _ = socket.send_to(b"x", to);
                    }
                    if dice.is_one_in(10) {
                        let _ = socket.send_to(&reply, to);
                    }
                    if !dice.is_one_in(50) {
                        let _ = socket.send_to(&reply, to);
                    }
                }
            }
        }
    });
    let config = format!(
        "[upstream.a]\nurl = \"udp://127.0.0.1:{port}?id_offset=0&id_width=4\"\n\
         pipeline_depth = 64\nretransmits = 20\nretransmit_interval = \"20ms\"\n\
         late_reply_window = \"1s\"\n"
    );
    let broker = serve(&config);
    check(&broker, "a", storm(broker.runtime_dir(), "a", b"same", requests()));
    let status = broker.upstream_status("a");
    assert!(status["retransmitted"].as_u64() > Some(0), "{status:#}");
    assert!(status["replies_discarded"].as_u64() > Some(0), "{status:#}");
}

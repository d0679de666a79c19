//! Host names: resolved in a thread of their own, since getaddrinfo(3) blocks.
//!
//! An upstream has names and literal addresses, and is reported the union of what is known of them:
//! the literal ones at once, each name's once it is resolved. A name that cannot be resolved keeps
//! the addresses it had, so that a failure removes nothing. An empty union is reported only when
//! every name of the upstream was tried, and a union that did not change only once.
//!
//! # When
//!
//! A name is due when it is first asked for, and again an `interval` after each time it was
//! resolved, whatever else happens. There is one thread: one name is resolved after the other, in
//! the order in which they are due. One that blocks delays the others by as long as it blocks, and
//! each other name comes before a due one at most once, because it is due later from then on. So a
//! name is resolved at most `interval` plus one lookup of each other name after the last time. With
//! the usual resolv.conf(5) a lookup takes 10 s at most for each name server (two attempts of 5 s):
//! one dead name makes intervals of 15 s up to 25 s long, and nothing but that waits.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::config::RESOLVER_QUEUE_MAX;
use crate::timers::Time;

/// The resolver thread, as the shard sees it.
#[derive(Debug)]
pub struct Resolver {
    requests: Sender<Request>,
}

/// Which hosts an upstream has.
#[derive(Debug)]
struct Request {
    upstream: usize,
    hosts: Vec<(String, u16)>,
    fixed: Vec<SocketAddr>,
}

impl Resolver {
    /// Starts the thread, which resolves by `resolve`, for instance [`look_up`], and knows the time
    /// from `clock`. `report` is called in it with an upstream and all its addresses, in ascending
    /// order, and says whether to go on.
    pub fn start(
        interval: Duration,
        clock: impl Fn() -> Time + Send + 'static,
        resolve: impl FnMut(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + 'static,
        report: impl Fn(usize, Vec<SocketAddr>) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, requests) = bounded(RESOLVER_QUEUE_MAX);
        std::thread::Builder::new()
            .name("resolver".into())
            .spawn(move || run(&requests, interval, clock, resolve, report))?;
        Ok(Resolver { requests: sender })
    }

    /// Keeps the hosts of `upstream` resolved from now on, in place of those it had, and adds the
    /// `fixed` addresses to them.
    pub fn watch(&self, upstream: usize, hosts: Vec<(String, u16)>, fixed: Vec<SocketAddr>) {
        // Full only with 4,096 requests waiting; the thread ends only with the broker.
        let _ = self.requests.try_send(Request { upstream, hosts, fixed });
    }
}

/// The addresses of a host, by getaddrinfo(3).
pub fn look_up(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

fn run(
    requests: &Receiver<Request>,
    interval: Duration,
    clock: impl Fn() -> Time,
    mut resolve: impl FnMut(&str, u16) -> io::Result<Vec<SocketAddr>>,
    report: impl Fn(usize, Vec<SocketAddr>) -> bool,
) {
    let mut names = Names::new(interval);
    loop {
        let pause = names.next_due().map_or(Duration::MAX, |due| due.since(clock()));
        // What was asked for meanwhile comes first: it tells which names are due.
        let news = match requests.recv_timeout(pause) {
            Ok(request) => names.handle_request(clock(), request),
            Err(RecvTimeoutError::Timeout) => names.resolve_due(&clock, &mut resolve),
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if let Some((upstream, addresses)) = news
            && !report(upstream, addresses)
        {
            return;
        }
    }
}

/// An upstream and all its addresses.
type News = (usize, Vec<SocketAddr>);

/// What is to be kept resolved, and what is known of it.
#[derive(Debug)]
struct Names {
    interval: Duration,
    upstreams: BTreeMap<usize, Watched>,
}

#[derive(Debug)]
struct Watched {
    names: Vec<Name>,
    fixed: Vec<SocketAddr>,
    reported: Option<Vec<SocketAddr>>,
}

#[derive(Debug)]
struct Name {
    host: String,
    port: u16,
    due: Time,
    outcome: Outcome,
    /// Of the last time that it was resolved.
    last_good: Vec<SocketAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Untried,
    Resolved,
    Failed,
}

impl Names {
    fn new(interval: Duration) -> Self {
        Names { interval, upstreams: BTreeMap::new() }
    }

    fn handle_request(&mut self, now: Time, request: Request) -> Option<News> {
        let Request { upstream, hosts, fixed } = request;
        let mut known = self.upstreams.remove(&upstream).map_or(Vec::new(), |before| before.names);
        let name = |(host, port): (String, u16)| {
            let is_same = |name: &Name| (&name.host, name.port) == (&host, port);
            match known.iter().position(is_same) {
                Some(index) => known.swap_remove(index),
                None => Name::new(host, port, now),
            }
        };
        let names = hosts.into_iter().map(name).collect();
        self.upstreams.insert(upstream, Watched { names, fixed, reported: None });
        self.news(upstream)
    }

    /// When the next name is due.
    fn next_due(&self) -> Option<Time> {
        self.upstreams.values().flat_map(|watched| &watched.names).map(|name| name.due).min()
    }

    /// Resolves the name that has been due longest.
    fn resolve_due(
        &mut self,
        clock: impl Fn() -> Time,
        resolve: impl FnMut(&str, u16) -> io::Result<Vec<SocketAddr>>,
    ) -> Option<News> {
        let now = clock();
        let all = self.upstreams.iter_mut().flat_map(|(upstream, watched)| {
            watched.names.iter_mut().map(move |name| (*upstream, name))
        });
        let (upstream, name) =
            all.filter(|(_, name)| name.due <= now).min_by_key(|(_, name)| name.due)?;
        name.resolve(resolve);
        name.due = clock() + self.interval;
        self.news(upstream)
    }

    /// All addresses of an upstream, if that is something new to it.
    fn news(&mut self, upstream: usize) -> Option<News> {
        let watched = self.upstreams.get_mut(&upstream)?;
        let known = watched.names.iter().flat_map(|name| &name.last_good);
        let mut addresses: Vec<_> = known.chain(&watched.fixed).copied().collect();
        addresses.sort_unstable();
        addresses.dedup();
        let is_open = watched.names.iter().any(|name| name.outcome == Outcome::Untried);
        if (addresses.is_empty() && is_open) || watched.reported.as_ref() == Some(&addresses) {
            return None;
        }
        watched.reported = Some(addresses.clone());
        Some((upstream, addresses))
    }
}

impl Name {
    fn new(host: String, port: u16, now: Time) -> Self {
        Name { host, port, due: now, outcome: Outcome::Untried, last_good: Vec::new() }
    }

    /// A failure is logged when it begins, and its end.
    fn resolve(&mut self, mut resolve: impl FnMut(&str, u16) -> io::Result<Vec<SocketAddr>>) {
        let found =
            resolve(&self.host, self.port).and_then(|addresses| match addresses.is_empty() {
                true => Err(io::Error::other("the name has no address")),
                false => Ok(addresses),
            });
        let before = self.outcome;
        self.outcome = match found {
            Ok(addresses) => {
                self.last_good = addresses;
                if before == Outcome::Failed {
                    tracing::info!(host = self.host, "the name is resolved again");
                }
                Outcome::Resolved
            }
            Err(error) => {
                if before != Outcome::Failed {
                    tracing::warn!(
                        host = self.host, %error, known = self.last_good.len(),
                        "the name could not be resolved; the addresses known of it stay"
                    );
                }
                Outcome::Failed
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const INTERVAL: Duration = Duration::from_secs(15);

    fn at(seconds: u64) -> Time {
        Time::from_start(Duration::from_secs(seconds))
    }

    fn address(last: u8) -> SocketAddr {
        ([127, 0, 0, last], 80).into()
    }

    fn addresses(lasts: &[u8]) -> Vec<SocketAddr> {
        lasts.iter().copied().map(address).collect()
    }

    /// Names whose resolution is what the test says, and takes as long as it says.
    struct World {
        names: Names,
        now: Cell<Time>,
        /// The last octets of a host; none: it fails.
        records: BTreeMap<&'static str, Vec<u8>>,
        lookup: Duration,
        asked: Vec<(String, Time)>,
    }

    impl World {
        fn new(records: &[(&'static str, &[u8])]) -> Self {
            World {
                names: Names::new(INTERVAL),
                now: Cell::new(at(0)),
                records: records.iter().map(|(host, last)| (*host, last.to_vec())).collect(),
                lookup: Duration::ZERO,
                asked: Vec::new(),
            }
        }

        fn watch(&mut self, upstream: usize, hosts: &[&str], fixed: &[u8]) -> Option<News> {
            let hosts = hosts.iter().map(|host| ((*host).to_owned(), 80)).collect();
            let fixed = addresses(fixed);
            self.names.handle_request(self.now.get(), Request { upstream, hosts, fixed })
        }

        fn resolve_due(&mut self) -> Option<News> {
            let World { names, now, records, lookup, asked } = self;
            names.resolve_due(
                || now.get(),
                |host, _| {
                    asked.push((host.to_owned(), now.get()));
                    now.set(now.get() + *lookup);
                    let found = records.get(host).ok_or_else(|| io::Error::other("SERVFAIL"))?;
                    Ok(addresses(found))
                },
            )
        }

        /// Waits for the next name to be due and resolves it.
        fn next(&mut self) -> Option<News> {
            let due = self.names.next_due().unwrap();
            self.now.set(self.now.get().max(due));
            self.resolve_due()
        }
    }

    #[test]
    fn the_union_of_names_and_literal_addresses_is_reported_as_it_grows() {
        let mut world = World::new(&[("a", &[3, 2]), ("b", &[2, 9])]);
        assert_eq!(world.watch(7, &["a", "b"], &[5]), Some((7, addresses(&[5]))));
        assert_eq!(world.next(), Some((7, addresses(&[2, 3, 5]))));
        assert_eq!(world.next(), Some((7, addresses(&[2, 3, 5, 9]))));
    }

    #[test]
    fn a_name_that_fails_keeps_its_addresses_and_others_change() {
        let mut world = World::new(&[("a", &[1]), ("b", &[2])]);
        world.watch(0, &["a", "b"], &[]);
        world.next();
        world.next();
        world.records.remove("a");
        world.records.insert("b", vec![3]);
        assert_eq!(world.next(), None, "a fails, and nothing changes");
        assert_eq!(world.next(), Some((0, addresses(&[1, 3]))));
        world.records.insert("b", vec![]);
        world.next();
        assert_eq!(world.next(), None, "no address is no answer");
        world.records.insert("a", vec![4]);
        assert_eq!(world.next(), Some((0, addresses(&[3, 4]))));
    }

    #[test]
    fn an_empty_list_is_reported_once_and_not_before_every_name_was_tried() {
        let mut world = World::new(&[]);
        assert_eq!(world.watch(0, &["a", "b"], &[]), None);
        assert_eq!(world.next(), None);
        assert_eq!(world.next(), Some((0, vec![])));
        assert_eq!(world.next(), None);
        world.records.insert("b", vec![1]);
        assert_eq!(world.next(), Some((0, addresses(&[1]))));
    }

    #[test]
    fn an_answer_in_another_order_is_not_reported() {
        let mut world = World::new(&[("a", &[1, 2])]);
        world.watch(0, &["a"], &[]);
        assert!(world.next().is_some());
        world.records.insert("a", vec![2, 1, 2]);
        assert_eq!(world.next(), None);
    }

    #[test]
    fn names_are_due_by_their_own_last_time_whatever_is_added() {
        let mut world = World::new(&[("a", &[1])]);
        world.watch(0, &["a"], &[]);
        world.next();
        for seconds in 1..15 {
            world.now.set(at(seconds));
            world.watch(seconds as usize, &["b"], &[]);
            world.resolve_due();
            assert_eq!(world.names.next_due(), Some(at(15)), "a is not put off");
        }
        world.asked.clear();
        world.next();
        world.next();
        assert_eq!(world.asked, [("a".to_owned(), at(15)), ("b".to_owned(), at(16))]);
    }

    #[test]
    fn with_slow_lookups_each_other_name_comes_first_at_most_once() {
        let mut world = World::new(&[("a", &[1])]);
        world.lookup = Duration::from_secs(30);
        for (upstream, host) in ["a", "b", "c"].into_iter().enumerate() {
            world.watch(upstream, &[host], &[]);
        }
        for _ in 0..12 {
            world.next();
        }
        let hosts: Vec<_> = world.asked.iter().map(|(host, _)| host.as_str()).collect();
        assert_eq!(hosts.concat(), "abc".repeat(4));
    }

    #[test]
    fn an_upstream_that_is_watched_anew_keeps_what_is_known_of_its_names() {
        let mut world = World::new(&[("a", &[1]), ("b", &[2]), ("c", &[3])]);
        world.watch(0, &["a", "b"], &[]);
        world.next();
        world.next();
        assert_eq!(world.watch(0, &["b", "c"], &[]), Some((0, addresses(&[2]))));
        assert_eq!(world.next(), Some((0, addresses(&[2, 3]))));
    }

    #[test]
    fn the_thread_reports_a_name_and_that_one_does_not_exist() {
        let (sender, results) = bounded(2);
        let resolver = Resolver::start(
            INTERVAL,
            || at(0),
            look_up,
            move |upstream, addresses| sender.send((upstream, addresses)).is_ok(),
        )
        .unwrap();
        resolver.watch(3, vec![("localhost".into(), 80)], vec![]);
        let (upstream, addresses) = results.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(upstream, 3);
        assert!(addresses.iter().all(|address| address.port() == 80) && !addresses.is_empty());
        resolver.watch(4, vec![("no-such-host.invalid".into(), 80)], vec![]);
        let (upstream, addresses) = results.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!((upstream, addresses.len()), (4, 0));
    }
}

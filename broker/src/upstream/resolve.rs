//! Host names: resolved in a thread of their own, since getaddrinfo(3) blocks.
//!
//! An upstream has names and literal addresses, and is reported the union of what is known of them:
//! the literal ones at once, each name's once it is resolved. A name that cannot be resolved keeps
//! the addresses it had, so that a failure removes nothing. An empty union is reported only when
//! every name of the upstream was tried, and a union that did not change only once.
//!
//! What a name may resolve to is the operator's to say: addresses outside the `allow` of an upstream
//! are left out, and so is what nothing can be connected to (0.0.0.0, which Linux takes for itself,
//! multicast, broadcast). Of one name [`ADDRESSES_PER_NAME_MAX`] are used, those first that were
//! used before.
//!
//! # When
//!
//! A name is due when it is first asked for, and again an `interval` after each time it was
//! resolved, whatever else happens; after a failure sooner, [`RESOLVE_RETRY`] and twice as long
//! each time, up to `interval`. There is one thread: one name is resolved after the other, in
//! the order in which they are due. One that blocks delays the others by as long as it blocks, and
//! each other name comes before a due one at most once, because it is due later from then on. So a
//! name is resolved at most `interval` plus one lookup of each other name after the last time. With
//! the usual resolv.conf(5) a lookup takes 10 s at most for each name server (two attempts of 5 s):
//! one dead name makes intervals of 15 s up to 25 s long, and nothing but that waits.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use ipnet::IpNet;

use crate::config::{ADDRESSES_PER_NAME_MAX, RESOLVE_RETRY, RESOLVER_QUEUE_MAX};
use crate::timers::Time;

/// The resolver thread, as the shard sees it.
#[derive(Debug)]
pub struct Resolver {
    requests: Sender<Request>,
}

/// Which hosts an upstream has.
#[derive(Debug)]
pub struct Request {
    /// The upstream.
    pub upstream: usize,
    /// Its names, and their ports.
    pub hosts: Vec<(String, u16)>,
    /// Its literal addresses.
    pub fixed: Vec<SocketAddr>,
    /// The networks in which addresses of names may lie; none: any.
    pub allow: Vec<IpNet>,
}

/// What the thread has found out.
#[derive(Debug, PartialEq, Eq)]
pub enum Report {
    /// All addresses of an upstream, in ascending order; they are not those of the last report.
    Addresses(usize, Vec<SocketAddr>),
    /// One of its names was looked up.
    Lookup(usize, Lookup),
}

/// How a name fares.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lookup {
    /// The name and the port.
    pub host: String,
    /// How often it was looked up.
    pub lookups: u64,
    /// How often that gave no address that may be used.
    pub failures: u64,
    /// How long the last time took.
    pub took: Duration,
    /// When that was over.
    pub ended_at: Time,
    /// Addresses that are used of it.
    pub addresses: usize,
    /// Why the last time failed.
    pub error: Option<String>,
}

impl Resolver {
    /// Starts the thread, which resolves by `resolve`, for instance [`look_up`], and knows the time
    /// from `clock`. `report` is called in it, and says whether to go on.
    pub fn start(
        interval: Duration,
        clock: impl Fn() -> Time + Send + 'static,
        resolve: impl FnMut(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + 'static,
        report: impl Fn(Report) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, requests) = bounded(RESOLVER_QUEUE_MAX);
        std::thread::Builder::new()
            .name("resolver".into())
            .spawn(move || run(&requests, interval, clock, resolve, report))?;
        Ok(Resolver { requests: sender })
    }

    /// Keeps the hosts of an upstream resolved from now on, in place of those it had.
    pub fn watch(&self, request: Request) {
        // Full only with 4,096 requests waiting; the thread ends only with the broker.
        let _ = self.requests.try_send(request);
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
    report: impl Fn(Report) -> bool,
) {
    let mut names = Names::new(interval);
    loop {
        let pause = names.next_due().map_or(Duration::MAX, |due| due.since(clock()));
        // What was asked for meanwhile comes first: it tells which names are due.
        let reports = match requests.recv_timeout(pause) {
            Ok(request) => names.handle_request(clock(), request).into_iter().collect(),
            Err(RecvTimeoutError::Timeout) => names.resolve_due(&clock, &mut resolve),
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if !reports.into_iter().all(&report) {
            return;
        }
    }
}

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
    allow: Vec<IpNet>,
    reported: Option<Vec<SocketAddr>>,
}

#[derive(Debug)]
struct Name {
    host: String,
    port: u16,
    due: Time,
    /// In a row.
    failures: u32,
    /// Of the last time that it was resolved.
    last_good: Vec<SocketAddr>,
    lookup: Lookup,
}

impl Names {
    fn new(interval: Duration) -> Self {
        Names { interval, upstreams: BTreeMap::new() }
    }

    fn handle_request(&mut self, now: Time, request: Request) -> Option<Report> {
        let Request { upstream, hosts, fixed, allow } = request;
        let mut known = self.upstreams.remove(&upstream).map_or(Vec::new(), |before| before.names);
        let name = |(host, port): (String, u16)| {
            let is_same = |name: &Name| (&name.host, name.port) == (&host, port);
            match known.iter().position(is_same) {
                Some(index) => known.swap_remove(index),
                None => Name::new(host, port, now),
            }
        };
        let names = hosts.into_iter().map(name).collect();
        self.upstreams.insert(upstream, Watched { names, fixed, allow, reported: None });
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
    ) -> Vec<Report> {
        let now = clock();
        let all = self.upstreams.iter_mut().flat_map(|(upstream, watched)| {
            let allow = &watched.allow;
            watched.names.iter_mut().map(move |name| (*upstream, allow, name))
        });
        let due = all.filter(|(.., name)| name.due <= now).min_by_key(|(.., name)| name.due);
        let Some((upstream, allow, name)) = due else { return Vec::new() };
        let found = name.resolve(resolve, allow);
        let ended_at = clock();
        name.handle_found(now, ended_at, found);
        name.due = ended_at + name.pause(self.interval);
        let lookup = Report::Lookup(upstream, name.lookup.clone());
        std::iter::once(lookup).chain(self.news(upstream)).collect()
    }

    /// All addresses of an upstream, if that is something new to it.
    fn news(&mut self, upstream: usize) -> Option<Report> {
        let watched = self.upstreams.get_mut(&upstream)?;
        let known = watched.names.iter().flat_map(|name| &name.last_good);
        let mut addresses: Vec<_> = known.chain(&watched.fixed).copied().collect();
        addresses.sort_unstable();
        addresses.dedup();
        let is_open = watched.names.iter().any(|name| name.lookup.lookups == 0);
        if (addresses.is_empty() && is_open) || watched.reported.as_ref() == Some(&addresses) {
            return None;
        }
        watched.reported = Some(addresses.clone());
        Some(Report::Addresses(upstream, addresses))
    }
}

impl Name {
    fn new(host: String, port: u16, now: Time) -> Self {
        let lookup = Lookup { host: format!("{host}:{port}"), ..Lookup::default() };
        Name { host, port, due: now, failures: 0, last_good: Vec::new(), lookup }
    }

    /// How long to wait until it is resolved again.
    fn pause(&self, interval: Duration) -> Duration {
        match self.failures.checked_sub(1) {
            None => interval,
            Some(before) => RESOLVE_RETRY.saturating_mul(1 << before.min(16)).min(interval),
        }
    }

    /// Looks it up, and chooses among what is found.
    fn resolve(
        &self,
        mut resolve: impl FnMut(&str, u16) -> io::Result<Vec<SocketAddr>>,
        allow: &[IpNet],
    ) -> Result<Vec<SocketAddr>, String> {
        let mut found = resolve(&self.host, self.port).map_err(|error| error.to_string())?;
        let Some(first) = found.first().copied() else {
            return Err("it has no address".into());
        };
        found.retain(|address| may_be_used(address.ip(), allow));
        if found.is_empty() {
            return Err(format!("none of its addresses may be used, {} for instance", first.ip()));
        }
        found.sort_by_key(|address| (!self.last_good.contains(address), *address));
        found.dedup();
        found.truncate(ADDRESSES_PER_NAME_MAX);
        Ok(found)
    }

    /// A failure is logged when it begins, and its end.
    fn handle_found(&mut self, began_at: Time, now: Time, found: Result<Vec<SocketAddr>, String>) {
        let error = match found {
            Ok(addresses) => {
                self.last_good = addresses;
                if self.failures > 0 {
                    tracing::info!(host = self.host, "the name is resolved again");
                }
                self.failures = 0;
                None
            }
            Err(error) => {
                if self.failures == 0 {
                    tracing::warn!(
                        host = self.host,
                        error,
                        known = self.last_good.len(),
                        "the name could not be resolved; the addresses known of it stay"
                    );
                }
                self.failures = self.failures.saturating_add(1);
                self.lookup.failures += 1;
                Some(error)
            }
        };
        self.lookup.lookups += 1;
        self.lookup.took = now.since(began_at);
        self.lookup.ended_at = now;
        self.lookup.addresses = self.last_good.len();
        self.lookup.error = error;
    }
}

/// Whether connections may go to an address of a name; `allow` is empty where all networks are
/// allowed.
fn may_be_used(address: IpAddr, allow: &[IpNet]) -> bool {
    let address = address.to_canonical();
    let is_peer = !address.is_unspecified()
        && !address.is_multicast()
        && address != IpAddr::V4(Ipv4Addr::BROADCAST);
    is_peer && (allow.is_empty() || allow.iter().any(|network| network.contains(&address)))
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

    fn known(upstream: usize, addresses: Vec<SocketAddr>) -> Option<Report> {
        Some(Report::Addresses(upstream, addresses))
    }

    /// Names whose resolution is what the test says, and takes as long as it says.
    struct World {
        names: Names,
        now: Cell<Time>,
        /// The last octets of a host; none: it fails.
        records: BTreeMap<&'static str, Vec<u8>>,
        lookup: Duration,
        allow: Vec<IpNet>,
        asked: Vec<(String, Time)>,
    }

    impl World {
        fn new(records: &[(&'static str, &[u8])]) -> Self {
            World {
                names: Names::new(INTERVAL),
                now: Cell::new(at(0)),
                records: records.iter().map(|(host, last)| (*host, last.to_vec())).collect(),
                lookup: Duration::ZERO,
                allow: Vec::new(),
                asked: Vec::new(),
            }
        }

        fn watch(&mut self, upstream: usize, hosts: &[&str], fixed: &[u8]) -> Option<Report> {
            let hosts = hosts.iter().map(|host| ((*host).to_owned(), 80)).collect();
            let (fixed, allow) = (addresses(fixed), self.allow.clone());
            self.names.handle_request(self.now.get(), Request { upstream, hosts, fixed, allow })
        }

        fn resolve_due(&mut self) -> Vec<Report> {
            let World { names, now, records, lookup, asked, .. } = self;
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
        fn look_up(&mut self) -> Vec<Report> {
            let due = self.names.next_due().unwrap();
            self.now.set(self.now.get().max(due));
            self.resolve_due()
        }

        /// The same, for what is new of the addresses.
        fn next(&mut self) -> Option<Report> {
            let mut reports = self.look_up();
            assert!(matches!(reports.remove(0), Report::Lookup(..)));
            reports.pop()
        }

        /// Goes on until `host` was looked up.
        fn until(&mut self, host: &str) -> Option<Report> {
            loop {
                let news = self.next();
                if self.asked.last().unwrap().0 == host {
                    return news;
                }
                assert_eq!(news, None);
            }
        }

        /// How the last name that was looked up fares.
        fn last_lookup(&mut self) -> Lookup {
            match self.look_up().swap_remove(0) {
                Report::Lookup(_, lookup) => lookup,
                Report::Addresses(..) => panic!("the lookup comes first"),
            }
        }
    }

    #[test]
    fn the_union_of_names_and_literal_addresses_is_reported_as_it_grows() {
        let mut world = World::new(&[("a", &[3, 2]), ("b", &[2, 9])]);
        assert_eq!(world.watch(7, &["a", "b"], &[5]), known(7, addresses(&[5])));
        assert_eq!(world.next(), known(7, addresses(&[2, 3, 5])));
        assert_eq!(world.next(), known(7, addresses(&[2, 3, 5, 9])));
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
        assert_eq!(world.next(), known(0, addresses(&[1, 3])));
        world.records.insert("b", vec![]);
        assert_eq!(world.until("b"), None, "no address is no answer");
        world.records.insert("a", vec![4]);
        assert_eq!(world.until("a"), known(0, addresses(&[3, 4])));
    }

    #[test]
    fn an_empty_list_is_reported_once_and_not_before_every_name_was_tried() {
        let mut world = World::new(&[]);
        assert_eq!(world.watch(0, &["a", "b"], &[]), None);
        assert_eq!(world.next(), None);
        assert_eq!(world.next(), known(0, vec![]));
        assert_eq!(world.next(), None);
        world.records.insert("b", vec![1]);
        assert_eq!(world.until("b"), known(0, addresses(&[1])));
    }

    #[test]
    fn a_name_that_fails_is_tried_again_soon_and_then_less_often() {
        let mut world = World::new(&[]);
        world.watch(0, &["a"], &[]);
        let mut last = at(0);
        for pause in [0, 1, 2, 4, 8, 15, 15] {
            world.next();
            let asked = world.asked.last().unwrap().1;
            assert_eq!(asked.since(last), Duration::from_secs(pause));
            last = asked;
        }
        world.records.insert("a", vec![1]);
        world.next();
        world.records.remove("a");
        world.next();
        assert_eq!(world.names.next_due().unwrap().since(world.now.get()), RESOLVE_RETRY);
    }

    #[test]
    fn addresses_that_may_not_be_used_are_left_out_and_all_of_them_are_a_failure() {
        let mut world = World::new(&[("a", &[1, 2, 9])]);
        world.allow = vec!["127.0.0.0/30".parse().unwrap()];
        world.watch(0, &["a"], &[]);
        assert_eq!(world.next(), known(0, addresses(&[1, 2])));
        world.records.insert("a", vec![9]);
        let lookup = world.last_lookup();
        let error = "none of its addresses may be used, 127.0.0.9 for instance";
        assert_eq!(lookup.error.as_deref(), Some(error));
        assert_eq!((lookup.lookups, lookup.failures, lookup.addresses), (2, 1, 2));
        for nobody in ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "::ffff:0.0.0.0"]
        {
            assert!(!may_be_used(nobody.parse().unwrap(), &[]), "{nobody}");
        }
        let mapped = "::ffff:127.0.0.1".parse().unwrap();
        assert!(may_be_used(mapped, &world.allow), "the same host by another name");
    }

    #[test]
    fn of_a_thousand_addresses_a_few_are_used_and_those_first_that_were() {
        let mut world = World::new(&[("a", &[200, 201])]);
        world.watch(0, &["a"], &[]);
        world.next();
        world.records.insert("a", (0..=255).collect());
        let Some(Report::Addresses(_, used)) = world.next() else { panic!("more are known") };
        assert_eq!(used.len(), ADDRESSES_PER_NAME_MAX);
        assert!(used.contains(&address(200)) && used.contains(&address(201)));
        assert_eq!(world.next(), None, "and they stay");
    }

    #[test]
    fn how_long_a_lookup_took_is_told() {
        let mut world = World::new(&[("a", &[1])]);
        world.lookup = Duration::from_secs(3);
        world.watch(0, &["a"], &[]);
        let lookup = world.last_lookup();
        assert_eq!((lookup.took, lookup.ended_at, lookup.error), (world.lookup, at(3), None));
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
        let mut world = World::new(&[("a", &[1]), ("b", &[2])]);
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
        assert_eq!(world.watch(0, &["b", "c"], &[]), known(0, addresses(&[2])));
        assert_eq!(world.next(), known(0, addresses(&[2, 3])));
    }

    #[test]
    fn the_thread_reports_a_name_and_that_one_does_not_exist() {
        let (sender, results) = bounded(8);
        let report = move |report| sender.send(report).is_ok();
        let resolver = Resolver::start(INTERVAL, || at(0), look_up, report).unwrap();
        let watch = |upstream, host: &str| {
            let hosts = vec![(host.to_owned(), 80)];
            resolver.watch(Request { upstream, hosts, fixed: vec![], allow: vec![] });
        };
        let next = || results.recv_timeout(Duration::from_secs(30)).unwrap();
        watch(3, "localhost");
        assert!(matches!(next(), Report::Lookup(3, Lookup { error: None, .. })));
        let Report::Addresses(3, addresses) = next() else { panic!("it has addresses") };
        assert!(addresses.iter().all(|address| address.port() == 80) && !addresses.is_empty());
        watch(4, "no-such-host.invalid");
        assert!(matches!(next(), Report::Lookup(4, Lookup { error: Some(_), .. })));
        assert_eq!(next(), Report::Addresses(4, vec![]));
    }
}

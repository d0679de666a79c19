//! Host names: resolved in a thread of their own, since getaddrinfo(3) blocks.
//!
//! Each name is resolved when it is first asked for and again every `interval`. A failure is
//! reported as an empty list; keeping the last good addresses is the pool's business.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::config::{ADDRESSES_MAX, RESOLVER_QUEUE_MAX};

/// A name to keep resolved.
#[derive(Debug)]
struct Name {
    upstream: usize,
    host: String,
    port: u16,
    is_failing: bool,
}

/// The resolver thread, as the shard sees it.
#[derive(Debug)]
pub struct Resolver {
    names: Sender<Name>,
}

impl Resolver {
    /// Starts the thread. `report` is called in it with each result, and says whether to go on.
    pub fn start(
        interval: Duration,
        report: impl Fn(usize, Vec<SocketAddr>) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let (names, requests) = bounded(RESOLVER_QUEUE_MAX);
        std::thread::Builder::new()
            .name("resolver".into())
            .spawn(move || run(&requests, interval, &report))?;
        Ok(Resolver { names })
    }

    /// Keeps the host of `upstream` resolved from now on.
    pub fn watch(&self, upstream: usize, host: &str, port: u16) {
        // Full only with 4,096 names waiting; the thread ends only with the broker.
        let _ =
            self.names.try_send(Name { upstream, host: host.to_owned(), port, is_failing: false });
    }
}

fn run(
    requests: &Receiver<Name>,
    interval: Duration,
    report: &impl Fn(usize, Vec<SocketAddr>) -> bool,
) {
    let mut names: Vec<Name> = Vec::new();
    loop {
        match requests.recv_timeout(interval) {
            Ok(mut name) => {
                if !report(name.upstream, name.resolve()) {
                    return;
                }
                names.push(name);
            }
            Err(RecvTimeoutError::Timeout) => {
                for name in &mut names {
                    if !report(name.upstream, name.resolve()) {
                        return;
                    }
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl Name {
    /// Its addresses now. A failure is logged when it begins, not each time.
    fn resolve(&mut self) -> Vec<SocketAddr> {
        match (self.host.as_str(), self.port).to_socket_addrs() {
            Ok(addresses) => {
                self.is_failing = false;
                addresses.take(ADDRESSES_MAX).collect()
            }
            Err(error) => {
                if !self.is_failing {
                    tracing::warn!(host = self.host, %error, "the name could not be resolved");
                }
                self.is_failing = true;
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_reported_and_one_that_does_not_exist_has_no_address() {
        let (sender, results) = bounded(2);
        let resolver = Resolver::start(Duration::from_secs(60), move |upstream, addresses| {
            sender.send((upstream, addresses)).is_ok()
        })
        .unwrap();
        resolver.watch(3, "localhost", 80);
        let (upstream, addresses) = results.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(upstream, 3);
        assert!(addresses.iter().all(|address| address.port() == 80) && !addresses.is_empty());
        resolver.watch(4, "no-such-host.invalid", 80);
        let (upstream, addresses) = results.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!((upstream, addresses.len()), (4, 0));
    }
}

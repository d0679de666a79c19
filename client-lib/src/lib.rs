//! Client library of poolbroker, the process that owns the network connections of a host.
//!
//! ```
//! use std::time::Duration;
//! use poolbroker_client::Client;
//! use poolbroker_tests::{Broker, peers::TcpEcho};
//!
//! let peer = TcpEcho::start();
//! let broker = Broker::start(&[format!("echo={}", peer.url())]);
//!
//! let client = Client::connect_in(broker.runtime_dir())?;
//! let echo = client.upstream("echo")?;
//! let reply = echo.request(b"hello", Duration::from_secs(5))?;
//! assert_eq!(reply, b"hello");
//! # Ok::<(), poolbroker_client::Error>(())
//! ```
//!
//! # What the calls promise
//!
//! - Every call ends by its deadline or by a documented limit, also when the broker is stopped or
//!   dead, and none raises SIGPIPE. The wait for another thread that is using the same [`Client`]
//!   comes on top, and lasts as long as that thread's own call.
//! - A message that [`Upstream::send`] accepted is in the socket to the broker; it is never dropped
//!   silently: [`Upstream::flush`] says what became of it, and after a broker that shut down,
//!   [`Upstream::not_taken`] says how many it never saw. Over a ring ([`Transport::Ring`]) it is in
//!   shared memory, which the next broker takes over.
//! - Every [`Error`] says whether the operation may safely be repeated ([`Error::retry`]).
//!
//! # Modules
//!
//! | module | its noun |
//! |---|---|
//! | `client` | [`Client`]: a session with a broker |
//! | `upstream` | [`Upstream`]: what an application does with one upstream |
//! | `lease` | [`Lease`]: a connection that was borrowed |
//! | `attached` | [`Attached`]: a pipe or socketpair that the broker reads |
//! | `reply` | [`Reply`] and [`CorrelationId`]: requests in flight |
//! | `deadline` | [`Deadline`] |
//! | `error` | [`Error`] |
//! | `session` | the calls: what each writes, and what it waits for |
//! | `link` | the way to the broker: a socket, or a ring beside one |
//! | `stream_link`, `ring_link` | all sequences of reading, writing and waiting, over each |
//! | `attempt` | joining a ring to a broker, the first or the next |
//! | `inbox`, `tally` | what the frames of the broker mean, what became of the messages; pure |
//! | `stream`, `ring` | the socket and its two buffers; the shared memory and its bells |
//! | `batch`, `dial`, [`Transport`] | messages gathered; connecting; how to |

#![forbid(unsafe_code)]

mod attached;
mod attempt;
mod batch;
mod client;
mod deadline;
mod dial;
mod error;
#[cfg(test)]
mod fake_broker;
#[cfg(test)]
mod fake_ring;
mod inbox;
mod lease;
mod link;
mod reply;
mod ring;
mod ring_link;
#[cfg(test)]
mod ring_tests;
mod session;
mod stream;
mod stream_link;
mod tally;
mod transport;
mod upstream;

pub use attached::{Attached, Detached};
pub use client::Client;
pub use deadline::Deadline;
pub use error::Error;
pub use lease::Lease;
pub use poolbroker_proto::address::Protocol;
pub use poolbroker_proto::message::{Failure, Outcomes, Retry};
pub use poolbroker_proto::reason::Reason;
pub use reply::{CorrelationId, Reply};
pub use transport::Transport;
pub use upstream::Upstream;

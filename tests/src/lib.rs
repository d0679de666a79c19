//! The harness of the end-to-end tests: a real broker process, and peers that behave or do not.
//!
//! | module | its noun |
//! |---|---|
//! | [`binary`] | the broker's executable, built when a test first needs it |
//! | [`broker`] | one running broker in a directory of its own |
//! | [`deadline`] | waiting for a condition, with an end |
//! | [`limits`] | the descriptor limit of the test process |
//! | [`namespace`] | a test with a network and mounts of its own |
//! | [`peers`] | upstreams: echoes, sinks, rude and silent ones |
//! | [`raw`] | a client that speaks the protocol as badly as a test wants |
//! | [`raw_ring`] | the same through rings, every word of which it can forge |
//! | [`strace`] | system calls of a broker that fail, or kill it |
//! | [`udp_table`] | what the kernel says of its UDP sockets |
//!
//! Nothing here knows the client library, so a fault of the library cannot hide one of the broker.
//! Everything panics with a message when a test cannot go on.

#![forbid(unsafe_code)]
#![allow(clippy::panic, reason = "the harness ends the test that uses it by panicking")]

pub mod binary;
pub mod broker;
pub mod deadline;
pub mod limits;
pub mod namespace;
pub mod peers;
pub mod raw;
pub mod raw_ring;
pub mod strace;
pub mod udp_table;

pub use broker::Broker;

//! Upstreams for tests: echoes, sinks, rude and silent ones. Plain threads and blocking sockets,
//! which end when the peer is dropped.
//!
//! Every peer listens on a port below the ephemeral range, so that it can stop and come back: no
//! connection of another test can have taken its port meanwhile, and no connection attempt to the
//! stopped peer can meet itself.

mod black_hole;
mod marks;
mod port;
mod tcp_echo;
mod tcp_server;
mod tcp_sink;
mod udp_echo;
mod udp_sink;

pub use black_hole::{TcpBlackHole, UdpBlackHole};
pub use marks::Marks;
pub use port::unused_port;
pub use tcp_echo::{FORGED, Manners, TcpEcho};
pub use tcp_sink::TcpSink;
pub use udp_echo::UdpEcho;
pub use udp_sink::UdpSink;

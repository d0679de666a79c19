//! What poolbroker and its clients must agree on.
//!
//! Everything here is either pure (bytes in, values out) or one thin wrapper of the kernel
//! ([`fd`], and the mapping of [`ring`]). The crate knows neither the broker nor the client library.
//!
//! | module | its noun |
//! |---|---|
//! | [`address`] | the URL of an upstream |
//! | [`fd`] | passing file descriptors over a Unix socket |
//! | [`frame`] | one unit on a Unix stream: header and body |
//! | [`framing`] | how a byte stream marks where a message ends |
//! | [`message`] | the control messages, in bincode |
//! | [`ring`] | messages in shared memory: producer, consumer, who wakes whom |
//! | [`reason`] | why something ended: counter name, text and reply code in one enum |
//! | [`runtime_dir`] | the directory in which a broker and its clients meet |

pub mod address;
pub mod fd;
pub mod frame;
pub mod framing;
pub mod message;
pub mod reason;
pub mod ring;
pub mod runtime_dir;

//! Ids of things in tables: index and generation, so that a late event for something that is gone
//! finds nothing rather than its successor.

use slotmap::new_key_type;

new_key_type! {
    /// One connection of a pool.
    pub struct ConnId;
    /// One request of an upstream.
    pub struct RequestId;
    /// One lease of a connection, asked for or held.
    pub struct LeaseId;
    /// One source of messages: a session or a FIFO.
    pub struct SourceId;
}

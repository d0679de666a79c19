//! The thread that closes passed descriptors: close(2) of a descriptor that a client made can
//! block, for seconds with SO_LINGER (E22), for ever on a dead network file system.

use std::io;
use std::os::fd::OwnedFd;

use crossbeam_channel::{Sender, TrySendError, bounded};

use crate::config::CLOSER_QUEUE_MAX;

/// The closer thread, as the shard sees it.
#[derive(Debug)]
pub struct Closer {
    queue: Sender<OwnedFd>,
    overflow: Vec<OwnedFd>,
}

impl Closer {
    /// Starts the thread; it ends when this is dropped and everything is closed.
    pub fn start() -> io::Result<Self> {
        let (queue, descriptors) = bounded::<OwnedFd>(CLOSER_QUEUE_MAX);
        std::thread::Builder::new()
            .name("closer".into())
            .spawn(move || descriptors.into_iter().for_each(drop))?;
        Ok(Closer { queue, overflow: Vec::new() })
    }

    /// Closes a descriptor, which must no longer be watched, without waiting.
    pub fn close(&mut self, descriptor: OwnedFd) {
        self.overflow.push(descriptor);
        while let Some(next) = self.overflow.pop() {
            match self.queue.try_send(next) {
                Ok(()) => {}
                Err(TrySendError::Full(next) | TrySendError::Disconnected(next)) => {
                    self.overflow.push(next);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn descriptors_are_closed_in_another_thread() {
        let mut closer = Closer::start().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        closer.close(writer.into());
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}

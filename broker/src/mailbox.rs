//! Commands between threads: a bounded crossbeam channel and an eventfd that wakes the reader.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// The reading end: polled through its descriptor, then emptied.
#[derive(Debug)]
pub struct Mailbox<T> {
    receiver: Receiver<T>,
    event: Arc<OwnedFd>,
}

/// The sending end; may be cloned.
#[derive(Debug)]
pub struct MailSender<T> {
    sender: Sender<T>,
    event: Arc<OwnedFd>,
}

impl<T> Clone for MailSender<T> {
    fn clone(&self) -> Self {
        MailSender { sender: self.sender.clone(), event: Arc::clone(&self.event) }
    }
}

/// A mailbox for up to `messages_max` messages.
pub fn mailbox<T>(messages_max: usize) -> Result<(MailSender<T>, Mailbox<T>), Errno> {
    let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    let (sender, receiver) = bounded(messages_max);
    let ours = MailSender { sender, event: Arc::clone(&event) };
    Ok((ours, Mailbox { receiver, event }))
}

impl<T> MailSender<T> {
    /// Sends and wakes the reader; waits while the mailbox is full. False: the reader is gone.
    pub fn send(&self, message: T) -> bool {
        let sent = match self.sender.try_send(message) {
            Ok(()) => true,
            Err(TrySendError::Full(message)) => {
                self.wake();
                self.sender.send(message).is_ok()
            }
            Err(TrySendError::Disconnected(_)) => false,
        };
        self.wake();
        sent
    }

    fn wake(&self) {
        // Fails only at 2^64-2 unread wake-ups; the reader is awake then.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
    }
}

impl<T> Drop for MailSender<T> {
    fn drop(&mut self) {
        // The reader may be waiting for a message that will never come.
        self.wake();
    }
}

impl<T> Mailbox<T> {
    /// The next message; the error says whether there can still be one.
    pub fn try_receive(&self) -> Result<T, TryRecvError> {
        self.receiver.try_recv()
    }

    /// Takes back the wake-ups so far. Before reading the messages, so that none is missed.
    pub fn clear_wake_ups(&self) {
        let _ = rustix::io::read(&*self.event, &mut [0u8; 8]);
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn a_message_wakes_the_reader_and_a_full_mailbox_waits_for_it() {
        let (sender, mailbox) = mailbox(1).unwrap();
        let writer = std::thread::spawn(move || (0..100).all(|number| sender.send(number)));
        let mut received = Vec::new();
        while received.len() < 100 {
            poll(&mut [PollFd::new(&mailbox, PollFlags::IN)], None).unwrap();
            mailbox.clear_wake_ups();
            received.extend(std::iter::from_fn(|| mailbox.try_receive().ok()));
        }
        assert!(writer.join().unwrap());
        assert_eq!(received, (0..100).collect::<Vec<_>>());
    }
}

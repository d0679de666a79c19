//! One-way messages on their way to one upstream, followed until each has its outcome, also
//! across a restart of the broker.
//!
//! Messages without an outcome are kept, as a bounded chunk. When the broker says goodbye it
//! tells how many it took; exactly the others are handed to the next broker, so none is lost and
//! none repeated. When it goes without a word, as after SIGKILL, nobody knows what it took: those
//! handed over are in doubt and are not repeated.

use poolbroker_client::{Error, Outcomes, Reason};

use super::exit::{CommandError, Exit, complain, complain_of_outcomes, messages};
use super::link::{Link, is_shutdown};
use crate::config::{SEND_BATCH_BYTES, SEND_CHUNK_BYTES_MAX, SEND_CHUNK_MESSAGES_MAX};

/// Messages on their way. [`Delivery::finish`] gives the verdict.
pub struct Delivery<'a> {
    link: Link<'a>,
    chunk: Chunk,
    /// What the link had handed over when the chunk was empty last.
    handed_over_before: u64,
    outcomes: Outcomes,
    /// Handed to a broker that went without a word.
    lost_sight_of: u64,
}

/// The messages without an outcome, one behind the other.
#[derive(Default)]
struct Chunk {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    /// How many of them the present broker was handed.
    handed_over: usize,
}

impl<'a> Delivery<'a> {
    /// A delivery over `link`, which nobody else uses.
    pub fn new(link: Link<'a>) -> Self {
        Delivery {
            handed_over_before: link.upstream().handed_over(),
            link,
            chunk: Chunk::default(),
            outcomes: Outcomes::default(),
            lost_sight_of: 0,
        }
    }

    /// The longest message that goes.
    pub fn message_bytes_max(&self) -> usize {
        self.link.upstream().message_bytes_max()
    }

    /// Takes a message; it leaves with the next [`Delivery::hand_over`] at the latest.
    pub fn push(&mut self, message: &[u8]) -> Result<(), CommandError> {
        match message.len() {
            0 => self.refuse(Reason::Empty),
            bytes if bytes > self.message_bytes_max() => self.refuse(Reason::TooLong),
            _ => self.chunk.push(message),
        }
        if self.chunk.is_full() {
            self.settle()?;
        } else if self.chunk.bytes_at_rest() >= SEND_BATCH_BYTES {
            // The broker works on these while the next ones are read.
            self.hand_over()?;
        }
        Ok(())
    }

    /// Counts a message that cannot be sent.
    pub fn refuse(&mut self, reason: Reason) {
        add(&mut self.outcomes.refused, reason, 1);
    }

    /// Hands over what was pushed.
    pub fn hand_over(&mut self) -> Result<(), CommandError> {
        while self.chunk.handed_over < self.chunk.ends.len() {
            let sent = self.link.upstream().send_all(self.chunk.rest());
            let handed_over = self.link.upstream().handed_over() - self.handed_over_before;
            self.chunk.handed_over = usize::try_from(handed_over).unwrap_or(usize::MAX);
            match sent {
                Ok(_) => {}
                Err(Error::Disconnected { reason, .. }) => self.recover(reason)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Hands over what was pushed and waits until each message has its outcome.
    pub fn settle(&mut self) -> Result<(), CommandError> {
        while !self.chunk.ends.is_empty() {
            self.hand_over()?;
            match self.link.upstream().flush(self.link.timeout()) {
                Ok(outcomes) => {
                    merge(&mut self.outcomes, outcomes);
                    self.chunk.drop_first(self.chunk.ends.len());
                    self.handed_over_before = self.link.upstream().handed_over();
                }
                Err(Error::Disconnected { reason, .. }) => self.recover(reason)?,
                Err(Error::TimedOut { .. }) => return Err(self.no_outcome()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn no_outcome(&self) -> CommandError {
        let timeout = humantime::Duration::from(self.link.timeout());
        CommandError {
            exit: Exit::TimedOut,
            text: format!(
                "{}: no outcome within {timeout}: is the upstream down? `poolbroker status` shows it",
                self.link.upstream().name()
            ),
        }
    }

    /// Says what went wrong, together with what stopped the command, and gives the verdict.
    pub fn finish(self, stopped: Result<(), CommandError>) -> Exit {
        let name = self.link.upstream().name().to_owned();
        complain_of_outcomes(&name, &self.outcomes);
        let mut exit = Exit::of_outcomes(&self.outcomes);
        if self.lost_sight_of > 0 {
            complain(&format!(
                "{name}: {} in doubt: the broker ended without saying what became of them; they \
                 were not repeated",
                messages(self.lost_sight_of)
            ));
            exit = Exit::InDoubt;
        }
        if let Err(error) = stopped {
            complain(&error.text);
            exit = exit.max(error.exit);
            let handed_over = self.chunk.handed_over as u64;
            let kept = self.chunk.ends.len() as u64 - handed_over;
            if handed_over > 0 {
                let count = messages(handed_over);
                complain(&format!(
                    "{name}: {count} with the broker, whose outcomes are not all known"
                ));
            }
            if kept > 0 {
                complain(&format!("{name}: {} not sent", messages(kept)));
            }
        }
        exit
    }

    /// After the end of a session: settles what is known and goes on with the next broker.
    fn recover(&mut self, reason: Option<Reason>) -> Result<(), CommandError> {
        let upstream = self.link.upstream();
        let handed_over = self.chunk.handed_over as u64;
        let taken = match (upstream.not_taken(), upstream.goodbye()) {
            (Some(not_taken), Some(outcomes)) => {
                self.lost_sight_of += outcomes.queued();
                merge(&mut self.outcomes, outcomes);
                handed_over.saturating_sub(not_taken)
            }
            _ => {
                self.lost_sight_of += handed_over;
                handed_over
            }
        };
        self.chunk.drop_first(usize::try_from(taken).unwrap_or(usize::MAX));
        self.chunk.handed_over = 0;
        self.handed_over_before = 0;
        // A session that was ended for another reason would end the same way again.
        if let Some(reason) = reason.filter(|reason| !is_shutdown(*reason)) {
            return Err(CommandError {
                exit: Exit::of_reason(reason),
                text: format!("{}: the broker ended the session: {reason}", upstream.name()),
            });
        }
        self.link.reopen()?;
        self.handed_over_before = self.link.upstream().handed_over();
        Ok(())
    }
}

impl Chunk {
    fn push(&mut self, message: &[u8]) {
        self.bytes.extend_from_slice(message);
        self.ends.push(self.bytes.len());
    }

    fn is_full(&self) -> bool {
        self.ends.len() >= SEND_CHUNK_MESSAGES_MAX || self.bytes.len() >= SEND_CHUNK_BYTES_MAX
    }

    /// Bytes that were not handed over yet.
    fn bytes_at_rest(&self) -> usize {
        self.bytes.len() - self.start(self.handed_over)
    }

    /// The messages that were not handed over yet.
    fn rest(&self) -> impl Iterator<Item = &[u8]> {
        (self.handed_over..self.ends.len())
            .map(|index| &self.bytes[self.start(index)..self.ends[index]])
    }

    fn start(&self, index: usize) -> usize {
        match index {
            0 => 0,
            _ => self.ends[index - 1],
        }
    }

    /// Forgets the first `count` messages, or all if there are fewer.
    fn drop_first(&mut self, count: usize) {
        let count = count.min(self.ends.len());
        let bytes = self.start(count);
        self.bytes.drain(..bytes);
        self.ends.drain(..count);
        for end in &mut self.ends {
            *end -= bytes;
        }
        self.handed_over = self.handed_over.saturating_sub(count);
    }
}

/// Adds the outcomes of further messages.
pub fn merge(into: &mut Outcomes, from: Outcomes) {
    into.accepted += from.accepted;
    into.copies += from.copies;
    into.sent += from.sent;
    into.expired += from.expired;
    into.in_doubt += from.in_doubt;
    into.untold += from.untold;
    for (reason, count) in from.dropped {
        add(&mut into.dropped, reason, count);
    }
    for (reason, count) in from.refused {
        add(&mut into.refused, reason, count);
    }
}

/// Counts further messages for a reason.
pub fn add(counts: &mut Vec<(Reason, u64)>, reason: Reason, count: u64) {
    match counts.iter_mut().find(|(counted, _)| *counted == reason) {
        Some((_, total)) => *total += count,
        None => counts.push((reason, count)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use poolbroker_proto::address::Protocol;
    use poolbroker_proto::frame::{Deframer, FrameHeader, Kind};
    use poolbroker_proto::message::{BrokerMessage, ClientMessage, decode, encode};
    use poolbroker_proto::runtime_dir::RuntimeDir;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread::{self, JoinHandle};
    use std::time::Duration;

    /// How one broker behaves: it takes that many messages, then ends so.
    #[derive(Clone, Copy)]
    struct Life {
        takes: u64,
        end: End,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum End {
        /// Says goodbye for that reason, with what it took.
        Goodbye(Reason),
        /// Goes without a word.
        Crash,
        /// Answers flushes until the client goes.
        Serve,
    }

    /// One broker after the other in a directory; gives what each took.
    fn brokers(dir: &RuntimeDir, lives: Vec<Life>) -> JoinHandle<Vec<Vec<String>>> {
        let listener = UnixListener::bind(dir.client_socket()).unwrap();
        thread::spawn(move || {
            let live = |life: Life| {
                let mut fds = [PollFd::new(&listener, PollFlags::IN)];
                let patience = Timespec::try_from(Duration::from_secs(20)).unwrap();
                let connected = poll(&mut fds, Some(&patience)).unwrap();
                assert_eq!(connected, 1, "the delivery does not look for the next broker");
                serve(listener.accept().unwrap().0, life)
            };
            lives.into_iter().map(live).collect()
        })
    }

    fn serve(mut socket: UnixStream, life: Life) -> Vec<String> {
        let (mut unread, mut taken) = (Vec::new(), Vec::new());
        let mut block = [0; 4_096];
        loop {
            while let Some(frame) = Deframer::new(1_000).next_frame(&unread).unwrap() {
                let mut outcomes = Outcomes::default();
                (outcomes.accepted, outcomes.sent) = (taken.len() as u64, taken.len() as u64);
                let answer = match frame.header.kind {
                    Kind::Hello => {
                        Some(BrokerMessage::Welcome { session: 1, requests_in_flight_max: 1 })
                    }
                    Kind::Send if taken.len() as u64 == life.takes => match life.end {
                        End::Serve => panic!("more messages than the test expects"),
                        End::Crash => return taken,
                        End::Goodbye(reason) => {
                            let upstreams = vec![(0, outcomes)];
                            tell(&mut socket, 0, &BrokerMessage::Goodbye { reason, upstreams });
                            return taken;
                        }
                    },
                    Kind::Send => {
                        taken.push(String::from_utf8(frame.body.to_vec()).unwrap());
                        None
                    }
                    _ => Some(match decode(frame.body).unwrap() {
                        ClientMessage::Flush => BrokerMessage::Flushed(outcomes),
                        _ => BrokerMessage::Opened {
                            handle: 0,
                            protocol: Protocol::Tcp,
                            message_bytes_max: 100,
                        },
                    }),
                };
                if let Some(answer) = answer {
                    tell(&mut socket, frame.header.correlation, &answer);
                }
                unread.drain(..frame.frame_bytes);
            }
            match socket.read(&mut block).unwrap() {
                0 => return taken,
                read => unread.extend_from_slice(&block[..read]),
            }
        }
    }

    fn tell(socket: &mut UnixStream, correlation: u64, message: &BrokerMessage) {
        let header = FrameHeader { correlation, ..FrameHeader::new(Kind::Control) };
        let mut bytes = Vec::new();
        header.append(&encode(message).unwrap(), &mut bytes).unwrap();
        socket.write_all(&bytes).unwrap();
    }

    /// Delivers the numbers up to `count` to these brokers: the verdict, and what each took.
    fn deliver(count: u64, lives: Vec<Life>) -> (Exit, Vec<Vec<String>>) {
        let home = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::resolve(Some(home.path())).unwrap();
        let brokers = brokers(&dir, lives);
        let link = Link::open(&dir, "echo", Duration::from_secs(60)).unwrap();
        let mut delivery = Delivery::new(link);
        let pushed = numbers(0..count).iter().try_for_each(|text| delivery.push(text.as_bytes()));
        let stopped = pushed.and_then(|()| delivery.settle());
        let exit = delivery.finish(stopped);
        (exit, brokers.join().unwrap())
    }

    fn numbers(range: std::ops::Range<u64>) -> Vec<String> {
        range.map(|number| number.to_string()).collect()
    }

    const SHUT_DOWN: End = End::Goodbye(Reason::ShuttingDown);

    #[test]
    fn what_a_broker_had_not_taken_goes_to_the_next_in_order_and_only_once() {
        let lives = [(3, SHUT_DOWN), (0, SHUT_DOWN), (4, SHUT_DOWN), (3, End::Serve)];
        let lives = lives.map(|(takes, end)| Life { takes, end });
        let (exit, taken) = deliver(10, lives.to_vec());
        assert_eq!(taken, [numbers(0..3), numbers(0..0), numbers(3..7), numbers(7..10)]);
        assert_eq!(exit, Exit::Done);
    }

    #[test]
    fn what_a_crashed_broker_was_handed_is_in_doubt_and_not_repeated() {
        let crashes = Life { takes: 3, end: End::Crash };
        let home = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::resolve(Some(home.path())).unwrap();
        let next = Life { takes: 1, end: End::Serve };
        let brokers = brokers(&dir, vec![crashes, next]);
        let mut delivery =
            Delivery::new(Link::open(&dir, "echo", Duration::from_secs(60)).unwrap());
        for number in numbers(0..10) {
            delivery.push(number.as_bytes()).unwrap();
        }
        delivery.settle().unwrap();
        delivery.push(b"later").unwrap();
        let stopped = delivery.settle();
        assert_eq!(delivery.lost_sight_of, 10);
        assert_eq!(delivery.finish(stopped), Exit::InDoubt);
        assert_eq!(brokers.join().unwrap(), [numbers(0..3), vec!["later".to_owned()]]);
    }

    #[test]
    fn a_session_that_is_ended_for_cause_is_not_begun_again() {
        let end = End::Goodbye(Reason::BadFrame);
        let (exit, taken) = deliver(10, vec![Life { takes: 3, end }]);
        assert_eq!((exit, taken), (Exit::Failed, vec![numbers(0..3)]));
    }

    #[test]
    fn messages_that_cannot_be_sent_are_refused_and_the_others_arrive() {
        let home = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::resolve(Some(home.path())).unwrap();
        let end = End::Serve;
        let brokers = brokers(&dir, vec![Life { takes: 2, end }]);
        let mut delivery =
            Delivery::new(Link::open(&dir, "echo", Duration::from_secs(60)).unwrap());
        for message in [b"a".as_slice(), b"", &[b'x'; 101], b"b"] {
            delivery.push(message).unwrap();
        }
        let stopped = delivery.settle();
        assert_eq!(delivery.outcomes.refused, [(Reason::Empty, 1), (Reason::TooLong, 1)]);
        assert_eq!(delivery.outcomes.sent, 2);
        assert_eq!(delivery.finish(stopped), Exit::Failed);
        assert_eq!(brokers.join().unwrap(), [["a", "b"]]);
    }

    fn chunk(messages: &[&str]) -> Chunk {
        let mut chunk = Chunk::default();
        for message in messages {
            chunk.push(message.as_bytes());
        }
        chunk
    }

    fn rest(chunk: &Chunk) -> Vec<&str> {
        chunk.rest().map(|message| std::str::from_utf8(message).unwrap()).collect()
    }

    #[test]
    fn the_rest_of_a_chunk_is_what_was_not_handed_over() {
        let mut chunk = chunk(&["a", "bb", "ccc"]);
        assert_eq!(rest(&chunk), ["a", "bb", "ccc"]);
        chunk.handed_over = 2;
        assert_eq!(rest(&chunk), ["ccc"]);
    }

    #[test]
    fn what_a_broker_took_is_forgotten_and_the_others_are_kept_whole() {
        let mut chunk = chunk(&["a", "bb", "ccc"]);
        chunk.handed_over = 3;
        chunk.drop_first(1);
        assert_eq!(chunk.handed_over, 2);
        chunk.handed_over = 0;
        chunk.push(b"d");
        assert_eq!(rest(&chunk), ["bb", "ccc", "d"]);
        chunk.drop_first(99);
        assert!(chunk.ends.is_empty() && chunk.bytes.is_empty());
    }

    #[test]
    fn outcomes_add_up_by_reason() {
        let one = || Outcomes {
            accepted: 5,
            copies: 0,
            sent: 2,
            dropped: vec![(Reason::TooBig, 1), (Reason::QueueFull, 1)],
            expired: 1,
            in_doubt: 1,
            refused: vec![(Reason::TooLong, 1)],
            untold: 1,
        };
        let mut sum = one();
        merge(&mut sum, one());
        assert_eq!((sum.accepted, sum.sent, sum.expired, sum.in_doubt), (10, 4, 2, 2));
        assert_eq!(sum.dropped, [(Reason::TooBig, 2), (Reason::QueueFull, 2)]);
        assert_eq!(sum.refused, [(Reason::TooLong, 2)]);
    }
}

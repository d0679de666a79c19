//! `poolbroker bench-peer`: the other process of `bench ring`, and the two ends of whatever it is
//! reached by: a ring, or what a program would use without one.

use std::fs::File;
use std::hint::spin_loop;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use clap::Args;
use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::ring::{
    Bell, Consumer, Header, Memory, NotWritten, Producer, Semaphore, Urgency,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

use super::clock::{now_ns, own_cpu_ns};
use super::helper::{Orders, answer};
use crate::cli::exit::{CommandError, Exit};
use crate::config::{
    BENCH_POLLS_PER_YIELD, BENCH_READ_BYTES, BENCH_RING_BYTES, BENCH_RING_RUN_RECORDS,
    NAPPING_CONSUMER_PAUSE,
};

/// Serve `poolbroker bench ring` as the other process.
#[derive(Debug, Args)]
pub struct BenchPeer {}

/// How the two processes are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Medium {
    /// Rings, at which both look all the time.
    RingPolled,
    /// Rings, whose consumer sleeps a fixed time when there is nothing.
    RingNapped,
    /// Rings, whose consumers sleep until they are woken.
    RingSlept,
    /// Two pipes.
    Pipe,
    /// A Unix stream socket.
    Unix,
    /// Two eventfds.
    Eventfd,
    /// Two semaphores in shared memory, which are futexes.
    Futex,
}

/// What the peer is to do; the descriptors of the medium come along.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Errand {
    pub medium: Medium,
    /// Send everything back, else only take it.
    pub is_echo: bool,
    pub messages: u64,
    pub bytes: usize,
}

/// Everything is open.
#[derive(Debug, Serialize, Deserialize)]
pub struct Begun {}

/// What it took.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Finished {
    pub cpu_ns: u64,
    /// Monotonic.
    pub ended_ns: u64,
}

impl BenchPeer {
    /// Runs errands until the benchmark ends.
    pub fn run(&self) -> Result<Exit, CommandError> {
        pin(1)?;
        let mut orders = Orders::from_standard_input()?;
        while let Some(errand) = orders.next::<Errand>()? {
            let mut end = End::theirs(errand.medium, orders.take_descriptors()).map_err(failed)?;
            answer(&Begun {})?;
            let cpu = own_cpu_ns();
            let mut left = errand.messages;
            while left > 0 {
                let taken = end.receive(left, errand.bytes).map_err(failed)?;
                if errand.is_echo {
                    end.send(&vec![b'y'; errand.bytes]).map_err(failed)?;
                }
                left -= taken;
            }
            answer(&Finished { cpu_ns: own_cpu_ns() - cpu, ended_ns: now_ns() })?;
        }
        Ok(Exit::Done)
    }
}

/// Ties this process to one processor, the first or the second of those it may use, so that the two
/// sides are never on one where there are two.
pub fn pin(index: usize) -> Result<(), CommandError> {
    let pinned = sched_getaffinity(None).and_then(|allowed| {
        let usable: Vec<_> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
        let mut one = CpuSet::new();
        if let Some(cpu) = usable.get(index % usable.len().max(1)) {
            one.set(*cpu);
        }
        sched_setaffinity(None, &one)
    });
    pinned.map_err(|error| failed(error.into()))
}

/// One side of a medium.
pub enum End {
    Ring(Box<RingEnd>),
    Stream { reader: File, writer: File, block: Vec<u8> },
    Eventfd { ours: File, theirs: File },
    Futex { ours: Semaphore, theirs: Semaphore },
}

impl End {
    /// The benchmark's own side, and the descriptors for the peer's.
    pub fn ours(medium: Medium) -> io::Result<(Self, Vec<OwnedFd>)> {
        Ok(match medium {
            Medium::RingPolled | Medium::RingNapped | Medium::RingSlept => {
                let (header, fd) = region()?;
                let doorbell = eventfd(0, EventfdFlags::CLOEXEC)?;
                let theirs = vec![fd, doorbell.try_clone()?];
                (End::Ring(Box::new(RingEnd::ours(medium, &header, doorbell)?)), theirs)
            }
            Medium::Pipe => {
                let ((reader, back), (forth, writer)) = (io::pipe()?, io::pipe()?);
                let theirs = vec![OwnedFd::from(forth), OwnedFd::from(back)];
                (End::stream(reader.into(), writer.into()), theirs)
            }
            Medium::Unix => {
                let (ours, theirs) = UnixStream::pair()?;
                let theirs = OwnedFd::from(theirs);
                let descriptors = vec![theirs.try_clone()?, theirs];
                (End::stream(ours.try_clone()?.into(), ours.into()), descriptors)
            }
            Medium::Eventfd => {
                let both = [(); 2].map(|()| eventfd(0, EventfdFlags::CLOEXEC));
                let [ours, theirs] = both;
                let (ours, theirs) = (ours?, theirs?);
                let descriptors = vec![theirs.try_clone()?, ours.try_clone()?];
                (End::Eventfd { ours: ours.into(), theirs: theirs.into() }, descriptors)
            }
            Medium::Futex => {
                let (header, fd) = region()?;
                (End::Futex { ours: header.filled(), theirs: header.free() }, vec![fd])
            }
        })
    }

    fn theirs(medium: Medium, descriptors: Vec<OwnedFd>) -> io::Result<Self> {
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or(io::ErrorKind::UnexpectedEof);
        Ok(match medium {
            Medium::RingPolled | Medium::RingNapped | Medium::RingSlept => {
                let header = mapped(next()?.as_fd())?;
                End::Ring(Box::new(RingEnd::theirs(medium, &header, next()?)?))
            }
            Medium::Pipe | Medium::Unix => End::stream(next()?, next()?),
            Medium::Eventfd => End::Eventfd { ours: next()?.into(), theirs: next()?.into() },
            Medium::Futex => {
                let header = mapped(next()?.as_fd())?;
                End::Futex { ours: header.free(), theirs: header.filled() }
            }
        })
    }

    fn stream(reader: OwnedFd, writer: OwnedFd) -> Self {
        let block = vec![0; BENCH_READ_BYTES];
        End::Stream { reader: reader.into(), writer: writer.into(), block }
    }

    /// Sends one message.
    pub fn send(&mut self, message: &[u8]) -> io::Result<()> {
        match self {
            End::Ring(ring) => ring.send(message),
            End::Stream { writer, .. } => writer.write_all(message),
            End::Eventfd { theirs, .. } => theirs.write_all(&1_u64.to_ne_bytes()),
            End::Futex { theirs, .. } => {
                theirs.post();
                Ok(())
            }
        }
    }

    /// Waits for messages of `bytes` each; returns how many came together, at most `limit`.
    pub fn receive(&mut self, limit: u64, bytes: usize) -> io::Result<u64> {
        match self {
            End::Ring(ring) => ring.receive(limit),
            End::Stream { reader, block, .. } => {
                let wanted = usize::try_from(limit).unwrap_or(usize::MAX).saturating_mul(bytes);
                let room = block.len().min(wanted);
                let read = reader.read(&mut block[..room])?;
                // The rest of a message that was cut follows at once.
                let rest = (bytes - read % bytes) % bytes;
                reader.read_exact(&mut block[..rest])?;
                match read {
                    0 => Err(io::ErrorKind::UnexpectedEof.into()),
                    read => Ok(((read + rest) / bytes) as u64),
                }
            }
            End::Eventfd { ours, .. } => {
                let mut count = [0; 8];
                ours.read_exact(&mut count)?;
                Ok(u64::from_ne_bytes(count))
            }
            End::Futex { ours, .. } => Ok(u64::from(ours.wait(None))),
        }
    }
}

/// One side of a pair of rings.
pub struct RingEnd {
    medium: Medium,
    producer: Producer,
    consumer: Consumer,
    /// On which this side waits for room in the ring that it fills, if it is the client's.
    free: Semaphore,
    filled: Semaphore,
    doorbell: File,
    is_client: bool,
    message: Vec<u8>,
    polls: u32,
}

impl RingEnd {
    fn ours(medium: Medium, header: &Header, doorbell: OwnedFd) -> io::Result<Self> {
        let producer = header.send_producer().map_err(io::Error::other)?;
        let consumer = header.reply_consumer().map_err(io::Error::other)?;
        Ok(RingEnd::new(medium, header, doorbell, producer, consumer, true))
    }

    fn theirs(medium: Medium, header: &Header, doorbell: OwnedFd) -> io::Result<Self> {
        let producer = header.reply_producer().map_err(io::Error::other)?;
        let (consumer, _) = header.send_consumer().map_err(io::Error::other)?;
        Ok(RingEnd::new(medium, header, doorbell, producer, consumer, false))
    }

    fn new(
        medium: Medium,
        header: &Header,
        doorbell: OwnedFd,
        producer: Producer,
        consumer: Consumer,
        is_client: bool,
    ) -> Self {
        let (free, filled) = (header.free(), header.filled());
        let (doorbell, message) = (doorbell.into(), Vec::new());
        let polls = 0;
        RingEnd { medium, producer, consumer, free, filled, doorbell, is_client, message, polls }
    }

    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let header = FrameHeader::new(Kind::Send);
        loop {
            match self.producer.push(&header, message) {
                Ok(()) => break,
                Err(NotWritten::Full) => self.wait_for_room(message.len())?,
                Err(problem) => return Err(io::Error::other(problem)),
            }
        }
        if self.producer.publish(Urgency::Relaxed) {
            match self.is_client {
                true => self.doorbell.write_all(&1_u64.to_ne_bytes())?,
                false => self.filled.post(),
            }
        }
        Ok(())
    }

    fn wait_for_room(&mut self, body_bytes: usize) -> io::Result<()> {
        if self.medium == Medium::RingPolled || !self.is_client {
            self.give_way();
            return Ok(());
        }
        if self.producer.arm(body_bytes).map_err(io::Error::other)? {
            // Posted when half of the ring is free; `push` looks whether it is.
            let _ = self.free.wait(None);
        }
        Ok(())
    }

    fn receive(&mut self, limit: u64) -> io::Result<u64> {
        let limit = limit.min(BENCH_RING_RUN_RECORDS);
        loop {
            let (mut taken, mut ring_bytes) = (0, 0);
            while taken < limit {
                let Some(record) = self.consumer.peek().map_err(io::Error::other)? else { break };
                self.message.clear();
                self.consumer.copy_body(&record, &mut self.message);
                self.consumer.take(&record);
                ring_bytes += record.ring_bytes;
                taken += 1;
            }
            if taken > 0 {
                if self.consumer.release(ring_bytes) {
                    self.free.post();
                }
                return Ok(taken);
            }
            self.wait_for_records()?;
        }
    }

    fn wait_for_records(&mut self) -> io::Result<()> {
        match self.medium {
            Medium::RingNapped => thread::sleep(NAPPING_CONSUMER_PAUSE),
            Medium::RingSlept => {
                if self.consumer.arm(Bell::Everything).map_err(io::Error::other)? {
                    match self.is_client {
                        true => drop(self.filled.wait(None)),
                        false => self.doorbell.read_exact(&mut [0; 8])?,
                    }
                }
            }
            Medium::RingPolled | Medium::Pipe | Medium::Unix | Medium::Eventfd | Medium::Futex => {
                self.give_way()
            }
        }
        Ok(())
    }

    /// Polls; after a while it lets the other side run, for which there may be no other processor.
    fn give_way(&mut self) {
        spin_loop();
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(BENCH_POLLS_PER_YIELD) {
            thread::yield_now();
        }
    }
}

fn region() -> io::Result<(Header, OwnedFd)> {
    let (memory, fd) = Memory::create(Header::region_bytes(BENCH_RING_BYTES))?;
    Ok((Header::write(Arc::new(memory), BENCH_RING_BYTES), fd))
}

fn mapped(fd: BorrowedFd<'_>) -> io::Result<Header> {
    let memory = Memory::map(fd, Header::region_bytes(BENCH_RING_BYTES));
    let memory = Arc::new(memory.map_err(io::Error::other)?);
    Header::verify(memory, BENCH_RING_BYTES).map_err(io::Error::other)
}

fn failed(error: io::Error) -> CommandError {
    CommandError::failed(format!("the two processes of `bench ring`: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEDIA: [Medium; 7] = [
        Medium::RingPolled,
        Medium::RingNapped,
        Medium::RingSlept,
        Medium::Pipe,
        Medium::Unix,
        Medium::Eventfd,
        Medium::Futex,
    ];

    #[test]
    fn every_medium_carries_a_message_there_and_back() {
        for medium in MEDIA {
            let (mut ours, descriptors) = End::ours(medium).unwrap();
            let mut theirs = End::theirs(medium, descriptors).unwrap();
            let echo = thread::spawn(move || {
                assert_eq!(theirs.receive(1, 64).unwrap(), 1);
                theirs.send(&[b'y'; 64]).unwrap();
            });
            ours.send(&[b'x'; 64]).unwrap();
            assert_eq!(ours.receive(1, 64).unwrap(), 1, "{medium:?}");
            echo.join().unwrap();
        }
    }

    #[test]
    fn a_stream_counts_whole_messages_however_they_are_cut() {
        let (mut ours, descriptors) = End::ours(Medium::Pipe).unwrap();
        let mut theirs = End::theirs(Medium::Pipe, descriptors).unwrap();
        (0..10).for_each(|_| ours.send(&[0; 7]).unwrap());
        let mut taken = 0;
        while taken < 10 {
            taken += theirs.receive(10 - taken, 7).unwrap();
        }
        assert_eq!(taken, 10);
    }
}

//! Two processes that sleep when there is nothing to do: the ring beside what the kernel offers.
//!
//! The receiver is this program again, started with `--receiver NAME MESSAGES`; its standard input
//! is a socket, over which it is passed the descriptors, says that it is ready and, at the end, how
//! much processor time it took.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;

use poolbroker_proto::fd;
use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::ring::{Bell, Consumer, Header, Memory, NotWritten, Producer, Urgency};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::measure::{Case, Contender, Cost, pin, timed};
use crate::{CAPACITY, MESSAGE_BYTES, RELEASED_AT_ONCE, body};

pub static CASES: [Case; 2] = [
    Case {
        name: "one_way_processes",
        messages: 200_000,
        contenders: &[
            Contender { name: "pipe", run: |messages| pipe(ONE_WAY, messages) },
            Contender { name: "unix stream", run: |messages| stream(ONE_WAY, messages) },
            Contender { name: "ring", run: |messages| ring(ONE_WAY_RING, messages) },
        ],
        goal: None,
    },
    Case {
        name: "round_trip_processes",
        messages: 10_000,
        contenders: &[
            Contender { name: "pipe", run: |messages| pipe(ECHO, messages) },
            Contender { name: "unix stream", run: |messages| stream(ECHO, messages) },
            Contender { name: "eventfd", run: eventfds },
            Contender { name: "futex", run: futex },
            Contender { name: "ring", run: |messages| ring(ECHO_RING, messages) },
        ],
        goal: None,
    },
];

/// What a receiver is started as.
const ONE_WAY: &str = "one-way";
const ECHO: &str = "echo";
const ECHO_EVENTFD: &str = "echo-eventfd";
const ECHO_FUTEX: &str = "echo-futex";
const ONE_WAY_RING: &str = "one-way-ring";
const ECHO_RING: &str = "echo-ring";

/// What a stream is read by: as much as a pipe holds.
const BLOCK_BYTES: usize = 64 * 1024;

/// Starts a receiver with these descriptors, and sends.
fn with_receiver(
    name: &str,
    messages: u64,
    descriptors: &[BorrowedFd<'_>],
    sender: impl FnOnce(),
) -> Cost {
    pin(0);
    let (mut control, theirs) = UnixStream::pair().expect("a socket can be made");
    let program = std::env::current_exe().expect("this program has a path");
    let mut receiver = Command::new(program)
        .args(["--receiver", name, &messages.to_string()])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .expect("this program can be started");
    fd::send(&control, b"x", descriptors).expect("the socket is empty");
    control.read_exact(&mut [0]).expect("it is ready");
    let (began, _, sender_ns) = timed(sender);
    let mut report = [0; 8];
    control.read_exact(&mut report).expect("it received everything");
    let wall = began.elapsed();
    assert!(receiver.wait().expect("it is a child").success(), "the receiver failed");
    Cost::per_message(messages, wall, sender_ns, u64::from_ne_bytes(report))
}

/// The other process.
pub fn receive(name: &str, messages: u64) {
    pin(1);
    let control = io::stdin().as_fd().try_clone_to_owned().expect("it is a socket");
    let mut control = UnixStream::from(control);
    poll(&mut [PollFd::new(&control, PollFlags::IN)], None).expect("it is a socket");
    let received = fd::receive(&control, &mut [0; 1]).expect("descriptors come");
    let mut descriptors = received.descriptors.into_iter();
    let mut next = || descriptors.next().expect("it is passed");
    let mut said_ready = control.try_clone().expect("a socket can be shared");
    let mut ready = || said_ready.write_all(b"r").expect("the other side waits");
    let (_, _, cpu_ns) = match name {
        ONE_WAY => {
            let stream = File::from(next());
            ready();
            timed(|| read_all(stream, messages))
        }
        ECHO => {
            let (reader, writer) = (File::from(next()), File::from(next()));
            ready();
            timed(|| echo(reader, writer, messages))
        }
        ECHO_EVENTFD => {
            let (asked, answers) = (next(), next());
            ready();
            timed(|| {
                for _ in 0..messages {
                    wait_for(&asked);
                    signal(&answers);
                }
            })
        }
        ECHO_FUTEX => {
            let header = attach(next());
            let (asked, answers) = (header.free(), header.filled());
            ready();
            timed(|| {
                for _ in 0..messages {
                    assert!(asked.wait(None), "there is no deadline");
                    answers.post();
                }
            })
        }
        ONE_WAY_RING | ECHO_RING => {
            let (header, doorbell) = (attach(next()), next());
            ready();
            match name {
                ONE_WAY_RING => timed(|| drain(&header, &doorbell, messages)),
                _ => timed(|| echo_ring(&header, &doorbell, messages)),
            }
        }
        other => unreachable!("nothing starts a receiver {other}"),
    };
    control.write_all(&cpu_ns.to_ne_bytes()).expect("the other side waits");
}

fn pipe(receiver: &str, messages: u64) -> Cost {
    let (reader, writer) = io::pipe().expect("a pipe can be made");
    let (back_reader, back_writer) = io::pipe().expect("a pipe can be made");
    let sender = || {
        exchange(
            receiver,
            OwnedFd::from(writer).into(),
            OwnedFd::from(back_reader).into(),
            messages,
        )
    };
    with_receiver(receiver, messages, &[reader.as_fd(), back_writer.as_fd()], sender)
}

fn stream(receiver: &str, messages: u64) -> Cost {
    let (ours, theirs) = UnixStream::pair().expect("a socket can be made");
    let back = ours.try_clone().expect("a socket can be shared");
    let sender =
        || exchange(receiver, OwnedFd::from(ours).into(), OwnedFd::from(back).into(), messages);
    with_receiver(receiver, messages, &[theirs.as_fd(), theirs.as_fd()], sender)
}

fn exchange(receiver: &str, mut writer: File, mut reader: File, messages: u64) {
    let mut reply = [0; MESSAGE_BYTES];
    for number in 0..messages {
        writer.write_all(&body(number)).expect("the other side reads");
        if receiver == ECHO {
            reader.read_exact(&mut reply).expect("the other side answers");
            assert_eq!(reply, body(number));
        }
    }
}

fn read_all(mut stream: File, messages: u64) {
    let mut block = vec![0; BLOCK_BYTES];
    let mut left = messages as usize * MESSAGE_BYTES;
    while left > 0 {
        left -= stream.read(&mut block).expect("the other side writes");
    }
}

fn echo(mut reader: File, mut writer: File, messages: u64) {
    let mut message = [0; MESSAGE_BYTES];
    for _ in 0..messages {
        reader.read_exact(&mut message).expect("the other side writes");
        writer.write_all(&message).expect("the other side reads");
    }
}

fn eventfds(messages: u64) -> Cost {
    let make = || eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd can be made");
    let (asks, answered) = (make(), make());
    with_receiver(ECHO_EVENTFD, messages, &[asks.as_fd(), answered.as_fd()], || {
        for _ in 0..messages {
            signal(&asks);
            wait_for(&answered);
        }
    })
}

fn signal(eventfd: &OwnedFd) {
    rustix::io::write(eventfd, &1u64.to_ne_bytes()).expect("its counter has room");
}

fn wait_for(eventfd: &OwnedFd) {
    rustix::io::read(eventfd, &mut [0; 8]).expect("it counts");
}

fn futex(messages: u64) -> Cost {
    let (header, fd) = make_pair();
    let (asks, answered) = (header.free(), header.filled());
    with_receiver(ECHO_FUTEX, messages, &[fd.as_fd()], || {
        for _ in 0..messages {
            asks.post();
            assert!(answered.wait(None), "there is no deadline");
        }
    })
}

fn make_pair() -> (Header, OwnedFd) {
    let bytes = Header::region_bytes(CAPACITY);
    let (memory, fd) = Memory::create(bytes).expect("a region can be made");
    (Header::write(Arc::new(memory), CAPACITY), fd)
}

fn attach(fd: OwnedFd) -> Header {
    let memory = Memory::map(fd.as_fd(), Header::region_bytes(CAPACITY)).expect("it is sealed");
    Header::verify(Arc::new(memory), CAPACITY).expect("it is a pair")
}

fn ring(receiver: &str, messages: u64) -> Cost {
    let (header, fd) = make_pair();
    let doorbell = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd can be made");
    with_receiver(receiver, messages, &[fd.as_fd(), doorbell.as_fd()], || {
        let mut producer = header.send_producer().expect("the ring is empty");
        let mut replies = header.reply_consumer().expect("the ring is empty");
        let mut reply = Vec::with_capacity(MESSAGE_BYTES);
        for number in 0..messages {
            send(&header, &mut producer, &body(number));
            if producer.publish(Urgency::Urgent) {
                signal(&doorbell);
            }
            if receiver == ECHO_RING {
                take(&mut replies, &mut reply, || assert!(header.filled().wait(None)));
                assert_eq!(reply, body(number));
            }
        }
    })
}

fn send(header: &Header, producer: &mut Producer, message: &[u8]) {
    let frame = FrameHeader { upstream: 1, ..FrameHeader::new(Kind::Send) };
    loop {
        match producer.push(&frame, message) {
            Ok(()) => return,
            Err(NotWritten::Full) => {
                if producer.arm(message.len()).expect("the ring is sound") {
                    assert!(header.free().wait(None), "there is no deadline");
                }
            }
            Err(error) => unreachable!("{error}"),
        }
    }
}

/// Takes the next message, sleeping until there is one; it returns what was taken of the ring.
fn take(consumer: &mut Consumer, message: &mut Vec<u8>, sleep: impl Fn()) {
    loop {
        if let Some(record) = consumer.peek().expect("the ring is sound") {
            message.clear();
            consumer.copy_body(&record, message);
            consumer.take(&record);
            // Nobody waits for room in a ring with one message.
            let _ = consumer.release(record.ring_bytes);
            return;
        }
        if consumer.arm(Bell::Everything).expect("the ring is sound") {
            sleep();
        }
    }
}

fn drain(header: &Header, doorbell: &OwnedFd, messages: u64) {
    let mut consumer = header.send_consumer().expect("the ring is sound").0;
    let mut message = Vec::with_capacity(MESSAGE_BYTES);
    let (mut left, mut held, mut held_bytes) = (messages, 0, 0);
    while left > 0 {
        let record = consumer.peek().expect("the ring is sound");
        if let Some(record) = &record {
            message.clear();
            consumer.copy_body(record, &mut message);
            consumer.take(record);
            (left, held, held_bytes) = (left - 1, held + 1, held_bytes + record.ring_bytes);
        }
        if held == RELEASED_AT_ONCE || (record.is_none() && held > 0) {
            if consumer.release(held_bytes) {
                header.free().post();
            }
            (held, held_bytes) = (0, 0);
        } else if record.is_none() && consumer.arm(Bell::Everything).expect("the ring is sound") {
            wait_for(doorbell);
        }
    }
}

fn echo_ring(header: &Header, doorbell: &OwnedFd, messages: u64) {
    let mut consumer = header.send_consumer().expect("the ring is sound").0;
    let mut producer = header.reply_producer().expect("the ring is empty");
    let mut message = Vec::with_capacity(MESSAGE_BYTES);
    for _ in 0..messages {
        take(&mut consumer, &mut message, || wait_for(doorbell));
        let frame = FrameHeader::new(Kind::Reply);
        producer.push(&frame, &message).expect("a ring with one message has room");
        if producer.publish(Urgency::Urgent) {
            header.filled().post();
        }
    }
}

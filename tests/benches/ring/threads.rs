//! Two threads of one process that poll, each on its own processor: what the ring itself costs.

use std::hint::{black_box, spin_loop};
use std::os::fd::AsFd;
use std::sync::{Arc, Barrier};
use std::thread;

use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::ring::{Consumer, Header, Memory, Producer, Urgency};

use crate::measure::{Case, Contender, Cost, pin, timed};
use crate::{CAPACITY, MESSAGE_BYTES, RELEASED_AT_ONCE, RING_MESSAGES, body};

/// How many messages are published at once where they are published in batches.
const BATCH: usize = 64;

/// How often a reader pauses that found nothing and does not want to take the line from under the
/// writer's hands: about as long as a broker takes to look at its other rings.
const PAUSES: usize = 16;

pub static CASES: [Case; 3] = [
    Case {
        name: "one_way_threads",
        messages: 1_000_000,
        contenders: &[
            Contender { name: "rtrb", run: |messages| rtrb_one_way(1, messages) },
            Contender { name: "ring", run: |messages| ring_one_way(1, 1, messages) },
            Contender {
                name: "rtrb, reader pauses",
                run: |messages| rtrb_one_way(PAUSES, messages),
            },
            Contender {
                name: "ring, reader pauses",
                run: |messages| ring_one_way(1, PAUSES, messages),
            },
        ],
        goal: Some(1.3),
    },
    Case {
        name: "one_way_threads_batch",
        messages: 1_000_000,
        contenders: &[
            Contender { name: "rtrb", run: rtrb_batches },
            Contender { name: "ring", run: |messages| ring_one_way(BATCH, 1, messages) },
        ],
        goal: Some(1.3),
    },
    Case {
        name: "round_trip_threads",
        messages: 300_000,
        contenders: &[
            Contender { name: "rtrb", run: rtrb_round_trip },
            Contender { name: "ring", run: |messages| ring_round_trip(1, messages) },
            Contender {
                name: "ring, 64 freed at once",
                run: |messages| ring_round_trip(RELEASED_AT_ONCE, messages),
            },
        ],
        goal: Some(1.3),
    },
];

/// Both sides at once, from the moment that both are there.
fn side_by_side(
    messages: u64,
    sender: impl FnOnce() + Send,
    receiver: impl FnOnce() + Send,
) -> Cost {
    let ready = Barrier::new(2);
    let side = |cpu| {
        pin(cpu);
        ready.wait();
    };
    let (sent, received) = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            side(0);
            timed(sender)
        });
        let receiver = scope.spawn(|| {
            side(1);
            timed(receiver)
        });
        (sender.join().expect("it sends"), receiver.join().expect("it receives"))
    });
    let wall = sent.1.max(received.1) - sent.0.min(received.0);
    Cost::per_message(messages, wall, sent.2, received.2)
}

/// A pair, mapped twice, as two processes have it.
fn pair() -> (Header, Header) {
    let bytes = Header::region_bytes(CAPACITY);
    let (ours, fd) = Memory::create(bytes).expect("a region can be made");
    let theirs = Memory::map(fd.as_fd(), bytes).expect("it is sealed");
    let ours = Header::write(Arc::new(ours), CAPACITY);
    (ours, Header::verify(Arc::new(theirs), CAPACITY).expect("it is a pair"))
}

fn ring() -> (Producer, Consumer) {
    let (broker, client) = pair();
    let producer = client.send_producer().expect("the ring is empty");
    (producer, broker.send_consumer().expect("the ring is empty").0)
}

fn ring_one_way(batch: usize, pauses: usize, messages: u64) -> Cost {
    let (mut producer, mut consumer) = ring();
    let header = FrameHeader { upstream: 1, ..FrameHeader::new(Kind::Send) };
    let sender = move || {
        for number in 0..messages {
            while producer.push(&header, &body(number)).is_err() {
                let _ = producer.publish(Urgency::Relaxed);
                spin_loop();
            }
            if (number + 1) % batch as u64 == 0 {
                let _ = producer.publish(Urgency::Relaxed);
            }
        }
        let _ = producer.publish(Urgency::Relaxed);
    };
    let receiver = move || {
        let mut message = Vec::with_capacity(MESSAGE_BYTES);
        let (mut sum, mut held, mut held_bytes) = (0, 0, 0);
        let mut left = messages;
        while left > 0 {
            let record = consumer.peek().expect("the ring is sound");
            if let Some(record) = &record {
                message.clear();
                consumer.copy_body(record, &mut message);
                consumer.take(record);
                sum += first_word(&message);
                held += 1;
                held_bytes += record.ring_bytes;
                left -= 1;
            } else {
                pause(pauses);
            }
            if held == RELEASED_AT_ONCE || (record.is_none() && held > 0) {
                let _ = consumer.release(held_bytes);
                (held, held_bytes) = (0, 0);
            }
        }
        assert_eq!(sum, expected_sum(messages));
    };
    side_by_side(messages, sender, receiver)
}

fn rtrb_one_way(pauses: usize, messages: u64) -> Cost {
    let (mut producer, mut consumer) = rtrb::RingBuffer::new(RING_MESSAGES);
    let sender = move || {
        for number in 0..messages {
            while producer.push(body(number)).is_err() {
                spin_loop();
            }
        }
    };
    let receiver = move || {
        let (mut sum, mut left) = (0, messages);
        while left > 0 {
            match consumer.pop() {
                Ok(message) => {
                    sum += first_word(&message);
                    left -= 1;
                }
                Err(_) => pause(pauses),
            }
        }
        assert_eq!(sum, expected_sum(messages));
    };
    side_by_side(messages, sender, receiver)
}

fn pause(pauses: usize) {
    (0..pauses).for_each(|_| spin_loop());
}

fn rtrb_batches(messages: u64) -> Cost {
    let (mut producer, mut consumer) = rtrb::RingBuffer::<[u8; MESSAGE_BYTES]>::new(RING_MESSAGES);
    let sender = move || {
        let mut number = 0;
        while number < messages {
            let batch = BATCH.min((messages - number) as usize);
            match producer.write_chunk_uninit(batch) {
                Ok(chunk) => number += chunk.fill_from_iter((number..).map(body)) as u64,
                Err(_) => spin_loop(),
            }
        }
    };
    let receiver = move || {
        let (mut sum, mut left) = (0, messages);
        while left > 0 {
            match consumer.read_chunk(consumer.slots().min(RELEASED_AT_ONCE)) {
                Ok(chunk) if !chunk.is_empty() => {
                    left -= chunk.len() as u64;
                    for message in chunk {
                        sum += first_word(&message);
                    }
                }
                _ => spin_loop(),
            }
        }
        assert_eq!(sum, expected_sum(messages));
    };
    side_by_side(messages, sender, receiver)
}

fn ring_round_trip(released_at_once: usize, messages: u64) -> Cost {
    let (broker, client) = pair();
    let mut asks = client.send_producer().expect("the ring is empty");
    let mut replies = client.reply_consumer().expect("the ring is empty");
    let mut asked = broker.send_consumer().expect("the ring is empty").0;
    let mut answers = broker.reply_producer().expect("the ring is empty");
    let sender = move || {
        let mut message = Vec::with_capacity(MESSAGE_BYTES);
        let mut held = Held { bytes: 0, messages: 0, most: released_at_once };
        for number in 0..messages {
            send(&mut asks, Kind::Request, &body(number));
            receive(&mut replies, &mut message, &mut held);
            assert_eq!(first_word(&message), number);
        }
    };
    let receiver = move || {
        let mut message = Vec::with_capacity(MESSAGE_BYTES);
        let mut held = Held { bytes: 0, messages: 0, most: released_at_once };
        for _ in 0..messages {
            receive(&mut asked, &mut message, &mut held);
            send(&mut answers, Kind::Reply, &message);
        }
    };
    side_by_side(messages, sender, receiver)
}

/// What was taken and not yet given back.
struct Held {
    bytes: usize,
    messages: usize,
    most: usize,
}

fn send(producer: &mut Producer, kind: Kind, message: &[u8]) {
    producer.push(&FrameHeader::new(kind), message).expect("a ring with one message has room");
    let _ = producer.publish(Urgency::Urgent);
}

fn receive(consumer: &mut Consumer, message: &mut Vec<u8>, held: &mut Held) {
    let record = loop {
        match consumer.peek().expect("the ring is sound") {
            Some(record) => break record,
            None => spin_loop(),
        }
    };
    message.clear();
    consumer.copy_body(&record, message);
    consumer.take(&record);
    held.bytes += record.ring_bytes;
    held.messages += 1;
    if held.messages == held.most {
        let _ = consumer.release(held.bytes);
        (held.bytes, held.messages) = (0, 0);
    }
}

fn rtrb_round_trip(messages: u64) -> Cost {
    let (mut asks, mut asked) = rtrb::RingBuffer::new(RING_MESSAGES);
    let (mut answers, mut replies) = rtrb::RingBuffer::new(RING_MESSAGES);
    let sender = move || {
        for number in 0..messages {
            asks.push(body(number)).expect("a ring with one message has room");
            assert_eq!(first_word(&pop(&mut replies)), number);
        }
    };
    let receiver = move || {
        for _ in 0..messages {
            let message = pop(&mut asked);
            answers.push(message).expect("a ring with one message has room");
        }
    };
    side_by_side(messages, sender, receiver)
}

fn pop(consumer: &mut rtrb::Consumer<[u8; MESSAGE_BYTES]>) -> [u8; MESSAGE_BYTES] {
    loop {
        match consumer.pop() {
            Ok(message) => break message,
            Err(_) => spin_loop(),
        }
    }
}

/// Its number, after every byte of it was needed.
fn first_word(message: &[u8]) -> u64 {
    // By a thin reference: one of two words would be read back in one piece, behind the store of
    // its length, which stalls the processor for longer than a message takes.
    let message: &[u8; MESSAGE_BYTES] = message.try_into().expect("all have one length");
    u64::from_ne_bytes(*black_box(message).first_chunk().expect("a message is longer"))
}

fn expected_sum(messages: u64) -> u64 {
    (0..messages).sum()
}

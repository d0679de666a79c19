//! What the other side can do to a ring: write anything, anywhere, at any time, through a mapping of
//! its own. Whatever it does, a record that is shown lies inside of the ring and has the length that
//! it says, nothing is written elsewhere, and nothing panics: at worst the ring is [`Corrupt`].
//!
//! The ring attacked is the last of the pair: behind it the region ends, and so does a test whose
//! ring is left.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use rustix::fs::{FallocateFlags, fallocate};

use super::*;
use crate::frame::Kind;

const CAPACITY: usize = 1024;
const REGION: usize = Header::region_bytes(CAPACITY);
const RECORDS: usize = REGION - 2 * CAPACITY;

/// A pair as its honest side has it, and the mapping of the other.
struct Attacked {
    ours: Header,
    theirs: Memory,
    fd: OwnedFd,
}

/// What the other side does.
#[derive(Debug, Clone)]
enum Attack {
    /// To any word of the region.
    Anywhere {
        at: usize,
        value: u64,
    },
    /// The producer's position.
    Tail(u64),
    /// The consumer's.
    Released(u64),
    Reading(u64),
    /// The first word of the record that is read next or after: length, kind, upstream.
    Length {
        records_on: usize,
        value: u64,
    },
    /// Frees pages, which read as zeros from then on.
    PunchHole {
        from: u64,
        bytes: u64,
    },
}

/// What the honest consumer does.
#[derive(Debug, Clone)]
enum Step {
    Attack(Attack),
    Take,
    Release,
    MarkReading,
    Arm(Bell),
    End,
    Resume,
}

/// What the honest producer does.
#[derive(Debug, Clone)]
enum SendStep {
    Attack(Attack),
    Push(usize),
    DropClaim(usize),
    Publish(Urgency),
    Arm(usize),
    Drained,
    Resume,
}

impl Attacked {
    /// With a ring that begins at `start`, so that records lie anywhere.
    fn new(start: u64) -> Self {
        let (ours, fd) = Memory::create(REGION).unwrap();
        let theirs = Memory::map(fd.as_fd(), REGION).unwrap();
        let ours = Header::write(Arc::new(ours), CAPACITY);
        let attacked = Attacked { ours, theirs, fd };
        let layout = attacked.ours.reply_ring();
        for at in [layout.tail, layout.released, layout.reading] {
            attacked.store(at, start);
        }
        attacked
    }

    /// Fills the ring, so that there is something to spoil.
    fn fill(&self) {
        let mut producer = self.ours.reply_producer().unwrap();
        let lens = [0, 1, 64, 200, 8].into_iter().cycle();
        for _ in lens.map_while(|len| push(&mut producer, len).ok()) {}
        let _ = producer.publish(Urgency::Relaxed);
    }

    fn store(&self, at: usize, value: u64) {
        // ORDER: relaxed; an attack is at no particular time.
        self.theirs.word(at).store(value, Ordering::Relaxed);
    }

    fn attack(&self, attack: &Attack, position: u64) {
        let layout = self.ours.reply_ring();
        match *attack {
            Attack::Anywhere { at, value } => self.store(at, value),
            Attack::Tail(value) => self.store(layout.tail, value),
            Attack::Released(value) => self.store(layout.released, value),
            Attack::Reading(value) => self.store(layout.reading, value),
            Attack::Length { records_on, value } => {
                let at = place(position.wrapping_add((records_on * WORD) as u64), CAPACITY);
                self.store(layout.records + at / WORD * WORD, value);
            }
            Attack::PunchHole { from, bytes } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.fd, flags, from, bytes).unwrap();
            }
        }
    }

    /// The words of the records of both rings.
    fn records(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.theirs.copy_out(RECORDS, 2 * CAPACITY, &mut bytes);
        bytes
    }
}

fn push(producer: &mut Producer, len: usize) -> Result<(), NotWritten> {
    let header = FrameHeader { correlation: 3, ..FrameHeader::new(Kind::Request) };
    producer.push(&header, &vec![0x5a; len])
}

/// Takes what is shown, after a look at whether it may be shown.
fn take(consumer: &mut Consumer) -> Result<Option<usize>, Corrupt> {
    let shown = consumer.peek()?;
    let (tail, released) = (consumer.tail, consumer.released);
    let unread = tail.wrapping_sub(consumer.position);
    assert!(tail.wrapping_sub(released) <= CAPACITY as u64 && tail.is_multiple_of(WORD as u64));
    assert!(unread <= tail.wrapping_sub(released), "a position goes back behind what was taken");
    let Some(record) = shown else {
        return Ok(None);
    };
    assert!(record.ring_bytes as u64 <= unread, "{record:?} of {unread} bytes");
    let ring = consumer.layout.records..=consumer.layout.records + CAPACITY;
    assert!(ring.contains(&record.body_at), "{record:?}");
    assert!(ring.contains(&(record.body_at + record.body_bytes)), "{record:?}");
    assert!(record.body_bytes <= body_bytes_max(CAPACITY), "{record:?}");
    let mut body = b"before".to_vec();
    consumer.copy_body(&record, &mut body);
    assert_eq!(body.len(), b"before".len() + record.body_bytes);
    consumer.take(&record);
    Ok(Some(record.ring_bytes))
}

/// Words that are likely to do harm.
fn any_value() -> impl Strategy<Value = u64> {
    let capacity = CAPACITY as u64;
    prop_oneof![
        any::<u64>(),
        0..=3 * capacity,
        (0..=3 * capacity / 8).prop_map(|words| words * 8),
        (0..=3 * capacity).prop_map(|back| u64::MAX - back),
        (0..=capacity + 8).prop_map(|len| PADDING | len),
        (1..=6u64, 0..=capacity).prop_map(|(kind, len)| kind << 32 | len),
        (1..=6u64).prop_map(|kind| kind << 32 | u64::from(u32::MAX)),
        Just(1 << 63),
    ]
}

fn any_start() -> impl Strategy<Value = u64> {
    let words = CAPACITY as u64 / 8;
    prop_oneof![
        Just(0),
        (0..words).prop_map(|word| word * 8),
        (1..words).prop_map(|word| {
            // Soon to wrap around.
            0u64.wrapping_sub(word * 8)
        })
    ]
}

fn any_attack() -> impl Strategy<Value = Attack> {
    prop_oneof![
        2 => (0..REGION / WORD, any_value())
            .prop_map(|(word, value)| Attack::Anywhere { at: word * WORD, value }),
        2 => any_value().prop_map(Attack::Tail),
        2 => any_value().prop_map(Attack::Released),
        1 => any_value().prop_map(Attack::Reading),
        4 => (0..8usize, any_value())
            .prop_map(|(records_on, value)| Attack::Length { records_on, value }),
        1 => (0..REGION as u64, 1..REGION as u64)
            .prop_map(|(from, bytes)| Attack::PunchHole { from, bytes }),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any_attack().prop_map(Step::Attack),
        6 => Just(Step::Take),
        3 => Just(Step::Release),
        1 => Just(Step::MarkReading),
        1 => prop_oneof![Just(Bell::Urgent), Just(Bell::Everything)].prop_map(Step::Arm),
        1 => Just(Step::End),
        1 => Just(Step::Resume),
    ]
}

fn any_send_step() -> impl Strategy<Value = SendStep> {
    let any_len = || prop_oneof![0..100usize, 0..=body_bytes_max(CAPACITY) + 1];
    prop_oneof![
        3 => any_attack().prop_map(SendStep::Attack),
        6 => any_len().prop_map(SendStep::Push),
        1 => any_len().prop_map(SendStep::DropClaim),
        2 => prop_oneof![Just(Urgency::Relaxed), Just(Urgency::Urgent)]
            .prop_map(SendStep::Publish),
        1 => any_len().prop_map(SendStep::Arm),
        1 => Just(SendStep::Drained),
        1 => Just(SendStep::Resume),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_consumer_shows_what_lies_in_the_ring_or_that_it_is_corrupt(
        start in any_start(),
        steps in proptest::collection::vec(any_step(), 0..60),
    ) {
        let attacked = Attacked::new(start);
        attacked.fill();
        let mut consumer = attacked.ours.reply_consumer().unwrap();
        let mut taken = Vec::new();
        for step in steps {
            match step {
                Step::Attack(attack) => {
                    attacked.attack(&attack, consumer.position());
                    continue;
                }
                Step::Resume => {
                    if let Ok(resumed) = attacked.ours.reply_consumer() {
                        consumer = resumed;
                        taken.clear();
                    }
                    continue;
                }
                _ => {}
            }
            let before = attacked.records();
            match step {
                Step::Take => taken.extend(take(&mut consumer).unwrap_or_default()),
                Step::Release if !taken.is_empty() => {
                    let _ = consumer.release(taken.remove(0));
                }
                Step::MarkReading => consumer.mark_reading(),
                Step::Arm(bell) => {
                    let _ = consumer.arm(bell);
                }
                _ => {
                    let _ = (consumer.end(), consumer.has_records());
                }
            }
            prop_assert!(before == attacked.records(), "a consumer writes no record");
            prop_assert!(taken.iter().sum::<usize>() <= CAPACITY, "{taken:?} are held");
        }
    }

    #[test]
    fn a_producer_writes_into_its_ring_or_says_that_it_is_corrupt(
        start in any_start(),
        steps in proptest::collection::vec(any_send_step(), 0..60),
    ) {
        let attacked = Attacked::new(start);
        let mut producer = attacked.ours.reply_producer().unwrap();
        for step in steps {
            if let SendStep::Attack(attack) = &step {
                attacked.attack(attack, producer.position());
                continue;
            }
            let (before, position) = (attacked.records(), producer.position());
            match step {
                SendStep::Push(len) => {
                    let result = push(&mut producer, len);
                    let too_long = matches!(result, Err(NotWritten::TooLong { .. }));
                    prop_assert_eq!(too_long, len > body_bytes_max(CAPACITY));
                    let moved = producer.position().wrapping_sub(position);
                    prop_assert!(moved <= CAPACITY as u64 && (moved > 0) == result.is_ok());
                }
                SendStep::DropClaim(len) => {
                    let header = FrameHeader::new(Kind::Send);
                    drop(producer.claim(&header, len));
                    prop_assert_eq!(producer.position(), position);
                }
                SendStep::Publish(urgency) => {
                    let _ = producer.publish(urgency);
                }
                SendStep::Arm(len) => {
                    let _ = producer.arm(len.min(body_bytes_max(CAPACITY)));
                }
                SendStep::Drained => {
                    let _ = (producer.is_drained(), producer.touched());
                }
                SendStep::Resume => {
                    if let Ok(resumed) = attacked.ours.reply_producer() {
                        producer = resumed;
                    }
                }
                SendStep::Attack(_) => {}
            }
            let after = attacked.records();
            prop_assert!(before[..CAPACITY] == after[..CAPACITY], "the other ring is not its own");
            let used = producer.tail.wrapping_sub(producer.released);
            prop_assert!(used <= CAPACITY as u64, "{used} bytes are in use");
        }
    }

    #[test]
    fn no_bytes_are_a_pair_of_another_size_or_make_looking_at_them_panic(
        words in proptest::collection::vec((0..RECORDS / WORD, any_value()), 0..40),
        capacity in prop_oneof![
            any::<usize>(),
            Just(CAPACITY),
            (0..64u32).prop_map(|bits| 1 << bits),
        ],
    ) {
        let attacked = Attacked::new(0);
        for (word, value) in words {
            attacked.store(word * WORD, value);
        }
        let memory = Arc::clone(attacked.ours.memory());
        if let Ok(header) = Header::verify(memory, capacity) {
            prop_assert_eq!(header.capacity(), CAPACITY);
            let _ = (header.send_consumer(), header.reply_consumer());
            let _ = (header.send_producer(), header.reply_producer());
            let _ = (header.advance_epoch(), header.take_nudge(), header.unsent());
            let _ = (header.free().try_wait(), header.filled().try_wait());
        }
    }
}

/// Calls `honest` so many times, while another thread writes the words of `flips` at full speed.
fn while_flipping(
    attacked: &Attacked,
    flips: &[(usize, [u64; 2])],
    times: usize,
    mut honest: impl FnMut(),
) {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // ORDER: relaxed; when exactly it stops is all the same.
            while !is_over.load(Ordering::Relaxed) {
                for side in [0, 1] {
                    flips.iter().for_each(|(at, values)| attacked.store(*at, values[side]));
                }
            }
        });
        let finished = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..times).for_each(|_| honest());
        }));
        is_over.store(true, Ordering::Relaxed);
        finished.unwrap();
    });
}

const TIMES: usize = 300_000;

#[test]
fn a_length_that_changes_between_two_looks_is_used_as_it_was_checked() {
    let attacked = Attacked::new(0);
    attacked.fill();
    let records = attacked.ours.reply_ring().records;
    let kind = (Kind::Request as u64) << 32;
    let flips = [
        (records, [kind, kind | 400]),
        (records, [kind | u64::from(u32::MAX), PADDING | CAPACITY as u64]),
        (records + HEADER_BYTES, [0x6161_6161_6161_6161, 0x0a0a_0a0a_0a0a_0a0a]),
    ];
    while_flipping(&attacked, &flips, TIMES, || {
        let mut consumer = attacked.ours.reply_consumer().unwrap();
        let _ = take(&mut consumer);
    });
}

#[test]
fn positions_that_change_all_the_time_lead_neither_side_out_of_its_ring() {
    let attacked = Attacked::new(0);
    attacked.fill();
    let layout = attacked.ours.reply_ring();
    let flips = [
        (layout.tail, [64, 1 << 40]),
        (layout.tail, [CAPACITY as u64, u64::MAX - 7]),
        (layout.released, [0, 64]),
        (layout.released, [u64::MAX, 13]),
    ];
    let mut producer = attacked.ours.reply_producer().unwrap();
    while_flipping(&attacked, &flips, TIMES, || {
        if let Ok(mut consumer) = attacked.ours.reply_consumer() {
            while let Ok(Some(ring_bytes)) = take(&mut consumer) {
                let _ = consumer.release(ring_bytes);
            }
        }
        let _ = push(&mut producer, 40);
    });
}

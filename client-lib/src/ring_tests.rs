//! What a client over a ring promises, against brokers that follow a script.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use poolbroker_proto::frame::Kind;
use poolbroker_proto::message::{Attachment, BrokerMessage, ClientMessage, Outcomes, Retry};
use poolbroker_proto::reason::Reason;
use poolbroker_proto::ring::{Bell, body_bytes_max};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::deadline::Deadline;
use crate::error::Error;
use crate::fake_broker::{FakeBroker, HANDLE, sent_all};
use crate::fake_ring::{FakeRing, RING_BYTES};
use crate::transport::Transport;

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(1);

fn is_readable(fd: &impl AsFd, timeout: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::try_from(timeout).unwrap())).unwrap() > 0
}

#[test]
fn sends_flushes_and_requests_go_through_the_ring() {
    let (broker, client, echo) = FakeBroker::ringing_echo(|mut ring, _| {
        assert_eq!(ring.expect_send(), b"one");
        assert_eq!(ring.expect_send(), b"two");
        ring.answer_flush(sent_all(2));
        for _ in 0..2 {
            let (id, body) = ring.expect_request();
            ring.reply(id, &body);
        }
        let (id, _) = ring.expect_request();
        ring.fail(id, Reason::UpstreamDown);
        assert!(ring.frame().is_none());
    });
    echo.send(b"one").unwrap();
    echo.try_send(b"two").unwrap();
    assert_eq!(echo.flush(LONG).unwrap(), sent_all(2));
    assert_eq!(echo.request(b"ping", LONG).unwrap(), b"ping");
    let id = echo.submit(b"later", LONG).unwrap();
    let reply = client.next_reply(LONG).unwrap();
    assert_eq!((reply.id, reply.result.unwrap()), (id, b"later".to_vec()));
    assert_eq!(echo.request(b"x", LONG).unwrap_err().reason(), Some(Reason::UpstreamDown));
    drop((client, echo));
    broker.join();
}

#[test]
fn a_message_is_at_most_half_of_the_ring() {
    let (_broker, _client, echo) =
        FakeBroker::ringing_echo(|mut ring, _| while ring.frame().is_some() {});
    let max = body_bytes_max(RING_BYTES);
    assert_eq!(echo.message_bytes_max(), max);
    for _ in 0..10 {
        echo.send(&vec![1; max]).unwrap();
    }
    let long = echo.send(&vec![1; max + 1]).unwrap_err();
    assert_eq!(long.reason(), Some(Reason::TooLong));
}

#[test]
fn the_doorbell_is_rung_only_when_the_broker_asked_for_it_and_once() {
    let (armed, is_armed) = sync_channel(0);
    let (done, is_done) = sync_channel(0);
    let (broker, _client, echo) = FakeBroker::ringing_echo(move |mut ring, _| {
        let mut rings = Vec::new();
        for bell in [Bell::Silent, Bell::Urgent, Bell::Everything, Bell::Everything] {
            while let Some(record) = ring.consumer.peek().unwrap() {
                ring.consumer.take(&record);
            }
            ring.consumer.arm(bell).unwrap();
            ring.rings();
            armed.send(()).unwrap();
            is_done.recv().unwrap();
            rings.push(ring.rings());
        }
        assert_eq!(rings, [0, 0, 1, 1]);
        while let Some(record) = ring.consumer.peek().unwrap() {
            ring.consumer.take(&record);
        }
        ring.consumer.arm(Bell::Urgent).unwrap();
        armed.send(()).unwrap();
        assert!(ring.sleep());
    });
    for round in 0..4 {
        is_armed.recv().unwrap();
        match round {
            3 => drop(echo.send_all([[1; 500]; 50]).unwrap()),
            // Enough for the library to look whether the broker lives, which is no reason to ring.
            _ => (0..50).for_each(|_| echo.send(&[1; 500]).unwrap()),
        }
        done.send(()).unwrap();
    }
    is_armed.recv().unwrap();
    echo.submit(b"x", LONG).unwrap();
    broker.join();
}

#[test]
fn a_full_ring_refuses_what_does_not_wait_and_times_out_what_does() {
    let (read_now, may_read) = sync_channel(0);
    let (broker, client, echo) = FakeBroker::ringing_echo(move |mut ring, _| {
        let count: u64 = may_read.recv().unwrap();
        for _ in 0..count {
            assert_eq!(ring.expect_send().len(), 1000);
        }
        assert_eq!(ring.expect_send(), b"next");
    });
    let full = loop {
        if let Err(error) = echo.try_send(&[1; 1000]) {
            break error;
        }
    };
    assert!(matches!(full, Error::Full { .. }), "{full}");
    assert_eq!(full.retry(), Retry::NotSent);
    client.set_send_timeout(SHORT);
    let unsent = [
        echo.send(&[1; 1000]).unwrap_err(),
        echo.send_all([[1; 1000]]).unwrap_err(),
        echo.submit(&[1; 1000], LONG).unwrap_err(),
        echo.request(&[1; 1000], LONG).unwrap_err(),
    ];
    for unsent in unsent {
        assert!(matches!(unsent, Error::TimedOut { .. }), "{unsent}");
        assert_eq!(unsent.retry(), Retry::NotSent);
    }
    assert!(matches!(client.next_reply(LONG).unwrap_err(), Error::NothingInFlight));
    client.set_send_timeout(LONG);
    read_now.send(echo.handed_over()).unwrap();
    echo.send(b"next").unwrap();
    broker.join();
}

#[test]
fn without_room_for_a_message_a_socket_refuses_what_does_not_wait() {
    let (read_now, may_read) = sync_channel(0);
    let (broker, client, echo) = FakeBroker::serving_echo(move |mut session| {
        let count: u64 = may_read.recv().unwrap();
        for _ in 0..count + 1 {
            assert_eq!(session.expect(Kind::Send).1.len(), 100_000);
        }
        assert_eq!(session.frame(), None);
    });
    let full = loop {
        if let Err(error) = echo.try_send(&[1; 100_000]) {
            break error;
        }
    };
    assert!(matches!(full, Error::Full { .. }), "{full}");
    read_now.send(echo.handed_over()).unwrap();
    client.set_send_timeout(LONG);
    echo.send(&[1; 100_000]).unwrap();
    drop((client, echo));
    broker.join();
}

#[test]
fn calls_to_a_broker_that_is_stopped_end_by_their_deadlines() {
    let (leave_now, may_leave) = sync_channel::<()>(0);
    let (_broker, client, echo) = FakeBroker::ringing_echo(move |_ring, _| {
        may_leave.recv().unwrap_err();
    });
    echo.send(b"x").unwrap();
    client.set_send_timeout(SHORT);
    let waited = [
        echo.flush(SHORT).unwrap_err(),
        echo.request(b"x", SHORT).unwrap_err(),
        client.upstream("other").map(drop).map_or_else(|error| error, |()| unreachable!()),
    ];
    for waited in waited {
        assert!(matches!(waited, Error::TimedOut { .. }), "{waited}");
        assert_eq!(waited.retry(), Retry::MaybeExecuted);
    }
    drop(leave_now);
}

#[test]
fn what_a_dead_broker_did_not_touch_the_next_one_takes_in_order() {
    let (broker, client, echo) = FakeBroker::ringing_echo(|mut ring, mut door| {
        for number in 0..10 {
            assert_eq!(ring.expect_send(), [number]);
        }
        door.close();
        drop(ring);
        door.open();
        let (mut ring, upstreams) = FakeRing::resume(door.next());
        assert_eq!(upstreams[usize::from(HANDLE)], "echo");
        for number in 10..200 {
            assert_eq!(ring.expect_send(), [number]);
        }
        ring.answer_flush(sent_all(190));
    });
    let descriptor = client.as_fd().as_raw_fd();
    for number in 0..200 {
        echo.send(&[number]).unwrap();
    }
    assert_eq!(echo.flush(LONG).unwrap(), sent_all(200));
    assert_eq!(client.as_fd().as_raw_fd(), descriptor);
    broker.join();
}

#[test]
fn sends_alone_find_the_next_broker_without_ever_waiting() {
    let (gone, is_gone) = sync_channel(0);
    let (broker, _client, echo) = FakeBroker::ringing_echo(move |ring, mut door| {
        drop(ring);
        gone.send(()).unwrap();
        let (mut ring, _) = FakeRing::resume(door.next());
        assert_eq!(ring.expect_send(), [7; 1000]);
    });
    is_gone.recv().unwrap();
    while !broker.is_over() {
        match echo.try_send(&[7; 1000]) {
            Ok(()) | Err(Error::Full { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    broker.join();
}

#[test]
fn a_send_that_waits_for_room_goes_on_with_the_next_broker() {
    let (broker, client, echo) = FakeBroker::ringing_echo(|mut ring, mut door| {
        ring.expect_send();
        drop(ring);
        let (mut ring, _) = FakeRing::resume(door.next());
        for _ in 1..1000 {
            assert_eq!(ring.expect_send().len(), 1000);
        }
        assert!(ring.frame().is_none());
    });
    assert_eq!(echo.send_all(std::iter::repeat_n([1; 1000], 1000)).unwrap(), 1000);
    drop((client, echo));
    broker.join();
}

#[test]
fn of_requests_only_those_that_a_dead_broker_touched_fail() {
    let (sent, is_sent) = sync_channel(0);
    let (broker, client, echo) = FakeBroker::ringing_echo(move |mut ring, mut door| {
        is_sent.recv().unwrap();
        let (id, _) = ring.expect_request();
        ring.reply(id, b"in time");
        ring.touch().unwrap();
        drop(ring);
        let (mut ring, _) = FakeRing::resume(door.next());
        // The second one, which is in the past of the next broker, too.
        ring.frame().unwrap();
        let (id, body) = ring.expect_request();
        ring.reply(id, &body);
        let (id, body) = ring.expect_request();
        ring.reply(id, &body);
    });
    let ids = [b"1", b"2", b"3"].map(|body| echo.submit(body, LONG).unwrap());
    sent.send(()).unwrap();
    let replies = [(); 3].map(|()| client.next_reply(LONG).unwrap());
    assert_eq!(replies.each_ref().map(|reply| reply.id), ids);
    let [first, second, third] = replies.map(|reply| reply.result);
    assert_eq!(first.unwrap(), b"in time");
    let lost = second.unwrap_err();
    assert!(matches!(lost, Error::Disconnected { .. }), "{lost}");
    assert_eq!(lost.retry(), Retry::MaybeExecuted);
    assert_eq!(third.unwrap(), b"3");
    assert_eq!(echo.request(b"4", LONG).unwrap(), b"4");
    broker.join();
}

#[test]
fn a_request_that_waits_fails_if_touched_and_is_answered_by_the_next_broker_if_not() {
    for touched in [true, false] {
        let (broker, _client, echo) = FakeBroker::ringing_echo(move |mut ring, mut door| {
            match touched {
                true => drop(ring.touch().unwrap()),
                false => assert!(ring.consumer.arm(Bell::Everything) == Ok(false) || ring.sleep()),
            }
            drop(ring);
            let (mut ring, _) = FakeRing::resume(door.next());
            let (id, body) = ring.expect_request();
            ring.reply(id, &body);
            ring.answer_flush(sent_all(0));
        });
        let reply = echo.request(b"x", LONG);
        match touched {
            true => {
                let lost = reply.unwrap_err();
                assert!(matches!(lost, Error::Disconnected { reason: None, .. }), "{lost}");
                assert_eq!(lost.retry(), Retry::MaybeExecuted);
            }
            false => assert_eq!(reply.unwrap(), b"x"),
        }
        echo.flush(LONG).unwrap();
        broker.join();
    }
}

#[test]
fn a_question_that_a_dead_broker_took_along_is_asked_again() {
    let (broker, _client, echo) = FakeBroker::ringing_echo(|mut ring, mut door| {
        let (first, _, _) = ring.expect_control();
        drop(ring);
        let (mut ring, _) = FakeRing::resume(door.next());
        let (second, _, message) = ring.expect_control();
        assert_ne!(first, second);
        assert_eq!(message, ClientMessage::Flush);
        ring.tell(first, &BrokerMessage::Flushed(sent_all(99)));
        ring.tell(second, &BrokerMessage::Flushed(sent_all(0)));
    });
    assert_eq!(echo.flush(LONG).unwrap(), Outcomes::default());
    broker.join();
}

#[test]
fn a_flush_tells_of_messages_that_dead_brokers_released_in_silence() {
    for unsent in [0, 1] {
        let (broker, _client, echo) = FakeBroker::ringing_echo(move |mut ring, mut door| {
            ring.expect_send();
            // Told: no reason to doubt what is not told.
            ring.header.add_unsent(1);
            let dropped = vec![(Reason::QueueFull, 1)];
            ring.answer_flush(Outcomes { accepted: 1, dropped, ..Outcomes::default() });
            for _ in 0..5 {
                ring.expect_send();
            }
            ring.header.add_unsent(unsent);
            drop(ring);
            let (mut ring, _) = FakeRing::resume(door.next());
            for _ in 0..3 {
                ring.expect_send();
            }
            ring.answer_flush(sent_all(3));
            ring.expect_send();
            ring.answer_flush(sent_all(4));
        });
        echo.send(b"x").unwrap();
        assert_eq!(echo.flush(LONG).unwrap().dropped_total(), 1);
        assert_eq!(echo.send_all([b"x"; 8]).unwrap(), 8);
        let outcomes = echo.flush(LONG).unwrap();
        let expected = match unsent {
            0 => sent_all(8),
            _ => Outcomes { accepted: 8, sent: 3, untold: 5, ..Outcomes::default() },
        };
        assert_eq!(outcomes, expected);
        echo.send(b"x").unwrap();
        assert_eq!(echo.flush(LONG).unwrap(), sent_all(1));
        broker.join();
    }
}

#[test]
fn an_answer_counts_although_the_broker_ended_right_behind_it() {
    let (broker, _client, echo) = FakeBroker::ringing_echo(|first, mut door| {
        let mut first = Some(first);
        for _ in 0..30 {
            let next = || FakeRing::resume(door.next()).0;
            let mut ring = first.take().unwrap_or_else(next);
            for sent in [1, 2] {
                ring.expect_send();
                ring.answer_flush(sent_all(sent));
            }
            drop(ring);
        }
    });
    for _ in 0..60 {
        echo.send(b"x").unwrap();
        assert_eq!(echo.flush(LONG).unwrap(), sent_all(1));
    }
    broker.join();
}

#[test]
fn a_goodbye_settles_exactly_and_the_next_broker_goes_on() {
    let (broker, client, echo) = FakeBroker::ringing_echo(|mut ring, mut door| {
        for _ in 0..5 {
            ring.expect_send();
        }
        ring.header.add_unsent(2);
        ring.goodbye(Outcomes { accepted: 5, sent: 3, expired: 2, ..Outcomes::default() });
        // Still here, as a broker is that drains its upstreams.
        let (mut next, _) = FakeRing::resume(door.next());
        for _ in 0..5 {
            next.expect_send();
        }
        next.answer_flush(sent_all(5));
        drop(ring);
    });
    assert_eq!(echo.send_all([b"x"; 10]).unwrap(), 10);
    let outcomes = echo.flush(LONG).unwrap();
    let expected = Outcomes { accepted: 10, sent: 8, expired: 2, ..Outcomes::default() };
    assert_eq!(outcomes, expected);
    assert_eq!((echo.not_taken(), echo.goodbye()), (None, None));
    drop(client);
    broker.join();
}

#[test]
fn a_refused_ring_ends_the_session_and_a_broker_that_shuts_down_does_not() {
    let (broker, client, echo) = FakeBroker::ringing_echo(|ring, mut door| {
        drop(ring);
        for reason in [Reason::ShuttingDown, Reason::BadRing] {
            let mut script = door.next();
            script.welcome(1);
            let (id, _, _) = script.expect_control();
            script.fail(id, reason, Retry::NotSent);
        }
    });
    let refused = echo.request(b"x", LONG).unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::BadRing), "{refused}");
    for ended in [
        echo.send(b"x").unwrap_err(),
        echo.try_send(b"x").unwrap_err(),
        echo.send_all([b"x"]).unwrap_err(),
        echo.flush(LONG).unwrap_err(),
        client.next_reply(LONG).unwrap_err(),
    ] {
        assert!(matches!(ended, Error::Disconnected { .. }), "{ended}");
        assert_eq!(ended.reason(), Some(Reason::BadRing));
    }
    broker.join();
}

#[test]
fn a_session_that_is_thrown_out_has_ended() {
    let (broker, _client, echo) = FakeBroker::ringing_echo(|mut ring, _| {
        ring.throw_out(Reason::RingCorrupt);
    });
    let ended = echo.flush(LONG).unwrap_err();
    assert!(matches!(ended, Error::Disconnected { .. }), "{ended}");
    assert_eq!(ended.reason(), Some(Reason::RingCorrupt));
    broker.join();
}

#[test]
fn a_ring_that_makes_no_sense_ends_the_session_and_nothing_else() {
    const RELEASED_AT: u64 = 384;
    let (leave_now, may_leave) = sync_channel::<()>(0);
    let (broken, is_broken) = sync_channel(0);
    let (_broker, _client, echo) = FakeBroker::ringing_echo(move |ring, _| {
        let memory = File::from(ring.memory.try_clone().unwrap());
        memory.write_all_at(&(1u64 << 40).to_le_bytes(), RELEASED_AT).unwrap();
        broken.send(()).unwrap();
        may_leave.recv().unwrap_err();
    });
    is_broken.recv().unwrap();
    let ended = loop {
        if let Err(error) = echo.send(&[0; 1000]) {
            break error;
        }
    };
    assert_eq!(ended.reason(), Some(Reason::RingCorrupt), "{ended}");
    drop(leave_now);
}

#[test]
fn an_event_loop_is_nudged_by_the_descriptor_and_learns_of_the_next_broker() {
    let (go, may_go) = sync_channel(0);
    let (broker, client, echo) = FakeBroker::ringing_echo(move |mut ring, mut door| {
        let (id, body) = ring.expect_request();
        may_go.recv().unwrap();
        ring.reply(id, &body);
        may_go.recv().unwrap();
        drop(ring);
        let (mut ring, _) = FakeRing::resume(door.next());
        let (id, body) = ring.expect_request();
        ring.reply(id, &body);
        assert!(ring.frame().is_none());
    });
    let first = echo.submit(b"first", LONG).unwrap();
    assert!(client.try_next_reply().unwrap().is_none());
    assert!(!is_readable(&client, Duration::ZERO));
    go.send(()).unwrap();
    assert!(is_readable(&client, LONG));
    assert_eq!(client.try_next_reply().unwrap().unwrap().id, first);
    assert!(client.try_next_reply().unwrap().is_none());
    assert!(!is_readable(&client, Duration::ZERO), "the nudge was read");
    go.send(()).unwrap();
    assert!(is_readable(&client, LONG), "the end of the broker");
    let second = echo.submit(b"second", LONG).unwrap();
    let reply = loop {
        match client.try_next_reply().unwrap() {
            Some(reply) => break reply,
            None => drop(is_readable(&client, Duration::from_millis(1))),
        }
    };
    assert_eq!((reply.id, reply.result.unwrap()), (second, b"second".to_vec()));
    drop((client, echo));
    broker.join();
}

#[test]
fn replies_beyond_the_reply_ring_come_as_it_is_emptied() {
    const COUNT: usize = 64;
    const BYTES: usize = 32 * 1024;
    let (broker, client, echo) = FakeBroker::ringing_echo(|mut ring, _| {
        let ids: Vec<_> = (0..COUNT).map(|_| ring.expect_request().0).collect();
        for id in ids {
            ring.reply(id, &[1; BYTES]);
        }
    });
    for _ in 0..COUNT {
        echo.submit(b"x", LONG).unwrap();
    }
    for _ in 0..COUNT {
        assert_eq!(client.next_reply(LONG).unwrap().result.unwrap().len(), BYTES);
    }
    broker.join();
}

#[test]
fn descriptors_go_by_the_socket_and_end_with_their_broker() {
    const ATTACHED: u64 = 12;
    let (broker, _client, echo) = FakeBroker::ringing_echo(|mut ring, mut door| {
        for round in 0..2 {
            let (id, upstream, message) = ring.script.expect_control();
            assert_eq!(upstream, HANDLE);
            assert_eq!(message, ClientMessage::Attach { attachment: Attachment::Pipe });
            assert_eq!(ring.script.descriptors.len(), 1);
            ring.tell(id, &BrokerMessage::Attached { session: ATTACHED });
            if round == 0 {
                drop(ring);
                ring = FakeRing::resume(door.next()).0;
            }
        }
        let (reason, outcomes) = (Reason::EndOfInput, sent_all(1));
        ring.tell(0, &BrokerMessage::Detached { session: ATTACHED, reason, outcomes });
    });
    let (_writer, first) = echo.pipe().unwrap();
    let ended = first.wait(LONG).unwrap_err();
    assert!(matches!(ended, Error::Disconnected { .. }), "{ended}");
    let (_writer, second) = echo.pipe().unwrap();
    let ended = first.wait(Deadline::now()).unwrap_err();
    assert!(matches!(ended, Error::Disconnected { .. }), "{ended}");
    assert_eq!(second.wait(LONG).unwrap().outcomes, sent_all(1));
    broker.join();
}

#[test]
fn without_any_broker_calls_end_by_their_deadlines_and_what_is_sent_is_kept() {
    let (gone, is_gone) = sync_channel(0);
    let (come, may_come) = sync_channel::<()>(0);
    let (broker, client, echo) = FakeBroker::ringing_echo(move |ring, mut door| {
        door.close();
        drop(ring);
        gone.send(()).unwrap();
        may_come.recv().unwrap();
        door.open();
        let (mut ring, _) = FakeRing::resume(door.next());
        assert_eq!(ring.expect_send(), b"kept");
        // The question of the call that gave up.
        ring.expect_control();
        ring.answer_flush(sent_all(1));
    });
    is_gone.recv().unwrap();
    echo.send(b"kept").unwrap();
    let waited = echo.flush(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(waited, Error::TimedOut { .. }), "{waited}");
    assert!(client.try_next_reply().unwrap().is_none());
    come.send(()).unwrap();
    assert_eq!(echo.flush(LONG).unwrap(), sent_all(1));
    broker.join();
}

#[test]
fn a_ring_that_is_refused_at_first_is_told_by_the_brokers_reason() {
    let broker = FakeBroker::start(|mut script| {
        script.welcome(1);
        let (id, _, _) = script.expect_control();
        script.fail(id, Reason::Quota, Retry::NotSent);
    });
    let refused = broker.connect_by_ring().unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    assert_eq!(refused.reason(), Some(Reason::Quota));
    let bytes = usize::MAX;
    let too_large = crate::Client::connect_in_with("/tmp", Transport::Ring { bytes }).unwrap_err();
    assert!(matches!(too_large, Error::RingTooLarge { .. }), "{too_large}");
}

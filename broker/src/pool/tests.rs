//! The promises of the pool, a test each.

mod world;

use std::collections::{BTreeMap, BTreeSet};

use self::world::{Socket, World, ms};
use super::*;
use crate::config::Overflow;

fn tcp(change: impl FnOnce(&mut UpstreamLimits)) -> World {
    world(Protocol::Tcp, change)
}

fn world(protocol: Protocol, change: impl FnOnce(&mut UpstreamLimits)) -> World {
    let mut limits = UpstreamLimits::of_protocol(protocol);
    change(&mut limits);
    World::new(protocol, limits)
}

#[test]
fn refuses_when_waiters_are_full() {
    let mut world = tcp(|limits| limits.waiters_max = 2);
    world.ask_times(2);
    assert_eq!(world.ask_as(world.source(0), None), Err(Reason::WaitersFull));
}

#[test]
fn where_nobody_may_wait_the_next_one_finds_a_connection() {
    let mut world = tcp(|limits| (limits.waiters_max, limits.connections_max) = (0, 1));
    for _ in 0..3 {
        assert_eq!(world.ask_as(world.source(0), None), Err(Reason::WaitersFull));
    }
    let conn = world.connect();
    let request = world.ask();
    assert_eq!(world.on(request), Some(conn));
    assert_eq!(world.ask_as(world.source(0), None), Err(Reason::WaitersFull));
}

#[test]
fn whoever_has_most_waiters_makes_way_for_another_user() {
    let mut world = tcp(|limits| limits.waiters_max = 2);
    let (many, few) = (world.source(0), world.source(1));
    let asked = world.ask_times(2);
    world.ask_as(few, None).unwrap();
    assert_eq!(world.pool.in_flight(), 2);
    assert!(!world.asked.contains_key(&asked[1]), "the last one of the other user");
    assert_eq!([many, few].map(|source| world.ask_as(source, None)), [Err(Reason::WaitersFull); 2]);
    world.check();
}

#[test]
fn users_that_wait_are_served_in_turn() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let asked = world.ask_times(3);
    let other = world.ask_as(world.source(1), None).unwrap();
    let conn = world.connect();
    for request in [asked[0], other, asked[1], asked[2]] {
        assert_eq!(world.on(request), Some(conn));
        world.reply(conn);
    }
}

#[test]
fn waiting_leases_keep_no_request_and_no_other_user_from_waiting() {
    let mut world = tcp(|limits| (limits.connections_max, limits.waiters_max) = (1, 2));
    let (many, few) = (world.source(0), world.source(1));
    (0..3).for_each(|_| world.lease_as(many, 1, None));
    assert_eq!((world.pool.lease_waiters(), world.leases_refused), (2, 1));
    world.ask_times(2);
    world.lease_as(few, 2, None);
    assert_eq!((world.pool.lease_waiters(), world.leases_refused), (2, 2));
    let owners = world.wishes.values().map(|(source, _)| *source).collect::<Vec<_>>();
    assert!(owners.contains(&many) && owners.contains(&few));
    world.check();
}

#[test]
fn a_lease_waits_for_one_request_of_another_user_and_not_for_all() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    world.ask_times(100);
    world.lease_as(world.source(1), 1, None);
    world.connect();
    let mut served = 0;
    while world.pool.leases_held() == 0 {
        let conn = world.pick(0, |_, state| state == State::InUse).unwrap();
        world.reply(conn);
        served += 1;
    }
    assert!(served <= 2, "{served}");
}

#[test]
fn a_request_waits_for_one_lease_of_another_user_and_not_for_all() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    (0..30).for_each(|_| world.lease_as(world.source(1), 1, None));
    world.pass(10);
    let request = world.ask_as(world.source(0), None).unwrap();
    let mut served = 0;
    while world.on(request).is_none() && served < 100 {
        if let Some(conn) = world.connecting(0) {
            world.finish_connect(conn, true);
        }
        if let Some(lease) = world.lent.keys().next().copied() {
            world.give_back(lease, Ok(()));
            served += 1;
        }
    }
    assert!(served <= 2, "{served}");
}

#[test]
fn the_oldest_lease_is_not_passed_by_whoever_asks_anew_for_ever() {
    let mut world = tcp(|limits| {
        (limits.connections_max, limits.waiters_max) = (1, 100);
        (limits.wait_timeout, limits.request_timeout) = (ms(60_000), ms(60_000));
    });
    let (asking, old, new) = (world.source(0), world.source(1), world.source(2));
    (0..2).for_each(|_| world.lease_as(old, 11, None));
    world.pass(10);
    (0..5).for_each(|_| _ = world.ask_as(asking, None).unwrap());
    world.connect();
    let lease = *world.lent.keys().next().unwrap();
    world.give_back(lease, Err(Reason::LeaseEnded));
    world.lease_as(new, 12, Some(20));
    let (mut served, mut left) = (0, 200);
    while world.pool.leases_held() == 0 && left > 0 {
        if let Some(conn) = world.connecting(0) {
            world.finish_connect(conn, true);
        }
        let busy = world.pick(0, |_, state| state == State::InUse);
        world.pass(21);
        world.lease_as(new, 12, Some(20));
        world.ask_as(asking, None).unwrap();
        if let Some(conn) = busy {
            world.reply(conn);
            served += 1;
        }
        left -= 1;
    }
    assert!(served <= 4, "{served} requests, all of them younger, before the oldest lease");
}

#[test]
fn a_freed_connection_serves_the_first_waiter_at_once() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let (first, second, third) = (world.ask(), world.ask(), world.ask());
    let conn = world.connect();
    assert_eq!([first, second, third].map(|r| world.on(r)), [Some(conn), None, None]);
    world.reply(conn);
    assert_eq!([first, second, third].map(|r| world.on(r)), [None, Some(conn), None]);
}

#[test]
fn idle_connections_are_reused_last_in_first_out() {
    let mut world = tcp(|_| ());
    let conns = world.idle_conns(3);
    assert_eq!([world.take(), world.take(), world.take()], [conns[2], conns[1], conns[0]]);
}

#[test]
fn never_more_connections_than_connections_max_in_both_roles() {
    let mut world = tcp(|limits| limits.connections_max = 2);
    world.send(&[1]);
    world.ask_times(2);
    let roles = [world.connect(), world.connect()].map(|conn| world.sockets[&conn].role);
    assert_eq!((roles, world.sockets.len()), ([Role::OneWay { lane: 0 }, Role::Exchange], 2));
}

#[test]
fn one_place_serves_both_roles_in_turn() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let exchange = world.idle_conns(1)[0];
    world.send(&[5]);
    assert_eq!(world.closes[&exchange], Reason::MakeRoom);
    let one_way = world.connect();
    let request = world.ask();
    world.write(5);
    // The peer has read to the end.
    world.lose(one_way, Reason::PeerClosed);
    assert_eq!(world.closes[&one_way], Reason::MakeRoom);
    let exchange = world.connect();
    assert_eq!(world.on(request), Some(exchange));
}

#[test]
fn a_new_connection_serves_one_waiter_before_it_makes_room() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let (first, _) = (world.ask(), world.ask());
    world.send(&[5]);
    let conn = world.connect();
    assert_eq!(world.on(first), Some(conn));
    world.reply(conn);
    assert_eq!(world.closes[&conn], Reason::MakeRoom);
}

#[test]
fn connects_in_progress_are_limited() {
    let mut world = tcp(|limits| limits.connecting_max = 2);
    world.ask_times(5);
    assert_eq!(world.sockets.len(), 2);
    world.connect();
    assert_eq!(world.sockets.len(), 3);
}

#[test]
fn a_connect_that_takes_too_long_is_given_up() {
    let mut world = tcp(|limits| limits.connect_timeout = ms(50));
    world.send(&[5]);
    let conn = world.connecting(0).unwrap();
    world.pass(50);
    assert_eq!(world.closes[&conn], Reason::ConnectTimeout);
}

#[test]
fn wait_timeout_ends_waiting_and_nothing_was_sent() {
    let mut world = tcp(|limits| limits.wait_timeout = ms(50));
    let request = world.ask();
    world.pass(49);
    assert_eq!(world.pool.waiters(), 1);
    world.pass(1);
    assert_eq!(world.ends[&request], (RequestEnd::Refused(Reason::WaitTimeout), false));
}

#[test]
fn the_deadline_of_the_caller_covers_waiting_and_exchange() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let [sent, waiting] = [(); 2].map(|()| world.ask_as(world.source(0), Some(50)).unwrap());
    world.connect();
    world.pass(50);
    assert_eq!(world.ends[&sent], (RequestEnd::TimedOut, true));
    assert_eq!(world.ends[&waiting], (RequestEnd::TimedOut, false));
}

#[test]
fn a_waiter_whose_caller_gave_up_is_not_sent() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    world.idle_conns(1);
    let conn = world.take();
    let hasty = world.ask_as(world.source(0), Some(50)).unwrap();
    let patient = world.ask();
    // In one turn of the loop replies come before deadlines.
    world.now = world.now + ms(50);
    world.reply(conn);
    assert_eq!(world.ends[&hasty], (RequestEnd::TimedOut, false));
    assert_eq!(world.on(patient), Some(conn));
}

#[test]
fn a_timed_out_tcp_exchange_is_closed() {
    let mut world = tcp(|limits| limits.request_timeout = ms(50));
    let (request, conn) = (world.ask(), world.connect());
    world.pass(50);
    assert_eq!(world.ends[&request], (RequestEnd::TimedOut, true));
    assert_eq!(world.closes[&conn], Reason::RequestTimeout);
}

#[test]
fn a_timed_out_udp_socket_is_retired_until_late_replies_cannot_come() {
    let mut world = world(Protocol::Udp, |limits| limits.request_timeout = ms(50));
    let conn = world.take();
    world.pass(50);
    assert_eq!(world.pool.counts.timed_out, 1);
    world.lose(conn, Reason::PeerReset);
    world.pass(9_999);
    assert!(world.sockets.contains_key(&conn), "whatever comes");
    world.pass(1);
    assert_eq!(world.closes[&conn], Reason::LateReplyWindow);
}

#[test]
fn a_udp_socket_with_unanswered_ids_is_kept_deaf_when_it_retires() {
    let mut limits = UpstreamLimits::of_protocol(Protocol::Udp);
    limits.pipeline_depth = 4;
    limits.requests_per_connection_max = 2;
    let matching = Matching::ById { ids: 1_000 };
    let mut world =
        World::matching(Protocol::Udp, limits, None, matching, false, Policy::RoundRobin);
    let (cancelled, _) = (world.ask(), world.ask());
    let conn = world.on(cancelled).unwrap();
    world.cancel(cancelled);
    // By the reply to the other one it has done all it may.
    world.receive(conn, 1, true);
    world.pass(9_999);
    assert!(world.sockets.contains_key(&conn), "the other reply may still come");
    world.pass(1);
    assert_eq!(world.closes[&conn], Reason::LateReplyWindow);
}

#[test]
fn retired_sockets_are_limited() {
    let mut world = world(Protocol::Udp, |limits| limits.retired_max = 1);
    let request = world.ask();
    world.cancel(request);
    world.pass(9_000);
    let request = world.ask();
    assert_eq!((world.on(request), world.sockets.len()), (None, 1));
    world.pass(1_000);
    assert!(world.on(request).is_some());
}

#[test]
fn a_cancelled_exchange_is_never_reused() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let (cancelled, next) = (world.ask(), world.ask());
    let conn = world.connect();
    world.cancel(cancelled);
    assert_eq!(world.closes[&conn], Reason::ClientGone);
    let conn = world.connect();
    assert_eq!(world.on(next), Some(conn));
}

#[test]
fn an_untouched_request_moves_to_another_connection_and_a_touched_one_fails() {
    let mut world = tcp(|_| ());
    let conns = world.idle_conns(2);
    let request = world.ask();
    world.lose_untouched(conns[1], Reason::PeerClosed);
    assert_eq!(world.on(request), Some(conns[0]));
    world.lose(conns[0], Reason::PeerClosed);
    assert_eq!(world.ends[&request], (RequestEnd::Failed(Reason::ConnectionLost), true));
}

#[test]
fn a_bad_reply_is_the_fault_of_one_request_and_those_behind_it_are_repeated() {
    let mut limits = UpstreamLimits::of_protocol(Protocol::Tcp);
    (limits.pipeline_depth, limits.connections_max) = (4, 1);
    limits.retry_budget_percent = 100;
    let (order, policy) = (Matching::InOrder, Policy::RoundRobin);
    let mut world = World::matching(Protocol::Tcp, limits, None, order, true, policy);
    let asked = [(); 3].map(|()| world.ask());
    let conn = world.connect();
    world.lose(conn, Reason::ReplyTooLong);
    assert_eq!(world.ends[&asked[0]], (RequestEnd::Failed(Reason::ReplyTooLong), true));
    world.pass(1_000);
    let conn = world.connect();
    assert_eq!([world.on(asked[1]), world.on(asked[2])], [Some(conn); 2]);
}

#[test]
fn what_was_sent_and_waits_to_be_repeated_may_have_been_carried_out() {
    type Way = fn(&mut World, RequestId);
    let ways: [(Way, RequestEnd); 4] = [
        (|world, _| world.pass(50), RequestEnd::TimedOut),
        (|world, _| world.pass(40), RequestEnd::Failed(Reason::WaitTimeout)),
        (|world, request| world.cancel(request), RequestEnd::Failed(Reason::ClientGone)),
        (
            |world, _| {
                world.pass(10);
                world.finish_connect(world.connecting(0).unwrap(), false);
            },
            RequestEnd::Failed(Reason::ConnectRefused),
        ),
    ];
    for (place, (go, end)) in ways.into_iter().enumerate() {
        let mut limits = UpstreamLimits::of_protocol(Protocol::Tcp);
        (limits.connections_max, limits.breaker_failures) = (1, 2);
        limits.backoff_base = ms(10);
        limits.wait_timeout = ms(if place == 1 { 40 } else { 100 });
        let (matching, policy) = (Matching::InOrder, Policy::RoundRobin);
        let mut world = World::matching(Protocol::Tcp, limits, None, matching, true, policy);
        let (request, conn) = (world.ask_as(world.source(0), Some(50)).unwrap(), world.connect());
        world.lose(conn, Reason::ConnectRefused);
        assert_eq!((world.on(request), world.pool.retried), (None, 1));
        go(&mut world, request);
        assert_eq!(world.ends.get(&request), Some(&(end, true)), "way {place}");
    }
}

#[test]
fn a_repeated_request_that_was_not_written_again_may_have_been_carried_out() {
    let limits = UpstreamLimits::of_protocol(Protocol::Tcp);
    let (matching, policy) = (Matching::InOrder, Policy::RoundRobin);
    let mut world = World::matching(Protocol::Tcp, limits, None, matching, true, policy);
    let conns = world.idle_conns(2);
    let request = world.ask();
    world.holds = true;
    world.lose(conns[1], Reason::PeerClosed);
    assert_eq!(world.on(request), Some(conns[0]));
    world.cancel(request);
    assert_eq!(world.ends[&request], (RequestEnd::Failed(Reason::ClientGone), true));
}

fn by_id(change: impl FnOnce(&mut UpstreamLimits)) -> World {
    let mut limits = UpstreamLimits::of_protocol(Protocol::Tcp);
    (limits.pipeline_depth, limits.connections_max) = (2, 1);
    change(&mut limits);
    let matching = Matching::ById { ids: 1_000 };
    World::matching(Protocol::Tcp, limits, None, matching, false, Policy::RoundRobin)
}

#[test]
fn a_connection_that_leaves_as_many_ids_unanswered_as_it_carries_is_replaced() {
    let mut world = by_id(|limits| limits.request_timeout = ms(1_000));
    let unanswered = [5, 6].map(|patience| world.ask_as(world.source(0), Some(patience)).unwrap());
    let conn = world.connect();
    world.pass(5);
    let answered = world.ask();
    assert_eq!(world.on(answered), Some(conn), "one may be missing");
    world.receive(conn, 2, true);
    assert!(world.ends.contains_key(&answered));
    let last = world.ask();
    world.pass(1);
    assert!(unanswered.iter().all(|r| world.ends[r] == (RequestEnd::TimedOut, true)));
    let next = world.ask();
    assert_eq!((world.on(last), world.on(next)), (Some(conn), None), "it takes nothing new");
    world.receive(conn, 2, true);
    assert_eq!(world.closes[&conn], Reason::Stuck);
    let conn = world.connect();
    assert_eq!(world.on(next), Some(conn));
}

#[test]
fn requests_that_are_given_up_take_no_more_ids_than_others_may() {
    let mut world = by_id(|_| ());
    let first = world.ask();
    let conn = world.connect();
    world.cancel(first);
    for _ in 0..3 {
        let request = world.ask();
        assert_eq!(world.on(request), Some(conn));
        world.cancel(request);
    }
    let waiting = world.ask();
    assert_eq!((world.on(waiting), world.sockets[&conn].slots.len()), (None, 4));
    world.receive(conn, 0, true);
    assert_eq!(world.on(waiting), Some(conn), "their replies came after all");
    world.check();
}

/// Two addresses, and for each a session that keeps to it.
fn hashed(change: impl FnOnce(&mut UpstreamLimits)) -> (World, [SourceId; 2]) {
    let mut limits = UpstreamLimits::of_protocol(Protocol::Tcp);
    change(&mut limits);
    let matching = Matching::InOrder;
    let mut world = World::matching(Protocol::Tcp, limits, None, matching, false, Policy::Hash);
    world.addresses = 2;
    world.resolve();
    let homes = |world: &World, port| {
        let is_home = |source: &&SourceId| {
            let home = world.pool.balance.home_of(world.now, source.data().as_ffi());
            home == Some(port)
        };
        *world.ledgers.keys().find(is_home).expect("some session goes there")
    };
    let sources = [homes(&world, 0), homes(&world, 1)];
    (world, sources)
}

/// The connections to an address.
fn to(world: &World, port: u16) -> Vec<ConnId> {
    let conns = world.pool.conns().filter(|(_, conn)| conn.remote.port() == port);
    conns.map(|(conn, _)| conn).collect()
}

#[test]
fn a_silent_address_leaves_connects_and_places_for_the_others() {
    for (connecting_max, connections_max) in [(4, 8), (8, 4)] {
        let (mut world, [silent, well]) = hashed(|limits| {
            (limits.connecting_max, limits.connections_max) = (connecting_max, connections_max);
        });
        (0..10).for_each(|_| _ = world.ask_as(silent, None).unwrap());
        // It leaves a place to the other one, if not a connect.
        assert_eq!(to(&world, 1).len(), if connections_max == 8 { 4 } else { 3 });
        let first = world.ask_as(well, None).unwrap();
        assert_eq!((to(&world, 1).len(), to(&world, 2).len()), (3, 1));
        let conn = to(&world, 2)[0];
        world.finish_connect(conn, true);
        assert_eq!(world.on(first), Some(conn));
        world.check();
        (0..10).for_each(|_| _ = world.ask_as(well, None).unwrap());
        // No more than evens it out.
        let of_silent = if connections_max == 8 { 3 } else { 2 };
        assert_eq!((to(&world, 1).len(), to(&world, 2).len()), (of_silent, 2));
        world.check();
    }
}

#[test]
fn an_address_in_backoff_keeps_nobody_who_goes_elsewhere_waiting() {
    let (mut world, [failed, well]) = hashed(|limits| limits.connecting_max = 1);
    world.ask_as(failed, None).unwrap();
    world.finish_connect(to(&world, 1)[0], false);
    let request = world.ask_as(well, None).unwrap();
    let conn = to(&world, 2)[0];
    world.finish_connect(conn, true);
    assert_eq!(world.on(request), Some(conn));
}

#[test]
fn a_doubtful_connect_gives_way_to_one_that_is_not() {
    for (connecting_max, connections_max) in [(1, 8), (8, 1)] {
        let (mut world, [silent, well]) = hashed(|limits| {
            (limits.connecting_max, limits.connections_max) = (connecting_max, connections_max);
        });
        world.ask_as(silent, None).unwrap();
        world.finish_connect(to(&world, 1)[0], false);
        world.pass(1_000);
        assert_eq!(to(&world, 1).len(), 1, "once more");
        world.ask_as(well, None).unwrap();
        assert_eq!((to(&world, 1).len(), to(&world, 2).len()), (0, 1));
    }
}

#[test]
fn a_busy_address_leaves_a_place_to_one_that_has_none() {
    let (mut world, [busy, other]) = hashed(|limits| limits.connections_max = 3);
    (0..7).for_each(|_| _ = world.ask_as(busy, None).unwrap());
    let _ = [world.connect(), world.connect()];
    assert_eq!((to(&world, 1).len(), world.pool.waiters()), (2, 5));
    // Though none of its replies ever comes.
    let request = world.ask_as(other, None).unwrap();
    let conn = to(&world, 2)[0];
    world.finish_connect(conn, true);
    assert_eq!(world.on(request), Some(conn));
    assert!(world.closes.is_empty());
}

#[test]
fn addresses_take_turns_in_the_only_place() {
    let (mut world, [busy, other]) = hashed(|limits| limits.connections_max = 1);
    (0..5).for_each(|_| _ = world.ask_as(busy, None).unwrap());
    let conn = world.connect();
    let request = world.ask_as(other, None).unwrap();
    while world.sockets.get(&conn).is_some_and(|socket| socket.begun > 0) {
        world.reply(conn);
        world.check();
    }
    assert_eq!(world.closes[&conn], Reason::MakeRoom);
    let conn = to(&world, 2)[0];
    world.finish_connect(conn, true);
    assert_eq!(world.on(request), Some(conn));
}

#[test]
fn what_rests_serves_those_whose_address_was_ejected() {
    let (mut world, [ejected, well]) = hashed(|limits| limits.breaker_failures = 1);
    world.ask_as(well, None).unwrap();
    let conn = world.connect();
    world.reply(conn);
    let request = world.ask_as(ejected, None).unwrap();
    world.finish_connect(to(&world, 1)[0], false);
    assert_eq!(world.on(request), Some(conn));
}

#[test]
fn whoever_waits_for_an_address_is_served_in_order_before_and_after_it_is_ejected() {
    let (mut world, [first, second]) = hashed(|limits| {
        (limits.connections_max, limits.connecting_max, limits.breaker_failures) = (2, 2, 1);
    });
    let order = [first, second, first, second];
    let asked = order.map(|source| world.ask_as(source, None).unwrap());
    let (gone, conn) = (to(&world, 1)[0], to(&world, 2)[0]);
    world.finish_connect(conn, true);
    assert_eq!(asked.map(|r| world.on(r)), [None, Some(conn), None, None]);
    world.finish_connect(gone, false);
    for (ended, next) in [(1, 0), (0, 2), (2, 3)] {
        assert_eq!(world.on(asked[ended]), Some(conn));
        world.reply(conn);
        assert_eq!(world.on(asked[next]), Some(conn), "{next} waited longest");
    }
}

#[test]
fn surplus_bytes_close_the_connection() {
    let mut world = tcp(|_| ());
    let conns = world.idle_conns(2);
    let busy = world.take();
    world.reply(busy);
    // And once more.
    world.reply(busy);
    world.reply(conns[0]);
    assert!(conns.iter().all(|conn| world.closes[conn] == Reason::Unsolicited));
    assert_eq!(world.pool.counts.replied, 3);
}

#[test]
fn a_reply_that_its_owner_cannot_take_frees_the_connection_all_the_same() {
    let mut world = tcp(|_| ());
    let (request, conn) = (world.ask(), world.connect());
    world.receive(conn, 0, false);
    assert_eq!(world.ends[&request], (RequestEnd::Failed(Reason::ReplyUndeliverable), true));
    assert_eq!(world.take(), conn);
}

#[test]
fn what_comes_back_to_a_send_is_never_a_reply() {
    let mut world = tcp(|_| ());
    world.send(&[5]);
    let one_way = world.connect();
    world.write(5);
    world.ask();
    world.connect();
    world.reply(one_way);
    assert_eq!((world.pool.replies_discarded(), world.pool.in_flight()), (1, 1));
}

#[test]
fn idle_timeout_spares_the_warm_ones() {
    let mut world = tcp(|limits| limits.connections_min = 1);
    let first = world.connect();
    world.ask_times(2);
    let second = world.connect();
    world.reply(first);
    world.reply(second);
    world.pass(60_000);
    assert_eq!(world.closes, BTreeMap::from([(first, Reason::IdleTimeout)]));
    world.pass(600_000);
    assert!(world.sockets.contains_key(&second));
}

#[test]
fn a_warm_write_only_connection_stays_open() {
    let mut world = world(Protocol::UdpWriteOnly, |limits| limits.connections_min = 1);
    world.pass(600_000);
    assert_eq!((world.pool.opened, world.sockets.len()), (1, 1));
}

#[test]
fn lifetime_closes_only_when_idle() {
    let mut world = tcp(|limits| limits.lifetime = ms(100));
    let conns = world.idle_conns(2);
    world.take();
    world.pass(110);
    assert_eq!(world.closes, BTreeMap::from([(conns[0], Reason::Lifetime)]));
    world.reply(conns[1]);
    assert_eq!(world.closes[&conns[1]], Reason::Lifetime);
}

#[test]
fn a_connection_closes_after_its_last_use() {
    let mut world = tcp(|limits| limits.requests_per_connection_max = 2);
    world.idle_conns(1);
    let conn = world.take();
    world.reply(conn);
    assert_eq!(world.closes[&conn], Reason::UsesMax);
}

#[test]
fn nothing_follows_a_request_with_which_its_connection_ends() {
    let mut world = tcp(|limits| {
        limits.pipeline_depth = 4;
        limits.connections_max = 1;
    });
    let conn = world.idle_conns(1)[0];
    let before = world.ask();
    let last = world.ask_last();
    let behind = world.ask();
    assert_eq!([before, last, behind].map(|r| world.on(r)), [Some(conn), Some(conn), None]);
    world.reply(conn);
    assert_eq!(world.on(behind), None);
    world.reply(conn);
    assert_eq!(world.ends[&last], (RequestEnd::Replied, true));
    assert_eq!(world.closes[&conn], Reason::RequestEndsConnection);
    assert_eq!((world.pool.breaker(), world.pool.last_failure()), (Breaker::Closed, None));
    let next = world.connect();
    assert_eq!(world.on(behind), Some(next));
    // One that waited ends its connection, too.
    world.reply(next);
    let [_, waiting] = [world.ask_last(), world.ask_last()];
    world.reply(next);
    let next = world.connect();
    assert_eq!(world.on(waiting), Some(next));
    world.reply(next);
    assert_eq!(world.closes[&next], Reason::RequestEndsConnection);
}

#[test]
fn the_breaker_opens_and_waiters_fail_with_the_cached_reason() {
    let mut world = tcp(|_| ());
    let request = world.ask();
    for _ in 0..3 {
        assert_eq!(world.pool.in_flight(), 1);
        world.pass(200);
        world.finish_connect(world.connecting(0).unwrap(), false);
    }
    let reason = Reason::ConnectRefused;
    assert_eq!(world.ends[&request], (RequestEnd::Refused(reason), false));
    assert_eq!(world.ask_as(world.source(0), None), Err(reason));
    world.pass(3_000);
    world.ask();
    assert_eq!(world.pool.breaker(), Breaker::HalfOpen);
    let conn = world.connect();
    world.reply(conn);
    assert_eq!((world.pool.breaker(), world.pool.last_failure()), (Breaker::Closed, None));
}

#[test]
fn waiters_fail_too_when_the_upstream_accepts_and_resets() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    world.ask_times(4);
    for _ in 0..3 {
        world.pass(200);
        let conn = world.connect();
        world.lose(conn, Reason::PeerReset);
    }
    assert_eq!((world.pool.counts.failed.total(), world.pool.counts.refused.total()), (3, 1));
}

#[test]
fn an_open_breaker_spares_those_who_wait_for_a_working_connection() {
    let mut world = tcp(|limits| limits.breaker_failures = 1);
    let (_, waiting) = (world.ask(), world.ask());
    let conn = world.connect();
    world.finish_connect(world.connecting(0).unwrap(), false);
    world.resolve();
    world.reply(conn);
    assert_eq!(world.on(waiting), Some(conn));
}

#[test]
fn a_reply_ends_the_backoff_for_all_who_wait() {
    let mut world = tcp(|_| ());
    world.idle_conns(1);
    let conn = world.take();
    world.send(&[5]);
    world.finish_connect(world.connecting(0).unwrap(), false);
    assert_eq!(world.connecting(0), None);
    world.reply(conn);
    assert!(world.connecting(0).is_some());
}

#[test]
fn one_way_messages_survive_a_reconnect_in_order_from_a_message_boundary() {
    let mut world = tcp(|_| ());
    world.send(&[5, 5, 5]);
    let conn = world.connect();
    world.write(7);
    world.unacknowledged_max = 3;
    world.lose(conn, Reason::PeerReset);
    world.pass(100);
    let conn = world.connect();
    world.write(9);
    let messages: Vec<_> = world.sockets[&conn].stream.iter().map(|byte| byte.message).collect();
    assert_eq!(messages, [2, 2, 2, 2, 2, 3, 3, 3, 3]);
    assert_eq!((world.pool.ledger.sent, world.pool.ledger.in_doubt), (2, 1));
}

#[test]
fn a_one_way_connection_ends_before_its_successor_begins() {
    let mut world = tcp(|limits| limits.idle_timeout = ms(50));
    world.send(&[5]);
    let old = world.connect();
    world.write(5);
    world.pass(50);
    world.send(&[5]);
    assert_eq!(world.connecting(0), None);
    world.unacknowledged_max = 5;
    world.lose(old, Reason::PeerClosed);
    world.connect();
    world.write(5);
    assert_eq!((world.pool.ledger.sent, world.pool.ledger.in_doubt), (2, 1));
}

#[test]
fn every_source_keeps_its_lane_and_neighbours_have_different_ones() {
    let mut world = tcp(|limits| limits.one_way_connections = 2);
    let lanes = [0, 1, 2].map(|source| world.pool.lane_of(world.source(source)));
    assert!(lanes[0] != lanes[1] && lanes[0] == lanes[2], "{lanes:?}");
    let sources = [0, 1, 2].map(|source| world.source(source));
    sources.into_iter().for_each(|source| world.send_as(source, &[2, 2]));
    let conns = [world.connect(), world.connect()];
    (0..2).for_each(|lane| world.write_by(lane, 100));
    let sent = conns.map(|conn| world.pool.conn(conn).unwrap().messages_out);
    assert_eq!((sent[0] + sent[1], sent[0].max(sent[1])), (6, 4));
    world.check();
}

#[test]
fn a_lane_that_lost_its_connection_does_not_hold_up_the_others() {
    let mut world = tcp(|limits| limits.one_way_connections = 2);
    for source in [0, 1] {
        world.send_as(world.source(source), &[5, 5]);
    }
    let (broken, _) = (world.connect(), world.connect());
    let lane = world.sockets[&broken].role.lane().unwrap();
    (0..2).for_each(|lane| world.write_by(lane, 7));
    world.lose(broken, Reason::PeerReset);
    world.write_by(1 - lane, 3);
    assert_eq!((world.pool.ledger.sent, world.unsent[lane].len()), (3, 5));
    world.pass(100);
    let conn = world.connect();
    world.write_by(lane, 5);
    assert_eq!((world.pool.ledger.sent, world.sockets[&conn].stream[0].offset), (4, 0));
}

#[test]
fn the_queue_is_one_limit_over_all_lanes_and_the_oldest_of_all_makes_room() {
    let mut world = tcp(|limits| (limits.one_way_connections, limits.queue_bytes_max) = (2, 10));
    world.send_as(world.source(0), &[4]);
    world.pass(1);
    world.send_as(world.source(1), &[6]);
    world.pass(1);
    assert!(!world.pool.has_room(1));
    world.send_or(Overflow::DropOldest, world.source(1), 4);
    let lanes = [0, 1].map(|source| world.pool.lane_of(world.source(source)));
    let [first, second] = lanes.map(|lane| world.unsent[lane].len());
    assert_eq!((first, second), (0, 10), "that of the other lane was older");
    world.check();
}

#[test]
fn lanes_leave_a_place_for_requests() {
    let mut world = tcp(|limits| (limits.one_way_connections, limits.connections_max) = (2, 3));
    world.ask_times(3);
    let asked: Vec<_> = (0..3).map(|_| world.connect()).collect();
    [0, 1].into_iter().for_each(|source| world.send_as(world.source(source), &[1]));
    asked.iter().for_each(|conn| world.reply(*conn));
    let roles = |world: &World| {
        let is_exchange = |socket: &&Socket| socket.role == Role::Exchange;
        world.sockets.values().filter(is_exchange).count()
    };
    assert_eq!((roles(&world), world.sockets.len()), (1, 3), "two have made room");
}

#[test]
fn a_datagram_that_is_not_full_goes_after_its_delay_or_when_the_pool_closes_down() {
    let mut limits = UpstreamLimits::of_protocol(Protocol::UdpWriteOnly);
    limits.connections_min = 1;
    let coalescer = Coalescer::new(100, ms(5), 1);
    let mut world = World::coalescing(Protocol::UdpWriteOnly, limits, Some(coalescer));
    let ready = |world: &World| {
        let mut lens = [0; 4];
        let count = world.pool.outbox(0).next_datagrams(&mut lens);
        lens[..count].to_vec()
    };
    world.send(&[6, 6]);
    assert_eq!(world.pool.next_deadline(), Some(world.now + ms(5)));
    world.pass(4);
    assert!(ready(&world).is_empty());
    world.pass(1);
    assert_eq!(ready(&world), [12]);
    world.write(1);
    assert_eq!((world.pool.ledger.sent, world.unsent[0].len()), (2, 0));
    world.send(&[7]);
    world.close_down();
    assert_eq!(ready(&world), [7]);
    world.send(&[8, 9]);
    assert_eq!(ready(&world), [7, 17], "what is accepted later does not wait either");
    world.refuse_datagram(0);
    assert_eq!((world.pool.ledger.dropped.total(), ready(&world)), (1, vec![17]));
    world.refuse_datagram(0);
    assert_eq!((world.pool.ledger.dropped.total(), ready(&world)), (3, vec![]));
}

#[test]
fn queue_timeout_expires_what_waits() {
    let mut world = tcp(|limits| limits.queue_timeout = ms(50));
    world.send(&[1]);
    world.pass(30);
    world.send(&[1]);
    world.pass(20);
    assert_eq!((world.pool.ledger.expired, world.pool.queued()), (1, 1));
    world.pass(30);
    assert_eq!((world.pool.ledger.expired, world.unsent[0].len()), (2, 0));
}

#[test]
fn a_stalled_torn_message_closes_its_connection_first() {
    let mut world = tcp(|limits| limits.queue_timeout = ms(50));
    world.send(&[5, 5]);
    let conn = world.connect();
    world.write(2);
    world.pass(50);
    assert_eq!(world.closes[&conn], Reason::Stalled);
    assert_eq!((world.pool.ledger.expired, world.unsent[0].len()), (2, 0));
}

#[test]
fn a_full_queue_drops_the_newest_or_the_oldest_that_is_whole() {
    let mut world = tcp(|limits| limits.queue_bytes_max = 10);
    world.send(&[4, 3, 3]);
    world.connect();
    world.write(1);
    world.send_or(Overflow::DropNewest, world.source(0), 3);
    assert_eq!((world.pool.queued(), world.pool.ledger.dropped.total()), (3, 1));
    world.send_or(Overflow::DropOldest, world.source(1), 3);
    assert_eq!((world.pool.queued(), world.pool.ledger.dropped.total()), (3, 2));
    let left: BTreeSet<_> = world.unsent[0].iter().map(|byte| byte.message).collect();
    assert_eq!(left, BTreeSet::from([1, 3, 4]));
    world.check();
}

#[test]
fn closing_down_closes_idle_connections_and_finishes_one_way_ones() {
    let mut world = tcp(|_| ());
    let idle = world.idle_conns(2);
    world.send(&[5]);
    let (one_way, busy) = (world.connect(), world.take());
    world.close_down();
    assert_eq!(world.closes, BTreeMap::from([(idle[0], Reason::Drained)]));
    world.write(5);
    assert!(matches!(world.state(one_way), State::Draining { .. }));
    world.reply(busy);
    assert_eq!(world.closes[&busy], Reason::Drained);
    world.pass(1_000);
    assert_eq!(world.closes[&one_way], Reason::Drained);
}

#[test]
fn closing_down_ends_connects_that_nobody_needs() {
    let mut world = tcp(|limits| (limits.connections_min, limits.queue_timeout) = (1, ms(50)));
    world.send(&[5]);
    world.pass(50);
    assert_eq!((world.sockets.len(), world.pool.queued()), (2, 0));
    world.close_down();
    assert!(world.sockets.is_empty());
}

#[test]
fn a_source_that_ends_gets_no_lease_for_another_that_it_held() {
    let mut world = tcp(|limits| limits.leases_max = 1);
    let source = world.source(0);
    world.lease_as(source, 1, None);
    world.connect();
    world.lease_as(source, 1, None);
    world.idle_conns(1);
    assert_eq!((world.pool.leases_held(), world.pool.lease_waiters()), (1, 1));
    world.end_source(source);
    assert_eq!((world.pool.leases_held(), world.pool.lease_waiters()), (0, 0));
    world.check();
    world.pass(600_000);
}

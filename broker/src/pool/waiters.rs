//! The requests that wait for a connection, in their [turn](super::turns).
//!
//! They stand in *lines*: all in one, or where each session has an address of its own
//! ([`Balance::spread`]) in one for each address, so that whoever is next for an address is found
//! without a look at the others. Those of all lines keep their turn when the lines are made anew.
//!
//! [`Balance::spread`]: crate::balance::Balance::spread

use std::collections::BTreeMap;

use slotmap::SecondaryMap;

use super::turns::{Turn, Turns};
use crate::balance::Spread;
use crate::ids::RequestId;

/// Which line: 0 is that of all, the others are for one address each.
pub(super) type Line = usize;

/// The requests that wait. See the module's text.
#[derive(Debug)]
pub(super) struct Waiters {
    places: SecondaryMap<RequestId, Place>,
    /// At least one.
    lines: Vec<BTreeMap<Turn, RequestId>>,
    turns: Turns,
    /// For what the lines were made.
    pub(super) spread: Spread,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    uid: u32,
    line: Line,
    turn: Turn,
}

impl Waiters {
    pub(super) fn new() -> Self {
        Waiters {
            places: SecondaryMap::new(),
            lines: vec![BTreeMap::new()],
            turns: Turns::default(),
            spread: Spread::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// How many wait in a line.
    pub(super) fn len_of(&self, line: Line) -> usize {
        self.lines.get(line).map_or(0, BTreeMap::len)
    }

    /// The lines in which somebody waits, and whose turn is first in each.
    pub(super) fn lines(&self) -> impl Iterator<Item = (Line, RequestId, Turn)> {
        let first = |(line, waiting): (Line, &BTreeMap<Turn, RequestId>)| {
            waiting.first_key_value().map(|(turn, request)| (line, *request, *turn))
        };
        self.lines.iter().enumerate().filter_map(first)
    }

    /// Whose turn is first in a line.
    pub(super) fn first_of(&self, line: Line) -> Option<RequestId> {
        self.lines.get(line)?.first_key_value().map(|(_, request)| *request)
    }

    /// The first one of each user.
    pub(super) fn firsts(&self) -> impl Iterator<Item = RequestId> {
        self.turns.firsts().filter_map(|turn| self.of_turn(turn))
    }

    /// Which one makes way for one more of this user, where there is no room.
    pub(super) fn makes_way_for(&self, uid: u32) -> Option<RequestId> {
        self.of_turn(self.turns.makes_way_for(uid)?)
    }

    fn of_turn(&self, turn: Turn) -> Option<RequestId> {
        self.lines.iter().find_map(|line| line.get(&turn)).copied()
    }

    pub(super) fn push_back(&mut self, request: RequestId, uid: u32, line: Line) {
        let turn = self.turns.push_back(uid);
        self.place(request, Place { uid, line, turn });
    }

    /// Before everybody else.
    pub(super) fn push_front(&mut self, request: RequestId, uid: u32, line: Line) {
        let turn = self.turns.push_front(uid);
        self.place(request, Place { uid, line, turn });
    }

    fn place(&mut self, request: RequestId, place: Place) {
        if let Some(line) = self.lines.get_mut(place.line) {
            line.insert(place.turn, request);
            self.places.insert(request, place);
        }
    }

    /// Takes out one that is served.
    pub(super) fn take(&mut self, request: RequestId) {
        if let Some(Place { uid, turn, .. }) = self.leave(request) {
            self.turns.take(uid, turn);
        }
    }

    /// Takes out one that is given up, wherever it stands.
    pub(super) fn remove(&mut self, request: RequestId) {
        if let Some(Place { uid, turn, .. }) = self.leave(request) {
            self.turns.remove(uid, turn);
        }
    }

    fn leave(&mut self, request: RequestId) -> Option<Place> {
        let place = self.places.remove(request)?;
        self.lines[place.line].remove(&place.turn);
        Some(place)
    }

    /// Takes out all of them, in their turn.
    pub(super) fn take_all(&mut self) -> Vec<RequestId> {
        let all = self.leave_all();
        self.turns.clear();
        all.into_iter().map(|(request, _)| request).collect()
    }

    /// Makes so many lines anew; `line_of` says who stands in which.
    pub(super) fn line_up(
        &mut self,
        spread: Spread,
        lines: usize,
        line_of: impl Fn(RequestId) -> Line,
    ) {
        let all = self.leave_all();
        self.spread = spread;
        self.lines.resize_with(lines.max(1), BTreeMap::new);
        for (request, place) in all {
            self.place(request, Place { line: line_of(request), ..place });
        }
    }

    fn leave_all(&mut self) -> Vec<(RequestId, Place)> {
        let mut all: Vec<_> = self.places.drain().collect();
        all.sort_unstable_by_key(|(_, place)| place.turn);
        self.lines.iter_mut().for_each(BTreeMap::clear);
        all
    }
}

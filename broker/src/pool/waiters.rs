//! The requests that wait for a connection, in their [turn](super::turns).
//!
//! They stand in *lines*: all in one, or where each session has an address of its own
//! ([`Balance::spread`]) in one for each address, so that whoever is next for an address is found
//! without a look at the others. Those of all lines keep their turn when the lines are made anew.
//!
//! [`Balance::spread`]: crate::balance::Balance::spread

use slotmap::SecondaryMap;

use super::turns::{Queue, Turn, Turns, makes_way_for};
use crate::balance::Spread;
use crate::ids::RequestId;

/// Which line: 0 is that of all, the others are for one address each.
pub(super) type Line = usize;

/// The requests that wait. See the module's text.
#[derive(Debug)]
pub(super) struct Waiters {
    places: SecondaryMap<RequestId, Place>,
    /// At least one.
    lines: Vec<Queue<RequestId>>,
    /// For what the lines were made.
    pub(super) spread: Spread,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    uid: u32,
    line: Line,
    came: i64,
}

impl Waiters {
    pub(super) fn new() -> Self {
        Waiters {
            places: SecondaryMap::new(),
            lines: vec![Queue::default()],
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
        self.lines.get(line).map_or(0, Queue::len)
    }

    /// The lines in which somebody waits, and whose turn is first in each.
    pub(super) fn lines(&self, turns: &Turns) -> impl Iterator<Item = (Line, RequestId, Turn)> {
        let lines = self.lines.iter().enumerate();
        lines.filter_map(|(line, waiting)| {
            let (turn, request) = waiting.first(turns, |_| true)?;
            Some((line, request, turn))
        })
    }

    /// Whose turn is first in a line.
    pub(super) fn first_of(&self, turns: &Turns, line: Line) -> Option<RequestId> {
        self.lines.get(line)?.first(turns, |_| true).map(|(_, request)| request)
    }

    /// What waits longest, of each user in each line.
    pub(super) fn oldest(&self) -> impl Iterator<Item = RequestId> {
        self.lines.iter().flat_map(Queue::oldest)
    }

    /// Which one makes way for one more of this user, where there is no room.
    pub(super) fn makes_way_for(&self, uid: u32) -> Option<RequestId> {
        let greediest = makes_way_for(uid, self.lines.iter().flat_map(Queue::counts))?;
        let lasts = self.lines.iter().filter_map(|line| line.last_of(greediest));
        lasts.max_by_key(|(came, _)| *came).map(|(_, request)| request)
    }

    pub(super) fn push(&mut self, request: RequestId, uid: u32, came: i64, line: Line) {
        self.place(request, Place { uid, line, came });
    }

    fn place(&mut self, request: RequestId, place: Place) {
        if let Some(line) = self.lines.get_mut(place.line) {
            line.push(place.uid, place.came, request);
            self.places.insert(request, place);
        }
    }

    /// Takes one out, wherever it stands; whose it is.
    pub(super) fn remove(&mut self, request: RequestId) -> Option<u32> {
        let Place { uid, line, came } = self.places.remove(request)?;
        self.lines[line].remove(uid, came);
        Some(uid)
    }

    /// All of them, those first who came first.
    pub(super) fn all(&self) -> Vec<RequestId> {
        let mut all: Vec<_> = self.places.iter().collect();
        all.sort_unstable_by_key(|(_, place)| place.came);
        all.into_iter().map(|(request, _)| request).collect()
    }

    /// Makes so many lines anew; `line_of` says who stands in which.
    pub(super) fn line_up(
        &mut self,
        spread: Spread,
        lines: usize,
        line_of: impl Fn(RequestId) -> Line,
    ) {
        let all: Vec<_> = self.places.drain().collect();
        self.spread = spread;
        self.lines.iter_mut().for_each(Queue::clear);
        self.lines.resize_with(lines.max(1), Queue::default);
        for (request, place) in all {
            self.place(request, Place { line: line_of(request), ..place });
        }
    }
}

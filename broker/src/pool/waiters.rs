//! The requests that wait for a connection, in the order in which they came.
//!
//! They stand in *lines*: all in one, or where each session has an address of its own
//! ([`Balance::spread`]) in one for each address, so that whoever is next for an address is found
//! without a look at the others. Those of all lines keep their turn when the lines are made anew.
//!
//! [`Balance::spread`]: crate::balance::Balance::spread

use slotmap::SecondaryMap;

use crate::balance::Spread;
use crate::ids::RequestId;

/// Which line: 0 is that of all, the others are for one address each.
pub(super) type Line = usize;

/// The requests that wait. See the module's text.
#[derive(Debug)]
pub(super) struct Waiters {
    links: SecondaryMap<RequestId, Link>,
    /// At least one.
    lines: Vec<Ends>,
    /// For what the lines were made.
    pub(super) spread: Spread,
    first_turn: i64,
    last_turn: i64,
}

/// The place of a request in its line.
#[derive(Debug, Clone, Copy)]
struct Link {
    line: Line,
    turn: i64,
    before: Option<RequestId>,
    behind: Option<RequestId>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Ends {
    first: Option<RequestId>,
    last: Option<RequestId>,
    len: usize,
}

impl Waiters {
    pub(super) fn new() -> Self {
        Waiters {
            links: SecondaryMap::new(),
            lines: vec![Ends::default()],
            spread: Spread::default(),
            first_turn: 0,
            last_turn: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.links.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// How many wait in a line.
    pub(super) fn len_of(&self, line: Line) -> usize {
        self.lines.get(line).map_or(0, |ends| ends.len)
    }

    /// The lines in which somebody waits, and whose turn is first in each.
    pub(super) fn lines(&self) -> impl Iterator<Item = (Line, RequestId, i64)> {
        let first = |(line, ends): (Line, &Ends)| {
            let first = ends.first?;
            Some((line, first, self.links.get(first)?.turn))
        };
        self.lines.iter().enumerate().filter_map(first)
    }

    /// Who waited longest in a line.
    pub(super) fn first_of(&self, line: Line) -> Option<RequestId> {
        self.lines.get(line)?.first
    }

    /// Who waited longest of all.
    pub(super) fn first(&self) -> Option<RequestId> {
        self.lines().min_by_key(|(_, _, turn)| *turn).map(|(_, first, _)| first)
    }

    pub(super) fn push_back(&mut self, request: RequestId, line: Line) {
        self.last_turn += 1;
        self.append(request, line, self.last_turn);
    }

    /// Before everybody else.
    pub(super) fn push_front(&mut self, request: RequestId, line: Line) {
        let Some(ends) = self.lines.get_mut(line) else { return };
        let behind = ends.first.replace(request);
        ends.last = ends.last.or(Some(request));
        ends.len += 1;
        self.first_turn -= 1;
        let link = Link { line, turn: self.first_turn, before: None, behind };
        self.links.insert(request, link);
        if let Some(link) = behind.and_then(|behind| self.links.get_mut(behind)) {
            link.before = Some(request);
        }
    }

    /// Takes one out, wherever it stands.
    pub(super) fn remove(&mut self, request: RequestId) {
        let Some(Link { line, before, behind, .. }) = self.links.remove(request) else { return };
        if let Some(link) = before.and_then(|before| self.links.get_mut(before)) {
            link.behind = behind;
        }
        if let Some(link) = behind.and_then(|behind| self.links.get_mut(behind)) {
            link.before = before;
        }
        let ends = &mut self.lines[line];
        ends.len -= 1;
        if before.is_none() {
            ends.first = behind;
        }
        if behind.is_none() {
            ends.last = before;
        }
    }

    /// Takes out all of them, those first who waited longest.
    pub(super) fn take_all(&mut self) -> Vec<RequestId> {
        let all = self.take_turns();
        all.into_iter().map(|(_, request)| request).collect()
    }

    /// Makes so many lines anew; `line_of` says who stands in which.
    pub(super) fn line_up(
        &mut self,
        spread: Spread,
        lines: usize,
        line_of: impl Fn(RequestId) -> Line,
    ) {
        let all = self.take_turns();
        self.spread = spread;
        self.lines.resize(lines.max(1), Ends::default());
        for (turn, request) in all {
            self.append(request, line_of(request), turn);
        }
    }

    fn append(&mut self, request: RequestId, line: Line, turn: i64) {
        let Some(ends) = self.lines.get_mut(line) else { return };
        let before = ends.last.replace(request);
        ends.first = ends.first.or(Some(request));
        ends.len += 1;
        self.links.insert(request, Link { line, turn, before, behind: None });
        if let Some(link) = before.and_then(|before| self.links.get_mut(before)) {
            link.behind = Some(request);
        }
    }

    fn take_turns(&mut self) -> Vec<(i64, RequestId)> {
        let mut all: Vec<_> =
            self.links.drain().map(|(request, link)| (link.turn, request)).collect();
        all.sort_unstable();
        self.lines.fill(Ends::default());
        all
    }
}

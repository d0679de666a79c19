//! Tables for people: columns as wide as their content, colour only where it is wanted.

use std::fmt::Write;
use std::io::{self, IsTerminal};

/// A table with a header.
#[derive(Debug, Clone, Default)]
pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(header: &[&'static str]) -> Self {
        Table { header: header.to_vec(), rows: Vec::new() }
    }

    /// Appends a row of as many cells as the header has.
    pub fn push(&mut self, row: Vec<String>) {
        debug_assert_eq!(row.len(), self.header.len());
        // Names and paths come from elsewhere and must not steer the terminal.
        let plain = |cell: String| match cell.chars().any(char::is_control) {
            true => cell.escape_debug().to_string(),
            false => cell,
        };
        self.rows.push(row.into_iter().map(plain).collect());
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table as text: numbers to the right, words to the left.
    pub fn render(&self, colour: bool) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.chain([self.header[column].len()]).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.header.len()).map(width).collect();
        let numeric = |column: usize| self.rows.iter().all(|row| is_number(&row[column]));
        let right: Vec<_> = (0..self.header.len()).map(numeric).collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::new();
            for (column, cell) in cells.enumerate() {
                let width = widths[column];
                let gap = if column == 0 { "" } else { "  " };
                let written = match right[column] {
                    true => write!(line, "{gap}{cell:>width$}"),
                    false => write!(line, "{gap}{cell:<width$}"),
                };
                written.expect("a String takes every write");
            }
            line.truncate(line.trim_end().len());
            line
        };
        let header = line(&mut self.header.iter().copied());
        let mut text = match colour {
            true => format!("\x1b[1m{header}\x1b[0m\n"),
            false => format!("{header}\n"),
        };
        for row in &self.rows {
            text.push_str(&line(&mut row.iter().map(String::as_str)));
            text.push('\n');
        }
        text
    }
}

/// Whether a cell is a number, a number with its reasons, or the absence of one.
fn is_number(cell: &str) -> bool {
    let first = cell.split(' ').next().unwrap_or_default();
    cell == "-" || first.parse::<f64>().is_ok()
}

/// Whether standard output takes colour: a terminal, and NO_COLOR is not set.
pub fn stdout_takes_colour() -> bool {
    io::stdout().is_terminal() && colour_is_welcome()
}

/// Whether standard error takes colour.
pub fn stderr_takes_colour() -> bool {
    io::stderr().is_terminal() && colour_is_welcome()
}

fn colour_is_welcome() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Breaks `text` into lines of up to `width` characters, each behind `indent` spaces.
pub fn wrap(text: &str, width: usize, indent: usize) -> String {
    let (mut wrapped, mut column) = (String::new(), 0);
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length <= width {
            wrapped.push(' ');
            column += 1;
        } else {
            if column > 0 {
                wrapped.push('\n');
            }
            wrapped.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        }
        wrapped.push_str(word);
        column += length;
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_to_the_right_and_words_to_the_left() {
        let mut table = Table::new(&["ADDRESS", "SENT", "FD"]);
        for row in [["127.0.0.1:1", "12345", "-"], ["[::1]:1", "6", "12"]] {
            table.push(row.map(str::to_owned).to_vec());
        }
        assert_eq!(
            table.render(false),
            "ADDRESS       SENT  FD\n127.0.0.1:1  12345   -\n[::1]:1          6  12\n"
        );
    }

    #[test]
    fn control_characters_never_reach_the_terminal() {
        let mut table = Table::new(&["NAME"]);
        table.push(vec!["\x1b]0;title\x07".into()]);
        assert!(!table.render(false).contains('\x1b'));
    }

    #[test]
    fn text_is_wrapped_between_words() {
        assert_eq!(wrap("one two three", 9, 2), "  one two\n  three");
        assert_eq!(wrap("", 9, 2), "");
    }
}

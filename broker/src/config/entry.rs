//! The file as a tree in which every key and value knows its place.
//!
//! [`Source`] is the text, [`Entry`] one key with its value. Their errors name file, line and
//! key; they know TOML's forms and nothing of what a key means.

use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::BusyPoll;

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file, or the option of the command line.
    pub source_name: String,
    /// The line, counted from 1, where there is one.
    pub line: Option<usize>,
    /// Section and key: `upstream.cache.url`; empty for the file as a whole.
    pub key: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source_name)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.problem)
    }
}

impl std::error::Error for ConfigError {}

/// The text of a configuration and what errors call it.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) text: &'a str,
    pub(super) source_name: &'a str,
}

/// One key with its value.
pub(super) struct Entry<'a> {
    pub(super) source: Source<'a>,
    /// The section it stands in; empty at the top.
    pub(super) section: String,
    pub(super) key: &'a str,
    pub(super) key_span: Range<usize>,
    pub(super) value: &'a Spanned<DeValue<'a>>,
}

impl<'a> Source<'a> {
    /// The entries of a table in the order of the file.
    pub(super) fn entries(&self, section: &str, table: &'a DeTable<'a>) -> Vec<Entry<'a>> {
        let entry = |(key, value): (&'a Spanned<_>, &'a Spanned<DeValue<'a>>)| {
            let name: &std::borrow::Cow<'a, str> = key.get_ref();
            Entry {
                source: *self,
                section: section.to_owned(),
                key: name,
                key_span: key.span(),
                value,
            }
        };
        let mut entries: Vec<_> = table.iter().map(entry).collect();
        entries.sort_by_key(|entry| entry.key_span.start);
        entries
    }
}

impl<'a> Entry<'a> {
    pub(super) fn path(&self) -> String {
        match self.section.as_str() {
            "" => self.key.to_owned(),
            section => format!("{section}.{}", self.key),
        }
    }

    pub(super) fn error_at(&self, offset: usize, key: String, problem: String) -> ConfigError {
        ConfigError {
            source_name: self.source.source_name.to_owned(),
            line: Some(line_at(self.source.text.as_bytes(), offset)),
            key,
            problem,
        }
    }

    /// The value is wrong.
    pub(super) fn wrong(&self, problem: impl Into<String>) -> ConfigError {
        self.error_at(self.value.span().start, self.path(), problem.into())
    }

    /// Something inside this section is wrong: the key if it is there, else the section.
    pub(super) fn wrong_inside(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        let inside = self.value.get_ref().as_table().and_then(|table| table.get_key_value(key));
        let offset = inside.map_or(self.key_span.start, |(key, _)| key.span().start);
        self.error_at(offset, format!("{}.{key}", self.path()), problem.into())
    }

    /// `true` or `false`.
    pub(super) fn flag(&self) -> Result<bool, ConfigError> {
        let value = self.value.get_ref();
        value.as_bool().ok_or_else(|| self.wrong(expected("true or false", value)))
    }

    /// The key is none of `known`.
    pub(super) fn unknown(&self, known: &[&str]) -> ConfigError {
        let nearest = known
            .iter()
            .map(|name| (strsim::damerau_levenshtein(self.key, name), name))
            .min()
            .filter(|(distance, _)| *distance <= 3);
        let remedy = match nearest {
            Some((_, name)) => format!("did you mean {name:?}?"),
            None => format!("there are: {}", known.join(", ")),
        };
        let problem = format!("unknown key {:?}; {remedy}", self.key);
        self.error_at(self.key_span.start, self.section.clone(), problem)
    }

    /// The key is known to another section.
    pub(super) fn misplaced(&self, home: &str) -> ConfigError {
        let problem = format!("unknown key {:?}; it belongs into {home}", self.key);
        self.error_at(self.key_span.start, self.section.clone(), problem)
    }

    pub(super) fn table(&self) -> Result<&'a DeTable<'a>, ConfigError> {
        let value = self.value.get_ref();
        value.as_table().ok_or_else(|| self.wrong(expected("a table", value)))
    }

    pub(super) fn entries(&self) -> Result<Vec<Entry<'a>>, ConfigError> {
        Ok(self.source.entries(&self.path(), self.table()?))
    }

    pub(super) fn text(&self) -> Result<&'a str, ConfigError> {
        let value = self.value.get_ref();
        value.as_str().ok_or_else(|| self.wrong(expected("a text in quotes", value)))
    }

    pub(super) fn group(&self) -> Result<String, ConfigError> {
        match self.text()? {
            "" => Err(self.wrong("the name of a group is missing")),
            name => Ok(name.to_owned()),
        }
    }

    pub(super) fn mode(&self) -> Result<u32, ConfigError> {
        let text = self.value.get_ref().as_str().unwrap_or_default();
        let is_octal = !text.is_empty() && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| is_octal && *mode <= 0o777);
        let mode = mode.ok_or_else(|| {
            let shown = self.value.get_ref();
            self.wrong(expected("permissions as octal digits in quotes, like \"0622\"", shown))
        })?;
        if mode & 0o600 != 0o600 {
            return Err(
                self.wrong(format!("the broker itself must read and write: 0{mode:o} lacks 0600"))
            );
        }
        if mode & 0o111 != 0 {
            return Err(self.wrong(format!("0{mode:o} makes it executable, which means nothing")));
        }
        Ok(mode)
    }
}

/// A value as a limit has it.
pub(super) trait Setting: PartialOrd + Sized {
    /// Takes a TOML value, or says what form is expected.
    fn read(value: &DeValue<'_>) -> Result<Self, Misread>;
    /// As it would be written in the file, without quotes.
    fn show(&self) -> String;
}

/// Why a value cannot be taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Misread {
    /// What form it must have.
    Form(String),
    /// No limit is so small or large; the value.
    OutOfRange(String),
}

macro_rules! whole_numbers {
    ($($Type:ty)*) => {$(
        impl Setting for $Type {
            fn read(value: &DeValue<'_>) -> Result<Self, Misread> {
                let number = match value {
                    DeValue::Integer(number) => number,
                    _ => return Err(Misread::Form(expected("a whole number", value))),
                };
                <$Type>::from_str_radix(number.as_str(), number.radix())
                    .map_err(|_| Misread::OutOfRange(number.to_string()))
            }

            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}

whole_numbers! { u32 u64 usize }

impl Setting for Duration {
    fn read(value: &DeValue<'_>) -> Result<Self, Misread> {
        let form = "a duration like \"500ms\", \"30s\" or \"10m\"";
        let parsed = value.as_str().and_then(|text| humantime::parse_duration(text).ok());
        parsed.ok_or_else(|| Misread::Form(expected(form, value)))
    }

    fn show(&self) -> String {
        humantime::format_duration(*self).to_string().replace(' ', "")
    }
}

impl Setting for BusyPoll {
    fn read(value: &DeValue<'_>) -> Result<Self, Misread> {
        let form = "\"auto\", \"off\" or a duration like \"50us\"";
        match value.as_str() {
            Some("off") => Ok(BusyPoll::Off),
            Some("auto") => Ok(BusyPoll::Auto),
            _ => Duration::read(value)
                .map(BusyPoll::For)
                .map_err(|_| Misread::Form(expected(form, value))),
        }
    }

    fn show(&self) -> String {
        match self {
            BusyPoll::Off => "off".to_owned(),
            BusyPoll::For(length) => length.show(),
            BusyPoll::Auto => "auto".to_owned(),
        }
    }
}

pub(super) fn read_within<T: Setting>(
    value: &DeValue<'_>,
    range: &RangeInclusive<T>,
) -> Result<T, String> {
    let given = match T::read(value) {
        Ok(read) if range.contains(&read) => return Ok(read),
        Ok(read) => read.show(),
        Err(Misread::OutOfRange(given)) => given,
        Err(Misread::Form(problem)) => return Err(problem),
    };
    let (least, most) = shown(range);
    Err(format!("{given} is out of range: from {least} to {most}"))
}

pub(super) fn shown<T: Setting>(range: &RangeInclusive<T>) -> (String, String) {
    (range.start().show(), range.end().show())
}

/// "must be FORM, not VALUE".
pub(super) fn expected(form: &str, value: &DeValue<'_>) -> String {
    let shown = match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(_) => "a date".into(),
        DeValue::Array(_) => "a list".into(),
        DeValue::Table(_) => "a table".into(),
    };
    format!("must be {form}, not {shown}")
}

/// The line of the byte at `offset`, counted from 1.
pub(super) fn line_at(text: &[u8], offset: usize) -> usize {
    let before = text.get(..offset).unwrap_or(text);
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_counted_from_one_and_never_past_the_text() {
        assert_eq!(line_at(b"a\nb\n", 0), 1);
        assert_eq!(line_at(b"a\nb\n", 2), 2);
        assert_eq!(line_at(b"a\nb\n", 99), 3);
    }

    #[test]
    fn durations_read_back_as_they_are_shown() {
        for duration in [0, 1, 1_500, 3_600_000, 5_400_000, 86_400_000 * 30] {
            let duration = Duration::from_millis(duration);
            let shown = DeValue::String(duration.show().into());
            assert_eq!(Duration::read(&shown), Ok(duration));
        }
    }
}

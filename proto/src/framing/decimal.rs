//! Messages with their length in decimal in front: netstrings, `5:hello,`
//! (<https://cr.yp.to/proto/netstrings.txt>), and syslog over TCP, `5 hello` (RFC 6587, section
//! 3.4.1).
//!
//! Both write a length without leading zeros. Here it has at most 9 digits: a stream of digits
//! without an end is no message, and no length comes near to an overflow.

use super::scan::Look;
use crate::reason::Reason;

/// Digits of a length at most.
const DIGITS_MAX: usize = 9;

/// The longest body that [`DIGITS_MAX`] digits can count.
const BODY_BYTES_MAX: usize = 999_999_999;

/// What a length and the marks around a body take at most: a netstring has two of them.
pub(super) const OVERHEAD_BYTES_MAX: usize = DIGITS_MAX + 2;

/// Behind the length of a netstring.
const COLON: u8 = b':';
/// Behind the body of a netstring.
const COMMA: u8 = b',';
/// Behind the length of a counted message.
const SPACE: u8 = b' ';

/// Appends `body` as a netstring.
///
/// # Errors
/// [`Reason::TooLong`]; `out` is then unchanged.
pub(super) fn encode_netstring(body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    append_length(body.len(), COLON, out)?;
    out.extend_from_slice(body);
    out.push(COMMA);
    Ok(())
}

/// Appends `body` with its count in front.
///
/// # Errors
/// [`Reason::TooLong`], or [`Reason::Empty`]: a count is at least 1; `out` is then unchanged.
pub(super) fn encode_octet_counted(body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    if body.is_empty() {
        return Err(Reason::Empty);
    }
    append_length(body.len(), SPACE, out)?;
    out.extend_from_slice(body);
    Ok(())
}

/// The netstring at the start of `bytes`, with a body of up to `bytes_max` bytes.
pub(super) fn look_netstring(bytes: &[u8], bytes_max: usize) -> Look {
    let Length { start, length } = match read_length(bytes, COLON) {
        Ok(length) => length,
        Err(look) => return look,
    };
    let end = start + length;
    let whole = end + 1;
    if length > bytes_max {
        return Look::TooLong { bytes: Some(whole) };
    }
    match bytes.get(end) {
        Some(&COMMA) => Look::Message { body: start..end, consumed: whole },
        Some(_) => Look::Malformed,
        None => Look::Incomplete,
    }
}

/// The counted message at the start of `bytes`, with a body of up to `bytes_max` bytes.
pub(super) fn look_octet_counted(bytes: &[u8], bytes_max: usize) -> Look {
    let Length { start, length } = match read_length(bytes, SPACE) {
        Ok(length) => length,
        Err(look) => return look,
    };
    let whole = start + length;
    if length == 0 {
        Look::Malformed
    } else if length > bytes_max {
        Look::TooLong { bytes: Some(whole) }
    } else if bytes.len() < whole {
        Look::Incomplete
    } else {
        Look::Message { body: start..whole, consumed: whole }
    }
}

fn append_length(length: usize, mark: u8, out: &mut Vec<u8>) -> Result<(), Reason> {
    if length > BODY_BYTES_MAX {
        return Err(Reason::TooLong);
    }
    out.reserve(length + OVERHEAD_BYTES_MAX);
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(mark);
    Ok(())
}

/// A length that has been read, and where the body behind its mark begins.
struct Length {
    start: usize,
    length: usize,
}

/// The decimal number in front of `mark`; else why there is none (yet).
fn read_length(bytes: &[u8], mark: u8) -> Result<Length, Look> {
    let mut length = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if byte == mark && at > 0 {
            return Ok(Length { start: at + 1, length });
        }
        let has_leading_zero = at > 0 && length == 0;
        if !byte.is_ascii_digit() || has_leading_zero || at == DIGITS_MAX {
            return Err(Look::Malformed);
        }
        length = length * 10 + usize::from(byte - b'0');
    }
    Err(Look::Incomplete)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: usize = 2000;

    type LookFn = fn(&[u8], usize) -> Look;
    type EncodeFn = fn(&[u8], &mut Vec<u8>) -> Result<(), Reason>;

    const BOTH: [(EncodeFn, LookFn); 2] =
        [(encode_netstring, look_netstring), (encode_octet_counted, look_octet_counted)];

    #[test]
    fn the_examples_of_their_texts_are_written_and_read() {
        let mut out = Vec::new();
        encode_netstring(b"hello world!", &mut out).unwrap();
        encode_netstring(b"", &mut out).unwrap();
        assert_eq!(out, b"12:hello world!,0:,");
        assert_eq!(look_netstring(&out, 99), Look::Message { body: 3..15, consumed: 16 });
        assert_eq!(look_netstring(&out[16..], 99), Look::Message { body: 2..2, consumed: 3 });
        let mut out = Vec::new();
        encode_octet_counted(b"hello", &mut out).unwrap();
        assert_eq!(out, b"5 hello");
        assert_eq!(look_octet_counted(&out, 5), Look::Message { body: 2..7, consumed: 7 });
        assert_eq!(encode_octet_counted(b"", &mut out), Err(Reason::Empty));
        assert_eq!(out, b"5 hello");
    }

    #[test]
    fn nonsense_is_malformed_however_much_of_it_came() {
        for text in
            ["00:,", "01:a,", ":", "5;", "a", "-1:", "+1:a,", " 1:a,", "1 :a,", "3:abc;", "1:a\n"]
        {
            assert_eq!(look_netstring(text.as_bytes(), MAX), Look::Malformed, "{text}");
        }
        for text in ["0 ", "00 ", "01 a", " ", "5:", "a", "-1 ", "+1 a", "1\ta"] {
            assert_eq!(look_octet_counted(text.as_bytes(), MAX), Look::Malformed, "{text}");
        }
        for look in [look_netstring, look_octet_counted] {
            assert_eq!(look(b"", MAX), Look::Incomplete);
            assert_eq!(look(b"999999999", MAX), Look::Incomplete);
            assert_eq!(look(b"9999999999", MAX), Look::Malformed);
            assert_eq!(look(b"18446744073709551616", MAX), Look::Malformed);
        }
    }

    #[test]
    fn what_is_too_long_shows_its_whole_length() {
        assert_eq!(look_netstring(b"11:", 10), Look::TooLong { bytes: Some(15) });
        assert_eq!(look_netstring(b"10:", 10), Look::Incomplete);
        assert_eq!(look_octet_counted(b"11 ", 10), Look::TooLong { bytes: Some(14) });
        let whole = BODY_BYTES_MAX + OVERHEAD_BYTES_MAX;
        assert_eq!(look_netstring(b"999999999:", MAX), Look::TooLong { bytes: Some(whole) });
    }

    proptest! {
        #[test]
        fn bodies_come_back_and_truncated_ones_are_incomplete(
            body in proptest::collection::vec(any::<u8>(), 1..MAX),
            behind in proptest::collection::vec(any::<u8>(), 0..5),
        ) {
            for (encode, look) in BOTH {
                let mut out = Vec::new();
                encode(&body, &mut out).unwrap();
                let whole = out.len();
                prop_assert!(whole <= body.len() + OVERHEAD_BYTES_MAX);
                for end in 0..whole {
                    prop_assert_eq!(look(&out[..end], MAX), Look::Incomplete);
                }
                out.extend_from_slice(&behind);
                let Look::Message { body: found, consumed } = look(&out, MAX) else {
                    panic!("{:?}", look(&out, MAX));
                };
                prop_assert_eq!(&out[found], &body[..]);
                prop_assert_eq!(consumed, whole);
            }
        }
    }
}

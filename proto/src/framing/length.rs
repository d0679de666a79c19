//! Fields inside of a message: its length, and the id by which its reply is known.
//!
//! Both belong to binary protocols whose header has a fixed layout (Modbus, Kafka, DNS
//! over TCP): the configuration says where the fields are, and nothing else of the protocol
//! needs to be known. The body is the whole message, header and all.

use std::fmt;

use super::scan::Look;
use super::{ByteOrder, check_options, option, parse_number};
use crate::reason::Reason;

/// Bytes in front of a length or id field at most.
pub const FIELD_OFFSET_MAX: u32 = 65_535;

/// Where a message carries its own length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LengthField {
    /// Bytes in front of the field.
    pub offset: u32,
    /// Bytes of the field: 1, 2, 3, 4 or 8.
    pub width: u8,
    /// Its byte order.
    pub order: ByteOrder,
    /// Added to the field's value it gives the bytes of the whole message.
    pub adjust: i32,
}

impl LengthField {
    /// The options of `framing=length`.
    pub(super) const OPTIONS: &[&str] = &["offset", "width", "endian", "adjust"];

    /// The field that these options describe.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what would be right.
    pub(super) fn parse(options: &[(&str, &str)]) -> Result<LengthField, String> {
        check_options("length", Self::OPTIONS, options)?;
        let offset = match option(options, "offset") {
            Some(value) => parse_number("offset", value, 0..=FIELD_OFFSET_MAX)?,
            None => 0,
        };
        let width = match option(options, "width") {
            None | Some("4") => 4,
            Some("1") => 1,
            Some("2") => 2,
            Some("3") => 3,
            Some("8") => 8,
            Some(value) => {
                return Err(format!("width {value:?} is none of 1, 2, 3, 4, 8 bytes"));
            }
        };
        let order = match option(options, "endian") {
            None | Some("big") => ByteOrder::Big,
            Some("little") => ByteOrder::Little,
            Some(value) => return Err(format!("endian {value:?} is neither big nor little")),
        };
        let field = LengthField { offset, width, order, adjust: 0 };
        let default = i32::try_from(field.end()).unwrap_or(i32::MAX);
        let adjust = match option(options, "adjust") {
            Some(value) => parse_number("adjust", value, i32::MIN..=i32::MAX)?,
            None => default,
        };
        let value_max = (1_i128 << (8 * u32::from(width))) - 1;
        if value_max + i128::from(adjust) < i128::from(field.end()) {
            return Err(format!(
                "adjust {adjust} lets no message reach the end of its length field, byte {}; a \
                 length that counts what follows the field has adjust={default}, one that counts \
                 the whole message adjust=0",
                field.end()
            ));
        }
        Ok(LengthField { adjust, ..field })
    }

    /// Where the field ends.
    pub(crate) fn end(self) -> u64 {
        u64::from(self.offset) + u64::from(self.width)
    }

    /// Appends `body`, which must be exactly one message by its own length field.
    ///
    /// # Errors
    /// [`Reason::Malformed`]; `out` is then unchanged.
    pub(super) fn encode(self, body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
        let whole = self.whole(body).and_then(|whole| usize::try_from(whole).ok());
        if whole != Some(body.len()) {
            return Err(Reason::Malformed);
        }
        out.extend_from_slice(body);
        Ok(())
    }

    /// The message at the start of `bytes`, of up to `bytes_max` bytes.
    pub(super) fn look(self, bytes: &[u8], bytes_max: usize) -> Look {
        if bytes.is_empty() {
            return Look::Incomplete;
        }
        if self.end() > bytes_max as u64 {
            // Its length cannot even be seen in so few bytes.
            return Look::TooLong { bytes: None };
        }
        let Some(whole) = self.whole(bytes) else {
            return Look::Incomplete;
        };
        if whole < i128::from(self.end()) {
            return Look::Malformed;
        }
        match usize::try_from(whole) {
            Err(_) => Look::TooLong { bytes: None },
            Ok(whole) if whole > bytes_max => Look::TooLong { bytes: Some(whole) },
            Ok(whole) if whole > bytes.len() => Look::Incomplete,
            Ok(whole) => Look::Message { body: 0..whole, consumed: whole },
        }
    }

    /// Bytes of the whole message, as its field says; none: the field is not there yet.
    fn whole(self, bytes: &[u8]) -> Option<i128> {
        let field = field_at(self.offset, self.width, bytes)?;
        let value = match self.order {
            ByteOrder::Big => read_number(field.iter()),
            ByteOrder::Little => read_number(field.iter().rev()),
        };
        Some(i128::from(value) + i128::from(self.adjust))
    }
}

/// The options as they stand behind `framing=length`; those with default values are left out.
impl fmt::Display for LengthField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.offset != 0 {
            write!(f, "&offset={}", self.offset)?;
        }
        if self.width != 4 {
            write!(f, "&width={}", self.width)?;
        }
        match self.order {
            ByteOrder::Big => {}
            ByteOrder::Little => f.write_str("&endian=little")?,
        }
        if u64::try_from(self.adjust) != Ok(self.end()) {
            write!(f, "&adjust={}", self.adjust)?;
        }
        Ok(())
    }
}

/// Where requests and replies carry an id, which a reply repeats from its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdField {
    /// Bytes in front of it in a request.
    pub offset: u32,
    /// Bytes in front of it in a reply.
    pub reply_offset: u32,
    /// Bytes of the id: 1 to 8.
    pub width: u8,
}

impl IdField {
    /// The id of a request; none: the message ends before it.
    #[must_use]
    pub fn of_request(self, message: &[u8]) -> Option<u64> {
        Some(read_number(field_at(self.offset, self.width, message)?.iter()))
    }

    /// The id of a reply; none: the message ends before it.
    #[must_use]
    pub fn of_reply(self, message: &[u8]) -> Option<u64> {
        Some(read_number(field_at(self.reply_offset, self.width, message)?.iter()))
    }

    /// Replaces the id of a request, of which only the lower `width` bytes count; false: the
    /// message ends before it.
    pub fn set_in_request(self, message: &mut [u8], id: u64) -> bool {
        set_number(self.offset, self.width, message, id)
    }

    /// Replaces the id of a reply, of which only the lower `width` bytes count; false: the message
    /// ends before it.
    pub fn set_in_reply(self, message: &mut [u8], id: u64) -> bool {
        set_number(self.reply_offset, self.width, message, id)
    }

    /// How many ids there are, at most `u64::MAX`.
    #[must_use]
    pub fn ids(self) -> u64 {
        1_u64.checked_shl(8 * u32::from(self.width)).unwrap_or(u64::MAX)
    }
}

fn field_at(offset: u32, width: u8, bytes: &[u8]) -> Option<&[u8]> {
    let offset = usize::try_from(offset).ok()?;
    bytes.get(offset..)?.get(..usize::from(width))
}

/// The number of these bytes, most significant first.
fn read_number<'a>(bytes: impl Iterator<Item = &'a u8>) -> u64 {
    bytes.fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

fn set_number(offset: u32, width: u8, message: &mut [u8], number: u64) -> bool {
    let wire = number.to_be_bytes();
    let low = wire.len().checked_sub(usize::from(width)).and_then(|from| wire.get(from..));
    let field = usize::try_from(offset)
        .ok()
        .and_then(|offset| message.get_mut(offset..)?.get_mut(..usize::from(width)));
    match (field, low) {
        (Some(field), Some(low)) => {
            field.copy_from_slice(low);
            true
        }
        (None, _) | (_, None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn field(offset: u32, width: u8, order: ByteOrder, adjust: i32) -> LengthField {
        LengthField { offset, width, order, adjust }
    }

    #[test]
    fn values_are_read_in_every_width_and_order() {
        let bytes = [9, 1, 2, 3, 4, 5, 6, 7, 8, 9];
        for (width, big, little) in [
            (1, 1, 1),
            (2, 0x0102, 0x0201),
            (3, 0x01_0203, 0x03_0201),
            (4, 0x0102_0304, 0x0403_0201),
            (8, 0x0102_0304_0506_0708, 0x0807_0605_0403_0201),
        ] {
            assert_eq!(field(1, width, ByteOrder::Big, 0).whole(&bytes), Some(big));
            assert_eq!(field(1, width, ByteOrder::Little, 0).whole(&bytes), Some(little));
        }
        assert_eq!(field(7, 4, ByteOrder::Big, 0).whole(&bytes), None);
        assert_eq!(field(u32::MAX, 8, ByteOrder::Big, 0).whole(&bytes), None);
    }

    #[test]
    fn a_length_that_ends_before_its_own_field_is_malformed() {
        let look = |bytes: &[u8], adjust| field(1, 2, ByteOrder::Big, adjust).look(bytes, 99);
        assert_eq!(look(&[7, 0, 2], 0), Look::Malformed);
        assert_eq!(look(&[7, 0, 0], -1), Look::Malformed);
        assert_eq!(look(&[7, 0, 0], 2), Look::Malformed);
        assert_eq!(look(&[7, 0, 3], 0), Look::Message { body: 0..3, consumed: 3 });
        assert_eq!(look(&[7, 0, 0], 3), Look::Message { body: 0..3, consumed: 3 });
        let mut out = vec![];
        assert_eq!(
            field(1, 2, ByteOrder::Big, 0).encode(&[7, 0], &mut out),
            Err(Reason::Malformed)
        );
        assert_eq!(field(0, 1, ByteOrder::Big, -1).encode(&[1], &mut out), Err(Reason::Malformed));
        assert_eq!(field(0, 1, ByteOrder::Big, -1).encode(&[], &mut out), Err(Reason::Malformed));
    }

    #[test]
    fn lengths_at_the_limits_neither_panic_nor_wrap() {
        let look = |adjust, value: u64| {
            field(0, 8, ByteOrder::Big, adjust).look(&value.to_be_bytes(), 1000)
        };
        assert_eq!(look(i32::MAX, u64::MAX), Look::TooLong { bytes: None });
        assert_eq!(look(1, u64::MAX), Look::TooLong { bytes: None });
        assert_eq!(look(0, u64::MAX), Look::TooLong { bytes: Some(usize::MAX) });
        assert_eq!(look(i32::MIN, 0), Look::Malformed);
        assert_eq!(look(0, 1001), Look::TooLong { bytes: Some(1001) });
        assert_eq!(look(0, 1000), Look::Incomplete);
        // Never so many bytes as the field needs: refused before they are awaited.
        assert_eq!(field(97, 4, ByteOrder::Big, 0).look(b"x", 100), Look::TooLong { bytes: None });
        assert_eq!(field(96, 4, ByteOrder::Big, 0).look(b"x", 100), Look::Incomplete);
    }

    #[test]
    fn ids_are_replaced_where_they_are() {
        let id = IdField { offset: 1, reply_offset: 3, width: 2 };
        let mut message = [0, 0xAB, 0xCD, 0x12, 0x34];
        assert_eq!((id.of_request(&message), id.of_reply(&message)), (Some(0xABCD), Some(0x1234)));
        assert!(id.set_in_request(&mut message, 0xFF_0102));
        assert!(id.set_in_reply(&mut message, 0x0304));
        assert_eq!(message, [0, 1, 2, 3, 4]);
        assert!(!id.set_in_reply(&mut message[..4], 0));
        assert_eq!(id.of_reply(&message[..4]), None);
        assert_eq!(message, [0, 1, 2, 3, 4]);
        for (width, ids) in [(1, 256), (2, 65_536), (7, 1 << 56), (8, u64::MAX)] {
            assert_eq!(IdField { offset: 0, reply_offset: 0, width }.ids(), ids);
        }
        let mut wide = [0; 8];
        let id = IdField { offset: 0, reply_offset: 0, width: 8 };
        assert!(id.set_in_request(&mut wide, u64::MAX - 1));
        assert_eq!(id.of_reply(&wide), Some(u64::MAX - 1));
        assert!(!id.set_in_request(&mut wide[..7], 1));
        let far = IdField { offset: u32::MAX, reply_offset: 0, width: 200 };
        assert!(!far.set_in_request(&mut wide, 1) && !far.set_in_reply(&mut wide, 1));
    }

    fn fields() -> impl Strategy<Value = LengthField> {
        let width = prop_oneof![Just(1_u8), Just(2), Just(3), Just(4), Just(8)];
        let order = prop_oneof![Just(ByteOrder::Big), Just(ByteOrder::Little)];
        (0_u32..12, width, order, -20_i32..40)
            .prop_map(|(offset, width, order, adjust)| field(offset, width, order, adjust))
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_cut_again_and_truncated_is_incomplete(
            field in fields(),
            mut body in proptest::collection::vec(any::<u8>(), 20..200),
        ) {
            let value = body.len() as i64 - i64::from(field.adjust);
            prop_assume!(value >= 0);
            let at = field.offset as usize..field.end() as usize;
            let width = usize::from(field.width);
            match field.order {
                ByteOrder::Big => body[at].copy_from_slice(&value.to_be_bytes()[8 - width..]),
                ByteOrder::Little => body[at].copy_from_slice(&value.to_le_bytes()[..width]),
            }
            let mut out = Vec::new();
            field.encode(&body, &mut out).unwrap();
            prop_assert_eq!(&out, &body);
            let whole = body.len();
            for end in 0..whole {
                prop_assert_eq!(field.look(&out[..end], 200), Look::Incomplete);
                prop_assert!(field.encode(&out[..end], &mut Vec::new()).is_err());
            }
            out.push(0);
            let expected = Look::Message { body: 0..whole, consumed: whole };
            prop_assert_eq!(field.look(&out, 200), expected);
            prop_assert!(field.encode(&out, &mut Vec::new()).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            field in fields(),
            bytes in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let whole = field.look(&bytes, 30);
            for end in 0..bytes.len() {
                let look = field.look(&bytes[..end], 30);
                prop_assert!(look == Look::Incomplete || look == whole);
            }
        }
    }
}

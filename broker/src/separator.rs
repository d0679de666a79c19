//! What stands between messages that share a datagram, and which bodies it keeps apart.
//!
//! A receiver cuts a datagram at each separator, beginning at its start. So a body must not contain
//! one, nor end so that its end and the separator behind it contain an earlier one (M14): one
//! message never becomes two, and none loses bytes to the next.

/// See the module's text. An empty one keeps nothing apart, and refuses nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Separator {
    bytes: Vec<u8>,
    /// How many bytes of it at the end of a body make an earlier separator with the one behind.
    overlaps: Vec<usize>,
}

impl Separator {
    /// A separator of these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        let is_overlap = |len: &usize| bytes[*len..] == bytes[..bytes.len() - len];
        let overlaps = (1..bytes.len()).filter(is_overlap).collect();
        Separator { bytes: bytes.to_vec(), overlaps }
    }

    /// The bytes of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether it cannot tell where `body` ends.
    pub fn is_in(&self, body: &[u8]) -> bool {
        let is_at = |at: usize| body[at..].starts_with(&self.bytes);
        match self.bytes.as_slice() {
            [] => false,
            [byte] => memchr::memchr(*byte, body).is_some(),
            [first, ..] => {
                memchr::memchr_iter(*first, body).any(is_at)
                    || self.overlaps.iter().any(|len| body.ends_with(&self.bytes[..*len]))
            }
        }
    }
}

/// A line feed, as statsd and its relatives have it.
impl Default for Separator {
    fn default() -> Self {
        Separator::new(b"\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// As a receiver does it.
    fn cut<'a>(mut bytes: &'a [u8], separator: &[u8]) -> Vec<&'a [u8]> {
        let mut found = Vec::new();
        let mut at = 0;
        while at + separator.len() <= bytes.len() {
            if bytes[at..].starts_with(separator) {
                found.push(&bytes[..at]);
                (bytes, at) = (&bytes[at + separator.len()..], 0);
            } else {
                at += 1;
            }
        }
        found.push(bytes);
        found
    }

    proptest! {
        /// Two letters and short separators, so that everything overlaps with everything.
        #[test]
        fn bodies_are_taken_exactly_when_a_receiver_cuts_them_apart_again(
            separator in vec(0u8..2, 1..5),
            bodies in vec(vec(0u8..2, 1..6), 1..5),
        ) {
            let joined = Separator::new(&separator);
            for body in &bodies {
                let followed = [&body[..], &separator, &[7]].concat();
                prop_assert_eq!(joined.is_in(body), cut(&followed, &separator)[0] != &body[..]);
            }
            let bodies: Vec<_> = bodies.iter().filter(|body| !joined.is_in(body)).collect();
            let parts: Vec<&[u8]> = bodies.iter().map(|body| &body[..]).collect();
            if !parts.is_empty() {
                let datagram = parts.join(&separator[..]);
                prop_assert_eq!(cut(&datagram, &separator), parts);
            }
        }
    }

    #[test]
    fn an_end_that_moves_the_border_is_found() {
        let blank_line = Separator::new(b"\n\n");
        assert!(blank_line.is_in(b"a\n"), "a receiver would give its last byte to the next one");
        assert!(!blank_line.is_in(b"\na\nb"));
        assert!(blank_line.is_in(b"a\n\nb"));
        assert!(!Separator::new(b"").is_in(b"anything"));
        assert!(!Separator::new(b"\r\n").is_in(b"a\r"), "a CR before CR LF moves nothing");
    }
}

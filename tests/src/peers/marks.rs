//! How a TCP peer tells messages apart. Written anew, not taken from the protocol crate: a mistake
//! there must not be undone by the same mistake here.

/// The marks between the messages of a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Marks {
    /// `\n` behind each.
    #[default]
    Lines,
    /// `\r\n` behind each.
    Crlf,
    /// Four bytes of length, most significant first, before each.
    U32be,
}

impl Marks {
    /// What the URL of an upstream needs for it.
    pub(super) fn query(self) -> &'static str {
        match self {
            Marks::Lines => "",
            Marks::Crlf => "?framing=crlf",
            Marks::U32be => "?framing=u32be",
        }
    }

    /// `body` with its marks.
    pub(super) fn wrap(self, body: &[u8]) -> Vec<u8> {
        match self {
            Marks::Lines => [body, b"\n"].concat(),
            Marks::Crlf => [body, b"\r\n"].concat(),
            Marks::U32be => {
                let length = u32::try_from(body.len()).expect("tests send less than 4 GiB");
                [&length.to_be_bytes(), body].concat()
            }
        }
    }

    /// Takes every complete message off the front of `buffer`.
    pub(super) fn cut(self, buffer: &mut Vec<u8>) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        let mut rest = buffer.as_slice();
        while let Some((message, behind)) = self.first(rest) {
            messages.push(message.to_vec());
            rest = behind;
        }
        let used = buffer.len() - rest.len();
        buffer.drain(..used);
        messages
    }

    fn first(self, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
        match self {
            Marks::Lines => {
                let end = bytes.iter().position(|byte| *byte == b'\n')?;
                Some((&bytes[..end], &bytes[end + 1..]))
            }
            Marks::Crlf => {
                let end = bytes.windows(2).position(|pair| pair == b"\r\n")?;
                Some((&bytes[..end], &bytes[end + 2..]))
            }
            Marks::U32be => {
                let (length, behind) = bytes.split_first_chunk()?;
                let length = u32::from_be_bytes(*length) as usize;
                behind.split_at_checked(length)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapped_messages_are_cut_apart_again() {
        for marks in [Marks::Lines, Marks::Crlf, Marks::U32be] {
            let mut buffer = [marks.wrap(b"one"), marks.wrap(b""), marks.wrap(b"three")].concat();
            let last = buffer.pop().unwrap();
            assert_eq!(marks.cut(&mut buffer), [&b"one"[..], b""]);
            buffer.push(last);
            assert_eq!(marks.cut(&mut buffer), [b"three"]);
            assert!(buffer.is_empty());
        }
    }
}

//! Where a JSON value ends in a stream that has neither lengths nor newlines.
//!
//! Each byte is looked at once, however a client cuts its request into pieces; a value is parsed when it is whole. What is certainly no
//! JSON is noticed at once. The rest of JSON's grammar is the parser's.

use thiserror::Error;

/// The longest value, in bytes.
pub const MAX_REQUEST_BYTES: usize = 256 << 10;
/// JSON values in one value of the stream, as SPDK counts them: a string, a number, a literal, and both ends of an object or array.
pub const MAX_VALUES: usize = 8192;
/// Objects and arrays within each other.
const MAX_DEPTH: u32 = 64;

/// The stream is not what it has to be. Where the next value would begin is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum FramingError {
    /// A byte that cannot stand there, or a bracket that does not belong to its partner.
    #[error("no JSON")]
    NotJson,
    /// More than [`MAX_DEPTH`] objects and arrays within each other.
    #[error("more than {MAX_DEPTH} objects and arrays within each other")]
    TooDeep,
    /// More than [`MAX_VALUES`].
    #[error("more than {MAX_VALUES} values")]
    TooManyValues,
    /// Longer than [`MAX_REQUEST_BYTES`].
    #[error("longer than {MAX_REQUEST_BYTES} bytes")]
    TooLong,
}

/// Cuts a stream into values.
#[derive(Debug, Default)]
pub(super) struct Framer {
    /// What has come of the present value.
    begun: Vec<u8>,
    scanner: Scanner,
}

impl Framer {
    /// Takes bytes from `input` up to the end of a value, which it returns; `None`: all of them, and none is whole yet.
    ///
    /// # Errors
    /// The stream is broken; nothing can be made of what follows.
    pub(super) fn next(&mut self, input: &mut &[u8]) -> Result<Option<Vec<u8>>, FramingError> {
        let bytes = *input;
        // Where the present value begins in these bytes.
        let mut start = 0;
        for (index, &byte) in bytes.iter().enumerate() {
            let end = match self.scanner.step(byte)? {
                Scanned::Between => {
                    start = index + 1;
                    continue;
                }
                Scanned::Within => None,
                Scanned::Last => Some(index + 1),
                Scanned::After => Some(index),
            };
            if self.begun.len() + end.unwrap_or(index + 1) - start > MAX_REQUEST_BYTES {
                return Err(FramingError::TooLong);
            }
            if let Some(end) = end {
                self.scanner = Scanner::default();
                self.begun.extend(&bytes[start..end]);
                *input = &bytes[end..];
                return Ok(Some(std::mem::take(&mut self.begun)));
            }
        }
        self.begun.extend(&bytes[start..]);
        *input = &[];
        Ok(None)
    }

    /// The value that ends with the stream: a number or a word has no other end.
    pub(super) fn finish(&mut self) -> Option<Vec<u8>> {
        let whole = self.scanner.depth == 0 && self.scanner.mode == ScanMode::Scalar;
        whole.then(|| std::mem::take(&mut self.begun))
    }
}

/// Where a byte stands.
enum Scanned {
    /// Between two values.
    Between,
    /// In a value that goes on.
    Within,
    /// It is the last one of a value.
    Last,
    /// A value has ended before it; it is to be looked at again.
    After,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ScanMode {
    #[default]
    Plain,
    /// In a number, `true`, `false` or `null`.
    Scalar,
    String,
    /// After a backslash.
    Escape,
}

#[derive(Debug, Default)]
struct Scanner {
    mode: ScanMode,
    /// Objects and arrays that are open.
    depth: u32,
    /// Which of them are arrays: a bit for each.
    arrays: u64,
    /// JSON values so far.
    values: usize,
}

impl Scanner {
    fn step(&mut self, byte: u8) -> Result<Scanned, FramingError> {
        match self.mode {
            ScanMode::Escape => {
                self.mode = ScanMode::String;
                return Ok(Scanned::Within);
            }
            ScanMode::String => {
                match byte {
                    b'\\' => self.mode = ScanMode::Escape,
                    b'"' => {
                        self.mode = ScanMode::Plain;
                        return Ok(self.ended());
                    }
                    _ => {}
                }
                return Ok(Scanned::Within);
            }
            ScanMode::Scalar if is_of_scalar(byte) => return Ok(Scanned::Within),
            ScanMode::Scalar => {
                self.mode = ScanMode::Plain;
                if self.depth == 0 {
                    return Ok(Scanned::After);
                }
            }
            ScanMode::Plain => {}
        }
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' => {
                return Ok(if self.depth == 0 { Scanned::Between } else { Scanned::Within });
            }
            b',' if self.depth > 0 => return Ok(Scanned::Within),
            b':' if self.depth > 0 && !self.is_in_array() => return Ok(Scanned::Within),
            _ => {}
        }
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err(FramingError::TooManyValues);
        }
        match byte {
            b'"' => self.mode = ScanMode::String,
            b'{' | b'[' => {
                if self.depth == MAX_DEPTH {
                    return Err(FramingError::TooDeep);
                }
                self.arrays = self.arrays << 1 | u64::from(byte == b'[');
                self.depth += 1;
            }
            b'}' | b']' => {
                if self.depth == 0 || self.is_in_array() != (byte == b']') {
                    return Err(FramingError::NotJson);
                }
                self.arrays >>= 1;
                self.depth -= 1;
                return Ok(self.ended());
            }
            byte if is_of_scalar(byte) => self.mode = ScanMode::Scalar,
            _ => return Err(FramingError::NotJson),
        }
        Ok(Scanned::Within)
    }

    fn is_in_array(&self) -> bool {
        self.arrays & 1 == 1
    }

    fn ended(&self) -> Scanned {
        if self.depth == 0 { Scanned::Last } else { Scanned::Within }
    }
}

/// Whether a byte may be one of a number, `true`, `false` or `null`.
fn is_of_scalar(byte: u8) -> bool {
    matches!(
        byte,
        b'0'..=b'9' | b'-' | b'+' | b'.' | b'E' | b'a' | b'e' | b'f' | b'l' | b'n' | b'r' | b's' | b't' | b'u'
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// The values of a stream that comes in pieces.
    fn cut<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<String>, FramingError> {
        let (mut framer, mut values) = (Framer::default(), Vec::new());
        for mut piece in pieces {
            while let Some(value) = framer.next(&mut piece)? {
                values.push(String::from_utf8(value).unwrap());
            }
            assert!(piece.is_empty());
        }
        values.extend(framer.finish().map(|value| String::from_utf8(value).unwrap()));
        Ok(values)
    }

    fn whole(text: &str) -> Result<Vec<String>, FramingError> {
        cut([text.as_bytes()])
    }

    #[test]
    fn values_end_where_they_end() {
        for (text, values) in [
            ("{\"a\": [1, {}]}\n[]", vec!["{\"a\": [1, {}]}", "[]"]),
            ("{}{}[{}]", vec!["{}", "{}", "[{}]"]),
            ("  {\"}\": \"\\\"}]\\\\\"} ", vec!["{\"}\": \"\\\"}]\\\\\"}"]),
            ("\"a\"\"b\"", vec!["\"a\"", "\"b\""]),
            ("1 -2e5\ttrue{}null", vec!["1", "-2e5", "true", "{}", "null"]),
            ("[\"\u{fc}\u{1f600}\"]", vec!["[\"\u{fc}\u{1f600}\"]"]),
            (" \r\n\t", vec![]),
            ("{\"a\":", vec![]),
        ] {
            assert_eq!(whole(text), Ok(values.iter().map(|value| value.to_string()).collect()), "{text}");
            assert_eq!(cut(text.as_bytes().chunks(1)), whole(text), "byte by byte: {text}");
        }
    }

    #[test]
    fn what_is_no_json_is_noticed_at_once() {
        for text in
            ["GET / HTTP/1.1", "}", "]", "[}", "{]", "[{]", ",", ":", "1,", "[1:", "'a'", "/* */", "\0", "\u{feff}{}"]
        {
            assert_eq!(whole(text), Err(FramingError::NotJson), "{text}");
        }
    }

    #[test]
    fn the_limits_are_kept_exactly() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert_eq!(whole(&nested(64)).unwrap().len(), 1);
        assert_eq!(whole(&nested(65)), Err(FramingError::TooDeep));
        assert_eq!(whole(&"[".repeat(1 << 20)), Err(FramingError::TooDeep));

        let list = |count: usize| format!("[{}1]", "1,".repeat(count - 1));
        assert_eq!(whole(&list(MAX_VALUES - 2)).unwrap().len(), 1, "both ends of the array count");
        assert_eq!(whole(&list(MAX_VALUES - 1)), Err(FramingError::TooManyValues));
        assert_eq!(whole(&"1 ".repeat(3 * MAX_VALUES)).unwrap().len(), 3 * MAX_VALUES, "of one value of the stream");

        let long = |bytes: usize| format!("\"{}\"", "a".repeat(bytes - 2));
        for pieces in [1, 1000, 1 << 20] {
            let cut = |text: &str| cut(text.as_bytes().chunks(pieces));
            assert_eq!(cut(&long(MAX_REQUEST_BYTES)).unwrap().len(), 1);
            assert_eq!(cut(&long(MAX_REQUEST_BYTES + 1)), Err(FramingError::TooLong));
            let spaces = " ".repeat(2 * MAX_REQUEST_BYTES);
            assert_eq!(
                cut(&format!("{spaces}{{}}{spaces}[]")).unwrap(),
                ["{}", "[]"],
                "what is between does not count"
            );
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 60, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::hash_map(any::<String>(), inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    // A failure prints its input and its seed.
    proptest! {
        #[test]
        fn a_stream_of_values_is_cut_into_them_wherever_it_is_torn(
            values in prop::collection::vec((json(), any::<bool>()), 1..6),
            tears in prop::collection::vec(1usize..40, 1..8),
        ) {
            let mut stream = String::new();
            for (value, pretty) in &values {
                stream += &if *pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) }.unwrap();
                // Two numbers beside each other would be one.
                stream.push(' ');
            }
            let (mut rest, mut pieces) = (stream.as_bytes(), Vec::new());
            for length in tears.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, after) = rest.split_at((*length).min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            let found: Vec<Value> =
                cut(pieces).unwrap().iter().map(|text| serde_json::from_str(text).unwrap()).collect();
            let expected: Vec<Value> = values.into_iter().map(|(value, _)| {
                // As it is after one way through a text: the last digit of a number may change.
                serde_json::from_str(&value.to_string()).unwrap()
            }).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_bytes_give_the_same_whole_or_one_by_one(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let run = |size: usize| {
                let (mut framer, mut values) = (Framer::default(), Vec::new());
                for mut piece in bytes.chunks(size) {
                    loop {
                        match framer.next(&mut piece) {
                            Ok(Some(value)) => values.push(value),
                            Ok(None) => break,
                            Err(error) => return (values, Some(error)),
                        }
                    }
                }
                (values, None)
            };
            prop_assert_eq!(run(1), run(300));
        }

        #[test]
        fn what_the_scanner_cuts_off_is_all_that_the_parser_takes(
            text in "[\\[\\]{}\",:0-9a-z \\\\]{0,60}",
        ) {
            // Whenever serde_json finds a whole first value, so does the scanner, and the same.
            let mut first = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
            if let Some(Ok(value)) = first.next() {
                let mut input = text.as_bytes();
                let mut framer = Framer::default();
                if let Some(found) = framer.next(&mut input).ok().flatten().or_else(|| framer.finish()) {
                    // A number that letters follow is two things to the one and garbage to the other.
                    if let Ok(found) = serde_json::from_slice::<Value>(&found) {
                        prop_assert_eq!(found, value);
                    }
                }
            }
        }
    }
}

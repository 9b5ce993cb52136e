//! The device ID string of a disk.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// virtio 1.2, section 5.2.6: the device ID string has 20 bytes.
pub const SERIAL_BYTES: usize = 20;

/// 1 to 20 printable ASCII characters.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Serial(String);

impl Serial {
    /// The device ID string of virtio 1.2, section 5.2.6: padded with zeroes, no terminator when it fills all 20 bytes.
    pub fn to_bytes(&self) -> [u8; SERIAL_BYTES] {
        let mut bytes = [0; SERIAL_BYTES];
        // Its length was checked when it was made.
        bytes.iter_mut().zip(self.0.bytes()).for_each(|(to, from)| *to = from);
        bytes
    }
}

/// A text is no device ID string.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("serial \"{text}\": use 1 to {SERIAL_BYTES} printable ASCII characters")]
pub struct SerialError {
    /// The text.
    text: String,
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        let fits = !text.is_empty() && text.len() <= SERIAL_BYTES;
        if fits && text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
            Ok(Serial(text.into()))
        } else {
            Err(SerialError { text: text.to_owned() })
        }
    }
}

impl TryFrom<String> for Serial {
    type Error = SerialError;

    fn try_from(text: String) -> Result<Self, SerialError> {
        text.parse()
    }
}

//! The namespace identification descriptor list.

use crate::Error;

/// The identifiers of a namespace from its descriptor list, CNS 03h (NVMe Base 2.0, figure 277).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Descriptors {
    pub eui64: Option<[u8; 8]>,
    pub nguid: Option<[u8; 16]>,
    pub uuid: Option<[u8; 16]>,
    /// Command Set Identifier: 0 is the NVM Command Set.
    pub command_set: Option<u8>,
}

impl Descriptors {
    pub(crate) fn parse(bytes: &[u8], namespace: u32) -> Result<Descriptors, Error> {
        let mut found = Descriptors::default();
        let mut rest = bytes;
        // Type (NIDT), length (NIDL), two reserved bytes, the identifier; a length of 0 ends the list.
        while let [kind, length, _, _, tail @ ..] = rest
            && *length != 0
        {
            let Some((id, tail)) = tail.split_at_checked((*length).into()) else {
                return Err(Error::Untrustworthy(format!(
                    "namespace {namespace}: identification descriptor of type {kind} with {length} bytes runs over the end"
                )));
            };
            let wrong = |_| {
                Error::Untrustworthy(format!(
                    "namespace {namespace}: identification descriptor of type {kind} with {length} bytes"
                ))
            };
            match kind {
                1 => found.eui64 = Some(id.try_into().map_err(wrong)?),
                2 => found.nguid = Some(id.try_into().map_err(wrong)?),
                3 => found.uuid = Some(id.try_into().map_err(wrong)?),
                4 => found.command_set = Some(<[u8; 1]>::try_from(id).map_err(wrong)?[0]),
                _ => {}
            }
            rest = tail;
        }
        Ok(found)
    }
}

//! What a controller can be asked and told: namespaces, features, log pages, abort, format.

use std::time::Duration;

use zerocopy::FromBytes;

use super::admin::{Admin, MAX_DATA, Patience};
use super::{Controller, ask, identify, lock};
use crate::quirks::Quirk;
use crate::spec::command::admin as opcode;
use crate::spec::features::{self, Feature, Select, VolatileWriteCache, Which};
use crate::spec::identify::{Descriptors, NamespaceContext, RawNamespace, cns};
use crate::spec::log_page::{self, ChangedNamespaces, ErrorEntry, Health, parse_namespace_list};
use crate::spec::registers::Version;
use crate::{Command, CommandId, Error, Namespace, Status};

/// The broadcast namespace identifier: all, or none in particular.
const ALL_NAMESPACES: u32 = u32::MAX;
/// More namespaces than this are not listed: no drive has them, so a longer list is a broken one.
const MAX_NAMESPACES: usize = 65_536;

/// No more are looked for where they have to be asked for one by one.
const MOST_LOOKED_FOR: u32 = 1024;

/// What a format does to the data that was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Erase {
    /// Nothing is promised about it.
    #[default]
    No = 0,
    /// All user data is erased.
    UserData = 1,
    /// The key it was encrypted with is erased.
    Cryptographic = 2,
}

/// How a namespace is to be formatted.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Bytes per logical block: 512 or 4096.
    pub block_bytes: u32,
    /// What happens to the old data.
    pub erase: Erase,
    /// How long the drive may take: seconds to hours.
    pub timeout: Duration,
}

impl Controller {
    /// Identifiers of the active namespaces, ascending (Identify CNS 02h, 1024 at a time).
    pub fn namespaces(&self) -> Result<Vec<u32>, Error> {
        let mut admin = lock(&self.inner.admin);
        let max = self.inner.identity.max_namespace_id;
        if self.inner.identity.version < Version::new(1, 1) {
            // Lists came with 1.1; before, all namespaces were active.
            return Ok((1..=max.min(MAX_NAMESPACES as u32)).collect());
        }
        if self.inner.identity.quirks.has(Quirk::NoNamespaceList) {
            return self.look_for_namespaces(&mut admin);
        }
        let mut ids = Vec::new();
        loop {
            let after = ids.last().copied().unwrap_or(0);
            let page = self.identify(&mut admin, cns::ACTIVE_NAMESPACES, after, "active namespaces")?;
            let more = parse_namespace_list(&page, after, max)?;
            let full = more.len() == page.len() / 4;
            ids.extend(more);
            if ids.len() > MAX_NAMESPACES {
                return Err(Error::Untrustworthy(format!("more than {MAX_NAMESPACES} active namespaces")));
            }
            // NN is the largest there can be, and FFFFFFFEh the largest to ask behind.
            if !full || ids.last().is_some_and(|&last| last >= max) {
                return Ok(ids);
            }
        }
    }

    /// The active namespaces of a controller that cannot list them: those of which it says something.
    fn look_for_namespaces(&self, admin: &mut Admin) -> Result<Vec<u32>, Error> {
        let all = 1..=self.inner.identity.max_namespace_id.min(MOST_LOOKED_FOR);
        let mut ids = Vec::new();
        for id in all {
            if self.identify_namespace(admin, id)?.is_some() {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// A namespace as it is now. Refused if its format cannot be served, with the format's name.
    pub fn namespace(&self, id: u32) -> Result<Namespace, Error> {
        let raw = {
            let mut admin = lock(&self.inner.admin);
            self.identify_namespace(&mut admin, id)?
        };
        let Some(raw) = raw else { return Err(self.no_such_namespace(id)) };
        let raw = RawNamespace::ref_from_bytes(&raw)
            .map_err(|_| Error::Untrustworthy("Identify data of wrong size".into()))?;
        let mut admin = lock(&self.inner.admin);
        let descriptors = self.identify_descriptors(&mut admin, id)?;
        let write_cache_enabled = self.inner.identity.volatile_write_cache && {
            let mut known = lock(&self.inner.write_cache);
            match self.get::<VolatileWriteCache>(&mut admin, Select::Current, &()) {
                Ok(cache) => *known.insert(cache.enabled),
                // Not to find it out is no news. One that never says whether its cache is used: flushes are harmless, lost data
                // is not.
                Err(Error::Command { .. }) => known.unwrap_or(true),
                Err(error) => return Err(error),
            }
        };
        let context = NamespaceContext {
            id,
            identity: &self.inner.identity,
            limits: &self.inner.limits,
            descriptors: &descriptors,
            write_cache_enabled,
        };
        Namespace::parse(raw, &context)
    }

    fn no_such_namespace(&self, namespace: u32) -> Error {
        match self.namespaces() {
            Ok(active) if active.contains(&namespace) => {
                Error::Untrustworthy(format!("namespace {namespace} is active, and Identify says nothing of it"))
            }
            Ok(active) => Error::NoSuchNamespace { namespace, active: active.into_iter().take(16).collect() },
            Err(error) => error,
        }
    }

    /// Identify CNS 00h; `None` when the controller says that there is no such namespace.
    fn identify_namespace(&self, admin: &mut Admin, id: u32) -> Result<Option<Vec<u8>>, Error> {
        if id == 0 || id > self.inner.identity.max_namespace_id {
            return Ok(None);
        }
        match self.identify(admin, cns::NAMESPACE, id, "namespace") {
            // An inactive namespace reads as zeroes (NVMe Base 2.0, 5.17.2.1).
            Ok(data) if data.iter().all(|&byte| byte == 0) => Ok(None),
            Ok(data) => Ok(Some(data)),
            Err(Error::Command { status, .. }) if status.kind() == Status::INVALID_NAMESPACE => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn identify_descriptors(&self, admin: &mut Admin, id: u32) -> Result<Descriptors, Error> {
        // The list came with 1.3.
        let identity = &self.inner.identity;
        if identity.version < Version::new(1, 3) || identity.quirks.has(Quirk::NoDescriptors) {
            return Ok(Descriptors::default());
        }
        match self.identify(admin, cns::NAMESPACE_DESCRIPTORS, id, "namespace descriptors") {
            Ok(data) => Descriptors::parse(&data, id),
            // Identifiers are a convenience; several drives do without.
            Err(Error::Command { status, .. }) => {
                log::debug!("namespace {id} has no identification descriptors: {status}");
                Ok(Descriptors::default())
            }
            Err(error) => Err(error),
        }
    }

    fn identify(&self, admin: &mut Admin, structure: u8, namespace: u32, name: &str) -> Result<Vec<u8>, Error> {
        identify(&self.inner.hardware, admin, self.asking(), structure, namespace, name)
    }

    /// A feature's value: what is in force, or another one (`select`; only if the controller supports it). `which` is `&()` for most.
    pub fn get_feature<F: Feature>(&self, select: Select, which: &F::Which) -> Result<F, Error> {
        self.get(&mut lock(&self.inner.admin), select, which)
    }

    fn get<F: Feature>(&self, admin: &mut Admin, select: Select, which: &F::Which) -> Result<F, Error> {
        if select != Select::Current && !self.inner.identity.supports_feature_select {
            return Err(Error::Unsupported(format!("asking for other than the current value of {}", F::NAME)));
        }
        let command = Command::new(opcode::GET_FEATURES, 0)
            .with_cdw10(u32::from(F::ID) | (select as u32) << 8)
            .with_cdw11(which.to_dword());
        let name = || format!("Get Features ({})", F::NAME);
        ask(|| admin.execute(&self.inner.hardware, command, self.asking(), name)).map(F::from_dword)
    }

    /// Sets a feature until the next reset, or for good with `save`. Returns the completion's dword 0, which few features use.
    ///
    /// A [`Namespace`] asked for before does not learn of a write cache that is switched on or off.
    pub fn set_feature<F: Feature>(&self, value: &F, save: bool) -> Result<u32, Error> {
        let identity = &self.inner.identity;
        // ONCS bit 4 stands for both, Save and Select (NVMe Base 2.0, figure 275).
        if save && !identity.supports_feature_select {
            return Err(Error::Unsupported(format!("saving {} over a reset (ONCS bit 4)", F::NAME)));
        }
        if F::ID == features::id::VOLATILE_WRITE_CACHE && !identity.volatile_write_cache {
            return Err(Error::Unsupported("a volatile write cache (VWC)".into()));
        }
        let command = Command::new(opcode::SET_FEATURES, 0)
            .with_cdw10(u32::from(F::ID) | u32::from(save) << 31)
            .with_cdw11(value.to_dword());
        let name = || format!("Set Features ({})", F::NAME);
        lock(&self.inner.admin).execute(&self.inner.hardware, command, self.inner.options.needed(), name)
    }

    /// `bytes` (a multiple of 4) of a log page from `offset` (a multiple of 4) on. Reading clears the events that belong to it.
    ///
    /// Offsets, and more than 4 KiB in one piece, need a controller with [`crate::ControllerIdentity::log_page_offsets`].
    pub fn get_log_page(&self, id: u8, namespace: Option<u32>, offset: u64, bytes: usize) -> Result<Vec<u8>, Error> {
        let namespace = namespace.unwrap_or(ALL_NAMESPACES);
        self.read_log_page(&mut lock(&self.inner.admin), id, namespace, offset, bytes)
    }

    /// The error log, newest entry first.
    pub fn error_log(&self) -> Result<Vec<ErrorEntry>, Error> {
        self.read_error_log(&mut lock(&self.inner.admin))
    }

    /// The SMART / health log of the controller.
    pub fn health_log(&self) -> Result<Health, Error> {
        self.read_health_log(&mut lock(&self.inner.admin))
    }

    /// The namespaces that changed since this log was read last. [`super::Event::NamespacesChanged`] has read it already.
    pub fn changed_namespaces(&self) -> Result<ChangedNamespaces, Error> {
        if !self.inner.identity.namespace_events {
            return Err(Error::Unsupported("telling which namespaces have changed (OAES bit 8)".into()));
        }
        self.read_changed_namespaces(&mut lock(&self.inner.admin))
    }

    pub(super) fn read_error_log(&self, admin: &mut Admin) -> Result<Vec<ErrorEntry>, Error> {
        let mut entries = usize::from(self.inner.identity.error_log_entries);
        if !self.inner.identity.log_page_offsets {
            entries = entries.min(PIECE / ErrorEntry::BYTES);
        }
        let page =
            self.read_log_page(admin, log_page::id::ERROR_INFORMATION, ALL_NAMESPACES, 0, entries * ErrorEntry::BYTES)?;
        Ok(ErrorEntry::parse(&page))
    }

    pub(super) fn read_health_log(&self, admin: &mut Admin) -> Result<Health, Error> {
        Health::parse(&self.read_log_page(admin, log_page::id::SMART_HEALTH, ALL_NAMESPACES, 0, Health::BYTES)?)
    }

    pub(super) fn read_changed_namespaces(&self, admin: &mut Admin) -> Result<ChangedNamespaces, Error> {
        let page =
            self.read_log_page(admin, log_page::id::CHANGED_NAMESPACES, ALL_NAMESPACES, 0, ChangedNamespaces::BYTES)?;
        ChangedNamespaces::parse(&page, self.inner.identity.max_namespace_id)
    }

    /// Get Log Page (NVMe Base 2.0, 5.16), in as many commands as the transfer limit asks for.
    ///
    /// Only the last one clears the events: their log must not change between two pieces.
    pub(super) fn read_log_page(
        &self,
        admin: &mut Admin,
        id: u8,
        namespace: u32,
        offset: u64,
        bytes: usize,
    ) -> Result<Vec<u8>, Error> {
        let identity = &self.inner.identity;
        // Retain Asynchronous Event came with 1.3; the bit was reserved before.
        let retain: u32 = if identity.version < Version::new(1, 3) { 0 } else { 1 << 15 };
        if bytes == 0
            || !bytes.is_multiple_of(4)
            || !offset.is_multiple_of(4)
            || offset.checked_add(bytes as u64).is_none()
        {
            return Err(Error::Invalid(format!(
                "a log page is read in multiples of 4 bytes, not {bytes} from {offset} on"
            )));
        }
        if !identity.log_page_offsets && (offset > 0 || bytes > PIECE) {
            return Err(Error::Unsupported(format!(
                "log pages by offset (LPA bit 2), needed for {bytes} bytes from {offset} on"
            )));
        }
        let piece = identity.max_transfer.map_or(MAX_DATA, |limit| MAX_DATA.min(limit as usize));
        let mut page = Vec::with_capacity(bytes);
        for (at, length, last) in pieces(offset, bytes, piece) {
            let dwords = (length / 4 - 1) as u32;
            let command = Command::new(opcode::GET_LOG_PAGE, namespace)
                .with_cdw10(dwords << 16 | if last { 0 } else { retain } | u32::from(id))
                .with_cdw11(dwords >> 16)
                .with_cdw12(at as u32)
                .with_cdw13((at >> 32) as u32);
            let name = || format!("Get Log Page ({id:#04x}, {length} bytes from {at} on)");
            page.extend(ask(|| admin.execute_in(&self.inner.hardware, command, length, self.asking(), name))?);
        }
        Ok(page)
    }

    /// Asks the controller to abort a command of a queue pair; true if it says that it did. The command completes either way,
    /// or never: an abort is only advice, and what helps against a command that is stuck is [`Controller::reset`].
    pub fn abort(&self, queue_pair: u16, command: CommandId) -> Result<bool, Error> {
        let abort = Command::new(opcode::ABORT, 0).with_cdw10(u32::from(command.0) << 16 | u32::from(queue_pair));
        let name = || format!("Abort (command {:#06x} of queue {queue_pair})", command.0);
        // Bit 0 of the result: 0 aborted, 1 not (NVMe Base 2.0, 5.1).
        lock(&self.inner.admin).execute(&self.inner.hardware, abort, self.asking(), name).map(|result| result & 1 == 0)
    }

    /// Formats a namespace, without metadata and protection: **its data is lost**. Returns it as it is then.
    ///
    /// Nothing may be outstanding on it. Where [`crate::ControllerIdentity::formats_all_namespaces`] is set, or
    /// [`crate::ControllerIdentity::erases_all_namespaces`] and something is to be erased, all namespaces lose their data: ask for
    /// each of them again.
    pub fn format(&self, namespace: u32, options: &FormatOptions) -> Result<Namespace, Error> {
        if !self.inner.identity.supports_format {
            return Err(Error::Unsupported("Format NVM".into()));
        }
        if options.erase == Erase::Cryptographic && !self.inner.identity.supports_cryptographic_erase {
            return Err(Error::Unsupported("erasing by throwing the key away (FNA bit 2)".into()));
        }
        let shift = match options.block_bytes {
            512 => 9,
            4096 => 12,
            other => return Err(Error::Invalid(format!("blocks of {other} bytes; 512 and 4096 are possible"))),
        };
        let data = self.identify_namespace(&mut lock(&self.inner.admin), namespace)?;
        let Some(data) = data else { return Err(self.no_such_namespace(namespace)) };
        let raw = RawNamespace::ref_from_bytes(&data)
            .map_err(|_| Error::Untrustworthy("Identify data of wrong size".into()))?;
        let Some(format) = raw.format_with(shift) else {
            return Err(Error::Unsupported(format!(
                "a format of {} bytes per block without metadata for namespace {namespace}",
                options.block_bytes
            )));
        };
        // LBAFL 3:0, SES 11:9, LBAFU 13:12; MSET, PI and PIL stay 0 (NVMe Base 2.0, 5.14).
        let format = u32::from(format);
        let dword = format & 0xf | (options.erase as u32) << 9 | (format >> 4 & 3) << 12;
        let command = Command::new(opcode::FORMAT_NVM, namespace).with_cdw10(dword);
        let name = || format!("Format NVM (namespace {namespace}, LBA format {format})");
        lock(&self.inner.admin).execute(&self.inner.hardware, command, Patience::needed(options.timeout), name)?;
        self.namespace(namespace)
    }
}

/// What every controller gives of a log page in one command.
const PIECE: usize = 4096;

/// `bytes` from `offset` on in pieces of at most `limit`: where each begins, its length, whether it is the last.
fn pieces(offset: u64, bytes: usize, limit: usize) -> impl Iterator<Item = (u64, usize, bool)> {
    (0..bytes).step_by(limit).map(move |at| {
        let length = limit.min(bytes - at);
        (offset + at as u64, length, at + length == bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_piece_is_the_last() {
        assert_eq!(pieces(8, 100, 100).collect::<Vec<_>>(), [(8, 100, true)]);
        assert_eq!(pieces(0, 96, 40).collect::<Vec<_>>(), [(0, 40, false), (40, 40, false), (80, 16, true)]);
        assert_eq!(pieces(4, 80, 40).collect::<Vec<_>>(), [(4, 40, false), (44, 40, true)]);
    }
}

//! The TOML file. A mistake within an export costs that export, one elsewhere the whole file; all are found, not only the first.
//!
//! Nothing is opened here: a file that is read has no effect.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::bounds::{DEFAULT_QUEUE_SIZE, DEFAULT_QUEUES};
use super::cpu_list::CpuList;
use super::error::{ConfigError, FileFault, Mistake, ValueError};
use super::values;
use super::{Configuration, DriveSettings, DriveTimeouts, ExportSettings, Listen, RefusedExport, Serial, Settings};
use crate::drive::{DeviceAddress, socket_path};
use crate::virtio::memory::Limits;

/// Reads the configuration from a TOML file.
///
/// # Errors
/// Nothing of it can be served. Mistakes that cost single exports are in the configuration.
pub fn load(path: &Path) -> Result<Configuration, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    parse(&text, &path.display().to_string()).map_err(ConfigError::File)
}

pub(super) fn parse(text: &str, name: &str) -> Result<Configuration, Vec<Mistake>> {
    let source = Source { text, name };
    // What follows a mistake in the syntax may mean anything.
    let table = DeTable::parse(text).map_err(|error| {
        let place = error.span().unwrap_or(0..0);
        vec![source.tell(source.line(place), FileFault::Syntax(error.message().to_owned()))]
    })?;
    let span = table.span();
    let mut top = Section::new(source, span, table.into_inner());
    let cpus = top.take::<CpuList>("cpus");
    let io_timeout = top.checked("io-timeout", values::io_timeout);
    let hold = top.checked("hold", values::hold);
    let bytes = top.checked("guest-memory-limit", |text: String| values::guest_memory(&text));
    let regions = top.checked("guest-regions-limit", values::guest_regions);
    let place = top.place_of("rpc-socket");
    let rpc_socket = top.take::<PathBuf>("rpc-socket");
    if let Some(fault) = rpc_socket.as_deref().map(socket_path).and_then(Result::err) {
        top.wrong(place, fault);
    }
    let sections = top.sections("export");
    let drives = top.sections("drive");
    let mut mistakes = top.finish();
    if sections.is_empty() && mistakes.is_empty() {
        mistakes.push(Mistake { file: name.to_owned(), line: None, fault: FileFault::NoExport });
    }
    let mut exports: Vec<ExportSection> = sections.into_iter().map(ExportSection::read).collect();
    let drives = read_drives(source, drives, &mut exports, &mut mistakes);
    find_common_sockets(source, &mut exports);
    find_common_files(source, &mut exports);
    let none_is_left = exports.iter().all(|export| !export.mistakes.is_empty());
    if !mistakes.is_empty() || none_is_left {
        mistakes.extend(exports.into_iter().flat_map(|export| export.mistakes));
        return Err(mistakes);
    }
    let timeouts = DriveTimeouts::with(io_timeout, hold);
    let memory = Limits::with(bytes, regions);
    let settings =
        Settings { cpus: cpus.unwrap_or_default().0, timeouts, memory, exports: Vec::new(), rpc_socket, drives };
    let mut configuration = Configuration { settings, refused: Vec::new() };
    for ExportSection { socket, settings, mistakes, .. } in exports {
        match settings.filter(|_| mistakes.is_empty()) {
            Some(settings) => configuration.settings.exports.push(settings),
            None => configuration.refused.push(RefusedExport { socket, mistakes }),
        }
    }
    Ok(configuration)
}

/// What stands in an `[[export]]` section.
struct ExportSection {
    /// Where it says its socket.
    line: usize,
    /// As it is written.
    socket: Option<PathBuf>,
    /// If every value makes sense.
    settings: Option<ExportSettings>,
    mistakes: Vec<Mistake>,
}

impl ExportSection {
    fn read(mut section: Section) -> ExportSection {
        let source = section.source;
        let line = source.line(section.place_of("socket-path"));
        let device = section.required::<DeviceAddress>("device");
        let socket = section.required::<PathBuf>("socket-path");
        let wrong_path = socket.as_deref().map(socket_path).and_then(Result::err);
        let place = section.place_of("namespace");
        let namespace = section.checked("namespace", values::namespace);
        let queues = section.checked("queues", values::queues);
        let queue_size = section.checked("queue-size", values::queue_size);
        let queue_pairs = section.checked("queue-pairs", values::queue_pairs);
        let read_only = section.take::<bool>("read-only");
        let serial = section.take::<Serial>("serial");
        let mut mistakes = section.finish();
        mistakes.extend(wrong_path.map(|fault| source.tell(line, fault)));
        let settings = device.zip(socket.clone()).map(|(device, socket)| ExportSettings {
            device,
            listen: Listen::Path(socket),
            namespace,
            queues: queues.unwrap_or(DEFAULT_QUEUES),
            queue_size: queue_size.unwrap_or(DEFAULT_QUEUE_SIZE),
            queue_pairs,
            read_only: read_only.unwrap_or_default(),
            serial,
        });
        if let Some(fault) = settings.as_ref().filter(|_| mistakes.is_empty()).and_then(ExportSettings::mistake) {
            mistakes.push(source.tell(source.line(place), fault));
        }
        ExportSection { line, socket, settings, mistakes }
    }
}

/// The drives' own settings. What is wrong with them costs the exports of that drive; without one, the file.
fn read_drives(
    source: Source,
    sections: Vec<Section>,
    exports: &mut [ExportSection],
    mistakes: &mut Vec<Mistake>,
) -> Vec<DriveSettings> {
    let mut drives: Vec<(usize, DriveSettings)> = Vec::new();
    for mut section in sections {
        let line = source.line(section.span.clone());
        let place = section.place_of("device");
        let device = section.required::<DeviceAddress>("device");
        let twice = drives.iter().find(|(_, other)| Some(&other.device) == device.as_ref());
        if let Some((earlier, other)) = twice {
            section.wrong(place, FileFault::TwoDriveSections { drive: other.device.clone(), earlier: *earlier });
        }
        let sgl = section.take::<bool>("sgl");
        let discard = section.take::<bool>("discard");
        let write_zeroes = section.take::<bool>("write-zeroes");
        let shadow_doorbells = section.take::<bool>("shadow-doorbells");
        let ready_timeout = section.checked("ready-timeout", values::drive_timeout);
        let admin_timeout = section.checked("admin-timeout", values::drive_timeout);
        let shutdown_timeout = section.checked("shutdown-timeout", values::drive_timeout);
        let queue_pairs = section.checked("queue-pairs", values::queue_pairs);
        let wrong = section.finish();
        let of_it = |export: &ExportSection| {
            device.as_ref().is_some_and(|device| export.settings.as_ref().is_some_and(|its| its.device == *device))
        };
        let mut its: Vec<&mut ExportSection> = exports.iter_mut().filter(|export| of_it(export)).collect();
        match (wrong.is_empty(), its.split_first_mut()) {
            (true, _) => {}
            (false, None) => mistakes.extend(wrong),
            (false, Some((first, others))) => {
                let fault = FileFault::DriveSection { line };
                others.iter_mut().for_each(|export| export.mistakes.push(source.tell(export.line, fault.clone())));
                first.mistakes.extend(wrong);
                continue;
            }
        }
        if let Some(device) = device {
            let settings = DriveSettings {
                device,
                sgl,
                discard,
                write_zeroes,
                shadow_doorbells,
                ready_timeout,
                admin_timeout,
                shutdown_timeout,
                queue_pairs,
            };
            drives.push((line, settings));
        }
    }
    drives.into_iter().map(|(_, settings)| settings).collect()
}

/// Of two exports with one socket nobody can tell which is meant: a guest must not find the other's disk there.
fn find_common_sockets(source: Source, exports: &mut [ExportSection]) {
    let mut users: BTreeMap<PathBuf, Vec<usize>> = BTreeMap::new();
    for (index, export) in exports.iter().enumerate() {
        if let Some(socket) = export.socket.clone().filter(|socket| !socket.as_os_str().is_empty()) {
            users.entry(socket).or_default().push(index);
        }
    }
    for (socket, indexes) in users.iter().filter(|(_, indexes)| indexes.len() > 1) {
        for index in indexes {
            let others: Vec<String> =
                indexes.iter().filter(|other| *other != index).map(|other| exports[*other].line.to_string()).collect();
            let fault = FileFault::SharedSocket { socket: socket.clone(), others: others.join(" and line ") };
            let line = exports[*index].line;
            exports[*index].mistakes.push(source.tell(line, fault));
        }
    }
}

/// A file can be that of one embedded controller only.
fn find_common_files(source: Source, exports: &mut [ExportSection]) {
    let mut users: BTreeMap<PathBuf, DeviceAddress> = BTreeMap::new();
    for export in exports.iter_mut().filter(|export| export.mistakes.is_empty()) {
        let Some(device) = export.settings.as_ref().map(|settings| settings.device.clone()) else { continue };
        for file in device.files() {
            let user = users.entry(file.clone()).or_insert_with(|| device.clone());
            if *user != device {
                let fault = FileFault::SharedFile { drive: device.clone(), other: user.clone(), file: file.clone() };
                export.mistakes.push(source.tell(export.line, fault));
                break;
            }
        }
    }
}

/// The text of a file, and what it is called.
#[derive(Clone, Copy)]
struct Source<'a> {
    text: &'a str,
    name: &'a str,
}

impl Source<'_> {
    fn line(&self, place: Range<usize>) -> usize {
        self.text.as_bytes()[..place.start.min(self.text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
    }

    fn tell(&self, line: usize, fault: impl Into<FileFault>) -> Mistake {
        Mistake { file: self.name.to_owned(), line: Some(line), fault: fault.into() }
    }
}

/// A table of the file, of which one key after the other is taken.
struct Section<'a> {
    source: Source<'a>,
    /// Where it begins.
    span: Range<usize>,
    left: DeTable<'a>,
    known: Vec<&'static str>,
    /// Each with its place.
    mistakes: Vec<(usize, Mistake)>,
}

impl<'a> Section<'a> {
    fn new(source: Source<'a>, span: Range<usize>, table: DeTable<'a>) -> Section<'a> {
        Section { source, span, left: table, known: Vec::new(), mistakes: Vec::new() }
    }

    fn wrong(&mut self, place: Range<usize>, fault: impl Into<FileFault>) {
        let mistake = self.source.tell(self.source.line(place.clone()), fault);
        self.mistakes.push((place.start, mistake));
    }

    /// Where the value of a key stands; without one: the section.
    fn place_of(&self, key: &str) -> Range<usize> {
        self.left.get(key).map_or_else(|| self.span.clone(), Spanned::span)
    }

    /// The value of a key, if it is there and makes sense.
    fn take<T: Deserialize<'a>>(&mut self, key: &'static str) -> Option<T> {
        self.checked(key, Ok::<T, ValueError>)
    }

    /// The value of a key that has to be there, if it makes sense.
    fn required<T: Deserialize<'a>>(&mut self, key: &'static str) -> Option<T> {
        if !self.left.contains_key(key) {
            self.wrong(self.span.clone(), FileFault::Missing(key));
        }
        self.take(key)
    }

    /// The value of a key, if it is there, makes sense and keeps its rule.
    fn checked<N: Deserialize<'a>, T>(
        &mut self,
        key: &'static str,
        check: impl FnOnce(N) -> Result<T, ValueError>,
    ) -> Option<T> {
        self.known.push(key);
        let value = self.left.remove(key)?;
        let place = value.span();
        let value = N::deserialize(value.into_deserializer())
            .map_err(|error| FileFault::Type(error.message().to_owned()))
            .and_then(|value| check(value).map_err(FileFault::Value));
        value.map_err(|fault| self.wrong(place, fault)).ok()
    }

    /// The sections in an array of tables.
    fn sections(&mut self, key: &'static str) -> Vec<Section<'a>> {
        self.known.push(key);
        let Some(value) = self.left.remove(key) else { return Vec::new() };
        let place = value.span();
        let wrong = |this: &mut Self, place| this.wrong(place, FileFault::NoSection(key));
        let DeValue::Array(values) = value.into_inner() else {
            wrong(self, place);
            return Vec::new();
        };
        let mut sections = Vec::new();
        for value in values {
            let place = value.span();
            match value.into_inner() {
                DeValue::Table(table) => sections.push(Section::new(self.source, place, table)),
                _ => wrong(self, place),
            }
        }
        sections
    }

    /// What is wrong with it, in the order of the file. A key that is left is not known.
    fn finish(mut self) -> Vec<Mistake> {
        let expected = self.known.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        for (key, _) in std::mem::take(&mut self.left) {
            let fault = FileFault::Unknown { key: key.get_ref().to_string(), expected: expected.clone() };
            self.wrong(key.span(), fault);
        }
        self.mistakes.sort_by_cached_key(|(place, mistake)| (*place, mistake.to_string()));
        self.mistakes.into_iter().map(|(_, mistake)| mistake).collect()
    }
}

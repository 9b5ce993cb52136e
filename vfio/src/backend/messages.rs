//! The messages of the vfio-user protocol, version 0.1, as its specification lays them out (`docs/vfio-user.rst` of
//! libvfio-user; the names of its sections are cited). All numbers are in the byte order of the machine.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What every message begins with ("Header").
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    /// Chosen by who sends the command; the reply has the same.
    pub id: u16,
    /// What is asked; a reply repeats the command it answers.
    pub command: u16,
    /// Bytes of the message, those of the header included.
    pub bytes: u32,
    /// [`FLAGS_TYPE`] and what follows it.
    pub flags: u32,
    /// In a reply with [`FLAG_ERROR`]: an errno.
    pub error: u32,
}

/// Flags: which kind of message it is ("Header", flags, "Type").
pub(super) const FLAGS_TYPE: u32 = 0xf;
/// The kind of a reply in the flags of a message; a command has 0.
pub(super) const TYPE_REPLY: u32 = 1;
/// A command that wants no reply.
pub(super) const FLAG_NO_REPLY: u32 = 1 << 4;
/// A reply to a command that failed; it may have no payload.
pub(super) const FLAG_ERROR: u32 = 1 << 5;

/// A command and its number ("Commands").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Command {
    Version = 1,
    DmaMap = 2,
    DmaUnmap = 3,
    GetInfo = 4,
    GetRegionInfo = 5,
    GetIrqInfo = 7,
    SetIrqs = 8,
    RegionRead = 9,
    RegionWrite = 10,
    Reset = 13,
}

/// The version that is spoken here, before the text of VERSION ("VFIO_USER_VERSION").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Version {
    pub major: u16,
    pub minor: u16,
}

/// "VFIO_USER_DMA_MAP"; the reply is a header.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct DmaMap {
    pub argsz: u32,
    pub flags: u32,
    /// Where the memory begins in its file.
    pub offset: u64,
    pub address: u64,
    pub bytes: u64,
}

/// Flags of [`DmaMap`]: the device may read and write.
pub(super) const DMA_READ_WRITE: u32 = 3;

/// "VFIO_USER_DMA_UNMAP"; the reply repeats it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DmaUnmap {
    pub argsz: u32,
    pub flags: u32,
    pub address: u64,
    pub bytes: u64,
}

/// "VFIO_USER_DEVICE_GET_INFO", asked and answered.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Info {
    pub argsz: u32,
    pub flags: u32,
    pub regions: u32,
    pub irqs: u32,
}

/// "VFIO_USER_DEVICE_GET_REGION_INFO", asked and answered; capabilities may follow the answer.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RegionInfo {
    /// In an answer: what this and the capabilities take, which may be more than was sent.
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    /// Where the first capability begins, counted from the beginning of this; 0 if there is none.
    pub first_capability: u32,
    pub bytes: u64,
    /// Where the region begins in its file.
    pub offset: u64,
}

/// What a capability of a region begins with ("VFIO region info cap header").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Capability {
    pub id: u16,
    pub version: u16,
    /// Where the next one begins, as in [`RegionInfo::first_capability`]; 0 if there is none.
    pub next: u32,
}

/// After [`Capability`], in that of the mappable areas ("VFIO region info cap sparse mmap"); the areas follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SparseAreas {
    pub areas: u32,
    pub reserved: u32,
}

/// A mappable area.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Area {
    pub offset: u64,
    pub bytes: u64,
}

/// "VFIO_USER_DEVICE_GET_IRQ_INFO", asked and answered.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IrqInfo {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub count: u32,
}

/// "VFIO_USER_DEVICE_SET_IRQS"; the reply is a header.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct SetIrqs {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub start: u32,
    pub count: u32,
}

/// "VFIO_USER_REGION_READ" and "VFIO_USER_REGION_WRITE", asked and answered. The data follow a write, and the answer to a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Access {
    pub offset: u64,
    pub region: u32,
    pub bytes: u32,
}

const _: () = {
    assert!(size_of::<Header>() == 16);
    assert!(size_of::<Version>() == 4);
    assert!(size_of::<DmaMap>() == 32);
    assert!(size_of::<DmaUnmap>() == 24);
    assert!(size_of::<Info>() == 16);
    assert!(size_of::<RegionInfo>() == 32);
    assert!(size_of::<Capability>() == 8);
    assert!(size_of::<SparseAreas>() == 8);
    assert!(size_of::<Area>() == 16);
    assert!(size_of::<IrqInfo>() == 16);
    assert!(size_of::<SetIrqs>() == 20);
    assert!(size_of::<Access>() == 16);
};

//! The front-end side: a connection to a target and what the disk says of itself.

use std::io;
use std::os::fd::AsRawFd;

use vfio::PlainMemory;
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport,
    VirtioFeatureFlags, VirtioTransport,
};

use crate::{ClientOptions, Error};

/// virtio-blk counts in sectors of this size, whatever the disk's block size (virtio 1.2, 5.2.4).
const SECTOR: u64 = 512;

/// What a disk says of itself (virtio 1.2, 5.2.3 and 5.2.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Capacity, in logical blocks.
    pub blocks: u64,
    /// Bytes per logical block.
    pub block_bytes: usize,
    /// Queues the device offers.
    pub queues: usize,
    /// Writes are refused.
    pub read_only: bool,
    /// Flush is offered.
    pub flush: bool,
    /// Longest discard, in logical blocks; 0: not offered.
    pub max_discard_blocks: u32,
    /// Longest write zeroes, in logical blocks; 0: not offered.
    pub max_write_zeroes_blocks: u32,
    /// Data segments a request may have, if the device says.
    pub segments: Option<u32>,
    /// The virtio features that both sides speak.
    pub features: u64,
}

/// A connected disk, its queues not yet set up.
pub(crate) struct Connection {
    transport: Box<VirtioBlkTransport>,
    options: ClientOptions,
    info: DiskInfo,
}

impl Connection {
    /// Connects and negotiates.
    pub(crate) fn open(options: &ClientOptions) -> Result<Connection, Error> {
        let path = &options.socket;
        let text =
            path.to_str().ok_or_else(|| Error::Options(format!("the socket path {} is not UTF-8", path.display())))?;
        let mut wanted = VirtioFeatureFlags::VERSION_1.bits() | blk_features().bits();
        if options.packed {
            wanted |= VirtioFeatureFlags::RING_PACKED.bits();
        }
        if options.wants_event_idx() {
            wanted |= VirtioFeatureFlags::RING_EVENT_IDX.bits();
        }
        let transport: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> =
            VhostUser::new(text, wanted).map_err(|source| Error::Connect { path: path.clone(), source })?;
        let features = transport.get_features();
        let missing = |feature, advice| Error::Feature { path: path.clone(), feature, advice };
        if features & VirtioFeatureFlags::VERSION_1.bits() == 0 {
            return Err(missing("virtio 1.0 (VERSION_1)", "use a current target"));
        }
        if options.packed && features & VirtioFeatureFlags::RING_PACKED.bits() == 0 {
            return Err(missing("packed rings (RING_PACKED)", "leave the packed option out"));
        }
        let config = transport.get_config().map_err(setup(options, "reading the configuration space"))?;
        let info = DiskInfo::new(features, &config, options)?;
        Ok(Connection { transport: Box::new(transport), options: options.clone(), info })
    }

    pub(crate) fn info(&self) -> &DiskInfo {
        &self.info
    }

    /// Shares `memory` with the target.
    pub(crate) fn share(&mut self, memory: &mut PlainMemory) -> Result<(), Error> {
        let bytes = memory.len();
        let address = memory.as_mut_slice().as_ptr() as usize;
        self.transport
            .map_mem_region(address, bytes, memory.file().as_raw_fd(), 0)
            .map(drop)
            .map_err(setup(&self.options, "sharing memory (ADD_MEM_REG)"))
    }

    /// Sets up and starts the queues.
    ///
    /// The queues live in memory of the connection and must be dropped before it.
    pub(crate) fn start_queues<C>(&mut self) -> Result<Vec<VirtioBlkQueue<'static, C>>, Error> {
        let size = self.options.ring_size()?;
        let queues = self.options.queues;
        if queues > self.info.queues {
            return Err(Error::Options(format!(
                "{} offers {} queues, {queues} were asked for; ask for fewer",
                self.options.socket.display(),
                self.info.queues
            )));
        }
        VirtioBlkQueue::setup_queues(&mut *self.transport, queues, size)
            .map_err(setup(&self.options, "setting up the queues"))
    }

    pub(crate) fn transport(&self) -> &VirtioBlkTransport {
        &*self.transport
    }
}

/// The block features this client understands.
fn blk_features() -> VirtioBlkFeatureFlags {
    VirtioBlkFeatureFlags::SEG_MAX
        | VirtioBlkFeatureFlags::RO
        | VirtioBlkFeatureFlags::BLK_SIZE
        | VirtioBlkFeatureFlags::FLUSH
        | VirtioBlkFeatureFlags::TOPOLOGY
        | VirtioBlkFeatureFlags::CONFIG_WCE
        | VirtioBlkFeatureFlags::MQ
        | VirtioBlkFeatureFlags::DISCARD
        | VirtioBlkFeatureFlags::WRITE_ZEROES
}

fn setup(options: &ClientOptions, what: &str) -> impl FnOnce(io::Error) -> Error {
    let (path, what) = (options.socket.clone(), what.to_owned());
    move |source| Error::Setup { path, what, source }
}

impl DiskInfo {
    fn new(features: u64, config: &VirtioBlkConfig, options: &ClientOptions) -> Result<DiskInfo, Error> {
        let has = |flag| VirtioBlkFeatureFlags::from_bits_truncate(features).contains(flag);
        let block_bytes = match config.blk_size.to_native() {
            size if has(VirtioBlkFeatureFlags::BLK_SIZE) => size,
            _ => SECTOR as u32,
        };
        if !block_bytes.is_power_of_two() || !(512..=65536).contains(&block_bytes) {
            return Err(Error::Options(format!(
                "{} says that its blocks have {block_bytes} bytes; a power of two from 512 to 65536 was expected",
                options.socket.display()
            )));
        }
        let sectors_per_block = u64::from(block_bytes) / SECTOR;
        let limit = |flag, sectors: u32| match has(flag) {
            // The quotient of a 32-bit number is one.
            true => (u64::from(sectors) / sectors_per_block) as u32,
            false => 0,
        };
        Ok(DiskInfo {
            blocks: config.capacity.to_native() / sectors_per_block,
            block_bytes: block_bytes as usize,
            queues: match has(VirtioBlkFeatureFlags::MQ) {
                true => config.num_queues.to_native().into(),
                false => 1,
            },
            read_only: has(VirtioBlkFeatureFlags::RO),
            flush: has(VirtioBlkFeatureFlags::FLUSH),
            max_discard_blocks: limit(VirtioBlkFeatureFlags::DISCARD, config.max_discard_sectors.to_native()),
            max_write_zeroes_blocks: limit(
                VirtioBlkFeatureFlags::WRITE_ZEROES,
                config.max_write_zeroes_sectors.to_native(),
            ),
            segments: has(VirtioBlkFeatureFlags::SEG_MAX).then_some(config.seg_max.to_native()),
            features,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(features: VirtioBlkFeatureFlags, block_bytes: u32) -> Result<DiskInfo, Error> {
        let mut config = VirtioBlkConfig::default();
        config.capacity = 80_000.into();
        config.blk_size = block_bytes.into();
        config.seg_max = 254.into();
        config.num_queues = 4.into();
        config.max_discard_sectors = u32::MAX.into();
        config.max_write_zeroes_sectors = 800.into();
        DiskInfo::new(features.bits(), &config, &ClientOptions::new("/nowhere"))
    }

    #[test]
    fn numbers_are_in_blocks_of_the_disk() {
        let info = info(VirtioBlkFeatureFlags::all(), 4096).unwrap();
        assert_eq!((info.blocks, info.block_bytes, info.queues), (10_000, 4096, 4));
        assert_eq!((info.max_discard_blocks, info.max_write_zeroes_blocks), (u32::MAX / 8, 100));
        assert_eq!(info.segments, Some(254));
        assert!(info.read_only && info.flush);
    }

    #[test]
    fn fields_without_their_feature_are_not_believed() {
        let info = info(VirtioBlkFeatureFlags::empty(), 4096).unwrap();
        assert_eq!((info.blocks, info.block_bytes, info.queues), (80_000, 512, 1));
        assert_eq!((info.max_discard_blocks, info.max_write_zeroes_blocks, info.segments), (0, 0, None));
        assert!(!info.read_only && !info.flush);
    }

    #[test]
    fn an_absurd_block_size_is_refused() {
        for block_bytes in [0, 1, 511, 768, 1 << 20, u32::MAX] {
            assert!(info(VirtioBlkFeatureFlags::BLK_SIZE, block_bytes).is_err(), "{block_bytes}");
        }
    }
}

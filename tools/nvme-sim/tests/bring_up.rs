//! Registers, bring-up, and what a controller says of itself.

mod support;

use nvme_sim::{Config, NamespaceConfig};
use support::{Host, Sqe, pattern, start};

#[test]
fn a_block_is_written_and_read() {
    for (block_bytes, by_message) in [(512, false), (4096, false), (512, true)] {
        let namespace = NamespaceConfig { bytes: 64 << 20, block_bytes, ..Default::default() };
        let controller = start(Config { namespaces: vec![namespace], ..Default::default() });
        let mut host = Host::connect(controller.simulator.socket());
        host.by_message = by_message;
        host.enable();
        assert_eq!(host.set_feature(7, 3 << 16 | 3).result, 3 << 16 | 3);
        host.create_pair(1, 64, None);
        let data = pattern(1, 64 << 10);
        let shift = block_bytes.ilog2();
        assert_eq!(host.write_blocks(1, 5, shift, &data), 0);
        assert_eq!(host.read_blocks(1, 5, shift, data.len()), Ok(data));
        assert_eq!(host.read_blocks(1, 1000, shift, 4096), Ok(vec![0; 4096]));
        assert_eq!(host.command(1, Sqe::new(0x00, 1)).status, 0);
    }
}

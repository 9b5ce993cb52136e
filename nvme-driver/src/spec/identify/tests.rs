use super::*;
use crate::Namespace;

fn controller(edit: impl FnOnce(&mut [u8])) -> Result<ControllerIdentity, Error> {
    let mut bytes = vec![0u8; BYTES];
    bytes[4..24].fill(b' ');
    bytes[6..12].copy_from_slice(b"SN-1\x07\xff");
    bytes[24..32].copy_from_slice(b"Model X\0");
    bytes[64..72].copy_from_slice(b"1.0     ");
    bytes[512] = 0x66;
    bytes[513] = 0x44;
    bytes[516] = 4;
    edit(&mut bytes);
    ControllerIdentity::parse(RawController::ref_from_bytes(&bytes).unwrap(), 0, Version::new(1, 4))
}

#[test]
fn texts_are_trimmed_and_made_printable() {
    let identity = controller(|_| {}).unwrap();
    assert_eq!(
        (identity.serial.as_str(), identity.model.as_str(), identity.firmware.as_str()),
        ("SN-1??", "Model X", "1.0")
    );
    assert_eq!(identity.version, Version::new(1, 4), "VER of 0: the register counts");
}

#[test]
fn capabilities_are_read_from_their_bits() {
    let identity = controller(|bytes| {
        bytes[77] = 5;
        bytes[80..84].copy_from_slice(&0x0002_0000u32.to_le_bytes());
        bytes[88..92].copy_from_slice(&3_000_000u32.to_le_bytes());
        bytes[92..96].copy_from_slice(&(1u32 << 8).to_le_bytes());
        bytes[256..258].copy_from_slice(&(1u16 << 8 | 1 << 1).to_le_bytes());
        bytes[258..260].copy_from_slice(&[3, 7]);
        bytes[261] = 4;
        bytes[270] = 25;
        bytes[524] = 6;
        bytes[520..522].copy_from_slice(&(1u16 | 1 << 2 | 1 << 7).to_le_bytes());
        bytes[525] = 7;
        bytes[536] = 2;
    })
    .unwrap();
    assert_eq!(identity.max_transfer, Some(128 << 10));
    assert_eq!(identity.version, Version::new(2, 0));
    assert_eq!(identity.shutdown_time, Some(Duration::from_secs(3)));
    assert!(identity.namespace_events && !identity.firmware_events);
    assert!(identity.supports_shadow_doorbells && identity.supports_format && !identity.supports_namespace_management);
    assert_eq!((identity.abort_limit, identity.event_limit), (4, 8));
    assert!(identity.log_page_offsets && identity.volatile_write_cache);
    assert!(identity.supports_compare && identity.supports_discard && identity.supports_verify);
    assert!(!identity.supports_write_zeroes && !identity.supports_feature_select);
    assert_eq!(identity.sgl, Some(SglAlignment::Dword));
    assert_eq!(identity.activation_time, Some(Duration::from_millis(2500)));
    assert!(
        !identity.formats_all_namespaces && identity.erases_all_namespaces && identity.supports_cryptographic_erase
    );
}

#[test]
fn absurd_values_are_refused_or_mean_no_limit() {
    assert_eq!(controller(|bytes| bytes[77] = 0).unwrap().max_transfer, None);
    assert_eq!(controller(|bytes| bytes[77] = 255).unwrap().max_transfer, None, "2^267 bytes bound nothing");
    assert!(matches!(controller(|bytes| bytes[516] = 0), Err(Error::Untrustworthy(_))));
    assert!(matches!(controller(|bytes| bytes[516..520].fill(0xff)), Err(Error::Untrustworthy(_))));
    assert!(matches!(controller(|bytes| bytes[512] = 0x77), Err(Error::Unsupported(_))));
    assert!(matches!(controller(|bytes| bytes[513] = 0x30), Err(Error::Unsupported(_))));
    assert_eq!(controller(|bytes| bytes[536] = 3).unwrap().sgl, None);
}

#[test]
fn a_controller_has_to_keep_what_was_built_on() {
    let with = |mdts: u8, sgls: u8, vwc: u8| {
        controller(|bytes| (bytes[77], bytes[536], bytes[525]) = (mdts, sgls, vwc)).unwrap()
    };
    let before = with(5, 1, 0);
    for kept in [with(5, 1, 0), with(6, 1, 0), with(0, 1, 0)] {
        assert_eq!(kept.broken_promise(&before), None, "{:?}", kept.max_transfer);
    }
    for (now, what) in
        [(with(4, 1, 0), "MDTS"), (with(5, 0, 0), "SGLS"), (with(5, 2, 0), "SGLS"), (with(5, 1, 1), "VWC")]
    {
        assert!(now.broken_promise(&before).is_some_and(|broken| broken.contains(what)), "{what}");
    }
    assert!(with(5, 1, 0).broken_promise(&with(0, 0, 1)).is_some(), "it had no limit");
    assert_eq!(with(5, 1, 0).broken_promise(&with(5, 0, 1)), None, "flushes too many do no harm");
}

#[test]
fn command_limits() {
    let mut bytes = vec![0u8; BYTES];
    let none = CommandLimits::parse(RawNvmController::ref_from_bytes(&bytes).unwrap(), 0);
    assert_eq!(none, CommandLimits::NONE);
    bytes[0..4].copy_from_slice(&[1, 5, 0, 16]);
    bytes[4..8].copy_from_slice(&1000u32.to_le_bytes());
    bytes[8..16].copy_from_slice(&16000u64.to_le_bytes());
    let some = CommandLimits::parse(RawNvmController::ref_from_bytes(&bytes).unwrap(), 1);
    assert_eq!(
        some,
        CommandLimits {
            verify_bytes: Some(16 << 10),
            write_zeroes_bytes: Some(256 << 10),
            discard_ranges: 16,
            discard_range_blocks: 1000,
            discard_blocks: 16000
        }
    );
    assert!(some.less_than(&none) && !none.less_than(&some) && !some.less_than(&some));
    for less in [
        CommandLimits { write_zeroes_bytes: Some(4096), ..some },
        CommandLimits { verify_bytes: Some(4096), discard_blocks: u64::MAX, ..some },
        CommandLimits { discard_ranges: 15, ..some },
        CommandLimits { discard_range_blocks: 999, ..some },
        CommandLimits { discard_blocks: 15999, ..some },
    ] {
        assert!(less.less_than(&some), "{less:?}");
    }
}

fn descriptor(kind: u8, id: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, id.len() as u8, 0, 0];
    bytes.extend_from_slice(id);
    bytes
}

fn descriptor_list(descriptors: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = descriptors.concat();
    bytes.resize(BYTES, 0);
    bytes
}

#[test]
fn descriptors_are_found_in_any_order_and_unknown_ones_skipped() {
    let list = descriptor_list(&[
        descriptor(9, &[1, 2, 3]),
        descriptor(3, &[7; 16]),
        descriptor(1, &[5; 8]),
        descriptor(4, &[2]),
    ]);
    let found = Descriptors::parse(&list, 1).unwrap();
    assert_eq!(found, Descriptors { eui64: Some([5; 8]), nguid: None, uuid: Some([7; 16]), command_set: Some(2) });
    assert_eq!(Descriptors::parse(&vec![0; BYTES], 1).unwrap(), Descriptors::default());
}

#[test]
fn descriptors_of_wrong_length_are_refused() {
    assert!(Descriptors::parse(&descriptor_list(&[descriptor(3, &[7; 15])]), 1).is_err());
    let mut list = descriptor_list(&[]);
    for at in (0..BYTES).step_by(128) {
        list[at] = 200;
        list[at + 1] = 124;
    }
    *list.last_mut().unwrap() = 1;
    assert!(Descriptors::parse(&list, 1).is_ok(), "fills the page exactly");
    list[BYTES - 127] = 125;
    assert!(Descriptors::parse(&list, 1).is_err(), "runs over the end by one");
    // Three bytes are left at the end: not even a header.
    assert!(Descriptors::parse(&[9, 1, 0, 0, 1, 3, 16, 0], 1).is_ok());
}

fn namespace(edit: impl FnOnce(&mut [u8])) -> Result<Namespace, Error> {
    namespace_with(edit, &Descriptors::default())
}

fn namespace_with(edit: impl FnOnce(&mut [u8]), descriptors: &Descriptors) -> Result<Namespace, Error> {
    namespace_of(&controller(|bytes| bytes[520] = 0xff).unwrap(), edit, descriptors)
}

fn namespace_of(
    identity: &ControllerIdentity,
    edit: impl FnOnce(&mut [u8]),
    descriptors: &Descriptors,
) -> Result<Namespace, Error> {
    let mut bytes = vec![0u8; BYTES];
    bytes[0..8].copy_from_slice(&0x10000u64.to_le_bytes());
    bytes[25] = 1;
    bytes[130] = 9;
    bytes[134] = 12;
    edit(&mut bytes);
    Namespace::parse(
        RawNamespace::ref_from_bytes(&bytes).unwrap(),
        &NamespaceContext { id: 1, identity, limits: &CommandLimits::NONE, descriptors, write_cache_enabled: true },
    )
}

fn refusal(edit: impl FnOnce(&mut [u8])) -> String {
    match namespace(edit) {
        Err(error @ Error::Format { namespace: 1, .. }) => error.to_string(),
        other => panic!("expected a refused format, got {other:?}"),
    }
}

#[test]
fn geometry_of_a_plain_namespace() {
    let plain = namespace(|_| {}).unwrap();
    assert_eq!((plain.blocks, plain.block_shift, plain.bytes()), (0x10000, 9, 32 << 20));
    assert_eq!((plain.physical_block_bytes, plain.optimal_io_bytes, plain.discard_granularity_bytes), (512, 0, 512));
    assert_eq!((plain.max_discard_ranges, plain.max_write_zeroes_blocks), (256, 65536));
    assert!(!plain.read_only && plain.volatile_write_cache && plain.discard && plain.compare);
    assert_eq!((plain.eui64, plain.nguid, plain.uuid), (None, None, None));

    let large = namespace(|bytes| bytes[26] = 1).unwrap();
    assert_eq!((large.block_shift, large.bytes()), (12, 256 << 20));
}

#[test]
fn preferred_sizes_are_zero_based_and_only_valid_with_optperf() {
    let sizes = |bytes: &mut [u8]| {
        for (at, value) in [(46, 256u16), (64, 7), (66, 7), (68, 15), (70, 31), (72, 255)] {
            bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        bytes[33] = 1 | 1 << 3;
        bytes[99] = 1;
        bytes[104..120].fill(3);
        bytes[120..128].fill(4);
    };
    let without = namespace(sizes).unwrap();
    assert_eq!(
        (without.physical_block_bytes, without.discard_granularity_bytes, without.optimal_io_bytes),
        (512, 512, 0)
    );
    assert_eq!(without.boundary_blocks, 256);
    assert!(without.read_only && without.discard_reads_zeroes && without.write_zeroes_deallocates);
    assert_eq!((without.nguid, without.eui64), (Some([3; 16]), Some([4; 8])));

    let with = namespace(|bytes| {
        sizes(bytes);
        bytes[24] = 1 << 4;
    })
    .unwrap();
    assert_eq!((with.write_granularity_bytes, with.write_alignment_bytes), (4096, 4096));
    assert_eq!(with.physical_block_bytes, 512, "it promises no more than a block");
    assert_eq!((with.discard_granularity_bytes, with.discard_alignment_bytes), (8192, 16384));
    assert_eq!(with.optimal_io_bytes, 128 << 10);

    let atomic = namespace(|bytes| {
        bytes[24] = 1 << 1;
        bytes[36] = 7;
    });
    assert_eq!(atomic.unwrap().physical_block_bytes, 4096);
    let huge = namespace(|bytes| {
        bytes[24] = 1 << 1;
        bytes[36] = 255;
    });
    assert_eq!(huge.unwrap().physical_block_bytes, 4096, "an atomic unit of 128 KiB is no physical block");
    let careless = namespace(|bytes| bytes[24] = 1 << 4).unwrap();
    assert_eq!((careless.optimal_io_bytes, careless.physical_block_bytes), (0, 512), "one block is no optimal size");
    let odd = namespace(|bytes| {
        bytes[24] = 1 << 4;
        bytes[64] = 11;
    });
    let odd = odd.unwrap();
    assert_eq!((odd.physical_block_bytes, odd.write_granularity_bytes), (512, 12 * 512));
}

#[test]
fn a_physical_block_is_what_is_written_without_tearing() {
    let physical = |awupf: u16, edit: &dyn Fn(&mut [u8])| {
        let identity = controller(|bytes| bytes[528..530].copy_from_slice(&awupf.to_le_bytes())).unwrap();
        namespace_of(&identity, |bytes| edit(bytes), &Descriptors::default()).unwrap().physical_block_bytes
    };
    let put = |bytes: &mut [u8], at: usize, value: u16| bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    const NSABP: u8 = 1 << 1;
    const OPTPERF: u8 = 1 << 4;
    assert_eq!(physical(0, &|_| ()), 512, "one block");
    assert_eq!(physical(7, &|_| ()), 4096, "the controller's promise");
    assert_eq!(physical(6, &|_| ()), 2048, "7 blocks: the largest power of two in them");
    assert_eq!(physical(u16::MAX, &|_| ()), 4096, "much more says nothing of what the drive works with");
    let pages_of_16_kib = |bytes: &mut [u8]| {
        bytes[24] = OPTPERF;
        put(bytes, 64, 31);
    };
    assert_eq!(physical(255, &pages_of_16_kib), 16 << 10, "it promises them, and works with them");
    assert_eq!(physical(7, &pages_of_16_kib), 4096);
    assert_eq!(physical(7, &|bytes| put(bytes, 36, 1)), 4096, "NAWUPF is not there without NSABP");
    let own = |nawupf: u16, nabspf: u16, nabo: u16| {
        physical(7, &|bytes| {
            bytes[24] = NSABP;
            put(bytes, 36, nawupf);
            put(bytes, 44, nabspf);
            put(bytes, 42, nabo);
        })
    };
    assert_eq!(own(0, 0, 0), 4096, "0: as the controller says");
    assert_eq!(own(3, 0, 0), 2048);
    assert_eq!((own(63, 1, 0), own(63, 5, 0), own(63, 255, 0)), (1024, 1024, 4096), "no boundary lies within");
    assert_eq!((own(63, 255, 2), own(63, 255, 8)), (1024, 4096), "nor where they begin later");
}

#[test]
fn what_is_known_of_a_drive_takes_abilities_away() {
    let offered = || controller(|bytes| (bytes[520], bytes[536], bytes[77]) = (0xff, 1, 5)).unwrap();
    let unknown = Function { vendor: 1, device: 2 };
    let kept = offered().restrict(unknown, &Options::default());
    assert_eq!(kept, offered());
    // Samsung PM1725a.
    let known = Function { vendor: 0x144d, device: 0xa822 };
    let without = offered().restrict(known, &Options::default());
    assert!(without.quirks.has(Quirk::NoWriteZeroes) && !without.supports_write_zeroes && without.supports_discard);
    let told = Options { write_zeroes: Some(true), sgl: Some(false), discard: Some(false), ..Options::default() };
    let told = offered().restrict(known, &told);
    assert_eq!(
        (told.supports_write_zeroes, told.supports_discard, told.sgl),
        (true, false, None),
        "an option counts more"
    );

    // Intel P4500: striped, and with identifiers that others have, too.
    let ids = |bytes: &mut [u8]| {
        bytes[104..120].fill(3);
        bytes[120..128].fill(4);
    };
    let uuid = Descriptors { uuid: Some([1; 16]), ..Default::default() };
    let plain = namespace_of(&offered(), ids, &uuid).unwrap();
    assert_eq!((plain.nguid, plain.eui64, plain.uuid), (Some([3; 16]), Some([4; 8]), Some([1; 16])));
    assert_eq!(plain.boundary_blocks, 0);
    let intel = offered().restrict(Function { vendor: 0x8086, device: 0x0a54 }, &Options::default());
    let striped = namespace_of(&intel, ids, &uuid).unwrap();
    assert_eq!((striped.nguid, striped.eui64, striped.uuid), (None, None, None));
    assert_eq!(striped.boundary_blocks, 256, "128 KiB");
    let own = namespace_of(&intel, |bytes| bytes[46] = 64, &uuid).unwrap();
    assert_eq!(own.boundary_blocks, 64, "NOIOB counts more");
}

#[test]
fn a_discard_takes_no_block_twice() {
    let without_limit = namespace(|_| {}).unwrap();
    assert_eq!(without_limit.max_discard_blocks, without_limit.blocks);
    let small = namespace(|bytes| bytes[0..8].copy_from_slice(&7u64.to_le_bytes())).unwrap();
    assert_eq!(small.max_discard_blocks, 7);
}

#[test]
fn formats_that_cannot_be_served_are_named() {
    assert!(refusal(|bytes| bytes[128] = 8).contains("512 bytes per block and 8 bytes of metadata"));
    assert!(refusal(|bytes| bytes[29] = 3).contains("protection information type 3"));
    assert!(refusal(|bytes| bytes[130] = 0).contains("not available"));
    assert!(refusal(|bytes| bytes[130] = 10).contains("1024 bytes per block"));
    assert!(refusal(|bytes| bytes[130] = 255).contains("2^255 bytes"));
    assert!(refusal(|bytes| bytes[26] = 2).contains("LBA format 2"), "there are only two");
    assert!(refusal(|bytes| bytes[0..8].fill(0)).contains("NSZE"));
    assert!(refusal(|bytes| bytes[0..8].fill(0xff)).contains("overflows"));
}

#[test]
fn the_format_index_has_high_bits_only_when_there_are_many_formats() {
    let many = namespace(|bytes| {
        bytes[25] = 40;
        bytes[26] = 1 << 5;
        bytes[128 + 4 * 16 + 2] = 12;
    });
    assert_eq!(many.unwrap().block_shift, 12);
    let few = namespace(|bytes| bytes[26] = 1 << 5);
    assert_eq!(few.unwrap().block_shift, 9, "reserved bits when there are at most 16");
    assert!(
        refusal(|bytes| {
            bytes[25] = 255;
            bytes[26] = 0x6f;
        })
        .contains("LBA format 63 is not available")
    );
}

#[test]
fn other_command_sets_are_refused() {
    let zoned = Descriptors { command_set: Some(2), ..Default::default() };
    let error = namespace_with(|_| {}, &zoned).unwrap_err();
    assert!(error.to_string().contains("command set 2"), "{error}");
    let uuid = Descriptors { command_set: Some(0), uuid: Some([1; 16]), ..Default::default() };
    assert_eq!(namespace_with(|_| {}, &uuid).unwrap().uuid, Some([1; 16]));
}

#[test]
fn any_bytes_give_a_sane_namespace_or_an_error() {
    proptest::proptest!(|(bytes in proptest::collection::vec(proptest::num::u8::ANY, 256), shift in 0u8..16)| {
        let result = namespace(|page| {
            page[..256].copy_from_slice(&bytes);
            page[128 + 4 * usize::from(bytes[26] & 0xf)..][..3].copy_from_slice(&[0, 0, shift]);
            page[29] &= 0xf8;
        });
        if let Ok(namespace) = result {
            proptest::prop_assert!(matches!(namespace.block_shift, 9 | 12));
            proptest::prop_assert!(namespace.blocks > 0 && namespace.bytes() <= i64::MAX as u64);
            proptest::prop_assert!(namespace.physical_block_bytes.is_power_of_two());
            proptest::prop_assert!(namespace.discard_granularity_bytes >= namespace.block_bytes());
        }
    });
}

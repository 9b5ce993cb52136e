//! Reading what the kernel says about an IOMMU and about a region: plain data in, plain data out.

use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::VfioRegionInfoCap;

use crate::IovaRange;

/// What VFIO_IOMMU_GET_INFO reports of a type1 IOMMU (linux/vfio.h).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Type1Info {
    /// A bit for each page size the IOMMU supports; 0 if it does not tell.
    pub page_sizes: u64,
    /// The usable addresses; `None` if the kernel is too old to tell (before 5.4).
    pub ranges: Option<Vec<IovaRange>>,
}

/// `struct vfio_iommu_type1_info` up to and including its `cap_offset`: argsz, flags, iova_pgsizes, cap_offset.
const INFO_BYTES: usize = 20;
/// Offset of `cap_offset` in it.
const CAP_OFFSET_AT: usize = 16;

/// Reads `struct vfio_iommu_type1_info` and the capabilities behind it. `None` if they make no sense.
pub(super) fn parse_type1_info(bytes: &[u8]) -> Option<Type1Info> {
    let flags = u32_at(bytes, 4)?;
    let page_sizes = if flags & VFIO_IOMMU_INFO_PGSIZES != 0 { u64_at(bytes, 8)? } else { 0 };
    let mut info = Type1Info { page_sizes, ranges: None };
    if flags & VFIO_IOMMU_INFO_CAPS == 0 {
        return Some(info);
    }
    // struct vfio_info_cap_header: id (16 bits), version (16), next (32), all offsets from the structure's beginning.
    let mut at = u32_at(bytes, CAP_OFFSET_AT)? as usize;
    let mut end_of_last = INFO_BYTES;
    while at != 0 {
        if at < end_of_last {
            return None;
        }
        let id = u32::from(u16::from_ne_bytes(array_at(bytes, at)?));
        if id == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
            info.ranges = Some(parse_ranges(bytes, at.checked_add(8)?)?);
        }
        end_of_last = at + 8;
        at = u32_at(bytes, at + 4)? as usize;
    }
    Some(info)
}

/// nr_iovas (32 bits), reserved (32), then pairs of first and last address.
fn parse_ranges(bytes: &[u8], at: usize) -> Option<Vec<IovaRange>> {
    let count = u32_at(bytes, at)? as usize;
    let list = bytes.get(at.checked_add(8)?..)?.get(..count.checked_mul(16)?)?;
    let ranges = list.as_chunks::<16>().0.iter();
    ranges.map(|range| Some(IovaRange { start: u64_at(range, 0)?, last: u64_at(range, 8)? })).collect()
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_ne_bytes)
}

/// The addresses to use where the kernel does not tell: 39 bits, which every IOMMU has, without the window that x86
/// keeps for interrupts.
pub(super) fn assumed_ranges() -> Vec<IovaRange> {
    vec![IovaRange { start: 0, last: 0xfedf_ffff }, IovaRange { start: 0xfef0_0000, last: (1 << 39) - 1 }]
}

/// The parts of a region (offset, bytes) that may be mapped, as whole pages of `page` bytes. The last page of a region may be
/// shorter: where the kernel offers it, nothing else is behind it (vfio-pci, which makes sure of that for a BAR of less than a
/// page).
///
/// `msix_table` is where the MSI-X table lies in this region. The kernel says that its pages may be mapped as well
/// (`MsixMappable`), or gives the areas around it, or, before 4.16 on some platforms, does neither: then they are left out.
pub(super) fn mappable(
    size: u64,
    flags: u32,
    capabilities: &[VfioRegionInfoCap],
    msix_table: Option<(u64, u64)>,
    page: u64,
) -> Vec<(u64, u64)> {
    if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
        return Vec::new();
    }
    let sparse = capabilities.iter().find_map(|capability| match capability {
        VfioRegionInfoCap::SparseMmap(sparse) => Some(&sparse.areas),
        _ => None,
    });
    let areas: Vec<(u64, u64)> = match (sparse, msix_table) {
        (Some(areas), _) => areas.iter().map(|area| (area.offset, area.size)).collect(),
        (None, Some((table, bytes))) if !capabilities.contains(&VfioRegionInfoCap::MsixMappable) => {
            let before = table / page * page;
            let behind = table.saturating_add(bytes).checked_next_multiple_of(page).unwrap_or(size);
            vec![(0, before), (behind, size.saturating_sub(behind))]
        }
        (None, _) => vec![(0, size)],
    };
    let whole = |&(offset, bytes): &(u64, u64)| {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= size);
        inside && bytes > 0 && offset % page == 0 && (bytes % page == 0 || offset + bytes == size)
    };
    areas.into_iter().filter(whole).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vfio_ioctls::{VfioRegionInfoCapSparseMmap, VfioRegionSparseMmapArea};

    use super::*;

    fn info(flags: u32, page_sizes: u64, capabilities: &[u8]) -> Vec<u8> {
        let cap_offset = if capabilities.is_empty() { 0 } else { 24u32 };
        let mut bytes = Vec::new();
        bytes.extend((24 + capabilities.len() as u32).to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(page_sizes.to_ne_bytes());
        bytes.extend(cap_offset.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(capabilities);
        bytes
    }

    fn capability(id: u16, next: u32, payload: &[u8]) -> Vec<u8> {
        [&id.to_ne_bytes()[..], &1u16.to_ne_bytes(), &next.to_ne_bytes(), payload].concat()
    }

    fn ranges(count: u32, ranges: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = [count.to_ne_bytes(), [0; 4]].concat();
        ranges.iter().for_each(|(start, last)| bytes.extend([start.to_ne_bytes(), last.to_ne_bytes()].concat()));
        bytes
    }

    #[test]
    fn the_ranges_are_found_behind_another_capability() {
        let other = capability(3, 24 + 12, &[1, 2, 3, 4]);
        let wanted = capability(1, 0, &ranges(2, &[(0, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)]));
        let parsed = parse_type1_info(&info(3, 0x4020_1000, &[other, wanted].concat())).unwrap();
        assert_eq!(parsed.page_sizes, 0x4020_1000);
        assert_eq!(parsed.ranges.unwrap(), assumed_ranges());
    }

    #[test]
    fn an_old_kernel_tells_nothing() {
        let parsed = parse_type1_info(&info(1, 0x1000, &[])).unwrap();
        assert_eq!(parsed, Type1Info { page_sizes: 0x1000, ranges: None });
        let parsed = parse_type1_info(&info(0, 0x1000, &[])).unwrap();
        assert_eq!(parsed, Type1Info { page_sizes: 0, ranges: None });
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        let too_many = capability(1, 0, &ranges(3, &[(0, 1)]));
        assert_eq!(parse_type1_info(&info(2, 0, &too_many)), None);
        let huge = capability(1, 0, &ranges(u32::MAX, &[(0, 1)]));
        assert_eq!(parse_type1_info(&info(2, 0, &huge)), None);
        let itself = capability(7, 24, &[]);
        assert_eq!(parse_type1_info(&info(2, 0, &itself)), None);
        let outside = capability(7, 4000, &[]);
        assert_eq!(parse_type1_info(&info(2, 0, &outside)), None);
        let into_the_info = capability(7, 4, &[]);
        assert_eq!(parse_type1_info(&info(2, 0, &into_the_info)), None);
        assert_eq!(parse_type1_info(&[0; 7]), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), at in 20u8..60) {
            if let [_, _, _, _, flags, ..] = &mut bytes[..] {
                *flags |= 2;
            }
            if bytes.len() > 20 {
                bytes[16..20].copy_from_slice(&u32::from(at).to_ne_bytes());
            }
            let _ = parse_type1_info(&bytes);
        }
    }

    fn sparse(areas: &[(u64, u64)]) -> VfioRegionInfoCap {
        let areas = areas.iter().map(|&(offset, size)| VfioRegionSparseMmapArea { offset, size }).collect();
        VfioRegionInfoCap::SparseMmap(VfioRegionInfoCapSparseMmap { areas })
    }

    const MMAP: u32 = VFIO_REGION_INFO_FLAG_MMAP;

    #[test]
    fn a_region_that_may_not_be_mapped_is_not() {
        assert_eq!(mappable(0x4000, 0, &[sparse(&[(0, 0x1000)])], None, 4096), []);
    }

    #[test]
    fn sparse_areas_come_before_everything_else() {
        let capabilities = [VfioRegionInfoCap::MsixMappable, sparse(&[(0, 0x2000), (0x3000, 0x1000)])];
        let areas = mappable(0x4000, MMAP, &capabilities, Some((0x2000, 0x410)), 4096);
        assert_eq!(areas, [(0, 0x2000), (0x3000, 0x1000)]);
    }

    #[test]
    fn areas_that_are_not_pages_of_the_region_are_left_out() {
        let areas = [(0, 0x800), (0x800, 0x1000), (0x3000, 0x2000), (0x1000, 0), (u64::MAX - 0xfff, 0x1000)];
        assert_eq!(mappable(0x4000, MMAP, &[sparse(&areas)], None, 4096), []);
    }

    #[test]
    fn a_region_of_less_than_a_page_is_mapped() {
        assert_eq!(mappable(0x4000, MMAP, &[], None, 0x10000), [(0, 0x4000)]);
        assert_eq!(mappable(0x14000, MMAP, &[], None, 0x10000), [(0, 0x14000)]);
        assert_eq!(
            mappable(0x4000, MMAP, &[VfioRegionInfoCap::MsixMappable], Some((0x2000, 16)), 0x10000),
            [(0, 0x4000)]
        );
        // The MSI-X table would be in it, or what is left does not begin at a page.
        assert_eq!(mappable(0x4000, MMAP, &[], Some((0x2000, 16)), 0x10000), []);
        assert_eq!(mappable(0x4000, MMAP, &[sparse(&[(0, 0x2000), (0x3000, 0x1000)])], None, 0x10000), []);
        assert_eq!(mappable(0x4000, 0, &[], None, 0x10000), []);
    }

    #[test]
    fn the_msix_table_is_mapped_only_where_the_kernel_says_so() {
        let table = Some((0x2000, 0x410));
        assert_eq!(mappable(0x4000, MMAP, &[VfioRegionInfoCap::MsixMappable], table, 4096), [(0, 0x4000)]);
        assert_eq!(mappable(0x4000, MMAP, &[], table, 4096), [(0, 0x2000), (0x3000, 0x1000)]);
        assert_eq!(mappable(0x4000, MMAP, &[], Some((0, 16)), 4096), [(0x1000, 0x3000)]);
        assert_eq!(mappable(0x4000, MMAP, &[], Some((u64::MAX - 5, 16)), 4096), []);
        assert_eq!(mappable(0x4000, MMAP, &[], None, 4096), [(0, 0x4000)]);
    }
}

//! The entries of a zip archive that is not compressed, as PyTorch writes it: where each entry's
//! bytes are, found without copying any.

use std::collections::BTreeMap;
use std::ops::Range;

use super::bytes::{Bytes, slice};

const LOCAL: &[u8] = b"PK\x03\x04";
const CENTRAL: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const END_64: &[u8] = b"PK\x06\x06";

/// The last record without its comment, and the longest comment.
const END_BYTES: usize = 22;
const LOCATOR_BYTES: usize = 20;
const COMMENT_BYTES: usize = u16::MAX as usize;

/// In place of a number that needs 64 bits.
const ELSEWHERE: u64 = u32::MAX as u64;
/// The extra field that has such numbers.
const WIDE: u16 = 1;

/// Whether a file starts as a zip archive does.
pub(super) fn is_archive(bytes: &[u8]) -> bool {
    bytes.starts_with(LOCAL)
}

/// The entries by name: where their bytes are in `bytes`.
pub(super) fn entries(bytes: &[u8]) -> Result<BTreeMap<String, Range<usize>>, String> {
    let (count, start) = directory(bytes)?;
    let mut r = Bytes::new(bytes);
    r.skip(start)?;
    let mut all = BTreeMap::new();
    for _ in 0..count {
        let (name, place) = entry(bytes, &mut r)?;
        if all.contains_key(&name) {
            return Err(format!("it has the entry `{name}` twice"));
        }
        all.insert(name, place);
    }
    Ok(all)
}

/// The number of entries and where their list starts.
fn directory(bytes: &[u8]) -> Result<(u64, u64), String> {
    let earliest = bytes.len().saturating_sub(END_BYTES + COMMENT_BYTES);
    let tail = bytes.get(earliest..).unwrap_or_default();
    let last = tail.windows(END.len()).rposition(|w| w == END);
    let at = earliest + last.ok_or("it is cut off: the list of its entries is not there")?;
    let mut r = Bytes::new(bytes.get(at..).unwrap_or_default());
    r.skip(10)?;
    let (count, _size, start) = (u64::from(r.u16()?), r.u32()?, u64::from(r.u32()?));
    let comment = r.u16()?;
    r.skip(comment.into())?;
    let locator = at.checked_sub(LOCATOR_BYTES).and_then(|from| bytes.get(from..at));
    let Some(locator) = locator.filter(|l| l.starts_with(LOCATOR_64)) else {
        return Ok((count, start));
    };
    let mut r = Bytes::new(locator);
    r.skip(8)?;
    let mut wide = Bytes::new(bytes);
    wide.skip(r.u64()?)?;
    if wide.take(END_64.len() as u64)? != END_64 {
        return Err("the list of its entries is not where it says".into());
    }
    wide.skip(28)?;
    let (count, _size, start) = (wide.u64()?, wide.u64()?, wide.u64()?);
    Ok((count, start))
}

/// The next entry of the list.
fn entry(bytes: &[u8], r: &mut Bytes) -> Result<(String, Range<usize>), String> {
    if r.take(CENTRAL.len() as u64)? != CENTRAL {
        return Err("the list of its entries is broken".into());
    }
    r.skip(4)?;
    let (flags, method) = (r.u16()?, r.u16()?);
    r.skip(8)?;
    let (mut packed, mut size) = (u64::from(r.u32()?), u64::from(r.u32()?));
    let (name, extra, comment) = (r.u16()?, r.u16()?, r.u16()?);
    r.skip(8)?;
    let mut start = u64::from(r.u32()?);
    let name = r.text(u64::from(name))?.to_owned();
    let extra = r.take(u64::from(extra))?;
    r.skip(u64::from(comment))?;
    if method != 0 || flags & 1 != 0 {
        return Err(format!("its entry `{name}` is compressed or encrypted, as PyTorch does not"));
    }
    widen(extra, [&mut size, &mut packed, &mut start])?;
    if packed != size {
        return Err(format!("its entry `{name}` has two sizes"));
    }
    let mut local = Bytes::new(bytes);
    local.skip(start)?;
    if local.take(LOCAL.len() as u64)? != LOCAL {
        return Err(format!("its entry `{name}` is not where it says"));
    }
    local.skip(22)?;
    let (own_name, own_extra) = (local.u16()?, local.u16()?);
    local.skip(u64::from(own_name) + u64::from(own_extra))?;
    let place = slice(local.position() as u64, size, bytes.len());
    place.map(|p| (name.clone(), p)).ok_or_else(|| format!("its entry `{name}` is cut off"))
}

/// Takes the numbers that did not fit into 32 bits from the extra fields, where they are in order.
fn widen(extra: &[u8], numbers: [&mut u64; 3]) -> Result<(), String> {
    let mut fields = Bytes::new(extra);
    while let (Ok(id), Ok(size)) = (fields.u16(), fields.u16()) {
        let mut field = Bytes::new(fields.take(u64::from(size))?);
        if id == WIDE {
            for number in numbers.into_iter().filter(|n| **n == ELSEWHERE) {
                *number = field.u64()?;
            }
            return Ok(());
        }
    }
    Ok(())
}

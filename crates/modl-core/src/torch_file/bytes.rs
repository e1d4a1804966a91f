//! Numbers and texts out of bytes, never beyond their end.

use std::ops::Range;

/// A place in the bytes.
#[derive(Debug)]
pub(super) struct Bytes<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Bytes { bytes, at: 0 }
    }

    /// The number of bytes that have been read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// The next `n` bytes.
    pub(super) fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let place = slice(self.at as u64, n, self.bytes.len());
        let found = place.and_then(|p| Some((p.end, self.bytes.get(p)?)));
        let (end, found) = found
            .ok_or_else(|| format!("it ends where {n} more bytes are to be, after {}", self.at))?;
        self.at = end;
        Ok(found)
    }

    pub(super) fn skip(&mut self, n: u64) -> Result<(), String> {
        self.take(n).map(drop)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N as u64)?.try_into().map_err(|_| "it ends".to_owned())
    }

    pub(super) fn u8(&mut self) -> Result<u8, String> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, String> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn i32(&mut self) -> Result<i32, String> {
        self.array().map(i32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// `n` bytes of UTF-8.
    pub(super) fn text(&mut self, n: u64) -> Result<&'a str, String> {
        let at = self.at;
        std::str::from_utf8(self.take(n)?)
            .map_err(|_| format!("the text after {at} bytes is not UTF-8"))
    }

    /// The text up to the end of the line, which is skipped.
    pub(super) fn line(&mut self) -> Result<&'a str, String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let n = rest.iter().position(|b| *b == b'\n').ok_or("it ends within a line")?;
        let text = self.text(n as u64)?;
        self.skip(1)?;
        Ok(text)
    }
}

/// The `n` bytes from `from`, where there are `len` in all.
pub(super) fn slice(from: u64, n: u64, len: usize) -> Option<Range<usize>> {
    let end = from.checked_add(n).filter(|end| *end <= len as u64)?;
    Some(usize::try_from(from).ok()?..usize::try_from(end).ok()?)
}

//! Numbers, strings and metadata out of the bytes of a GGUF file, or one that has the like.

use serde_json::{Number, Value};

/// Lists in the metadata have at most so many elements together; vocabularies have a few hundred
/// thousand. An element may take 32 times as much memory as in the file.
const MOST_ELEMENTS: u64 = 1 << 22;

/// The code of a list.
const LIST: u32 = 9;

/// A place in the bytes.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    elements: u64,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes, at: 0, elements: 0 }
    }

    /// The number of bytes that have been read.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// The next `n` bytes.
    pub(crate) fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let end = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n));
        let found = end.and_then(|end| Some((end, self.bytes.get(self.at..end)?)));
        let (end, found) = found.ok_or_else(|| {
            format!("it ends where {n} more bytes are to be, at byte {}", self.at)
        })?;
        self.at = end;
        Ok(found)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self.take(N as u64)?;
        bytes.try_into().map_err(|_| "it ends".to_owned())
    }

    pub(crate) fn u8(&mut self) -> Result<u8, String> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, String> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn string(&mut self) -> Result<String, String> {
        let n = self.u64()?;
        let at = self.at;
        let bytes = self.take(n)?.to_vec();
        String::from_utf8(bytes).map_err(|_| format!("the text at byte {at} is not UTF-8"))
    }

    /// A value of the metadata after its type.
    pub(crate) fn value(&mut self) -> Result<Value, String> {
        match self.u32()? {
            LIST => {
                let (code, n) = (self.u32()?, self.u64()?);
                self.elements = self.elements.saturating_add(n);
                if self.elements > MOST_ELEMENTS {
                    return Err(format!("its lists have more than {MOST_ELEMENTS} elements"));
                }
                // Pushed one by one: the length is only what the file claims.
                let mut list = Vec::new();
                for _ in 0..n {
                    list.push(self.plain(code)?);
                }
                Ok(Value::Array(list))
            }
            code => self.plain(code),
        }
    }

    /// A value that is no list.
    fn plain(&mut self, code: u32) -> Result<Value, String> {
        let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
        Ok(match code {
            0 => self.u8()?.into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => self.u16()?.into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            6 => float(f32::from_le_bytes(self.array()?).into()),
            7 => (self.u8()? != 0).into(),
            8 => self.string()?.into(),
            10 => self.u64()?.into(),
            11 => i64::from_le_bytes(self.array()?).into(),
            12 => float(f64::from_le_bytes(self.array()?)),
            _ => return Err(format!("metadata of type {code} is not known here")),
        })
    }
}

//! The numbers of dense rows: a tensor, or bytes that stand in a file where they are more than memory is to hold.

use std::sync::Arc;

use modl_core::{Device, Error, Kind, Result, Tensor};
use sha2::{Digest, Sha256};

use crate::spill::Spill;

/// Rows `[rows, …]` of bytes or floats.
#[derive(Debug, Clone)]
pub(crate) enum StoredRows {
    Whole(Tensor),
    Spilled(Arc<Spilled>),
}

/// Rows u8 or f32, in a file where they are many.
#[derive(Debug)]
pub(crate) struct Spilled {
    size: Vec<i64>,
    kind: Kind,
    store: Spill,
}

/// What a row is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Numbers<'a> {
    Bytes(&'a [u8]),
    Floats(&'a [f32]),
}

impl Numbers<'_> {
    fn kind(self) -> Kind {
        match self {
            Numbers::Bytes(_) => Kind::Uint8,
            Numbers::Floats(_) => Kind::Float,
        }
    }
}

/// Rows in the making, all of one shape and kind.
#[derive(Debug)]
pub(crate) struct RowsWriter {
    rows: i64,
    shape: Vec<i64>,
    kind: Kind,
    store: Spill,
    bytes: Vec<u8>,
}

impl RowsWriter {
    /// For rows of this shape, made as `like` is; `most` bytes of them stand in memory.
    pub(crate) fn new(shape: &[i64], like: Numbers, most: usize) -> Self {
        let (shape, store) = (shape.to_vec(), Spill::new(most));
        RowsWriter { rows: 0, shape, kind: like.kind(), store, bytes: Vec::new() }
    }

    /// The shape of a row.
    pub(crate) fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// Takes a row, which has to have the shape of the others.
    ///
    /// # Errors
    /// Where some rows are of bytes and others of floats, or the file cannot be written.
    pub(crate) fn push(&mut self, row: Numbers) -> Result<()> {
        if row.kind() != self.kind {
            let problem = "has rows of bytes and others of floats; write all as one of them";
            return Err(Error::invalid("data", problem));
        }
        match row {
            Numbers::Bytes(bytes) => self.store.append(bytes)?,
            Numbers::Floats(floats) => {
                self.bytes.clear();
                self.bytes.extend(floats.iter().flat_map(|x| x.to_le_bytes()));
                self.store.append(&self.bytes)?
            }
        };
        self.rows += 1;
        Ok(())
    }

    /// All rows.
    ///
    /// # Errors
    /// Where their tensor cannot be made.
    pub(crate) fn finish(self) -> Result<StoredRows> {
        let size = [&[self.rows], self.shape.as_slice()].concat();
        let (kind, store) = (self.kind, self.store);
        let whole = match kind {
            // Single rows of bytes are sooner read there than picked out of a tensor.
            Kind::Uint8 => None,
            _ => store.in_memory(|bytes| Tensor::from_bytes(bytes, &size, kind)),
        };
        match whole {
            Some(whole) => whole.map(StoredRows::Whole),
            None => Ok(StoredRows::Spilled(Arc::new(Spilled { size, kind, store }))),
        }
    }
}

impl StoredRows {
    /// Their shape, `[rows, …]`.
    pub(crate) fn size(&self) -> Vec<i64> {
        match self {
            StoredRows::Whole(rows) => rows.size(),
            StoredRows::Spilled(rows) => rows.size.clone(),
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match self {
            StoredRows::Whole(rows) => rows.kind(),
            StoredRows::Spilled(rows) => rows.kind,
        }
    }

    /// Kind and shape in words, as a tensor says them.
    pub(crate) fn describe(&self) -> String {
        match self {
            StoredRows::Whole(rows) => format!("{rows:?}"),
            StoredRows::Spilled(rows) => match rows.kind {
                Kind::Uint8 => format!("u8{:?}", rows.size),
                _ => format!("f32{:?}", rows.size),
            },
        }
    }

    /// The rows at `index`.
    ///
    /// # Errors
    /// Where one is not there, or the file cannot be read.
    pub(crate) fn pick(&self, index: &[i64]) -> Result<Tensor> {
        if let StoredRows::Whole(rows) = self {
            let index = Tensor::from_slice(index, &[index.len() as i64], Device::Cpu)?;
            return rows.index_select(0, &index);
        }
        let mut size = self.size();
        if let Some(first) = size.first_mut() {
            *first = index.len() as i64;
        }
        Tensor::from_bytes(&self.bytes(index)?, &size, self.kind())
    }

    /// The bytes of the rows at `index`, one after the other.
    ///
    /// # Errors
    /// As [`StoredRows::pick`].
    pub(crate) fn bytes(&self, index: &[i64]) -> Result<Vec<u8>> {
        let rows = match self {
            StoredRows::Whole(_) => return self.pick(index)?.to_bytes(),
            StoredRows::Spilled(rows) => rows,
        };
        let count = rows.size.first().copied().unwrap_or(0);
        let width = rows.store.len().checked_div(count as u64).unwrap_or(0);
        let mut bytes = vec![0; index.len() * width as usize];
        for (own, i) in bytes.chunks_exact_mut((width as usize).max(1)).zip(index) {
            rows.store.read(*i as u64 * width, own)?;
        }
        Ok(bytes)
    }

    /// Adds all numbers to a hash.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub(crate) fn digest(&self, hash: &mut Sha256) -> Result<()> {
        self.pieces(|piece| {
            hash.update(piece);
            Ok(())
        })
    }

    /// These rows, then others of the same shape and kind.
    ///
    /// # Errors
    /// Where they cannot be joined, or a file cannot be read or written.
    pub(crate) fn and(&self, other: &StoredRows) -> Result<Self> {
        if let (StoredRows::Whole(a), StoredRows::Whole(b)) = (self, other) {
            return Tensor::cat(&[a.clone(), b.clone()], 0).map(StoredRows::Whole);
        }
        let most = |rows: &StoredRows| match rows {
            StoredRows::Whole(_) => 0,
            StoredRows::Spilled(rows) => rows.store.most(),
        };
        let store = Spill::new(most(self).max(most(other)));
        for rows in [self, other] {
            rows.pieces(|piece| store.append(piece).map(drop))?;
        }
        let mut size = self.size();
        if let (Some(rows), Some(more)) = (size.first_mut(), other.size().first()) {
            *rows += more;
        }
        Ok(StoredRows::Spilled(Arc::new(Spilled { size, kind: self.kind(), store })))
    }

    fn pieces(&self, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match self {
            StoredRows::Whole(rows) => each(&rows.to_bytes()?),
            StoredRows::Spilled(rows) => rows.store.pieces(each),
        }
    }
}

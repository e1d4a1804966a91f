//! Dense inputs: images and other rows of numbers that a network reads instead of tokens.

use std::fmt::Write as _;
use std::sync::{Arc, OnceLock};

use modl_core::{Device, Error, Kind, Result, Tensor, is_float};
use sha2::{Digest, Sha256};

/// One row of numbers for each example. The rows themselves are shared by all data sets that were
/// cut out of one, each of which knows which are its own.
#[derive(Debug, Clone)]
pub(crate) struct DenseRows {
    stored: Arc<Stored>,
    /// The row of each example.
    index: Vec<i64>,
}

#[derive(Debug)]
struct Stored {
    /// `[rows, …]`, u8 or floats.
    values: Tensor,
    digest: OnceLock<String>,
}

impl DenseRows {
    /// The rows of `examples` in order.
    ///
    /// # Errors
    /// Where there is not one row for each example, or they are neither bytes nor floats.
    pub(crate) fn new(name: &str, values: Tensor, examples: usize) -> Result<Self> {
        let wrong = |problem| Err(Error::invalid(format!("input `{name}`"), problem));
        if matches!(name, "input_ids" | "attention_mask") {
            return wrong("is what tokens become; give it another name".to_owned());
        }
        if values.dim() < 2 || values.len_of(0) != examples as i64 {
            return wrong(format!("has shape {:?} for {examples} examples", values.size()));
        }
        if values.kind() != Kind::Uint8 && !is_float(values.kind()) {
            return wrong(format!("{values:?} is to be made of bytes or of floats"));
        }
        let values = values.detach()?.to_device(Device::Cpu)?.contiguous()?;
        let stored = Arc::new(Stored { values, digest: OnceLock::new() });
        Ok(DenseRows { stored, index: (0..examples as i64).collect() })
    }

    /// Those of some examples, which have to be there.
    pub(crate) fn pick(&self, examples: &[usize]) -> Self {
        let index = examples.iter().filter_map(|i| self.index.get(*i).copied()).collect();
        DenseRows { stored: self.stored.clone(), index }
    }

    /// Those of some examples as floats `[examples, …]`: bytes 0 … 255 become 0 … 1.
    pub(crate) fn rows(&self, examples: &[usize], device: Device) -> Result<Tensor> {
        let index = self.pick(examples).index;
        let index = Tensor::from_slice(&index, &[index.len() as i64], Device::Cpu)?;
        let rows = self.stored.values.index_select(0, &index)?.to_device(device)?;
        match rows.kind() {
            Kind::Uint8 => rows.to_kind(Kind::Float)?.mul_scalar(1.0 / 255.0),
            _ => Ok(rows),
        }
    }

    /// The rows of `self`, then those of `other`.
    ///
    /// # Errors
    /// Where they differ in shape or kind.
    pub(crate) fn and(&self, other: &DenseRows) -> Result<Self> {
        let mut index = self.index.clone();
        if Arc::ptr_eq(&self.stored, &other.stored) {
            index.extend(&other.index);
            return Ok(DenseRows { stored: self.stored.clone(), index });
        }
        let (a, b) = (&self.stored.values, &other.stored.values);
        if a.kind() != b.kind() || a.size().get(1..) != b.size().get(1..) {
            return Err(Error::invalid("data sets", format!("{a:?} and {b:?} cannot be joined")));
        }
        index.extend(other.index.iter().map(|i| i + a.len_of(0)));
        let values = Tensor::cat(&[a.clone(), b.clone()], 0)?;
        let stored = Arc::new(Stored { values, digest: OnceLock::new() });
        Ok(DenseRows { stored, index })
    }

    /// A text that changes with any number, and with the choice of rows.
    pub(crate) fn digest(&self) -> Result<String> {
        let digest = match self.stored.digest.get() {
            Some(known) => known,
            None => {
                let values = &self.stored.values;
                let mut hash = Sha256::new();
                hash.update(format!("{values:?}"));
                hash.update(values.to_bytes()?);
                let mut text = String::new();
                for byte in hash.finalize() {
                    // Writing into a string does not fail.
                    let _ = write!(text, "{byte:02x}");
                }
                self.stored.digest.get_or_init(|| text)
            }
        };
        let mut hash = Sha256::new();
        hash.update(digest);
        self.index.iter().for_each(|i| hash.update(i.to_le_bytes()));
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }
}

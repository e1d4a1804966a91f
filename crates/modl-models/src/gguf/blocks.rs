//! The formats of GGUF's tensors: plain floats, and blocks of small integers q with a scale d and
//! perhaps a minimum m, from which x = d·q or x = d·q + m.
//!
//! In blocks of 32 each has its own d (and m) in f16. In blocks of 256 the scales of parts of 16 or
//! 32 elements are integers, too, and are multiplied by the block's d.

use half::f16;
use modl_core::{Kind, Result, Tensor};

/// What the elements of a tensor are stored as.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Format {
    /// As they are.
    Plain(Kind),
    /// In blocks of so many elements and bytes, each of which is written to f32.
    Blocks { elements: usize, bytes: usize, write: fn(&[u8], &mut [f32]) },
}

/// Formats by their codes and names.
const FORMATS: [(u32, &str, Format); 10] = [
    (0, "F32", Format::Plain(Kind::Float)),
    (1, "F16", Format::Plain(Kind::Half)),
    (30, "BF16", Format::Plain(Kind::BFloat16)),
    (2, "Q4_0", Format::Blocks { elements: 32, bytes: 18, write: q4_0 }),
    (3, "Q4_1", Format::Blocks { elements: 32, bytes: 20, write: q4_1 }),
    (6, "Q5_0", Format::Blocks { elements: 32, bytes: 22, write: q5_0 }),
    (7, "Q5_1", Format::Blocks { elements: 32, bytes: 24, write: q5_1 }),
    (8, "Q8_0", Format::Blocks { elements: 32, bytes: 34, write: q8_0 }),
    (12, "Q4_K", Format::Blocks { elements: 256, bytes: 144, write: q4_k }),
    (14, "Q6_K", Format::Blocks { elements: 256, bytes: 210, write: q6_k }),
];

impl Format {
    /// The format with that code.
    pub(crate) fn of(code: u32) -> Option<Self> {
        FORMATS.iter().find(|(c, ..)| *c == code).map(|(_, _, format)| *format)
    }

    /// The names of all formats.
    pub(crate) fn known() -> String {
        FORMATS.map(|(_, name, _)| name).join(", ")
    }

    /// The kind of the tensors that are made.
    pub(crate) fn kind(self) -> Kind {
        match self {
            Format::Plain(kind) => kind,
            Format::Blocks { .. } => Kind::Float,
        }
    }

    /// The bytes that `elements` take, where rows of `row` of them are whole blocks.
    pub(crate) fn size(self, elements: u64, row: u64) -> Option<u64> {
        match self {
            Format::Plain(kind) => elements.checked_mul(kind.elt_size_in_bytes() as u64),
            Format::Blocks { elements: block, bytes, .. } => row
                .is_multiple_of(block as u64)
                .then(|| elements / block as u64)
                .and_then(|blocks| blocks.checked_mul(bytes as u64)),
        }
    }

    /// The tensor of `shape` whose elements are in `bytes`.
    pub(crate) fn read(self, bytes: &[u8], shape: &[i64]) -> Result<Tensor> {
        let Format::Blocks { elements, bytes: size, write } = self else {
            return Tensor::from_bytes(bytes, shape, self.kind());
        };
        let mut values = vec![0f32; bytes.len() / size * elements];
        for (block, out) in bytes.chunks_exact(size).zip(values.chunks_exact_mut(elements)) {
            write(block, out);
        }
        Tensor::from_slice(&values, shape, modl_core::Device::Cpu)
    }
}

/// The f16 at the start, and the rest.
fn scale(block: &[u8]) -> (f32, &[u8]) {
    match block.split_first_chunk::<2>() {
        Some((bytes, rest)) => (f16::from_le_bytes(*bytes).to_f32(), rest),
        None => (0.0, block),
    }
}

/// The bits at the start, and the rest.
fn bits(block: &[u8]) -> (u32, &[u8]) {
    match block.split_first_chunk::<4>() {
        Some((bytes, rest)) => (u32::from_le_bytes(*bytes), rest),
        None => (0, block),
    }
}

/// Writes f(q) for the low halves of the bytes and then for the high ones; `high` holds a fifth bit
/// for each of the 32.
fn nibbles(bytes: &[u8], high: u32, out: &mut [f32], f: impl Fn(f32) -> f32) {
    let (low_out, high_out) = out.split_at_mut(bytes.len().min(out.len()));
    let fifth = |j: usize| ((high >> (j & 31)) & 1) << 4;
    for (j, (byte, x)) in bytes.iter().zip(low_out).enumerate() {
        *x = f((u32::from(byte & 15) | fifth(j)) as f32);
    }
    for (j, (byte, x)) in bytes.iter().zip(high_out).enumerate() {
        *x = f((u32::from(byte >> 4) | fifth(j + bytes.len())) as f32);
    }
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let (d, q) = scale(block);
    nibbles(q, 0, out, |q| d * (q - 8.0));
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, rest) = scale(block);
    let (m, q) = scale(rest);
    nibbles(q, 0, out, |q| d * q + m);
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, rest) = scale(block);
    let (high, q) = bits(rest);
    nibbles(q, high, out, |q| d * (q - 16.0));
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, rest) = scale(block);
    let (m, rest) = scale(rest);
    let (high, q) = bits(rest);
    nibbles(q, high, out, |q| d * q + m);
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let (d, q) = scale(block);
    for (x, q) in out.iter_mut().zip(q) {
        *x = d * f32::from(*q as i8);
    }
}

/// Eight parts of 32, each with a scale and a minimum of 6 bits; 12 bytes hold the 16.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, rest) = scale(block);
    let (m, rest) = scale(rest);
    let Some((packed, q)) = rest.split_first_chunk::<12>() else { return };
    let six = |j: usize| -> (f32, f32) {
        let at = |i: usize| packed.get(i).copied().unwrap_or(0);
        let (scale, minimum) = if j < 4 {
            (at(j) & 63, at(j + 4) & 63)
        } else {
            ((at(j + 4) & 15) | (at(j - 4) >> 6) << 4, (at(j + 4) >> 4) | (at(j) >> 6) << 4)
        };
        (d * f32::from(scale), m * f32::from(minimum))
    };
    for (i, (q, out)) in q.chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let ((d1, m1), (d2, m2)) = (six(2 * i), six(2 * i + 1));
        for ((q, x), y) in q.iter().zip(low).zip(high) {
            *x = d1 * f32::from(q & 15) - m1;
            *y = d2 * f32::from(q >> 4) - m2;
        }
    }
}

/// Sixteen parts of 16, each with a scale of 8 bits: 128 bytes of low halves, 64 of high quarters,
/// the scales and d.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let Some((low, rest)) = block.split_at_checked(128) else { return };
    let Some((high, rest)) = rest.split_at_checked(64) else { return };
    let Some((scales, d)) = rest.split_at_checked(16) else { return };
    let (d, _) = scale(d);
    let halves = low.chunks_exact(64).zip(high.chunks_exact(32)).zip(scales.chunks_exact(8));
    for (((low, high), scales), out) in halves.zip(out.chunks_exact_mut(128)) {
        for (n, x) in out.iter_mut().enumerate() {
            // Four runs of 32: the low halves of the first 64 bytes and then their high halves.
            let (run, l) = (n / 32, n % 32);
            let at = |bytes: &[u8], i: usize| bytes.get(i).copied().unwrap_or(0);
            let byte = at(low, l + 32 * (run % 2));
            let nibble = if run < 2 { byte & 15 } else { byte >> 4 };
            let q = i32::from(nibble | ((at(high, l) >> (2 * run)) & 3) << 4) - 32;
            *x = d * f32::from(at(scales, n / 16) as i8) * q as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use modl_core::Device;
    use modl_core::checkpoint::Checkpoint;

    use super::*;
    use crate::gguf::Gguf;

    /// Against what the gguf package makes of the same blocks.
    #[test]
    fn every_format_gives_the_numbers_of_the_reference() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf");
        let file = Gguf::open(&dir.join("formats.gguf")).unwrap();
        let wanted = Checkpoint::open(dir.join("formats.safetensors")).unwrap();
        let names = FORMATS.map(|(_, name, _)| name);
        assert_eq!(file.names().len(), names.len());
        for name in names {
            let (found, wanted) = (
                file.tensor(name, Device::Cpu).unwrap(),
                wanted.tensor(name, Device::Cpu).unwrap(),
            );
            assert_eq!(file.info(name).unwrap(), (found.size(), found.kind()), "{name}");
            assert!(found.all_close(&wanted, 0.0, 1e-6).unwrap(), "{name}");
        }
    }
}

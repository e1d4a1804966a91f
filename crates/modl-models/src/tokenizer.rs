//! From text to ids, by a `tokenizer.json` as Hugging Face's `tokenizers` writes it.

use std::path::Path;

use modl_core::{Device, Error, Result, Tensor, Tensors};
use tokenizers::{Encoding, PostProcessor, TruncationDirection};

use crate::gguf::{Gguf, description};

/// The names that padding has in common vocabularies.
const PADDING: [&str; 3] = ["[PAD]", "<pad>", "<|endoftext|>"];

/// The names that the mask has.
const MASKS: [&str; 2] = ["[MASK]", "<mask>"];

/// A tokenizer. Padding and truncation that its file prescribes are not followed: both are the
/// caller's.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    padding: i64,
}

/// Texts as ids, padded at the end to the longest.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[texts, seq]` i64.
    pub ids: Tensor,
    /// `[texts, seq]` i64: 1 for tokens, 0 for padding.
    pub mask: Tensor,
}

impl Batch {
    /// As a backbone takes it: `input_ids` and `attention_mask`.
    pub fn inputs(&self) -> Tensors {
        Tensors::new().with("input_ids", self.ids.clone()).with("attention_mask", self.mask.clone())
    }
}

impl Tokenizer {
    /// Opens the `tokenizer.json` of a model's folder, or the tokenizer in a `.gguf` file, which has
    /// to be one of byte pairs (`gpt2`).
    ///
    /// # Errors
    /// Where it is missing or is not a tokenizer.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        if Gguf::is_at(dir.as_ref()) {
            return Self::from_gguf(dir.as_ref());
        }
        let path = dir.as_ref().join("tokenizer.json");
        let refuse = |e: tokenizers::Error| Error::file(&path, format!("is not a tokenizer: {e}"));
        if !path.is_file() {
            return Err(Error::file(
                &path,
                "is not there; a model's folder has one beside its weights",
            ));
        }
        Self::new(tokenizers::Tokenizer::from_file(&path).map_err(refuse)?).map_err(refuse)
    }

    fn from_gguf(path: &Path) -> Result<Self> {
        let refuse = |e: tokenizers::Error| Error::file(path, format!("has no tokenizer: {e}"));
        let file = Gguf::open(path)?;
        let json = description(&file)?.to_string();
        let inner = json.parse::<tokenizers::Tokenizer>().map_err(refuse)?;
        let padding = file.metadata().get("tokenizer.ggml.padding_token_id");
        let padding = padding.and_then(serde_json::Value::as_i64);
        let own = Self::new(inner).map_err(refuse)?;
        Ok(Tokenizer { padding: padding.unwrap_or(own.padding), ..own })
    }

    fn new(mut inner: tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        let own = inner.get_padding().map(|p| p.pad_id);
        let named = || PADDING.iter().find_map(|name| inner.token_to_id(name));
        let padding = i64::from(own.or_else(named).unwrap_or(0));
        inner.with_padding(None);
        inner.with_truncation(None)?;
        Ok(Tokenizer { inner, padding })
    }

    /// The size of the vocabulary with the added tokens.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The ids of one text with its special tokens, however long.
    pub fn encode_one(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.inner.encode(text, true).map_err(|e| refused(&e))?;
        Ok(ids(&encoding).collect())
    }

    /// The ids of one text with its special tokens, cut to `max_len` of them.
    ///
    /// # Errors
    /// Where `max_len` leaves no room beside the special tokens.
    pub fn encode_up_to(&self, text: &str, max_len: usize) -> Result<Vec<i64>> {
        let room = self.room(max_len)?;
        let mut encoding = self.inner.encode(text, false).map_err(|e| refused(&e))?;
        encoding.truncate(room, 0, TruncationDirection::Right);
        let whole = self.inner.post_process(encoding, None, true).map_err(|e| refused(&e))?;
        Ok(ids(&whole).collect())
    }

    /// The id of the token that stands for one that is to be guessed, where the vocabulary has one.
    pub fn mask(&self) -> Option<i64> {
        MASKS.iter().find_map(|name| self.inner.token_to_id(name)).map(i64::from)
    }

    /// The ids of special tokens, in order.
    pub fn special(&self) -> Vec<i64> {
        let added = self.inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special);
        let mut ids: Vec<i64> = special.map(|(id, _)| i64::from(*id)).collect();
        ids.sort_unstable();
        ids
    }

    /// How many tokens of a text have room among `max_len`.
    fn room(&self, max_len: usize) -> Result<usize> {
        let special = self.inner.get_post_processor().map_or(0, |p| p.added_tokens(false));
        match max_len.checked_sub(special) {
            None | Some(0) => {
                let problem = format!("{max_len} tokens, {special} of them special");
                Err(Error::invalid("encode", format!("{problem}, leave no room for a text")))
            }
            Some(room) => Ok(room),
        }
    }

    /// The ids of one text alone, without tokens that the tokenizer adds.
    pub(crate) fn encode_bare(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.inner.encode(text, false).map_err(|e| refused(&e))?;
        Ok(ids(&encoding).collect())
    }

    /// The text of ids, without special tokens.
    ///
    /// # Errors
    /// Where an id is negative or too large to be one.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let id = |id: &i64| {
            u32::try_from(*id).map_err(|_| Error::invalid("id", format!("{id} is of no token")))
        };
        let ids = ids.iter().map(id).collect::<Result<Vec<u32>>>()?;
        self.inner.decode(&ids, true).map_err(|e| refused(&e))
    }

    /// The ids of several texts with their special tokens, each cut to `max_len`.
    ///
    /// # Errors
    /// Where there are no texts, or `max_len` leaves no room beside the special tokens.
    pub fn encode(&self, texts: &[&str], max_len: usize) -> Result<Batch> {
        if texts.is_empty() {
            return Err(Error::invalid("encode", "has no texts, of which no batch can be made"));
        }
        let room = self.room(max_len)?;
        let raw = self.inner.encode_batch(texts.to_vec(), false).map_err(|e| refused(&e))?;
        let whole = raw.into_iter().map(|mut encoding| {
            encoding.truncate(room, 0, TruncationDirection::Right);
            self.inner.post_process(encoding, None, true).map_err(|e| refused(&e))
        });
        let rows = whole.collect::<Result<Vec<Encoding>>>()?;
        let longest = rows.iter().map(Encoding::len).max().unwrap_or(0);
        let mut all = Vec::with_capacity(rows.len() * longest);
        let mut mask = Vec::with_capacity(rows.len() * longest);
        for row in &rows {
            let rest = longest - row.len();
            all.extend(ids(row).chain(std::iter::repeat_n(self.padding, rest)));
            mask.extend(std::iter::repeat_n(1i64, row.len()));
            mask.extend(std::iter::repeat_n(0i64, rest));
        }
        let shape = [rows.len() as i64, longest as i64];
        Ok(Batch {
            ids: Tensor::from_slice(&all, &shape, Device::Cpu)?,
            mask: Tensor::from_slice(&mask, &shape, Device::Cpu)?,
        })
    }
}

fn ids(encoding: &Encoding) -> impl Iterator<Item = i64> + '_ {
    encoding.get_ids().iter().map(|id| i64::from(*id))
}

fn refused(e: &tokenizers::Error) -> Error {
    Error::invalid("text", e.to_string())
}

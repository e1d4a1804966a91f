//! `tokenizer_source` and `tokenizer`: which tokens the result knows, and where their embeddings come
//! from.
//!
//! The result has the tokenizer of the base, of a model, or of the base with all tokens of the others
//! added (`union`). A model that lacks one of its tokens takes the row from the base where that has it,
//! else from the one model that has it, or the mean of those that have it; then the method merges rows of
//! equal tokens. `tokens` names another source for single ones.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use modl_core::{Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use super::config::MergeConfig;
use crate::merge::{Row, Source, Vocabulary, read_json};

/// `tokenizer`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    /// `base`, `union` or a model; `union` where it is left out.
    source: Option<String>,
    #[serde(default)]
    tokens: BTreeMap<String, Token>,
    pad_to_multiple_of: Option<usize>,
}

/// Where the row of one token comes from.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Token {
    source: Option<TokenSource>,
    /// Whether models that have the token take it from there, too.
    #[serde(default)]
    force: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum TokenSource {
    Model(String),
    Other(Other),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Other {
    kind: String,
    model: Option<String>,
    token: Option<String>,
    token_id: Option<usize>,
}

/// What the result's tokenizer is, and where the rows of its tokens come from.
#[derive(Debug)]
pub(super) struct Tokens {
    /// By source, then by token of the result. Places of rows are places of sources.
    pub(super) vocabulary: Arc<Vocabulary>,
    /// `tokenizer.json`, where it is not copied.
    pub(super) text: Option<String>,
    /// The source whose other files the result has.
    pub(super) donor: usize,
    /// Rows of an embedding.
    pub(super) size: usize,
}

/// What the configuration says of tokenizers; `None` where it says nothing.
///
/// # Errors
/// Where a model or token is unknown, or a tokenizer cannot be read.
pub(super) fn tokens(config: &MergeConfig, sources: &[Source]) -> Result<Option<Tokens>> {
    let wanted = match (&config.tokenizer_source, &config.tokenizer) {
        (Some(source), _) => Wanted { source: Some(source.clone()), ..Wanted::default() },
        (None, Some(value)) => serde_json::from_value(value.clone())
            .map_err(|e| Error::invalid("tokenizer", e.to_string()))?,
        (None, None) => return Ok(None),
    };
    let place = |name: &str| {
        let known =
            || Error::unknown("model of a tokenizer", name, sources.iter().map(|s| &s.name));
        sources.iter().position(|s| s.name == name).ok_or_else(known)
    };
    let base = config.base_model.as_deref().map(&place).transpose()?;
    let vocabularies: Vec<Tokenizer> = sources.iter().map(Tokenizer::of).collect::<Result<_>>()?;
    let source = wanted.source.as_deref().unwrap_or("union");
    let donor = match source {
        "base" | "union" => base.unwrap_or(0),
        model => place(model)?,
    };
    let need = |i: usize| {
        let lost = || Error::invalid("tokenizer", "names a model that is not there");
        vocabularies.get(i).ok_or_else(lost)
    };
    let mut made = need(donor)?.clone();
    if source == "union" {
        for other in &vocabularies {
            other.by_id().into_iter().for_each(|token| made.add(token, other));
        }
    }
    for token in wanted.tokens.keys() {
        made.add(token, &made.clone());
    }
    let mut size = made.ids.values().max().map_or(0, |id| id + 1);
    if let Some(multiple) = wanted.pad_to_multiple_of.filter(|m| *m > 0) {
        size = size.next_multiple_of(multiple);
    }
    let rows = (0..sources.len())
        .map(|own| {
            let mut rows = vec![Row::Filler; size];
            for (token, id) in &made.ids {
                let row = row(token, own, base, &vocabularies, &wanted, &place)?;
                if let Some(place) = rows.get_mut(*id) {
                    *place = row;
                }
            }
            Ok(rows)
        })
        .collect::<Result<_>>()?;
    let changed = made.json != need(donor)?.json;
    let text = serde_json::to_string(&made.json)
        .map_err(|e| Error::invalid("tokenizer.json", e.to_string()))?;
    let vocabulary = Arc::new(Vocabulary { rows });
    Ok(Some(Tokens { vocabulary, text: changed.then_some(text), donor, size }))
}

/// Where one model's row of a token comes from.
fn row(
    token: &str,
    own: usize,
    base: Option<usize>,
    vocabularies: &[Tokenizer],
    wanted: &Wanted,
    place: &impl Fn(&str) -> Result<usize>,
) -> Result<Row> {
    let at = |i: usize| vocabularies.get(i).and_then(|v| v.row(token)).map(|id| (i, id));
    let said = wanted.tokens.get(token);
    if let Some((i, id)) = at(own).filter(|_| !said.is_some_and(|s| s.force)) {
        return Ok(Row::Of(i, id));
    }
    let unknown = |model: &str, token: &str| {
        let problem = format!("`{model}` has no token {token:?} to take the embedding from");
        Error::invalid("tokenizer.tokens", problem)
    };
    match said.and_then(|s| s.source.as_ref()) {
        Some(TokenSource::Model(model)) => {
            let (i, id) = at(place(model)?).ok_or_else(|| unknown(model, token))?;
            return Ok(Row::Of(i, id));
        }
        Some(TokenSource::Other(other)) if other.kind == "zero" => return Ok(Row::Zero),
        Some(TokenSource::Other(other)) if other.kind == "model_token" => {
            let model = other.model.as_deref().unwrap_or_default();
            let i = place(model)?;
            let known = vocabularies.get(i);
            let id = match (&other.token, other.token_id) {
                (Some(token), None) => known.and_then(|v| v.row(token)),
                (None, Some(id)) => known.filter(|v| id < v.rows).map(|_| id),
                _ => {
                    let problem = "a `model_token` has either a `token` or a `token_id`";
                    return Err(Error::invalid("tokenizer.tokens", problem));
                }
            };
            let named = other.token.clone().unwrap_or_else(|| format!("{:?}", other.token_id));
            return Ok(Row::Of(i, id.ok_or_else(|| unknown(model, &named))?));
        }
        Some(TokenSource::Other(other)) => {
            let known = ["model_token", "zero"];
            return Err(Error::unknown("kind of a token's source", &other.kind, known));
        }
        None => {}
    }
    let having: Vec<(usize, usize)> = (0..vocabularies.len()).filter_map(at).collect();
    Ok(match (having.as_slice(), base.and_then(at)) {
        ([], _) => Row::Zero,
        ([(i, id)], _) => Row::Of(*i, *id),
        (_, Some((i, id))) => Row::Of(i, id),
        (several, None) => Row::Mean(several.to_vec()),
    })
}

/// The tokens of a model and its `tokenizer.json`.
#[derive(Debug, Clone)]
struct Tokenizer {
    json: Value,
    ids: BTreeMap<String, usize>,
    /// Rows of the model's embeddings: tokens beyond have none.
    rows: usize,
}

impl Tokenizer {
    fn of(source: &Source) -> Result<Self> {
        let path: PathBuf = source.path.join("tokenizer.json");
        let json = read_json(&path)?;
        let model = json.pointer("/model/vocab");
        let id = |v: &Value| v.as_u64().map(|n| n as usize);
        let mut ids: BTreeMap<String, usize> = match model {
            Some(Value::Object(map)) => {
                map.iter().filter_map(|(t, v)| Some((t.clone(), id(v)?))).collect()
            }
            // Unigram: pairs of a token and its score.
            Some(Value::Array(all)) => all
                .iter()
                .enumerate()
                .filter_map(|(n, pair)| Some((pair.get(0)?.as_str()?.to_owned(), n)))
                .collect(),
            _ => return Err(Error::file(&path, "has no `model.vocab`")),
        };
        for added in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            if let (Some(content), Some(id)) =
                (added.get("content").and_then(Value::as_str), added.get("id").and_then(id))
            {
                ids.insert(content.to_owned(), id);
            }
        }
        let stated = source.config.get("vocab_size").and_then(id);
        let rows = stated.unwrap_or_else(|| ids.values().max().map_or(0, |n| n + 1));
        Ok(Tokenizer { json, ids, rows })
    }

    /// The row of a token, where the embeddings have one.
    fn row(&self, token: &str) -> Option<usize> {
        self.ids.get(token).copied().filter(|id| *id < self.rows)
    }

    /// The tokens that have a row, in the order of their ids.
    fn by_id(&self) -> Vec<&str> {
        let mut all: Vec<(usize, &str)> = self
            .ids
            .iter()
            .filter(|(_, id)| **id < self.rows)
            .map(|(t, id)| (*id, t.as_str()))
            .collect();
        all.sort_unstable();
        all.into_iter().map(|(_, token)| token).collect()
    }

    /// Adds a token behind the others, as `other` describes it.
    fn add(&mut self, token: &str, other: &Tokenizer) {
        if self.ids.contains_key(token) {
            return;
        }
        let id = self.ids.values().max().map_or(0, |id| id + 1);
        let described = other.json.get("added_tokens").and_then(Value::as_array);
        let described =
            described.into_iter().flatten().find(|a| a.get("content") == Some(&token.into()));
        let mut entry = described.cloned().unwrap_or_else(|| {
            json!({
                "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": true, "special": false
            })
        });
        if let Some(entry) = entry.as_object_mut() {
            entry.insert("id".into(), id.into());
        }
        match self.json.get_mut("added_tokens").and_then(Value::as_array_mut) {
            Some(all) => all.push(entry),
            None => {
                if let Some(json) = self.json.as_object_mut() {
                    json.insert("added_tokens".into(), json!([entry]));
                }
            }
        }
        self.ids.insert(token.to_owned(), id);
    }
}

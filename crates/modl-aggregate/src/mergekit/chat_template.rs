//! `chat_template`: how a conversation becomes one text. A Jinja template, the name of a format, or
//! `auto` for what most of the models have.

use std::fs;

use modl_core::{Error, Result};
use serde_json::Value;

use crate::merge::{Source, read_json};

/// Formats by mergekit's names for them, written anew: they give the texts that mergekit's templates give,
/// with what those have of spaces and lines of their own (`tests/python/chat_templates_are_mergekits.py`).
const NAMED: [(&str, &str); 5] = [
    ("alpaca", include_str!("templates/alpaca.jinja")),
    ("chatml", include_str!("templates/chatml.jinja")),
    ("exaone", include_str!("templates/exaone.jinja")),
    ("llama3", include_str!("templates/llama3.jinja")),
    ("mistral", include_str!("templates/mistral.jinja")),
];

/// The template that the result has; `None` where it keeps what its tokenizer has.
///
/// # Errors
/// Where it is neither a template nor a name, or a model's own cannot be read.
pub(super) fn chat_template(wanted: Option<&str>, sources: &[Source]) -> Result<Option<String>> {
    match wanted {
        None => Ok(None),
        Some("auto") => usual(sources),
        Some(text) if text.contains('{') => Ok(Some(text.to_owned())),
        Some(name) => match NAMED.iter().find(|(n, _)| *n == name) {
            Some((_, text)) => Ok(Some((*text).to_owned())),
            None => {
                let known = NAMED.iter().map(|(n, _)| *n).chain(["auto"]);
                Err(Error::unknown("chat template", name, known))
            }
        },
    }
}

/// What most of the models have; of equally many that which is met first.
fn usual(sources: &[Source]) -> Result<Option<String>> {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for source in sources {
        let Some(text) = of(source)? else { continue };
        match counts.iter_mut().find(|(known, _)| *known == text) {
            Some((_, n)) => *n += 1,
            None => counts.push((text, 1)),
        }
    }
    let most = counts.iter().map(|(_, n)| *n).max();
    Ok(counts.into_iter().find(|(_, n)| Some(*n) == most).map(|(text, _)| text))
}

/// A model's own: a file beside the tokenizer, or in the older form a field of its configuration.
fn of(source: &Source) -> Result<Option<String>> {
    let file = source.path.join("chat_template.jinja");
    if file.is_file() {
        let text = fs::read_to_string(&file)
            .map_err(|e| Error::file(&file, format!("cannot be read: {e}")))?;
        return Ok(Some(text.trim().to_owned()));
    }
    let file = source.path.join("tokenizer_config.json");
    if !file.is_file() {
        return Ok(None);
    }
    let config = read_json(&file)?;
    let named = |all: &Vec<Value>| {
        let default = all.iter().find(|t| t.get("name") == Some(&"default".into()));
        default.and_then(|t| t.get("template")).and_then(Value::as_str).map(str::to_owned)
    };
    let found = match config.get("chat_template") {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(all)) => named(all),
        _ => None,
    };
    Ok(found.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::path::Path;

    use super::*;

    /// Three models: two have one template, in either form, and one has another.
    fn models(at: &Path) -> Vec<Source> {
        let weights = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/mergekit/models/base/model.safetensors");
        ["a", "b", "c"]
            .iter()
            .map(|name| {
                let folder = at.join(name);
                fs::create_dir(&folder).unwrap();
                fs::copy(&weights, folder.join("model.safetensors")).unwrap();
                let (file, text) = match *name {
                    "a" => ("chat_template.jinja", "{{ other }}".to_owned()),
                    "b" => ("chat_template.jinja", "{{ usual }}\n".to_owned()),
                    _ => {
                        ("tokenizer_config.json", r#"{"chat_template": "{{ usual }}"}"#.to_owned())
                    }
                };
                fs::write(folder.join(file), text).unwrap();
                Source::open(name, &folder).unwrap()
            })
            .collect()
    }

    #[test]
    fn names_texts_and_what_most_models_have() {
        let dir = tempfile::tempdir().unwrap();
        let models = models(dir.path());
        let of = |wanted| chat_template(Some(wanted), &models).unwrap().unwrap();
        assert_eq!(of("auto"), "{{ usual }}");
        assert_eq!(of("{{ mine }}"), "{{ mine }}");
        assert!(of("chatml").contains("<|im_start|>"));
        assert_eq!(chat_template(None, &models).unwrap(), None);
        assert_eq!(chat_template(Some("auto"), &[]).unwrap(), None);
        let error = chat_template(Some("chatmI"), &models).unwrap_err().to_string();
        assert!(error.contains("chatml"), "{error}");
    }
}

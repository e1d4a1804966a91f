//! What choices are counted by: the task, the class of a token, or labels of a file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use modl_core::Error;
use modl_models::Tokenizer;
use modl_train::Batch;

use crate::commands::run_folder::Loaded;

/// What choices are counted by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum By {
    /// The task of the row.
    Task,
    /// `special`, `word`, `number` or `punctuation`.
    TokenClass,
    /// The label that a file has for the row.
    File(PathBuf),
}

impl From<&str> for By {
    fn from(text: &str) -> By {
        match text {
            "task" => By::Task,
            "token-class" => By::TokenClass,
            file => By::File(file.into()),
        }
    }
}

impl std::fmt::Display for By {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            By::Task => f.write_str("task"),
            By::TokenClass => f.write_str("class of token"),
            By::File(path) => write!(f, "label of {}", path.display()),
        }
    }
}

/// Labels of rows or of tokens.
pub(super) enum Labels {
    Task,
    TokenClass(Box<Tokenizer>),
    /// By task and id.
    Given(PathBuf, BTreeMap<(String, String), String>),
}

impl Labels {
    pub(super) fn new(by: &By, loaded: &Loaded) -> Result<Self> {
        Ok(match by {
            By::Task => Labels::Task,
            By::TokenClass => {
                let folder = loaded.recipe.backbone_folder()?;
                Labels::TokenClass(Box::new(Tokenizer::open(folder)?))
            }
            By::File(path) => {
                let text = std::fs::read_to_string(path).with_context(|| {
                    let known = "--by takes `task`, `token-class`, or a file of labels";
                    format!("{}: {known}", path.display())
                })?;
                let mut all = BTreeMap::new();
                for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.is_empty()) {
                    let columns: Vec<&str> = line.split('\t').collect();
                    let [task, id, label] = columns[..] else {
                        let wants = "wants task, id and label, separated by tabs";
                        anyhow::bail!("{}:{}: {wants}", path.display(), i + 1);
                    };
                    all.insert((task.to_owned(), id.to_owned()), label.to_owned());
                }
                Labels::Given(path.clone(), all)
            }
        })
    }

    /// Whether each token has one of its own.
    pub(super) fn of_tokens(&self) -> bool {
        matches!(self, Labels::TokenClass(_))
    }

    /// Those of a batch: row by row, or token by token with padding.
    pub(super) fn of(&self, batch: &Batch) -> modl_core::Result<Vec<String>> {
        match self {
            Labels::Task => Ok(batch.tasks.clone()),
            Labels::TokenClass(tokenizer) => {
                let ids = batch.inputs.need("input_ids")?.to_vec::<i64>()?;
                let class = |id: &i64| Ok(class(&tokenizer.decode(&[*id])?).to_owned());
                ids.iter().map(class).collect()
            }
            Labels::Given(path, all) => {
                let one = |(task, id): (&String, &String)| {
                    let missing = || {
                        Error::file(path, format!("has no label for example `{id}` of `{task}`"))
                    };
                    all.get(&(task.clone(), id.clone())).cloned().ok_or_else(missing)
                };
                batch.tasks.iter().zip(&batch.ids).map(one).collect()
            }
        }
    }
}

/// The class of a token by its text, which special tokens do not have.
fn class(text: &str) -> &'static str {
    let text = text.trim();
    match text {
        "" => "special",
        _ if !text.chars().any(char::is_alphanumeric) => "punctuation",
        _ if !text.chars().any(char::is_alphabetic) => "number",
        _ => "word",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_classed_by_their_text() {
        for (text, wanted) in [
            ("", "special"),
            (" ", "special"),
            ("film", "word"),
            ("##ing", "word"),
            ("3d", "word"),
            ("1984", "number"),
            ("3.5", "number"),
            ("...", "punctuation"),
            ("'", "punctuation"),
        ] {
            assert_eq!(class(text), wanted, "{text}");
        }
        assert_eq!(By::from("task"), By::Task);
        assert_eq!(By::from("a/b.tsv"), By::File("a/b.tsv".into()));
    }
}

//! A configuration as it is written: `models`, `slices` or `modules`, a method and its parameters.

use std::collections::BTreeMap;

use modl_core::{Error, Result};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// Values of settings by name: a scalar, a list over the layers, or values with filters.
pub type Parameters = Map<String, Value>;

/// One document.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeConfig {
    /// How later documents of the same file name the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The method.
    pub merge_method: String,
    /// The model that the others are compared with.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "maybe_reference"
    )]
    pub base_model: Option<String>,
    /// Whole models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<InputModel>>,
    /// Layers of models, one slice after the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slices: Option<Vec<OutputSlice>>,
    /// The parts of a model that has several (an encoder and a decoder), each by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<BTreeMap<String, Module>>,
    /// Settings of the method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Parameters>,
    /// What inputs are rounded to: float32, bfloat16, float16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// Of what the result's numbers are; `dtype` where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out_dtype: Option<String>,
    /// Whose tokenizer the result has: `base`, `union` or a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_source: Option<String>,
    /// The same, with rules for single tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Value>,
    /// A template's name or text, or `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
}

/// A whole model.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputModel {
    /// Its folder, or `FOLDER+ADAPTER`.
    #[serde(deserialize_with = "reference")]
    pub model: String,
    /// Settings for this model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Parameters>,
    /// The file of statistics that the method asks for, if it does not stand beside the model under
    /// its usual name. mergekit does not have this key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<String>,
}

/// Layers of the result that come of as many layers of each source.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputSlice {
    /// What they come of.
    pub sources: Vec<InputSlice>,
    /// The base of this slice.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "maybe_reference"
    )]
    pub base_model: Option<String>,
    /// Settings of this slice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Parameters>,
}

/// Layers of a model.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputSlice {
    /// Its folder, or `FOLDER+ADAPTER`.
    #[serde(deserialize_with = "reference")]
    pub model: String,
    /// The first layer, and the one after the last.
    pub layer_range: (usize, usize),
    /// Settings for this model in this slice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Parameters>,
}

/// One part of a model that has several.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Module {
    /// Whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<InputModel>>,
    /// By layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slices: Option<Vec<OutputSlice>>,
    /// Settings of this part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Parameters>,
}

impl MergeConfig {
    /// Checks what the format asks for beyond names and types.
    ///
    /// # Errors
    /// Where there is not exactly one of `models`, `slices` and `modules`, or keys exclude each other.
    pub fn check(&self) -> Result<()> {
        let given = [self.models.is_some(), self.slices.is_some(), self.modules.is_some()];
        if given.iter().filter(|g| **g).count() != 1 {
            return Err(Error::invalid(
                "merge configuration",
                "is to have exactly one of `models`, `slices` and `modules`",
            ));
        }
        if self.tokenizer_source.is_some() && self.tokenizer.is_some() {
            return Err(Error::invalid(
                "merge configuration",
                "has both `tokenizer_source` and `tokenizer`; the latter has a `source` of its own",
            ));
        }
        for (name, module) in self.modules.iter().flatten() {
            if module.models.is_some() == module.slices.is_some() {
                let problem = "is to have either `models` or `slices`";
                return Err(Error::invalid(format!("modules.{name}"), problem));
            }
        }
        Ok(())
    }

    /// The models that it names, each once, in the order in which they are named, the base last
    /// where nothing else names it.
    pub fn models(&self) -> Vec<&str> {
        let mut all: Vec<&str> = Vec::new();
        for name in self.named() {
            if !all.contains(&name) {
                all.push(name);
            }
        }
        all
    }

    fn named(&self) -> impl Iterator<Item = &str> {
        fn sliced(slices: &[OutputSlice]) -> impl Iterator<Item = &str> {
            slices.iter().flat_map(|s| {
                let sources = s.sources.iter().map(|i| i.model.as_str());
                sources.chain(s.base_model.as_deref())
            })
        }
        let models = self.models.iter().flatten().map(|m| m.model.as_str());
        let slices = self.slices.iter().flat_map(|s| sliced(s));
        let modules = self.modules.iter().flatten().flat_map(|(_, m)| {
            let whole = m.models.iter().flatten().map(|m| m.model.as_str());
            whole.chain(m.slices.iter().flat_map(|s| sliced(s)))
        });
        models.chain(slices).chain(modules).chain(self.base_model.as_deref())
    }
}

/// How mergekit writes a model: `FOLDER`, `FOLDER+ADAPTER`, or the same in parts.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Reference {
    Text(String),
    Parts(Parts),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    model: Folder,
    lora: Option<Folder>,
    /// Which tensors there are is said by the files.
    #[serde(rename = "override_architecture")]
    _override_architecture: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Folder {
    Text(String),
    Parts(FolderParts),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FolderParts {
    path: String,
    revision: Option<String>,
}

impl Folder {
    fn path(self) -> std::result::Result<String, String> {
        match self {
            Folder::Parts(FolderParts { path, revision: Some(r) }) => {
                Err(format!("revision `{r}` of `{path}`: models are folders on this machine"))
            }
            Folder::Text(path) | Folder::Parts(FolderParts { path, .. }) => Ok(path),
        }
    }
}

impl Reference {
    fn text(self) -> std::result::Result<String, String> {
        match self {
            Reference::Text(text) => Ok(text),
            Reference::Parts(Parts { model, lora: None, .. }) => model.path(),
            Reference::Parts(Parts { model, lora: Some(lora), .. }) => {
                Ok(format!("{}+{}", model.path()?, lora.path()?))
            }
        }
    }
}

fn reference<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<String, D::Error> {
    Reference::deserialize(d)?.text().map_err(D::Error::custom)
}

fn maybe_reference<'de, D: Deserializer<'de>>(
    d: D,
) -> std::result::Result<Option<String>, D::Error> {
    let found = Option::<Reference>::deserialize(d)?;
    found.map(Reference::text).transpose().map_err(D::Error::custom)
}

/// Reads a file: one document, or several of which later ones may name the results of earlier ones.
///
/// # Errors
/// Where it is not YAML, or a key is unknown or has a wrong type: line and key are named.
pub fn read_documents(text: &str) -> Result<Vec<MergeConfig>> {
    let mut all = Vec::new();
    for document in serde_norway::Deserializer::from_str(text) {
        let config = MergeConfig::deserialize(document)
            .map_err(|e| Error::invalid("merge configuration", e.to_string()))?;
        config.check()?;
        all.push(config);
    }
    if all.is_empty() {
        return Err(Error::invalid("merge configuration", "is empty"));
    }
    Ok(all)
}

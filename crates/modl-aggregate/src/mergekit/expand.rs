//! A configuration made into a plan: which tensor comes of which, with which settings.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use modl_core::shards::ShardSize;
use modl_core::{Error, Result, ResultExt, Seed};
use safetensors::Dtype;

use super::beside::beside;
use super::config::{InputSlice, MergeConfig, OutputSlice, Parameters};
use super::layers::stacks;
use super::part::{Found, Part};
use super::settings::known;
use super::statistics;
use super::tokenizer::tokens;
use crate::merge::{MergeMethods, Plan, Source};

/// Merges the adapter of a folder into a model as this is read ([`Source::adapt`]).
pub type Adapt = fn(adapter: &Path, model: &mut Source) -> Result<()>;

/// What a configuration does not say.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where random choices come from. Default: 0.
    pub seed: u64,
    /// The size of a file at most. Default: 50 GB.
    pub shard: ShardSize,
    /// Whether numbers that are not finite may be in an input. Default: no.
    pub allow_nan: bool,
    /// What is done with a tensor that some models lack, or have in another shape. Default: refuse.
    pub uneven: Uneven,
    /// Folders under names that stand for a model: the results of earlier documents.
    pub named: BTreeMap<String, PathBuf>,
    /// The folder that relative paths of models start from. Default: the working directory.
    pub folder: PathBuf,
    /// What is to be done with `MODEL+ADAPTER`. Default: nothing, which refuses it.
    pub adapt: Option<Adapt>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            seed: 0,
            shard: ShardSize::USUAL,
            allow_nan: false,
            uneven: Uneven::Refuse,
            named: BTreeMap::new(),
            folder: PathBuf::new(),
            adapt: None,
        }
    }
}

/// What is done with a tensor that some models lack, or have in another shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uneven {
    /// An error that names all of them.
    Refuse,
    /// It is taken from the base, or from the first model that has it, and the plan says so.
    Keep,
}

/// Makes a plan of a configuration: opens the models, and finds out everything that could go wrong.
///
/// # Errors
/// What does not fit, before anything is written.
pub fn plan(config: &MergeConfig, methods: &MergeMethods, options: &Options) -> Result<Plan> {
    config.check()?;
    let spec = methods.find(&config.merge_method)?.spec();
    let mut models = Models { sources: Vec::new() };
    for name in config.models() {
        models.open(name, options)?;
    }
    if let Some(kind) = spec.statistics {
        statistics::open(&mut models.sources, kind, config, &options.folder)?;
    }
    let parts = parts(config, &models)?;
    let dtype = config.dtype.as_deref().map(dtype_of).transpose()?;
    let out_dtype = config.out_dtype.as_deref().map(dtype_of).transpose()?.or(dtype);
    let tokens = tokens(config, &models.sources)?;
    let mut found = Found {
        tokens: tokens.as_ref().map(|t| (t.vocabulary.clone(), t.size)),
        spec,
        dtype,
        out_dtype,
        outputs: BTreeMap::new(),
        uneven: Vec::new(),
    };
    known(&spec, config.parameters.as_ref()).at("parameters")?;
    for part in &parts {
        part.expand(config, &models, &mut found)?;
    }
    if options.uneven == Uneven::Refuse && !found.uneven.is_empty() {
        let shown: Vec<&str> = found.uneven.iter().take(8).map(String::as_str).collect();
        let more = found.uneven.len().saturating_sub(shown.len());
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        return Err(Error::invalid(
            "models",
            format!(
                "have not the same tensors: {}{more}. Take such tensors from the base with \
                 `--uneven keep`; for other vocabularies say `tokenizer_source`",
                shown.join("; ")
            ),
        ));
    }
    let first = parts.first().and_then(|p| p.slices.first()).and_then(|s| s.sources.first());
    let donor = config.base_model.as_deref().or(first.map(|i| i.model.as_str()));
    let donor = models.index(donor.unwrap_or_default())?;
    let kind = found.outputs.values().find(|o| o.settings.is_some()).map(|o| o.dtype);
    let (texts, copies) = beside(config, &models, donor, &parts, kind, tokens.as_ref())?;
    let plan = Plan {
        method: config.merge_method.clone(),
        sources: models.sources,
        outputs: found.outputs.into_values().collect(),
        texts,
        copies,
        seed: Seed(options.seed),
        shard: options.shard,
        allow_nan: options.allow_nan,
        notes: found.uneven,
    };
    plan.check(methods)?;
    Ok(plan)
}

/// The models of a configuration.
pub(super) struct Models {
    pub(super) sources: Vec<Source>,
}

impl Models {
    fn open(&mut self, name: &str, options: &Options) -> Result<()> {
        let (path, adapter) = match found(name, options) {
            Err(lost) => {
                // A folder may have a plus in its own name; then it was there.
                let (model, adapter) = name.split_once('+').ok_or(lost)?;
                (found(model, options)?, Some(found(adapter, options)?))
            }
            Ok(path) => (path, None),
        };
        let mut source = Source::open(name, &path)?;
        if let Some(adapter) = adapter {
            let Some(adapt) = options.adapt else {
                let advice = "merge it first: `modl convert --to model`";
                return Err(Error::unsupported(format!("the adapter in `{name}`"), advice));
            };
            adapt(&adapter, &mut source).at(name)?;
        }
        self.sources.push(source);
        Ok(())
    }

    pub(super) fn index(&self, name: &str) -> Result<usize> {
        let found = self.sources.iter().position(|s| s.name == name);
        found.ok_or_else(|| Error::invalid("models", format!("`{name}` is none of them")))
    }

    pub(super) fn get(&self, i: usize) -> Result<&Source> {
        self.sources.get(i).ok_or_else(|| Error::invalid("models", "one is lost"))
    }
}

/// The folder of a model or an adapter.
fn found(name: &str, options: &Options) -> Result<PathBuf> {
    let path = match options.named.get(name) {
        Some(path) => path.clone(),
        None => options.folder.join(name),
    };
    if path.exists() {
        return Ok(path);
    }
    let problem = match modl_core::nearest(name, options.named.keys().map(String::as_str)) {
        Some(near) => format!("is not there; did you mean the document `{near}`?"),
        None => "is not there; models are folders on this machine".to_owned(),
    };
    Err(Error::file(path, problem))
}

/// The parts of a configuration, by slices.
fn parts(config: &MergeConfig, models: &Models) -> Result<Vec<Part>> {
    let whole = |inputs: &[super::InputModel], stack: Option<&str>| -> Result<Vec<OutputSlice>> {
        let mut names: Vec<(&str, Option<Parameters>)> =
            inputs.iter().map(|i| (i.model.as_str(), i.parameters.clone())).collect();
        if let Some(base) = &config.base_model
            && !names.iter().any(|(name, _)| name == base)
        {
            names.push((base, None));
        }
        let sources = names.into_iter().map(|(model, parameters)| {
            let source = models.get(models.index(model)?)?;
            let layers = stacks(source);
            let count = match stack {
                Some(stack) => layers.get(stack).copied(),
                None => layers.values().max().copied(),
            };
            let layer_range = (0, count.unwrap_or(0));
            Ok(InputSlice { model: model.to_owned(), layer_range, parameters })
        });
        let sources = sources.collect::<Result<_>>()?;
        Ok(vec![OutputSlice { sources, base_model: None, parameters: None }])
    };
    if let Some(models) = &config.models {
        let slices = whole(models, None)?;
        return Ok(vec![Part { stack: None, slices, parameters: None, sliced: false }]);
    }
    if let Some(slices) = &config.slices {
        return Ok(vec![Part {
            stack: None,
            slices: slices.clone(),
            parameters: None,
            sliced: true,
        }]);
    }
    let mut all = Vec::new();
    for (name, module) in config.modules.iter().flatten() {
        let first = models.sources.first().map(stacks).unwrap_or_default();
        let stack = match name.as_str() {
            "default" => None,
            _ => {
                let fits = first.keys().find(|s| **s == name || s.starts_with(&format!("{name}.")));
                let known = first.keys().map(|s| (*s).to_owned()).chain(["default".to_owned()]);
                Some((*fits.ok_or_else(|| Error::unknown("module", name, known))?).to_owned())
            }
        };
        let (slices, sliced) = match (&module.models, &module.slices) {
            (Some(models), _) => (whole(models, stack.as_deref())?, false),
            (_, slices) => (slices.clone().unwrap_or_default(), true),
        };
        all.push(Part { stack, slices, parameters: module.parameters.clone(), sliced });
    }
    Ok(all)
}

/// What `dtype` means.
fn dtype_of(name: &str) -> Result<Dtype> {
    Ok(match name.trim_start_matches("torch.") {
        "float32" => Dtype::F32,
        "bfloat16" => Dtype::BF16,
        "float16" => Dtype::F16,
        "float64" => Dtype::F64,
        other => return Err(Error::unknown("dtype", other, ["float32", "bfloat16", "float16"])),
    })
}

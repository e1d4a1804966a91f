//! A configuration made into a plan: which tensor comes of which, with which settings.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use modl_core::{Error, Result, ResultExt, Seed};
use safetensors::Dtype;

use super::config::{InputSlice, MergeConfig, OutputSlice, Parameters};
use super::layers::{comes_after, layered, stacks};
use super::settings::{Scopes, known};
use crate::merge::{Base, MergeMethods, Output, Plan, Source, Spec};

/// What a configuration does not say.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where random choices come from. Default: 0.
    pub seed: u64,
    /// Bytes of a file at most. Default: 5 GB.
    pub shard: u64,
    /// Whether numbers that are not finite may be in an input. Default: no.
    pub allow_nan: bool,
    /// What is done with a tensor that some models lack, or have in another shape. Default: refuse.
    pub uneven: Uneven,
    /// Folders under names that stand for a model: the results of earlier documents.
    pub named: BTreeMap<String, PathBuf>,
    /// The folder that relative paths of models start from. Default: the working directory.
    pub folder: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            seed: 0,
            shard: 5_000_000_000,
            allow_nan: false,
            uneven: Uneven::Refuse,
            named: BTreeMap::new(),
            folder: PathBuf::new(),
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
    let parts = parts(config, &models)?;
    let dtype = config.dtype.as_deref().map(dtype_of).transpose()?;
    let out_dtype = config.out_dtype.as_deref().map(dtype_of).transpose()?.or(dtype);
    let mut found = Found { spec, dtype, out_dtype, outputs: BTreeMap::new(), uneven: Vec::new() };
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
    let (texts, copies) = beside(config, models.get(donor)?, &parts, kind)?;
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
struct Models {
    sources: Vec<Source>,
}

impl Models {
    fn open(&mut self, name: &str, options: &Options) -> Result<()> {
        let path = match options.named.get(name) {
            Some(path) => path.clone(),
            None => options.folder.join(name),
        };
        if !path.exists() {
            let known = options.named.keys().map(String::as_str);
            let problem = match modl_core::nearest(name, known) {
                Some(near) => format!("is not there; did you mean the document `{near}`?"),
                None => "is not there; models are folders on this machine".to_owned(),
            };
            return Err(Error::file(path, problem));
        }
        self.sources.push(Source::open(name, &path)?);
        Ok(())
    }

    fn index(&self, name: &str) -> Result<usize> {
        let found = self.sources.iter().position(|s| s.name == name);
        found.ok_or_else(|| Error::invalid("models", format!("`{name}` is none of them")))
    }

    fn get(&self, i: usize) -> Result<&Source> {
        self.sources.get(i).ok_or_else(|| Error::invalid("models", "one is lost"))
    }
}

/// One part of a model, by slices.
struct Part {
    /// Its stack of layers; `None` for all of the model.
    stack: Option<String>,
    slices: Vec<OutputSlice>,
    parameters: Option<Parameters>,
    /// Whether its layers are renumbered, since they do not all come of whole models.
    sliced: bool,
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

/// What is being put together.
struct Found {
    spec: Spec,
    dtype: Option<Dtype>,
    out_dtype: Option<Dtype>,
    outputs: BTreeMap<String, Output>,
    uneven: Vec<String>,
}

impl Part {
    fn expand(&self, config: &MergeConfig, models: &Models, found: &mut Found) -> Result<()> {
        let (Some(first), Some(last)) = (self.slices.first(), self.slices.last()) else {
            return Err(Error::invalid("slices", "are empty"));
        };
        known(&found.spec, self.parameters.as_ref()).at("modules")?;
        let mut next = 0;
        for (n, slice) in self.slices.iter().enumerate() {
            let place = format!("slice {}", n + 1);
            known(&found.spec, slice.parameters.as_ref()).at(&place)?;
            for source in &slice.sources {
                known(&found.spec, source.parameters.as_ref()).at(&place)?;
            }
            let base = slice.base_model.as_ref().or(config.base_model.as_ref());
            if let Some(base) = base
                && !slice.sources.iter().any(|s| s.model == *base)
                && found.spec.base != Base::Input
            {
                let problem = format!("`{base}` is the base and none of the slice's sources");
                return Err(Error::invalid(place, problem));
            }
            next += self.layers(config, models, slice, next, found).at(&place)?;
        }
        // What belongs to no layer: as the first slice says, or the last.
        let names: BTreeSet<&String> = first
            .sources
            .iter()
            .chain(&last.sources)
            .map(|s| Ok(models.get(models.index(&s.model)?)?.tensors().keys()))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .flatten()
            .collect();
        let outside = |name: &&&String| match &self.stack {
            Some(stack) => {
                let part = stack.split('.').next().unwrap_or_default();
                layered(name).is_none() && name.starts_with(&format!("{part}."))
            }
            None => layered(name).is_none(),
        };
        for name in names.iter().filter(outside) {
            let slice = if comes_after(name) { last } else { first };
            let inputs: Vec<&str> = slice.sources.iter().map(|_| name.as_str()).collect();
            self.tensor(config, models, slice, name, &inputs, 0.0, found)?;
        }
        Ok(())
    }

    /// The layers of a slice, from `start` on in the result; how many.
    fn layers(
        &self,
        config: &MergeConfig,
        models: &Models,
        slice: &OutputSlice,
        start: usize,
        found: &mut Found,
    ) -> Result<usize> {
        let ranges: Vec<(usize, usize)> = slice.sources.iter().map(|s| s.layer_range).collect();
        let count = |(from, to): &(usize, usize)| to.saturating_sub(*from);
        let n = ranges.first().map_or(0, count);
        if let Some(other) = ranges.iter().find(|r| count(r) != n) {
            let problem = format!("has {n} layers of one source and {} of another", count(other));
            return Err(Error::invalid("layer_range", problem));
        }
        let mut stacked: BTreeSet<(&str, &str)> = BTreeSet::new();
        for source in &slice.sources {
            let source_of = models.get(models.index(&source.model)?)?;
            let (from, to) = source.layer_range;
            let counts = stacks(source_of);
            let most = counts.values().max().copied().unwrap_or(0);
            if to > most && self.sliced {
                let problem =
                    format!("{from} to {to} of `{}`, which has {most} layers", source.model);
                return Err(Error::invalid("layer_range", problem));
            }
            for name in source_of.tensors().keys() {
                if let Some(l) = layered(name)
                    && self.stack.as_deref().is_none_or(|s| s == l.stack)
                {
                    stacked.insert((l.stack, l.rest));
                }
            }
        }
        for layer in 0..n {
            let depth = if n > 1 { layer as f64 / (n - 1) as f64 } else { 1.0 };
            for (stack, rest) in &stacked {
                let name = format!("{stack}.{}.{rest}", start + layer);
                let inputs: Vec<String> =
                    ranges.iter().map(|r| format!("{stack}.{}.{rest}", r.0 + layer)).collect();
                let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
                // Not every layer has every tensor (a bias of relative positions in the first).
                let there = slice.sources.iter().zip(&inputs).any(|(s, input)| {
                    let source = models.index(&s.model).and_then(|i| models.get(i));
                    source.is_ok_and(|s| s.tensors().contains_key(*input))
                });
                if there {
                    self.tensor(config, models, slice, &name, &inputs, depth, found)?;
                }
            }
        }
        Ok(n)
    }

    /// One tensor of the result, which comes of a tensor of each source of the slice.
    #[allow(clippy::too_many_arguments)]
    fn tensor(
        &self,
        config: &MergeConfig,
        models: &Models,
        slice: &OutputSlice,
        name: &str,
        inputs: &[&str],
        depth: f64,
        found: &mut Found,
    ) -> Result<()> {
        let base_name = slice.base_model.as_ref().or(config.base_model.as_ref());
        let base_place = slice.sources.iter().position(|s| Some(&s.model) == base_name);
        let mut members = Vec::new();
        for (place, (source, input)) in slice.sources.iter().zip(inputs).enumerate() {
            let index = models.index(&source.model)?;
            if let Some(at) = models.get(index)?.tensors().get(*input) {
                members.push((place, index, *input, at, source.parameters.as_ref()));
            }
        }
        let lead = members.iter().find(|m| Some(m.0) == base_place).or(members.first());
        let Some((_, lead_source, lead_input, lead, _)) = lead.copied() else { return Ok(()) };
        let mut output = Output {
            name: name.to_owned(),
            shape: lead.shape.clone(),
            dtype: lead.dtype,
            rounded: found.dtype,
            inputs: vec![(lead_source, lead_input.to_owned())],
            base: None,
            settings: None,
        };
        let floats = matches!(lead.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64);
        if !floats {
            // Counters and indices are not averaged.
            found.outputs.insert(name.to_owned(), output);
            return Ok(());
        }
        output.dtype = found.out_dtype.unwrap_or(lead.dtype);
        let missing: Vec<&str> = slice
            .sources
            .iter()
            .enumerate()
            .filter(|(n, _)| !members.iter().any(|m| m.0 == *n))
            .map(|(_, s)| s.model.as_str())
            .collect();
        let other = members.iter().find(|m| m.3.shape != lead.shape);
        let problem = match (missing.is_empty(), other) {
            (false, _) => Some(format!("`{name}` is not in {}", missing.join(", "))),
            (_, Some(m)) => Some(format!("`{name}` is {:?} and {:?}", lead.shape, m.3.shape)),
            _ => None,
        };
        if let Some(problem) = problem {
            found.uneven.push(problem);
            output.dtype = lead.dtype;
            found.outputs.insert(name.to_owned(), output);
            return Ok(());
        }
        output.inputs = members.iter().map(|m| (m.1, m.2.to_owned())).collect();
        output.base = base_place.and_then(|b| members.iter().position(|m| m.0 == b));
        let scopes = Scopes {
            slice: slice.parameters.as_ref(),
            module: self.parameters.as_ref(),
            file: config.parameters.as_ref(),
            depth,
        };
        let own: Vec<(&str, Option<&Parameters>)> = members.iter().map(|m| (m.2, m.4)).collect();
        let settings = scopes.settings(&found.spec, name, &own, output.base)?;
        let each = if found.spec.base == Base::Input {
            own.len()
        } else {
            own.len() - usize::from(output.base.is_some())
        };
        output.settings = Some(settings.complete(&found.spec, each).at(name)?);
        found.outputs.insert(name.to_owned(), output);
        Ok(())
    }
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

/// The name of a dtype in `config.json`.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        Dtype::F64 => "float64",
        _ => "float32",
    }
}

/// Files that are copied beside the weights.
const BESIDE: [&str; 12] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "preprocessor_config.json",
];

type Beside = (Vec<(String, String)>, Vec<PathBuf>);

/// `config.json` and what else belongs to the result.
fn beside(
    config: &MergeConfig,
    donor: &Source,
    parts: &[Part],
    kind: Option<Dtype>,
) -> Result<Beside> {
    let mut settings = donor.config.clone();
    if let (Some(kind), Some(map)) = (kind, settings.as_object_mut()) {
        let key = if map.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        map.insert(key.to_owned(), dtype_name(kind).into());
    }
    for part in parts.iter().filter(|p| p.sliced) {
        let count = |s: &OutputSlice| {
            s.sources.first().map_or(0, |i| i.layer_range.1.saturating_sub(i.layer_range.0))
        };
        let layers: usize = part.slices.iter().map(count).sum();
        let decoder = part.stack.as_deref().is_some_and(|s| s.starts_with("decoder"));
        let keys: &[&str] = match decoder && settings.get("num_decoder_layers").is_some() {
            true => &["num_decoder_layers"],
            false => &["num_hidden_layers", "n_layer", "n_layers", "num_layers"],
        };
        let key = keys.iter().find(|k| settings.get(**k).is_some());
        if let Some(place) = key.and_then(|k| settings.get_mut(*k)) {
            *place = layers.into();
        }
    }
    let mut texts = Vec::new();
    if !settings.is_null() {
        let text = serde_json::to_string_pretty(&settings)
            .map_err(|e| Error::invalid("config.json", e.to_string()))?;
        texts.push(("config.json".to_owned(), text + "\n"));
    }
    let yaml = serde_norway::to_string(config)
        .map_err(|e| Error::invalid("merge configuration", e.to_string()))?;
    texts.push(("mergekit_config.yml".to_owned(), yaml));
    let folder = if donor.path.is_dir() { donor.path.as_path() } else { Path::new("") };
    let copies = BESIDE.iter().map(|n| folder.join(n)).filter(|p| p.is_file()).collect();
    Ok((texts, copies))
}

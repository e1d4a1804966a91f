//! One part of a model, tensor by tensor: its layers, and what belongs to none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use modl_core::{Error, Result, ResultExt};
use safetensors::Dtype;

use super::config::{MergeConfig, OutputSlice, Parameters};
use super::expand::Models;
use super::layers::{comes_after, layered, stacks};
use super::settings::{Scopes, known};
use crate::merge::{Base, Output, Row, Source, Spec, Vocabulary};

/// One part of a model, by slices.
pub(super) struct Part {
    /// Its stack of layers; `None` for all of the model.
    pub(super) stack: Option<String>,
    pub(super) slices: Vec<OutputSlice>,
    pub(super) parameters: Option<Parameters>,
    /// Whether its layers are renumbered, since they do not all come of whole models.
    pub(super) sliced: bool,
}

/// What is being put together.
pub(super) struct Found {
    pub(super) spec: Spec,
    /// The vocabulary of the result, by source, and its size.
    pub(super) tokens: Option<(Arc<Vocabulary>, usize)>,
    pub(super) dtype: Option<Dtype>,
    pub(super) out_dtype: Option<Dtype>,
    pub(super) outputs: BTreeMap<String, Output>,
    pub(super) uneven: Vec<String>,
}

impl Part {
    pub(super) fn expand(
        &self,
        config: &MergeConfig,
        models: &Models,
        found: &mut Found,
    ) -> Result<()> {
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
            let layers = self.layers(config, models, slice, next, found);
            next += if self.sliced { layers.at(&place)? } else { layers? };
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
            vocabulary: None,
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
        let by_token = found.tokens.clone().filter(|_| {
            members.iter().all(|m| {
                models.get(m.1).is_ok_and(|source| has_row_for_each_token(source, name, &m.3.shape))
            })
        });
        let rows = usize::from(by_token.is_some());
        let other = members.iter().find(|m| m.3.shape.get(rows..) != lead.shape.get(rows..));
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
        if let Some((vocabulary, size)) = by_token {
            let places: Vec<usize> = members.iter().map(|m| m.1).collect();
            output.vocabulary = Some(Arc::new(among(&vocabulary, &places)));
            if let Some(rows) = output.shape.first_mut() {
                *rows = size;
            }
        }
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

/// Whether a tensor's first dimension is the vocabulary.
fn has_row_for_each_token(source: &Source, name: &str, shape: &[usize]) -> bool {
    const NAMES: [&str; 8] = [
        "embed_tokens.weight",
        "word_embeddings.weight",
        "wte.weight",
        "shared.weight",
        "lm_head.weight",
        "lm_head.bias",
        "predictions.bias",
        "predictions.decoder.weight",
    ];
    let rows = source.config.get("vocab_size").and_then(serde_json::Value::as_u64);
    NAMES.iter().any(|n| name.ends_with(n)) && rows == shape.first().map(|n| *n as u64)
}

/// A vocabulary whose rows name sources, with rows that name these inputs.
fn among(vocabulary: &Vocabulary, sources: &[usize]) -> Vocabulary {
    let input = |source: usize| sources.iter().position(|s| *s == source);
    let moved = |row: &Row| match row {
        Row::Of(source, at) => input(*source).map_or(Row::Zero, |i| Row::Of(i, *at)),
        Row::Mean(all) => {
            let all: Vec<_> = all.iter().filter_map(|(s, at)| Some((input(*s)?, *at))).collect();
            if all.is_empty() { Row::Zero } else { Row::Mean(all) }
        }
        other => other.clone(),
    };
    let of =
        |source: &usize| vocabulary.rows.get(*source).into_iter().flatten().map(moved).collect();
    Vocabulary { rows: sources.iter().map(of).collect() }
}

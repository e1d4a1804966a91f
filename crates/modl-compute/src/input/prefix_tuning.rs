//! Prefix tuning: trained keys and values before those of the tokens, in every layer.
//!
//! Attention looks at \[P_K; K\] and \[P_V; V\] with P `[p, layers · 2 · width]` in all, each layer's
//! part as `[p, groups, head_dim]`; tokens stand p positions further on. It equals
//! (1 − λ)·attention + λ·softmax(q P_Kᵀ) P_V, where λ is the share of attention that the prefix
//! gets (He et al. 2022). With a projection P = W₂ tanh(W₁ E + b₁) + b₂ in training, which a PEFT
//! file holds multiplied out. It is no identity at the start.
//!
//! In an encoder with a decoder PEFT gives a prefix to the decoder's self-attention alone
//! (`num_transformer_submodules` 2), and there takes slots 4i and 4i + 1 of the 2·layers halves of P
//! for layer i, from the start again where they end: layers share parts of P, others are unused.
//!
//! Li and Liang 2021, *Prefix-Tuning*, arXiv 2101.00190; without a projection also Liu et al. 2021,
//! *P-Tuning v2*, arXiv 2110.07602. Survey §3.2, input composition. Names and defaults are PEFT's.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope, Signal, SiteKind,
    Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::prompt_tuning::PROMPT;
use crate::peft::Provenance;

/// The parameters of the projection: E, W₁, b₁, W₂, b₂.
pub(crate) const PROJECTION: [&str; 5] = [
    "embedding.weight",
    "transform.0.weight",
    "transform.0.bias",
    "transform.2.weight",
    "transform.2.bias",
];

/// Configuration of prefix tuning at `attention` sites, and at the `tokens` site for the positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrefixTuning {
    /// p, at least 1; default 30.
    pub num_virtual_tokens: i64,
    /// How many stacks PEFT counts, which says which part of P belongs to a layer: 2 for the decoder
    /// behind an encoder. Default 1: each attention site has a part of its own.
    pub num_transformer_submodules: i64,
    /// Trains the prefix through a projection; default false, which is P-tuning v2 (deep prompts
    /// without reparametrisation).
    pub prefix_projection: bool,
    /// The width within the projection; default 512.
    pub encoder_hidden_size: i64,
    /// Whether a projection has been multiplied out, as in PEFT's files.
    pub projected: bool,
    /// The standard deviation of the start; default 1, as in PEFT.
    pub std: f64,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl Default for PrefixTuning {
    fn default() -> Self {
        PrefixTuning {
            num_virtual_tokens: 30,
            num_transformer_submodules: 1,
            prefix_projection: false,
            encoder_hidden_size: 512,
            projected: false,
            std: 1.0,
            peft: Provenance::default(),
        }
    }
}

/// The sites of a prefix of one stack, or of the second of two.
pub(crate) fn prefixed(stacks: i64) -> Targets {
    if stacks == 1 {
        return Targets::pattern("all-tokens|all-attention");
    }
    let others = r"(.*\.)?encoder\..*|.*\.EncDecAttention";
    let exclude = Some(modl_core::Names::Pattern(others.to_owned()));
    Targets { exclude, ..Targets::pattern("all-attention") }
}

impl ModuleConfig for PrefixTuning {
    fn kind(&self) -> &'static str {
        "prefix_tuning"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        prefixed(self.num_transformer_submodules)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if self.num_virtual_tokens < 1 || self.encoder_hidden_size < 1 {
            let problem = "and encoder_hidden_size are to be at least 1";
            return Err(Error::invalid("prefix_tuning.num_virtual_tokens", problem));
        }
        if !(1..=2).contains(&self.num_transformer_submodules) {
            let problem = format!("is {}, wants 1 or 2", self.num_transformer_submodules);
            return Err(Error::invalid("prefix_tuning.num_transformer_submodules", problem));
        }
        if at.site.kind == SiteKind::Tokens {
            return Ok(Box::new(Shift { by: self.num_virtual_tokens }));
        }
        let layers: Vec<_> = at.sites.iter().filter(|s| s.kind == SiteKind::Attention).collect();
        let layer = layers.iter().position(|s| s.index == at.site.index).ok_or_else(|| {
            Error::unsupported(
                format!("prefix tuning at a site of kind {:?}", at.site.kind),
                "attach it to `all-tokens|all-attention`",
            )
        })?;
        let width = at.site.input;
        if let Some(other) = layers.iter().find(|s| s.input != width) {
            let problem = format!("is {} wide, `{}` {width}", other.input, at.site.path);
            return Err(Error::invalid(&other.path, problem));
        }
        let columns = 2 * width * layers.len() as i64;
        let (p, h) = (self.num_virtual_tokens, self.encoder_hidden_size);
        let start = Init::Normal(self.std);
        let mut common = scope.common();
        let source = if self.prefix_projection && !self.projected {
            let shapes = [vec![p, width], vec![h, width], vec![h], vec![columns, h], vec![columns]];
            let mut all = Tensors::new();
            for (name, shape) in PROJECTION.into_iter().zip(shapes) {
                let init = match name {
                    "embedding.weight" => start,
                    n if n.ends_with("bias") => Init::Zeros,
                    _ => Init::Kaiming,
                };
                all.set(name, common.shared(name, &shape, init)?);
            }
            Source::Projected(all)
        } else {
            Source::Flat(common.shared(PROMPT, &[p, columns], start)?)
        };
        // The half of a layer that this key stands for; its value is the next.
        let slot = 2 * self.num_transformer_submodules * layer as i64 % (2 * layers.len() as i64);
        Ok(Box::new(Prefix { source, at: slot * width, width }))
    }
}

/// E, W₁, b₁, W₂, b₂ multiplied out: P `[p, layers · 2 · width]`.
pub(crate) fn project(all: &Tensors) -> Result<Tensor> {
    let get = |i: usize| all.need(PROJECTION[i]);
    let inner = get(0)?.linear(get(1)?, Some(get(2)?))?.tanh()?;
    inner.linear(get(3)?, Some(get(4)?))
}

/// Where P comes from.
#[derive(Debug, Clone)]
enum Source {
    Flat(Tensor),
    Projected(Tensors),
}

/// The prefix of one layer.
#[derive(Debug, Clone)]
struct Prefix {
    source: Source,
    /// Where this layer's columns start.
    at: i64,
    width: i64,
}

impl Module for Prefix {
    fn kind(&self) -> &'static str {
        "prefix_tuning"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let (key, value) = (x.with.need("key")?, x.with.need("value")?);
        let (groups, kind) = (key.len_of(1), key.kind());
        let all = match &self.source {
            Source::Flat(all) => all.clone(),
            Source::Projected(all) => project(all)?,
        };
        let p = all.len_of(0);
        let part = |start: i64| {
            let own = all.narrow(1, start, self.width)?.to_kind(kind)?;
            let heads = own.reshape(&[p, groups, self.width / groups])?.transpose(0, 1)?;
            heads.unsqueeze(0)?.expand(&[x.rows(), -1, -1, -1])
        };
        let mut with = x.with.clone();
        with.set("key", Tensor::cat(&[part(self.at)?, key.clone()], 2)?);
        with.set("value", Tensor::cat(&[part(self.at + self.width)?, value.clone()], 2)?);
        // Nothing hides the prefix.
        with.set("mask", x.with.need("mask")?.pad(&[p, 0])?);
        f.call(&Signal { x: x.x.clone(), with }, cx)
    }

    fn phi(&self) -> Tensors {
        match &self.source {
            Source::Flat(all) => Tensors::new().with(PROMPT, all.clone()),
            Source::Projected(all) => all.clone(),
        }
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let source = match &self.source {
            Source::Flat(_) => Source::Flat(phi.need(PROMPT)?.clone()),
            Source::Projected(own) => {
                Source::Projected(own.map(|name, _| Ok(phi.need(name)?.clone()))?)
            }
        };
        Ok(Box::new(Prefix { source, ..self.clone() }))
    }

    fn signature(&self) -> String {
        let shapes: Vec<String> =
            self.phi().iter().map(|(n, t)| format!("{n}{:?}", t.size())).collect();
        format!("prefix_tuning({}, from {})", shapes.join(", "), self.at)
    }
}

/// The positions of tokens behind a prefix.
#[derive(Debug)]
struct Shift {
    by: i64,
}

impl Module for Shift {
    fn kind(&self) -> &'static str {
        "prefix_tuning"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let positions = x.with.need("positions")?.shift(self.by)?;
        f.call(&Signal { x: x.x.clone(), with: x.with.clone().with("positions", positions) }, cx)
    }

    fn with_phi(&self, _: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Shift { by: self.by }))
    }

    fn signature(&self) -> String {
        format!("prefix_tuning(positions + {})", self.by)
    }
}

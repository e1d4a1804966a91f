//! (IA)³: activations rescaled by learned vectors.
//!
//! y = l ⊙ f_θ(x) with l `[out, 1]`, or y = f_θ(l ⊙ x) with l `[1, in]` at the second layer of a
//! feed-forward block, where l ⊙ x is the activation between the two layers. l starts at 1, so
//! that a fresh module changes nothing. Both are changes of θ, too: l scales the rows of W and b,
//! or the columns of W.
//!
//! Liu et al. 2022, *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
//! Learning*, arXiv 2205.05638. Survey §3.3, function composition. Names and rules are PEFT's.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Names, Result, Scope, Signal,
    Site, SiteKind, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::peft::Provenance;

/// The parameter's name, as in PEFT's files.
const L: &str = "ia3_l";

/// Configuration of (IA)³ at linear sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ia3 {
    /// The sites whose input is scaled instead of their output: those whose path ends with one of
    /// the names, or fits the pattern as a whole. The default takes the second layer of the
    /// feed-forward blocks of BERT, ViT, GPT-2, T5 and LLaMA.
    pub feedforward_modules: Names,
    /// How l starts.
    pub init: Ia3Init,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

/// How l starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ia3Init {
    /// 1 everywhere.
    #[default]
    Ones,
    /// Standard normal: changes the function from the start; for tests.
    Random,
}

impl Default for Ia3 {
    fn default() -> Self {
        Ia3 {
            feedforward_modules: Names::Pattern(
                r"(.*\.)?(output\.dense|fc2|mlp\.c_proj|wo|down_proj)".into(),
            ),
            init: Ia3Init::default(),
            peft: Provenance::default(),
        }
    }
}

impl Ia3 {
    pub(crate) fn scales_input(&self, site: &Site) -> Result<bool> {
        match &self.feedforward_modules {
            // Unlike the names of targets, these need not start at a dot.
            Names::List(names) => Ok(names.iter().any(|n| site.path.ends_with(n))),
            pattern => Targets::new(pattern.clone()).take(site),
        }
    }
}

impl ModuleConfig for Ia3 {
    fn kind(&self) -> &'static str {
        "ia3"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        if site.kind != SiteKind::Linear {
            return Err(Error::unsupported(
                format!("(IA)³ at a site of kind {:?}", site.kind),
                "attach it to linear sites, for instance `key`, `value` and `output.dense`",
            ));
        }
        let shape = if self.scales_input(site)? { [1, site.input] } else { [site.output, 1] };
        let init = match self.init {
            Ia3Init::Ones => Init::Ones,
            Ia3Init::Random => Init::Normal(1.0),
        };
        Ok(Box::new(Scale { input: shape[0] == 1, l: scope.param(L, &shape, init)? }))
    }

    /// Keys, values and the second feed-forward layer.
    fn usual_targets(&self) -> Targets {
        Targets::pattern(
            r"(.*\.)?(key|value|k_proj|v_proj|k|v|c_attn|output\.dense|fc2|mlp\.c_proj|wo|down_proj)",
        )
    }
}

/// (IA)³ at one site.
#[derive(Debug)]
struct Scale {
    /// Whether the input is scaled.
    input: bool,
    l: Tensor,
}

impl Scale {
    /// l ⊙ z over the last dimension.
    fn scale(&self, z: &Tensor) -> Result<Tensor> {
        z.mul(&self.l.reshape(&[-1])?.to_kind(z.kind())?)
    }
}

impl Module for Scale {
    fn kind(&self) -> &'static str {
        "ia3"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        if self.input {
            return f.call(&x.replace(self.scale(&x.x)?), cx);
        }
        let y = f.call(x, cx)?;
        Ok(y.replace(self.scale(&y.x)?))
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        // In the module's kind (f32), then rounded once.
        let times = |t: &Tensor, l: &Tensor| t.to_kind(l.kind())?.mul(l)?.to_kind(t.kind());
        let scaled = theta.clone().with("weight", times(theta.need("weight")?, &self.l)?);
        Ok(Some(match theta.get("bias") {
            Some(b) if !self.input => scaled.with("bias", times(b, &self.l.reshape(&[-1])?)?),
            _ => scaled,
        }))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(L, self.l.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Scale { input: self.input, l: phi.need(L)?.clone() }))
    }
}

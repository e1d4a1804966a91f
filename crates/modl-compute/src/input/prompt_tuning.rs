//! Prompt tuning: trained vectors before the token vectors.
//!
//! f_θ(\[P; x\]) with P `[p, dim]` at the embeddings alone. The sequence becomes p longer; the
//! backbone's outputs say so by their `attention_mask`. It is no identity at the start.
//!
//! Lester, Al-Rfou, Constant 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv
//! 2104.08691. Survey §3.2, input composition. Names and defaults are PEFT's.

use modl_core::{
    Attachment, Context, Device, Error, Host, Init, Kind, Modular, Module, ModuleConfig, Result,
    Scope, Seed, Signal, SiteKind, Targets, Tensor, Tensors, no_grad,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::virtual_tokens::{check, prepend, prepend_after};
use crate::peft::Provenance;

/// The name of P, as in PEFT's files.
pub(super) const PROMPT: &str = "prompt_embeddings";

/// Configuration of prompt tuning at the `tokens` site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptTuning {
    /// p, at least 1; default 20.
    pub num_virtual_tokens: i64,
    /// How many stacks a PEFT file holds prompts for: 2 for an encoder with a decoder, of which
    /// only the first is used. Default 1.
    pub num_transformer_submodules: i64,
    /// P stands before what the embeddings give, behind positions and normalisation, as in
    /// AdapterHub, and not before what goes into them, as in PEFT; default false.
    pub after_embeddings: bool,
    /// The standard deviation of the start; default 1, as in PEFT. [`start_from_words`] and
    /// [`start_from_vocabulary`] start from words.
    pub std: f64,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl Default for PromptTuning {
    fn default() -> Self {
        PromptTuning {
            num_virtual_tokens: 20,
            num_transformer_submodules: 1,
            after_embeddings: false,
            std: 1.0,
            peft: Provenance::default(),
        }
    }
}

/// The sites of the embeddings that a text enters by: not those of a decoder behind an encoder.
pub(crate) fn entrance() -> Targets {
    let exclude = Some(modl_core::Names::Pattern(r"(.*\.)?decoder".to_owned()));
    Targets { exclude, ..Targets::pattern("all-tokens") }
}

impl ModuleConfig for PromptTuning {
    fn kind(&self) -> &'static str {
        "prompt_tuning"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        entrance()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        check(self.kind(), at.site, self.num_virtual_tokens)?;
        if !(1..=2).contains(&self.num_transformer_submodules) {
            let problem = format!("is {}, wants 1 or 2", self.num_transformer_submodules);
            return Err(Error::invalid("prompt_tuning.num_transformer_submodules", problem));
        }
        let rows = self.num_virtual_tokens.saturating_mul(self.num_transformer_submodules);
        let shape = [rows, at.site.input];
        let all = scope.common().shared(PROMPT, &shape, Init::Normal(self.std))?;
        let (count, after) = (self.num_virtual_tokens, self.after_embeddings);
        Ok(Box::new(Prompt { kind: self.kind(), all, count, after }))
    }
}

/// Starts an attached prompt from the vectors of words, repeated or cut as it takes: from a text
/// that describes the task, or from words of the vocabulary.
///
/// # Errors
/// Where there is no such module, it is no prompt, `ids` is empty or out of range.
pub fn start_from_words(model: &Modular, name: &str, ids: &[i64]) -> Result<()> {
    let full = format!("modules.{name}.{PROMPT}");
    let mut prompt = model.params().get(&full)?.clone();
    let sites = model.backbone().sites();
    let words = sites.iter().find(|s| s.kind == SiteKind::Embedding).ok_or_else(|| {
        Error::unsupported("words in a backbone without a table of them", "start at random")
    })?;
    if ids.is_empty() || ids.iter().any(|id| !(0..words.input).contains(id)) {
        let problem = format!("{ids:?}: wanted are ids in 0..{}, at least one", words.input);
        return Err(Error::invalid("ids", problem));
    }
    let rows: Vec<i64> = ids.iter().copied().cycle().take(prompt.len_of(0) as usize).collect();
    let table = model.backbone().theta(words)?;
    let rows = Tensor::from_slice(&rows, &[prompt.len_of(0)], prompt.device())?;
    let start = table.need("weight")?.detach()?.embedding(&rows)?;
    no_grad(|| prompt.copy_from(&start))
}

/// Starts an attached prompt from the vectors of words drawn from the first `among` of the
/// vocabulary, each as likely as any other: all of them as PEFT's `SAMPLE_VOCAB`, or the common
/// ones (Lester et al. took 5000) where the vocabulary is sorted so.
///
/// # Errors
/// What [`start_from_words`] gives, or where `among` is no number of words.
pub fn start_from_vocabulary(model: &Modular, name: &str, among: i64, seed: Seed) -> Result<()> {
    if among < 1 {
        return Err(Error::invalid("among", format!("is {among}, wants at least 1")));
    }
    let count = model.params().get(&format!("modules.{name}.{PROMPT}"))?.len_of(0);
    let u =
        Init::Uniform(1.0).tensor(&[count], seed, Kind::Double, Device::Cpu)?.to_vec::<f64>()?;
    let draw = |u: &f64| (((u + 1.0) / 2.0 * among as f64) as i64).clamp(0, among - 1);
    start_from_words(model, name, &u.iter().map(draw).collect::<Vec<_>>())
}

/// A prompt at one site.
#[derive(Debug)]
pub(super) struct Prompt {
    pub(super) kind: &'static str,
    pub(super) all: Tensor,
    /// p, the rows of `all` that are used.
    pub(super) count: i64,
    /// Whether it stands behind the embeddings.
    pub(super) after: bool,
}

impl Prompt {
    /// P, `[p, dim]` or `[batch, p, dim]`.
    fn used(&self) -> Result<Tensor> {
        self.all.narrow(-2, 0, self.count)
    }
}

impl Module for Prompt {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let prompt = self.used()?;
        if self.after { prepend_after(&prompt, f, x, cx) } else { prepend(&prompt, f, x, cx) }
    }

    fn virtual_tokens(&self, _: &Context) -> Result<Option<Tensor>> {
        self.used().map(Some)
    }

    fn with_virtual_tokens(&self, tokens: Tensor) -> Result<Box<dyn Module>> {
        let count = tokens.len_of(-2);
        Ok(Box::new(Prompt { kind: self.kind, all: tokens, count, after: self.after }))
    }

    fn phi(&self) -> Tensors {
        Tensors::new().with(PROMPT, self.all.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let all = phi.need(PROMPT)?.clone();
        Ok(Box::new(Prompt { kind: self.kind, all, count: self.count, after: self.after }))
    }
}

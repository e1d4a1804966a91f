//! P-tuning (version 1): a prompt that a small network makes.
//!
//! f_θ(\[P; x\]) with P = W₃ relu(W₂ relu(W₁ E + b₁) + b₂) + b₃ and E `[p, dim]`; or, as in the paper,
//! P = W₂ relu(W₁ LSTM(E) + b₁) + b₂ with a bidirectional LSTM. After training P alone is needed:
//! PEFT's files hold it multiplied out. It is no identity at the start.
//!
//! Liu et al. 2021, *GPT Understands, Too*, arXiv 2103.10385. Survey §3.2, input composition. Names
//! and defaults are PEFT's, and PyTorch's for the LSTM's start, uniform in ±1⁄√hidden.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope, Signal, Targets,
    Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lstm;
use super::prompt_tuning::{PROMPT, Prompt, entrance};
use super::virtual_tokens::{check, prepend};
use crate::dropout::Dropout;
use crate::peft::Provenance;

/// E, which is there as long as a network makes P.
pub(crate) const EMBEDDING: &str = "embedding.weight";

/// Where the LSTM's tensors are.
const LSTM: &str = "lstm_head.";

/// The network that makes the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum PromptEncoder {
    /// Three layers for each vector by itself.
    #[default]
    Mlp,
    /// A bidirectional LSTM before them.
    Lstm,
}

/// More layers than an encoder has; each is several tensors.
const MOST_LAYERS: i64 = 1000;

/// Configuration of P-tuning at the `tokens` site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PTuning {
    /// p, at least 1; default 20.
    pub num_virtual_tokens: i64,
    /// How many stacks a PEFT file holds prompts for, of which only the first is used. Default 1.
    pub num_transformer_submodules: i64,
    /// The network.
    pub encoder_reparameterization_type: PromptEncoder,
    /// The width within the network; default 512.
    pub encoder_hidden_size: i64,
    /// The number of layers of an LSTM; default 2.
    pub encoder_num_layers: i64,
    /// The dropout of an LSTM, in training; default 0.
    pub encoder_dropout: f64,
    /// Whether P has been multiplied out, as in PEFT's files.
    pub projected: bool,
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl Default for PTuning {
    fn default() -> Self {
        PTuning {
            num_virtual_tokens: 20,
            num_transformer_submodules: 1,
            encoder_reparameterization_type: PromptEncoder::Mlp,
            encoder_hidden_size: 512,
            encoder_num_layers: 2,
            encoder_dropout: 0.0,
            projected: false,
            peft: Provenance::default(),
        }
    }
}

impl ModuleConfig for PTuning {
    fn kind(&self) -> &'static str {
        "p_tuning"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        entrance()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        check(self.kind(), at.site, self.num_virtual_tokens)?;
        let drop = Dropout::new("p_tuning.encoder_dropout", self.encoder_dropout, scope)?;
        let sizes =
            [self.num_transformer_submodules, self.encoder_hidden_size, self.encoder_num_layers];
        if sizes.iter().any(|n| *n < 1) {
            let problem = "num_transformer_submodules, encoder_hidden_size and encoder_num_layers \
                           are to be at least 1";
            return Err(Error::invalid("p_tuning", problem));
        }
        if self.encoder_num_layers > MOST_LAYERS {
            let problem = format!("is {}, wants {MOST_LAYERS} at most", self.encoder_num_layers);
            return Err(Error::invalid("p_tuning.encoder_num_layers", problem));
        }
        let (count, width) = (self.num_virtual_tokens, at.site.input);
        let rows = count.saturating_mul(self.num_transformer_submodules);
        let mut common = scope.common();
        if self.projected {
            let all = common.shared(PROMPT, &[rows, width], Init::Normal(1.0))?;
            return Ok(Box::new(Prompt { kind: self.kind(), all, count, after: false }));
        }
        let mut phi = Tensors::new();
        for (name, shape, init) in self.network(rows, width) {
            let tensor = common.shared(&name, &shape, init)?;
            phi.set(name, tensor);
        }
        Ok(Box::new(Encoded { phi, count, drop }))
    }
}

impl PTuning {
    /// The tensors of the network that makes `rows` vectors of `width`.
    fn network(&self, rows: i64, width: i64) -> Vec<(String, Vec<i64>, Init)> {
        let h = self.encoder_hidden_size;
        let mut all = vec![(EMBEDDING.to_owned(), vec![rows, width], Init::Normal(1.0))];
        let widths = match self.encoder_reparameterization_type {
            PromptEncoder::Mlp => vec![width, h, h, width],
            PromptEncoder::Lstm => {
                let start = Init::Uniform((h as f64).sqrt().recip());
                let named = |(name, shape)| (format!("{LSTM}{name}"), shape, start);
                all.extend(lstm::shapes(self.encoder_num_layers, width, h).into_iter().map(named));
                vec![h.saturating_mul(2), h.saturating_mul(2), width]
            }
        };
        for (layer, pair) in widths.windows(2).enumerate() {
            let &[input, output] = pair else { continue };
            // Every second place in PEFT's list is a relu.
            let name = |part: &str| format!("mlp_head.{}.{part}", 2 * layer);
            all.push((name("weight"), vec![output, input], Init::Kaiming));
            all.push((name("bias"), vec![output], Init::Zeros));
        }
        all
    }
}

/// P of E and the network's parameters.
pub(crate) fn encode(phi: &Tensors) -> Result<Tensor> {
    encode_with(phi, |x, _| Ok(x.clone()))
}

/// [`encode`] with something between the layers of an LSTM.
fn encode_with(
    phi: &Tensors,
    between: impl Fn(&Tensor, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut x = phi.need(EMBEDDING)?.clone();
    if phi.names().any(|name| name.starts_with(LSTM)) {
        x = lstm::bidirectional(&x, phi, LSTM, between)?;
    }
    for layer in (0..).step_by(2) {
        let Some(weight) = phi.get(&format!("mlp_head.{layer}.weight")) else { break };
        if layer > 0 {
            x = x.relu()?;
        }
        x = x.linear(weight, Some(phi.need(&format!("mlp_head.{layer}.bias"))?))?;
    }
    Ok(x)
}

/// A prompt that is still made by its network.
#[derive(Debug)]
struct Encoded {
    phi: Tensors,
    count: i64,
    /// Between the layers of an LSTM.
    drop: Dropout,
}

impl Encoded {
    /// P `[p, dim]`.
    fn prompt(&self, cx: &Context) -> Result<Tensor> {
        let all = encode_with(&self.phi, |x, layer| self.drop.apply_nth(x, cx, layer as u64))?;
        all.narrow(0, 0, self.count)
    }
}

impl Module for Encoded {
    fn kind(&self) -> &'static str {
        "p_tuning"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        prepend(&self.prompt(cx)?, f, x, cx)
    }

    fn virtual_tokens(&self, cx: &Context) -> Result<Option<Tensor>> {
        self.prompt(cx).map(Some)
    }

    fn with_virtual_tokens(&self, tokens: Tensor) -> Result<Box<dyn Module>> {
        let count = tokens.len_of(-2);
        Ok(Box::new(Prompt { kind: self.kind(), all: tokens, count, after: false }))
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let phi = self.phi.map(|name, _| Ok(phi.need(name)?.clone()))?;
        Ok(Box::new(Encoded { phi, count: self.count, drop: self.drop.clone() }))
    }
}

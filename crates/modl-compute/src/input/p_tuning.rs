//! P-tuning (version 1): a prompt that a small network makes.
//!
//! f_θ(\[P; x\]) with P = W₃ relu(W₂ relu(W₁ E + b₁) + b₂) + b₃ and E `[p, dim]`. After training P
//! alone is needed: PEFT's files hold it multiplied out. It is no identity at the start.
//!
//! Liu et al. 2021, *GPT Understands, Too*, arXiv 2103.10385. Survey §3.2, input composition. Names
//! and defaults are PEFT's. Of the two encoders of PEFT, files of both are read; the LSTM cannot be
//! trained here.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope, Signal, Targets,
    Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::prompt_tuning::{PROMPT, Prompt, entrance};
use super::virtual_tokens::{check, prepend};
use crate::dropout::Dropout;
use crate::peft::Provenance;

/// The parameters: E, and the three layers of the network.
pub(crate) const ENCODER: [&str; 7] = [
    "embedding.weight",
    "mlp_head.0.weight",
    "mlp_head.0.bias",
    "mlp_head.2.weight",
    "mlp_head.2.bias",
    "mlp_head.4.weight",
    "mlp_head.4.bias",
];

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
        Dropout::new("p_tuning.encoder_dropout", self.encoder_dropout, scope)?;
        if self.num_transformer_submodules < 1 || self.encoder_hidden_size < 1 {
            let problem = "and encoder_hidden_size are to be at least 1";
            return Err(Error::invalid("p_tuning.num_transformer_submodules", problem));
        }
        let (count, width) = (self.num_virtual_tokens, at.site.input);
        let rows = count * self.num_transformer_submodules;
        let mut common = scope.common();
        if self.projected {
            let all = common.shared(PROMPT, &[rows, width], Init::Normal(1.0))?;
            return Ok(Box::new(Prompt { kind: self.kind(), all, count, after: false }));
        }
        if self.encoder_reparameterization_type == PromptEncoder::Lstm {
            return Err(Error::unsupported(
                "training P-tuning with an LSTM",
                "use encoder_reparameterization_type = \"MLP\"",
            ));
        }
        let h = self.encoder_hidden_size;
        let shapes = [
            vec![rows, width],
            vec![h, width],
            vec![h],
            vec![h, h],
            vec![h],
            vec![width, h],
            vec![width],
        ];
        let mut phi = Tensors::new();
        for (name, shape) in ENCODER.into_iter().zip(shapes) {
            let init = match name {
                "embedding.weight" => Init::Normal(1.0),
                n if n.ends_with("bias") => Init::Zeros,
                _ => Init::Kaiming,
            };
            phi.set(name, common.shared(name, &shape, init)?);
        }
        Ok(Box::new(Encoded { phi, count }))
    }
}

/// P of E and the network's parameters.
pub(crate) fn encode(phi: &Tensors) -> Result<Tensor> {
    let layer =
        |x: &Tensor, i: usize| x.linear(phi.need(ENCODER[i])?, Some(phi.need(ENCODER[i + 1])?));
    let inner = layer(phi.need(ENCODER[0])?, 1)?.relu()?;
    layer(&layer(&inner, 3)?.relu()?, 5)
}

/// A prompt that is still made by its network.
#[derive(Debug)]
struct Encoded {
    phi: Tensors,
    count: i64,
}

impl Module for Encoded {
    fn kind(&self) -> &'static str {
        "p_tuning"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        prepend(&encode(&self.phi)?.narrow(0, 0, self.count)?, f, x, cx)
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let phi = self.phi.map(|name, _| Ok(phi.need(name)?.clone()))?;
        Ok(Box::new(Encoded { phi, count: self.count }))
    }
}

//! A feed-forward network in the place of a function: the expert of a mixture.
//!
//! | | y |
//! |---|---|
//! | gated, the default | W_down(σ(W_gate x) ⊙ W_up x) |
//! | plain | W_down σ(W_up x) |
//!
//! with biases on demand. f_θ is not computed. A mixture of experts is a bank of these, a router
//! for each token and a weighted sum with `base = "replaced"`. With σ = swish the gated one is
//! SwiGLU.
//!
//! Shazeer 2020, *GLU Variants Improve Transformer*, arXiv 2002.05202 (gated); Shazeer et al. 2017,
//! *Outrageously Large Neural Networks*, arXiv 1701.06538 (as experts). Survey §3.3.

use modl_core::{
    Activation, Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope,
    Signal, SiteKind, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

const GATE: &str = "gate_proj";
const UP: &str = "up_proj";
const DOWN: &str = "down_proj";

/// Configuration of feed-forward networks at `linear` and `sublayer` sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FeedForward {
    /// The width between the matrices. Default: four times the site's output, two thirds of that
    /// where there is a gate, so that both have as many parameters.
    pub inner: Option<i64>,
    /// Whether a gate multiplies what goes up.
    pub gated: bool,
    /// σ.
    pub activation: Activation,
    /// Whether each product has a bias, which starts at 0.
    pub bias: bool,
    /// Weights start normal with this standard deviation. Default: uniform in ±1⁄√in, as PyTorch's
    /// linear layers do.
    pub init_std: Option<f64>,
}

impl Default for FeedForward {
    fn default() -> Self {
        FeedForward {
            inner: None,
            gated: true,
            activation: Activation::Swish,
            bias: false,
            init_std: None,
        }
    }
}

impl FeedForward {
    /// Without a gate: W_down σ(W_up x), with biases and GELU, as BERT and GPT-2 have it.
    pub fn plain() -> Self {
        FeedForward { gated: false, activation: Activation::Gelu, bias: true, ..Self::default() }
    }

    fn width(&self, output: i64) -> Result<i64> {
        let inner = match (self.inner, self.gated) {
            (Some(inner), _) => inner,
            (None, true) => (8 * output / 3).max(1),
            (None, false) => 4 * output,
        };
        if inner < 1 {
            let problem = format!("is {inner}, wants at least 1");
            return Err(Error::invalid("feed_forward.inner", problem));
        }
        Ok(inner)
    }
}

impl ModuleConfig for FeedForward {
    fn kind(&self) -> &'static str {
        "feed_forward"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    /// Where `inner` is given: the usual one follows from the site.
    fn widened(&self, factor: f64) -> Option<Box<dyn ModuleConfig>> {
        let inner = Some(((self.inner? as f64 * factor).round() as i64).max(1));
        Some(Box::new(FeedForward { inner, ..self.clone() }))
    }

    /// The feed-forward sub-layer of each layer.
    fn usual_targets(&self) -> Targets {
        Targets::pattern(r"(.*\.)?\d+\.(output|mlp)")
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        if !matches!(site.kind, SiteKind::Linear | SiteKind::Sublayer) {
            return Err(Error::unsupported(
                format!("a feed-forward network at a site of kind {:?}", site.kind),
                "attach it to `all-sublayer` or `all-linear`",
            ));
        }
        let init = match self.init_std {
            None => Init::Kaiming,
            Some(std) if std.is_finite() && std >= 0.0 => Init::Normal(std),
            Some(std) => {
                let problem = format!("is {std}, wants a number that is not negative");
                return Err(Error::invalid("feed_forward.init_std", problem));
            }
        };
        let inner = self.width(site.output)?;
        let mut matrix = |name: &str, [rows, columns]: [i64; 2]| -> Result<Linear> {
            let mut scope = scope.sub(name);
            let weight = scope.param("weight", &[rows, columns], init)?;
            let bias = self.bias.then(|| scope.param("bias", &[rows], Init::Zeros)).transpose()?;
            Ok(Linear { weight, bias })
        };
        Ok(Box::new(Network {
            gate: self.gated.then(|| matrix(GATE, [inner, site.input])).transpose()?,
            up: matrix(UP, [inner, site.input])?,
            down: matrix(DOWN, [site.output, inner])?,
            activation: self.activation,
        }))
    }
}

/// x Wᵀ + b.
#[derive(Debug)]
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let kind = x.kind();
        let bias = self.bias.as_ref().map(|b| b.to_kind(kind)).transpose()?;
        x.linear(&self.weight.to_kind(kind)?, bias.as_ref())
    }

    fn named(&self, name: &str, mut all: Tensors) -> Tensors {
        all.set(format!("{name}.weight"), self.weight.clone());
        if let Some(bias) = &self.bias {
            all.set(format!("{name}.bias"), bias.clone());
        }
        all
    }

    fn of(&self, name: &str, phi: &Tensors) -> Result<Self> {
        let bias = self.bias.as_ref().map(|_| phi.need(&format!("{name}.bias")).cloned());
        let weight = phi.need(&format!("{name}.weight"))?.clone();
        Ok(Linear { weight, bias: bias.transpose()? })
    }
}

/// A feed-forward network at one site.
#[derive(Debug)]
struct Network {
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    activation: Activation,
}

impl Module for Network {
    fn kind(&self) -> &'static str {
        "feed_forward"
    }

    fn forward(&self, _: &Host, x: &Signal, _: &Context) -> Result<Signal> {
        let up = self.up.apply(&x.x)?;
        let inner = match &self.gate {
            Some(gate) => self.activation.apply(&gate.apply(&x.x)?)?.mul(&up)?,
            None => self.activation.apply(&up)?,
        };
        Ok(x.replace(self.down.apply(&inner)?))
    }

    fn stands_alone(&self) -> bool {
        true
    }

    fn phi(&self) -> Tensors {
        let gate = self.gate.iter().fold(Tensors::new(), |all, gate| gate.named(GATE, all));
        self.down.named(DOWN, self.up.named(UP, gate))
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(Network {
            gate: self.gate.as_ref().map(|gate| gate.of(GATE, phi)).transpose()?,
            up: self.up.of(UP, phi)?,
            down: self.down.of(DOWN, phi)?,
            activation: self.activation,
        }))
    }

    fn signature(&self) -> String {
        let shapes: Vec<String> =
            self.phi().iter().map(|(n, t)| format!("{n}{:?}", t.size())).collect();
        format!("feed_forward({}; {:?})", shapes.join(", "), self.activation)
    }
}

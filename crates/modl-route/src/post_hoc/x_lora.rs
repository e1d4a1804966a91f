//! X-LoRA: a small network reads the hidden states of a first pass without modules, and gives each
//! module a scaling for each token.
//!
//! With the hidden states h, `[batch, seq, width]`, as a feature of the context,
//!
//! s = W_n (… (W_1 h + b_1) …) + b_n, `[batch, seq, modules]`, n = `depth`,
//! α = scale · softmax(s ⁄ τ), or scale · s where `softmax` is off.
//!
//! With `k` only the k largest scalings are kept, as they are; with `softmax_k` they are made a
//! softmax of their own. Modules and base stay as they were trained: y = f_θ(x) + Σ αⱼ (hⱼ − f_θ(x)).
//! Buehler, Buehler 2024, arXiv 2402.07148; survey §4.2.3.
//!
//! The defaults are those of PEFT's `XLoraConfig` (`enable_softmax`, `enable_softmax_topk`,
//! `top_k_lora`, `xlora_depth`, `xlora_size`, `enable_relu_and_dropout`, `xlora_dropout_p`,
//! `use_bias`, `global_scaling_weight`). One router for all sites is its default,
//! `layerwise_scalings = false`; one for each site is `layerwise_scalings` with a network for each,
//! where PEFT has one with a last layer for each.
//!
//! ```toml
//! router = { type = "x_lora", scope = "global", feature = "hidden" }
//! ```
//!
//! The caller makes the first pass and hands its last hidden states over with
//! `Context::with_feature("hidden", h)`. What the network gave before `k` is noted as `scalings`.

use modl_core::{
    Bank, Context, Error, Init, Kind, Result, Router, RouterConfig, Routing, Scope, Signal, Site,
    Tensor, Weights, dropout,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::top_k::check_k;
use crate::top_k::ties::{Ties, largest};

/// More layers than any file has: each takes time even where it takes no memory.
const MOST_LAYERS: usize = 1000;

/// Scalings by a network over hidden states.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct XLora {
    /// The name of the feature with the hidden states, `[batch, seq, width]`, or `[batch, width]` for
    /// an α for each row. Default: `hidden`.
    pub feature: String,
    /// Their width. Default: the width of the site's input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// The number of linear layers, at least 1. Default: 1.
    pub depth: usize,
    /// The width between them. Default: 2048.
    pub size: i64,
    /// Whether there are a ReLU and dropout between layers. Default: false, and so all is linear.
    pub relu: bool,
    /// The probability of dropout where there is a ReLU. Default: 0.2.
    pub dropout: f64,
    /// Whether layers have a bias. Default: true.
    pub bias: bool,
    /// Whether scalings are a softmax over all modules. Default: true.
    pub softmax: bool,
    /// τ of the softmax. Default: 1.
    pub temperature: f64,
    /// How many modules are active. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k: Option<usize>,
    /// Whether the k largest scalings are made a softmax of their own, instead of `softmax`.
    /// Default: false.
    pub softmax_k: bool,
    /// What all scalings are multiplied by. Default: 1.
    pub scale: f64,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
}

impl Default for XLora {
    fn default() -> Self {
        XLora {
            feature: "hidden".into(),
            width: None,
            depth: 1,
            size: 2048,
            relu: false,
            dropout: 0.2,
            bias: true,
            softmax: true,
            temperature: 1.0,
            k: None,
            softmax_k: false,
            scale: 1.0,
            seed: 0,
        }
    }
}

impl XLora {
    fn check(&self, modules: usize) -> Result<()> {
        let wrong = |key: &str, problem: String| Err(Error::invalid(key, problem));
        if !(1..=MOST_LAYERS).contains(&self.depth) {
            return wrong("x_lora.depth", format!("is to be from 1 to {MOST_LAYERS}"));
        }
        if self.size < 1 || self.width.is_some_and(|w| w < 1) {
            return wrong("x_lora.size", "and `width` are to be 1 or more".into());
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong("x_lora.dropout", "is to be in [0, 1)".into());
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return wrong("x_lora.temperature", "is to be above 0".into());
        }
        if !self.scale.is_finite() {
            return wrong("x_lora.scale", "is to be a number".into());
        }
        if let Some(k) = self.k {
            check_k("x_lora.k", k, modules)?;
        }
        if self.softmax_k && (self.softmax || self.k.is_none()) {
            let problem = "wants a `k`, and `softmax = false`: it is one over the k largest";
            return wrong("x_lora.softmax_k", problem.into());
        }
        Ok(())
    }
}

impl RouterConfig for XLora {
    fn kind(&self) -> &'static str {
        "x_lora"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        self.check(bank.len())?;
        let mut width = self.width.unwrap_or(site.input);
        let mut layers = Vec::with_capacity(self.depth);
        let mut first = None;
        for layer in 0..self.depth {
            let last = layer + 1 == self.depth;
            let out = if last { bank.len() as i64 } else { self.size };
            let mut place = scope.sub(&format!("layers.{layer}"));
            let weight = place.param("weight", &[out, width], Init::Kaiming)?;
            let bound = Init::Uniform(1.0 / (width as f64).sqrt());
            let bias = self.bias.then(|| place.param("bias", &[out], bound)).transpose()?;
            first.get_or_insert(width);
            layers.push(Layer { weight, bias });
            width = out;
        }
        let width = first.unwrap_or(site.input);
        let like = Tensor::zeros(&[bank.len() as i64, width], Kind::Float, scope.device())?;
        let path = scope.path().to_owned();
        let ties = Ties::over(self.seed, &like, &path);
        Ok(Box::new(XLoraRouter { config: self.clone(), layers, width, ties, path }))
    }
}

#[derive(Debug)]
struct Layer {
    /// `[out, in]`.
    weight: Tensor,
    /// `[out]`.
    bias: Option<Tensor>,
}

impl Layer {
    /// With rows for new modules, drawn as the first ones were.
    fn grown(&self, modules: i64, scope: &mut Scope) -> Result<Layer> {
        let (new, width) = (modules - self.weight.len_of(0), self.weight.len_of(1));
        let bound = Init::Uniform(1.0 / (width.max(1) as f64).sqrt());
        let mut more = |name: &str, old: &Tensor, shape: &[i64]| {
            let seed = scope.seed().child(name).nth(modules as u64);
            let rows = bound.tensor(shape, seed, old.kind(), old.device())?;
            scope.replace(name, &Tensor::cat(&[old.detach()?, rows], 0)?)
        };
        let weight = more("weight", &self.weight, &[new, width])?;
        let bias = self.bias.as_ref().map(|b| more("bias", b, &[new])).transpose()?;
        Ok(Layer { weight, bias })
    }
}

#[derive(Debug)]
struct XLoraRouter {
    config: XLora,
    layers: Vec<Layer>,
    width: i64,
    ties: Ties,
    /// Where this router's dropout is drawn.
    path: String,
}

impl XLoraRouter {
    /// s, `[…, modules]`.
    fn scores(&self, hidden: &Tensor, cx: &Context) -> Result<Tensor> {
        let mut h = hidden.clone();
        for (n, layer) in self.layers.iter().enumerate() {
            if n > 0 && self.config.relu {
                h = h.relu()?;
                if cx.train {
                    let seed = cx.draw(&self.path).nth(n as u64);
                    h = dropout(&h, self.config.dropout, seed)?;
                }
            }
            let bias = layer.bias.as_ref().map(|b| b.to_kind(h.kind())).transpose()?;
            h = h.linear(&layer.weight.to_kind(h.kind())?, bias.as_ref())?;
        }
        h.check_finite("scores of an `x_lora` router")?;
        Ok(h)
    }
}

impl Router for XLoraRouter {
    fn kind(&self) -> &'static str {
        "x_lora"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let config = &self.config;
        let hidden = cx.feature(&config.feature)?;
        let (rows, shape) = (x.rows(), hidden.size());
        if !matches!(shape[..], [r, w] | [r, _, w] if r == rows && w == self.width) {
            let problem = format!(
                "is {hidden:?} for {rows} rows and a router that was made for width {}; \
                 set `width`",
                self.width
            );
            return Err(Error::invalid(format!("feature `{}`", config.feature), problem));
        }
        let wide = matches!(
            (hidden.kind(), self.layers.first().map(|l| l.weight.kind())),
            (Kind::Double, _) | (_, Some(Kind::Double))
        );
        let hidden = hidden.to_kind(if wide { Kind::Double } else { Kind::Float })?;
        let scores = self.scores(&hidden, cx)?;
        let scalings = match config.softmax {
            true => scores.mul_scalar(1.0 / config.temperature)?.softmax(-1)?,
            false => scores,
        };
        let mut sums_to_one = config.softmax && config.k.is_none();
        let weights = match config.k {
            None => Weights::Dense(scalings.mul_scalar(config.scale)?),
            Some(k) => {
                let index = largest(&scalings, || self.ties.second(&hidden), k)?; // [batch, (seq,) k]
                let mut kept = scalings.gather(-1, &index)?;
                if config.softmax_k {
                    (kept, sums_to_one) = (kept.softmax(-1)?, true);
                }
                Weights::Sparse { index, weight: kept.mul_scalar(config.scale)? }
            }
        };
        let routing = Routing::new(weights, bank.len()).note("scalings", scalings);
        Ok(if sums_to_one && config.scale == 1.0 { routing.normalised() } else { routing })
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let last = self.layers.len().saturating_sub(1);
        let mut layers = Vec::with_capacity(self.layers.len());
        for (n, layer) in self.layers.iter().enumerate() {
            let (weight, bias) = (layer.weight.clone(), layer.bias.clone());
            layers.push(match n == last {
                false => Layer { weight, bias },
                true => layer.grown(modules as i64, &mut scope.sub(&format!("layers.{n}")))?,
            });
        }
        let like = Tensor::zeros(&[modules as i64, self.width], Kind::Float, scope.device())?;
        let ties = Ties::over(self.config.seed, &like, &self.path);
        let (config, path) = (self.config.clone(), self.path.clone());
        Ok(Box::new(XLoraRouter { config, layers, width: self.width, ties, path }))
    }
}

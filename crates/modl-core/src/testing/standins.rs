//! The least of every family of the survey: a prompt (input composition), a mask on a weight
//! (parameter composition), a scale (function composition), a module generated from a task vector
//! (hypernetwork), and a router that looks at the whole batch.
//!
//! They show that the seams carry each family, and serve as small modules in tests. Read them as
//! the shortest examples of how a method is written.

use serde_json::{Value, json};

use crate::{
    Attachment, Bank, Context, Entry, Host, Init, Module, ModuleConfig, Registry, Result, Router,
    RouterConfig, Routing, Scope, Signal, Site, Tensor, Tensors, Weights,
};

/// Adds all stand-ins to a registry, so that files can name them.
pub fn register(r: &mut Registry) -> Result<()> {
    fn module(
        name: &'static str,
        parse: fn(Value) -> Result<Box<dyn ModuleConfig>>,
    ) -> Entry<dyn ModuleConfig> {
        Entry { name, title: "Stand-in", citation: "-", section: "3", parse }
    }
    r.modules.add(module("prompt", |_| Ok(Box::new(Prompt))))?;
    r.modules.add(module("weight_mask", |_| Ok(Box::new(WeightMask))))?;
    r.modules.add(module("scale", |_| Ok(Box::new(Scale))))?;
    r.modules.add(module("generated", |_| Ok(Box::new(Generated))))?;
    r.aggregators.add(Entry {
        name: "sum",
        title: "Stand-in",
        citation: "-",
        section: "5",
        parse: |_| Ok(Box::new(super::Sum::default())),
    })?;
    r.routers.add(Entry {
        name: "balanced_halves",
        title: "Stand-in",
        citation: "-",
        section: "4",
        parse: |_| Ok(Box::new(BalancedHalves)),
    })
}

/// A recipe without settings.
macro_rules! recipe {
    ($type:ident, $kind:literal) => {
        impl ModuleConfig for $type {
            fn kind(&self) -> &'static str {
                $kind
            }

            fn to_json(&self) -> Result<Value> {
                Ok(json!({}))
            }

            fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
                self.make(at.site, scope).map(|m| Box::new(m) as Box<dyn Module>)
            }
        }
    };
}

/// Input composition: f_θ([φ; x]) with two vectors before the tokens, at a `Tokens` site.
#[derive(Debug, Clone, Copy)]
pub struct Prompt;

#[derive(Debug)]
struct PromptModule {
    /// `[2, dim]`.
    prompt: Tensor,
}

impl Prompt {
    fn make(&self, site: &Site, scope: &mut Scope) -> Result<PromptModule> {
        Ok(PromptModule { prompt: scope.param("prompt", &[2, site.input], Init::Normal(0.5))? })
    }
}

recipe!(Prompt, "prompt");

impl Module for PromptModule {
    fn kind(&self) -> &'static str {
        "prompt"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        if cx.past() > 0 {
            // The sequence has its prompt already.
            return f.call(x, cx);
        }
        let kind = x.x.kind();
        let prompt = self.prompt.to_kind(kind)?.unsqueeze(0)?.expand(&[x.rows(), -1, -1])?;
        let seen = x.with.need("mask")?.narrow(1, 0, 1)?.ones_like()?.expand(&[-1, 2])?;
        let mask = Tensor::cat(&[seen, x.with.need("mask")?.clone()], 1)?;
        let positions = x.with.need("positions")?;
        let first = positions.narrow(1, 0, 1)?;
        let first = Tensor::cat(&[first.clone(), first.shift(1)?], 1)?;
        let positions = Tensor::cat(&[first, positions.shift(2)?], 1)?;
        let longer = Signal {
            x: Tensor::cat(&[prompt, x.x.clone()], 1)?,
            with: x.with.clone().with("mask", mask).with("positions", positions),
        };
        f.call(&longer, cx)
    }
}

/// Parameter composition: f_{θ ⊙ φ}(x) with a soft mask φ = 2σ(s) on the weight, s = 0 at the
/// start.
#[derive(Debug, Clone, Copy)]
pub struct WeightMask;

#[derive(Debug)]
struct WeightMaskModule {
    /// `[out, in]`.
    scores: Tensor,
}

impl WeightMask {
    fn make(&self, site: &Site, scope: &mut Scope) -> Result<WeightMaskModule> {
        let scores = scope.param("scores", &[site.output, site.input], Init::Zeros)?;
        Ok(WeightMaskModule { scores })
    }
}

recipe!(WeightMask, "weight_mask");

impl Module for WeightMaskModule {
    fn kind(&self) -> &'static str {
        "weight_mask"
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let w = theta.need("weight")?;
        let mask = self.scores.sigmoid()?.mul_scalar(2.0)?.to_kind(w.kind())?;
        Ok(Some(theta.clone().with("weight", w.mul(&mask)?)))
    }
}

/// Function composition: φ ⊙ f_θ(x) with one factor per output, 1 at the start.
#[derive(Debug, Clone, Copy)]
pub struct Scale;

#[derive(Debug)]
struct ScaleModule {
    /// `[out]`.
    factor: Tensor,
}

impl Scale {
    fn make(&self, site: &Site, scope: &mut Scope) -> Result<ScaleModule> {
        Ok(ScaleModule { factor: scope.param("factor", &[site.output], Init::Ones)? })
    }
}

recipe!(Scale, "scale");

impl Module for ScaleModule {
    fn kind(&self) -> &'static str {
        "scale"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let y = f.call(x, cx)?;
        Ok(y.replace(y.x.mul(&self.factor.to_kind(y.x.kind())?)?))
    }
}

/// A low-rank change of a linear layer, for routers and aggregators that look at factors.
#[derive(Debug, Clone, Copy)]
pub struct Thin;

impl Thin {
    fn make(&self, site: &Site, scope: &mut Scope) -> Result<crate::LowRank> {
        let down = scope.param("down", &[2, site.input], Init::Normal(0.5))?;
        let up = scope.param("up", &[site.output, 2], Init::Zeros)?;
        Ok(crate::LowRank { down, up, scale: 1.0 })
    }
}

recipe!(Thin, "thin");

/// A hypernetwork: each row's shift of the output is generated from its task vector of 3 numbers,
/// δ = z G with G = 0 at the start.
#[derive(Debug, Clone, Copy)]
pub struct Generated;

#[derive(Debug)]
struct GeneratedModule {
    /// `[3, out]`.
    generator: Tensor,
}

impl Generated {
    fn make(&self, site: &Site, scope: &mut Scope) -> Result<GeneratedModule> {
        Ok(GeneratedModule { generator: scope.param("generator", &[3, site.output], Init::Zeros)? })
    }
}

recipe!(Generated, "generated");

impl Module for GeneratedModule {
    fn kind(&self) -> &'static str {
        "generated"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let y = f.call(x, cx)?;
        let kind = y.x.kind();
        let z = cx.feature("task_vector")?.to_kind(kind)?;
        let shift = z.matmul(&self.generator.to_kind(kind)?)?.unsqueeze(1)?;
        Ok(y.replace(y.x.add(&shift)?))
    }
}

/// A router that looks at the whole batch: rows are ranked by a learned score, and each module
/// gets an equal share of them, with the score's sigmoid as weight.
#[derive(Debug, Clone, Copy)]
pub struct BalancedHalves;

#[derive(Debug)]
struct BalancedHalvesRouter {
    /// `[dim, 1]`.
    direction: Tensor,
}

impl RouterConfig for BalancedHalves {
    fn kind(&self) -> &'static str {
        "balanced_halves"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, site: &Site, _: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let direction = scope.param("direction", &[site.input, 1], Init::Normal(0.5))?;
        Ok(Box::new(BalancedHalvesRouter { direction }))
    }
}

impl Router for BalancedHalvesRouter {
    fn kind(&self) -> &'static str {
        "balanced_halves"
    }

    fn route(&self, x: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        let rows = x.rows();
        let mean = x.x.to_kind(self.direction.kind())?.mean_dims(&[1], false)?;
        let score = mean.matmul(&self.direction)?; // [rows, 1]
        score.check_finite("scores")?;
        let order = score.detach()?.squeeze(-1)?.sort(0, false)?.1.to_vec::<i64>()?;
        let mut choice = vec![0i64; rows as usize];
        for (rank, row) in order.iter().enumerate() {
            if let Some(c) = choice.get_mut(*row as usize) {
                *c = (rank * bank.len() / order.len().max(1)) as i64;
            }
        }
        let index = Tensor::from_slice(&choice, &[rows, 1], x.x.device())?;
        Ok(Routing::new(Weights::Sparse { index, weight: score.sigmoid()? }, bank.len()))
    }
}

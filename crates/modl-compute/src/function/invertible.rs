//! Invertible adapters: a change of the embeddings that can be undone at the output embedding.
//!
//! After the embeddings, in two halves (x₁, x₂) of each vector:
//!
//! | | y₁ | y₂ |
//! |---|---|---|
//! | NICE | x₁ + F(x₂) | x₂ + G(y₁) |
//! | GLOW | e(s₂) ⊙ x₁ + t₂, (s₂, t₂) = S₂(x₂) | e(s₁) ⊙ x₂ + t₁, (s₁, t₁) = S₁(y₁) |
//!
//! with two-layer networks F, G, S₁, S₂ and e(s) = exp(5 · 0.636 · atan(s ⁄ 5)), which keeps the
//! factors within e^±5. [`Coupling::inverse`] is for the vectors that an output embedding compares
//! with the words.
//!
//! Pfeiffer et al. 2020, *MAD-X*, arXiv 2005.00052; Dinh et al. 2015, *NICE*, arXiv 1410.8516;
//! Kingma and Dhariwal 2018, *Glow*, arXiv 1807.03039. Survey §3.3, function composition. Names and
//! shapes are AdapterHub's.

use modl_core::{
    Activation, Attachment, Context, Error, Host, Init, Module, ModuleConfig, Result, Scope,
    Signal, SiteKind, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::BottleneckInit;

/// The bound on |ln factor| of GLOW.
const CLAMP: f64 = 5.0;

/// How the halves change each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InvertibleBlock {
    /// Shifts: volumes stay as they are.
    Nice,
    /// Factors and shifts.
    Glow,
}

/// Configuration of invertible adapters at the `tokens` site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Invertible {
    /// NICE, the default, or GLOW.
    pub block: InvertibleBlock,
    /// The inner networks have width ⌊input width ⁄ this⌋, at least 1; default 2.
    pub reduction_factor: f64,
    /// The inner networks' non-linearity; default ReLU.
    pub non_linearity: Activation,
    /// How the inner networks start; default `bert`, nearly no change. `mam_adapter` is none.
    pub init_weights: BottleneckInit,
}

impl Default for Invertible {
    fn default() -> Self {
        Invertible {
            block: InvertibleBlock::Nice,
            reduction_factor: 2.0,
            non_linearity: Activation::Relu,
            init_weights: BottleneckInit::Bert,
        }
    }
}

impl Invertible {
    /// The two inner networks: name, input width and output width. The first one is for y₁.
    fn networks(&self, width: i64) -> [(&'static str, i64, i64); 2] {
        let first = width / 2;
        let second = width - first;
        match self.block {
            InvertibleBlock::Nice => [("F", second, first), ("G", first, second)],
            InvertibleBlock::Glow => [("s2", second, 2 * first), ("s1", first, 2 * second)],
        }
    }

    /// The coupling that a module of a model is, by its configuration with its `type`, of which it may be
    /// a part; `None` where it is another method's.
    ///
    /// # Errors
    /// Where the configuration is not one of this method.
    pub fn coupling_of(module: &dyn Module, config: &Value) -> Result<Option<Coupling>> {
        let kind = "invertible";
        let Some(own) = (module.kind() == kind).then(|| within(config)).flatten() else {
            return Ok(None);
        };
        let mut own = own.clone();
        if let Some(table) = own.as_object_mut() {
            table.shift_remove("type");
        }
        let config: Invertible = modl_core::from_json(kind, own)?;
        Ok(Some(config.coupling(module.phi())))
    }

    /// The coupling with parameters that an attached module has, [`Module::phi`].
    pub fn coupling(&self, phi: Tensors) -> Coupling {
        Coupling { config: self.clone(), phi }
    }
}

/// The table of an invertible adapter within another method's.
fn within(config: &Value) -> Option<&Value> {
    match config {
        Value::Object(table) if table.get("type").is_some_and(|t| t == "invertible") => {
            Some(config)
        }
        Value::Object(table) => table.values().find_map(within),
        Value::Array(parts) => parts.iter().find_map(within),
        _ => None,
    }
}

impl ModuleConfig for Invertible {
    fn kind(&self) -> &'static str {
        "invertible"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-tokens")
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if at.site.kind != SiteKind::Tokens {
            return Err(Error::unsupported(
                format!("an invertible adapter at a site of kind {:?}", at.site.kind),
                "attach it to the site of the embeddings, `all-tokens`",
            ));
        }
        if !(self.reduction_factor.is_finite() && self.reduction_factor > 0.0) {
            let problem = format!("is {}, wants a number above 0", self.reduction_factor);
            return Err(Error::invalid("invertible.reduction_factor", problem));
        }
        if at.site.output < 2 {
            return Err(Error::invalid("invertible", "a vector of one number has no two halves"));
        }
        let mut phi = Tensors::new();
        for (name, input, output) in self.networks(at.site.output) {
            let inner = ((input as f64 / self.reduction_factor).floor() as i64).max(1);
            let names = [0, 2].map(|i| (format!("{name}.{i}.weight"), format!("{name}.{i}.bias")));
            let [(w0, b0), (w2, b2)] = names;
            let down = self.init_weights.down(scope, &w0, &[inner, input])?;
            let up = self.init_weights.up(scope, &w2, &[output, inner])?;
            phi = phi.with(w0, down).with(w2, up);
            for (bias, width) in [(b0, inner), (b2, output)] {
                let zeros = scope.param(&bias, &[width], Init::Zeros)?;
                phi = phi.with(bias, zeros);
            }
        }
        Ok(Box::new(self.coupling(phi)))
    }
}

/// An invertible function of vectors `[…, width]`.
#[derive(Debug)]
pub struct Coupling {
    config: Invertible,
    phi: Tensors,
}

impl Coupling {
    /// y of x.
    ///
    /// # Errors
    /// Where x is of another width.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let ([first, second], x1, x2) = self.halves(x)?;
        let y1 = self.change(first, &x1, &x2)?;
        let y2 = self.change(second, &x2, &y1)?;
        Tensor::cat(&[y1, y2], -1)
    }

    /// x of y.
    ///
    /// # Errors
    /// Where y is of another width.
    pub fn inverse(&self, y: &Tensor) -> Result<Tensor> {
        let ([first, second], y1, y2) = self.halves(y)?;
        let x2 = self.undo(second, &y2, &y1)?;
        let x1 = self.undo(first, &y1, &x2)?;
        Tensor::cat(&[x1, x2], -1)
    }

    fn halves(&self, x: &Tensor) -> Result<([&'static str; 2], Tensor, Tensor)> {
        let width = x.len_of(-1);
        let [(first, ..), (second, ..)] = self.config.networks(width);
        let at = width / 2;
        Ok(([first, second], x.narrow(-1, 0, at)?, x.narrow(-1, at, width - at)?))
    }

    /// `half` changed by what the other half says.
    fn change(&self, name: &str, half: &Tensor, other: &Tensor) -> Result<Tensor> {
        let r = self.network(name, other)?;
        match self.config.block {
            InvertibleBlock::Nice => half.add(&r),
            InvertibleBlock::Glow => {
                let (factor, shift) = factor_and_shift(&r)?;
                half.mul(&factor)?.add(&shift)
            }
        }
    }

    fn undo(&self, name: &str, half: &Tensor, other: &Tensor) -> Result<Tensor> {
        let r = self.network(name, other)?;
        match self.config.block {
            InvertibleBlock::Nice => half.sub(&r),
            InvertibleBlock::Glow => {
                let (factor, shift) = factor_and_shift(&r)?;
                half.sub(&shift)?.div(&factor)
            }
        }
    }

    fn network(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let layer = |x: &Tensor, i: usize| {
            let phi = |what| self.phi.need(&format!("{name}.{i}.{what}"))?.to_kind(x.kind());
            x.linear(&phi("weight")?, Some(&phi("bias")?))
        };
        layer(&self.config.non_linearity.apply(&layer(x, 0)?)?, 2)
    }
}

fn factor_and_shift(r: &Tensor) -> Result<(Tensor, Tensor)> {
    let n = r.len_of(-1) / 2;
    let s = r.narrow(-1, 0, n)?.mul_scalar(1.0 / CLAMP)?.atan()?;
    Ok((s.mul_scalar(CLAMP * 0.636)?.exp()?, r.narrow(-1, n, n)?))
}

impl Module for Coupling {
    fn kind(&self) -> &'static str {
        "invertible"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let h = f.call(x, cx)?;
        Ok(h.replace(self.apply(&h.x)?))
    }

    fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let phi = self.phi.map(|name, _| Ok(phi.need(name)?.clone()))?;
        Ok(Box::new(self.config.coupling(phi)))
    }

    fn signature(&self) -> String {
        let shapes: Vec<String> =
            self.phi.iter().map(|(n, t)| format!("{n}{:?}", t.size())).collect();
        format!("invertible({}; {:?})", shapes.join(", "), self.config.non_linearity)
    }
}

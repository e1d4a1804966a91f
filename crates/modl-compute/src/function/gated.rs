//! A gate on another module: how much of its change passes, as each row's input says.
//!
//! y = f_θ(x) + G·(f'(x) − f_θ(x)), with G the mean over tokens of σ(w·x + b): the gate that
//! UniPELT puts on each of its parts. Padding counts as tokens, as it does there.
//!
//! Mao et al. 2022, *UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning*,
//! arXiv 2110.07577. Survey §3.5.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, ModuleConfig, ParamStore, Result, Scope,
    Signal, SiteKind, Step, Targets, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Bottleneck, Nested};

const WEIGHT: &str = "gate.weight";
const BIAS: &str = "gate.bias";

/// Configuration of a gate around another method, which must not change the sequence's length.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gated {
    /// The method whose change is gated; default: bottleneck adapters after Pfeiffer et al.
    pub config: Nested,
}

impl Default for Gated {
    fn default() -> Self {
        Self::new(Bottleneck::pfeiffer())
    }
}

impl Gated {
    /// A gate around that method.
    pub fn new(config: impl ModuleConfig + 'static) -> Self {
        Gated { config: Nested::new(config) }
    }
}

impl ModuleConfig for Gated {
    fn kind(&self) -> &'static str {
        "gated"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        self.config.usual_targets()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if at.site.kind == SiteKind::Tokens {
            let inner = self.config.build(at, scope)?;
            // A prefix moves positions there; that has no change of vectors to gate.
            if inner.phi().is_empty() {
                return Ok(inner);
            }
        }
        let width = match at.site.kind {
            // Queries, whose heads together are as wide as the output.
            SiteKind::Attention => at.site.output,
            SiteKind::Linear | SiteKind::Norm | SiteKind::Sublayer | SiteKind::Block => {
                at.site.input
            }
            other => {
                return Err(Error::unsupported(
                    format!("a gate at a site of kind {other:?}"),
                    "a gate looks at token vectors; attach it behind the embeddings",
                ));
            }
        };
        Ok(Box::new(GatedModule {
            inner: self.config.build(at, scope)?,
            weight: scope.param(WEIGHT, &[1, width], Init::Normal(0.02))?,
            bias: scope.param(BIAS, &[1], Init::Zeros)?,
        }))
    }

    fn check_built(&self, params: &ParamStore) -> Result<()> {
        self.config.check_built(params)
    }

    fn after_step(&self, params: &ParamStore, step: &Step) -> Result<()> {
        self.config.after_step(params, step)
    }
}

/// A gated module at one site.
#[derive(Debug)]
struct GatedModule {
    inner: Box<dyn Module>,
    /// `[1, width]`.
    weight: Tensor,
    /// `[1]`.
    bias: Tensor,
}

impl GatedModule {
    /// G, one number for each row, in a shape to meet `dims` dimensions.
    fn gate(&self, x: &Tensor, dims: usize) -> Result<Tensor> {
        let kind = x.kind();
        // Heads are laid side by side again: [batch, seq, heads · head_dim].
        let tokens = match x.dim() {
            4 => x.transpose(1, 2)?.reshape(&[x.len_of(0), x.len_of(2), -1])?,
            _ => x.reshape(&[x.len_of(0), -1, x.len_of(-1)])?,
        };
        let open = tokens.linear(&self.weight.to_kind(kind)?, Some(&self.bias.to_kind(kind)?))?;
        let mut shape = vec![1; dims];
        if let Some(rows) = shape.first_mut() {
            *rows = x.len_of(0);
        }
        open.sigmoid()?.mean_dims(&[1, 2], false)?.reshape(&shape)
    }
}

impl Module for GatedModule {
    fn kind(&self) -> &'static str {
        "gated"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        f.sharing(x, || {
            let y = f.call(x, cx)?;
            let change = match self.inner.delta(f, x, cx)? {
                Some(delta) => delta,
                None => self.inner.forward(f, x, cx)?.x.sub(&y.x)?,
            };
            Ok(y.replace(y.x.addcmul(&change, &self.gate(&x.x, y.x.dim())?)?))
        })
    }

    fn delta(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Option<Tensor>> {
        let Some(change) = self.inner.delta(f, x, cx)? else { return Ok(None) };
        change.mul(&self.gate(&x.x, change.dim())?).map(Some)
    }

    fn penalty(&self, cx: &Context) -> Result<Option<Tensor>> {
        self.inner.penalty(cx)
    }

    fn phi(&self) -> Tensors {
        self.inner.phi().with(WEIGHT, self.weight.clone()).with(BIAS, self.bias.clone())
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        Ok(Box::new(GatedModule {
            inner: self.inner.with_phi(phi)?,
            weight: phi.need(WEIGHT)?.clone(),
            bias: phi.need(BIAS)?.clone(),
        }))
    }

    fn signature(&self) -> String {
        format!("gated({})", self.inner.signature())
    }
}

//! Puts a hypernetwork together at a site: what is generated, from what, by which network, and
//! which of its parameters all sites share.
//!
//! Networks start so that z keeps a mean square of 1 on its way, and heads by hyperfan-in: what is
//! generated has the variance that the module's own start has, Var(H) = Var(φ) ⁄ (width · Var(z)).
//! Where the module would start from one value everywhere (0, or a norm's gain 1) the head is 0 and
//! the value is added, so that a module that changes nothing at the start still does.
//!
//! Chang, Flokas and Lipson 2020, *Principled Weight Initialization for Hypernetworks*, ICLR.

use std::sync::Arc;

use modl_core::{Attachment, Error, Init, Module, ParamStore, Result, Scope, Tensor, Tensors};

use super::generated::{Generated, Plan};
use super::network::{Chain, Generator, Layer, Part};
use super::place::Place;
use super::source::{Condition, Source};
use crate::Nested;

/// Whose a parameter of the hypernetwork is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// The site's alone.
    Site,
    /// All sites' at the same position in their layers.
    Position,
    /// All sites'.
    All,
}

/// A hypernetwork that is being put together.
pub(super) struct Builder<'b, 's> {
    kind: &'static str,
    scope: &'b mut Scope<'s>,
    place: Place,
    inner: Box<dyn Module>,
    /// The parameters that are generated.
    pub(super) parts: Vec<Part>,
    starts: Tensors,
    sources: Vec<Source>,
    /// The width of z.
    width: i64,
    eta: Tensors,
}

impl<'b, 's> Builder<'b, 's> {
    /// For modules of the recipe `inner` at a site.
    ///
    /// # Errors
    /// Where the module does not fit the site, or its parameters cannot be generated.
    pub(super) fn new(
        kind: &'static str,
        inner: &Nested,
        at: &Attachment,
        scope: &'b mut Scope<'s>,
    ) -> Result<Self> {
        let mut own = ParamStore::new();
        let (path, seed) = (scope.path().to_owned(), scope.seed());
        let mut inside = Scope::at(&mut own, &path, seed).on(scope.kind(), scope.device());
        let module = inner.build(at, &mut inside)?;
        let starts = module.phi().map(|_, t| t.detach())?;
        let held: usize = own.iter().map(|(_, p)| p.tensor().numel()).sum();
        let shown: usize = starts.iter().map(|(_, t)| t.numel()).sum();
        if shown == 0 || held != shown || own.iter().any(|(_, p)| p.is_buffer()) {
            return Err(Error::unsupported(
                format!("generating a module `{}`", inner.kind()),
                "it has parts that are no parameters, or parameters that it does not show; \
                 generate LoRA, bottleneck adapters, norms or whole weights",
            ));
        }
        let parts = starts.iter().map(|(name, t)| Part::new(name, t)).collect::<Result<_>>()?;
        // A template takes no room: all of its elements are one.
        let empty =
            |t: &Tensor| Tensor::zeros(&vec![1; t.dim()], t.kind(), t.device())?.expand(&t.size());
        let inner = module.with_phi(&starts.map(|_, t| empty(t))?)?;
        Ok(Builder {
            kind,
            scope,
            place: Place::of(at),
            inner,
            parts,
            starts,
            sources: Vec::new(),
            width: 0,
            eta: Tensors::new(),
        })
    }

    /// Appends to z what tells rows apart: an embedding of width `dim` of a row's label of that
    /// kind, or the row's feature.
    pub(super) fn condition(&mut self, kind: &str, from: &Condition, dim: i64) -> Result<()> {
        let what = format!("{}.{kind}s", self.kind);
        match from {
            Condition::Names(names) => {
                if let Some(twice) = (1..names.len()).find(|i| names[..*i].contains(&names[*i])) {
                    return Err(Error::invalid(what, format!("has `{}` twice", names[twice])));
                }
                if names.is_empty() {
                    let problem = "there is none; name them, or give a feature and its width";
                    return Err(Error::invalid(what, problem));
                }
                let table = self.table(kind, names.len() as i64, dim)?;
                let (kind, names) = (kind.to_owned(), names.clone());
                self.sources.push(Source::Label { kind, names, table });
            }
            Condition::Feature { feature, width } => {
                self.positive(&format!("{kind}s.width"), *width)?;
                self.width += width;
                self.sources.push(Source::Feature { name: feature.clone(), width: *width });
            }
        }
        Ok(())
    }

    /// Appends an embedding of the site's layer to z.
    pub(super) fn layer(&mut self, dim: i64) -> Result<()> {
        let table = self.table("layer", self.place.layers, dim)?;
        self.sources.push(Source::Site { table, row: self.place.layer });
        Ok(())
    }

    /// Appends an embedding of the site's position in its layer to z.
    pub(super) fn position(&mut self, dim: i64) -> Result<()> {
        let table = self.table("position", self.place.positions, dim)?;
        self.sources.push(Source::Site { table, row: self.place.position });
        Ok(())
    }

    fn table(&mut self, of: &str, rows: i64, dim: i64) -> Result<String> {
        self.positive(&format!("{of}_dim"), dim)?;
        self.width += dim;
        let name = format!("{of}_embedding");
        self.param(Whose::All, name, &[rows, dim], Init::Normal(1.0))
    }

    /// A parameter of the hypernetwork; gives its name in η.
    pub(super) fn param(
        &mut self,
        whose: Whose,
        name: String,
        shape: &[i64],
        init: Init,
    ) -> Result<String> {
        let (name, t) = match whose {
            Whose::Site => {
                let t = self.scope.param(&name, shape, init)?;
                (name, t)
            }
            Whose::All => {
                let t = self.scope.common().shared(&name, shape, init)?;
                (name, t)
            }
            Whose::Position => {
                let position = &self.place.position_name;
                let name = if position.is_empty() { name } else { format!("{position}.{name}") };
                let t = self.scope.common().shared(&name, shape, init)?;
                (name, t)
            }
        };
        self.eta.set(name.clone(), t);
        Ok(name)
    }

    /// A part that is not generated but trained as it is, from its own start.
    pub(super) fn own(&mut self, part: &Part) -> Result<String> {
        let name = format!("own.{}", part.name);
        let start = self.starts.need(&part.name)?.add_scalar(-part.offset)?;
        self.eta.set(name.clone(), self.scope.param_from(&name, &start)?);
        Ok(name)
    }

    /// W `[out, in]` with that standard deviation, and b = 0 where there is a bias.
    pub(super) fn linear(
        &mut self,
        whose: Whose,
        name: &str,
        (out, inputs): (i64, i64),
        std: f64,
        bias: bool,
    ) -> Result<Layer> {
        let init = if std == 0.0 { Init::Zeros } else { Init::Normal(std) };
        let weight = self.param(whose, format!("{name}.weight"), &[out, inputs], init)?;
        let bias = match bias {
            true => Some(self.param(whose, format!("{name}.bias"), &[out], Init::Zeros)?),
            false => None,
        };
        Ok(Layer::Linear { weight, bias })
    }

    /// W₁ z + b₁, of all sites. Behind a ReLU, which halves the mean square, `gain` is 2.
    pub(super) fn dense(&mut self, name: &str, out: i64, gain: f64) -> Result<Layer> {
        self.positive(&format!("the width of its {name}"), out)?;
        let (inputs, std) = (self.width, (gain / self.width.max(1) as f64).sqrt());
        self.width = out;
        self.linear(Whose::All, name, (out, inputs), std, true)
    }

    /// W₂ relu(W₁ z + b₁) + b₂, of all sites: HyperFormer's task projector.
    pub(super) fn projector(&mut self, hidden: i64, out: i64) -> Result<Vec<Layer>> {
        let first = self.dense("projector.0", hidden, 2.0)?;
        Ok(vec![first, Layer::Relu, self.dense("projector.2", out, 1.0)?])
    }

    /// Layer norm of z, of all sites.
    pub(super) fn norm(&mut self, name: &str, eps: f64) -> Result<Layer> {
        let shape = [self.width];
        let weight = self.param(Whose::All, format!("{name}.weight"), &shape, Init::Ones)?;
        let bias = self.param(Whose::All, format!("{name}.bias"), &shape, Init::Zeros)?;
        Ok(Layer::Norm { weight, bias, eps })
    }

    /// Hᵢ z, and + hᵢ where there is a bias, for each part.
    pub(super) fn heads(&mut self, whose: Whose, bias: bool) -> Result<Vec<Vec<Layer>>> {
        let inputs = self.width;
        self.heads_of(
            |g, name, part| {
                let std = part.spread / (inputs.max(1) as f64).sqrt();
                Ok(vec![g.linear(whose, &name, (part.numel(), inputs), std, bias)?])
            },
            whose,
        )
    }

    /// For each part the layers that `make` makes under the part's name.
    pub(super) fn heads_of(
        &mut self,
        mut make: impl FnMut(&mut Self, String, &Part) -> Result<Vec<Layer>>,
        whose: Whose,
    ) -> Result<Vec<Vec<Layer>>> {
        let parts = self.parts.clone();
        let name = |part: &Part| match whose {
            Whose::Site => format!("heads.{}", part.name),
            // Sites of other sizes have other heads.
            Whose::Position | Whose::All => format!("heads.{}.{}", part.name, part.size()),
        };
        parts.iter().map(|part| make(self, name(part), part)).collect()
    }

    /// The width of z, or of what the last layer made of it.
    pub(super) fn width(&self) -> i64 {
        self.width
    }

    /// # Errors
    /// Where a setting is below 1.
    pub(super) fn positive(&self, setting: &str, n: i64) -> Result<()> {
        if n >= 1 {
            return Ok(());
        }
        Err(Error::invalid(format!("{}.{setting}", self.kind), format!("is {n}, wants 1 or more")))
    }

    /// The module whose parts are φᵢ = cᵢ + headᵢ(trunk(z)).
    pub(super) fn chain(self, trunk: Vec<Layer>, heads: Vec<Vec<Layer>>) -> Box<dyn Module> {
        self.finish(Chain { trunk, heads })
    }

    /// The module whose parts `generator` makes.
    pub(super) fn finish(self, generator: impl Generator + 'static) -> Box<dyn Module> {
        let (kind, sources, parts) = (self.kind, self.sources, self.parts);
        let plan = Arc::new(Plan { kind, sources, parts, generator: Box::new(generator) });
        Box::new(Generated { plan, inner: self.inner, eta: self.eta })
    }
}

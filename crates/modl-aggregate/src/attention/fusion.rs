//! AdapterFusion: attention of what the base function gives over what each module changes.
//!
//! With h = f_θ(x), the changes zⱼ = hⱼ − h, and the router's α as a prior (all equal in the paper):
//!
//! sⱼ = (h Q)·(zⱼ K) ⁄ T,   p ∝ α exp(s),   y = h + Σⱼ pⱼ zⱼ V,
//!
//! for each token by itself, one fusion for each site. Q, K ~ N(0, 0.02); V starts as nearly the
//! identity, and is held there by the loss `regularisation`·‖I − V‖². Modules and base stay as they are
//! while it is trained: it has 3·dim² + 2·dim numbers at each site, more than an adapter.
//!
//! Pfeiffer, Kamath, Rücklé, Cho, Gurevych 2021, *AdapterFusion: Non-Destructive Task Composition for
//! Transfer Learning*, arXiv 2005.00247. Names, defaults and files are AdapterHub's
//! ([`load_fusion`](crate::load_fusion)); survey §5.2.2.

use modl_core::{
    Aggregator, AggregatorConfig, Context, Error, Host, Init, Order, Outputs, Result, Routing,
    Scope, Signal, Site, SiteKind, Tensor, dropout,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::temperature::{Cooling, Temperature};
use crate::changes::{Changes, attend, blend, check_site};

/// What asks which module is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuerySource {
    /// h = f_θ(x).
    #[default]
    Output,
    /// LN(h + residual), the site's own norm: what adapters behind the norm see. At sub-layers.
    Norm,
    /// x, where it is as wide as the output.
    Input,
}

/// How V starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ValueStart {
    /// There is no V: y = h + Σ pⱼ zⱼ.
    None,
    /// N(0, 0.02).
    Normal,
    /// 1 on the diagonal and 10⁻⁶ elsewhere, as AdapterHub has it.
    #[default]
    NearIdentity,
    /// 1 on the diagonal and 0 elsewhere: with one module y is that module's.
    Identity,
}

/// What V has off its diagonal at first.
const OFF_DIAGONAL: f64 = 1e-6;

/// The standard deviation with which Q and K start.
const STD: f64 = 0.02;

/// AdapterFusion. The default is AdapterHub's `dynamic` with the output as the query.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fusion {
    /// Whether there is Q, with a bias; else h asks as it is.
    pub query: bool,
    /// Whether there is K, with a bias, which does not change p; else zⱼ answers as it is.
    pub key: bool,
    /// Whether there is V, without a bias, and how it starts.
    pub value: ValueStart,
    /// What asks.
    pub query_source: QuerySource,
    /// h + zⱼ takes the place of zⱼ in keys and values, and h is not added afterwards. Default: false.
    pub residual_before: bool,
    /// T. Default: 1.
    pub temperature: Temperature,
    /// The factor of ‖I − V‖² in the loss, for V that is trained. Default: 0.01.
    pub regularisation: f64,
    /// In training, each score is dropped to 0 with this probability, in [0, 1). Default: 0.
    pub dropout: f64,
}

impl Default for Fusion {
    fn default() -> Self {
        Fusion {
            query: true,
            key: true,
            value: ValueStart::default(),
            query_source: QuerySource::default(),
            residual_before: false,
            temperature: Temperature::default(),
            regularisation: 0.01,
            dropout: 0.0,
        }
    }
}

impl Fusion {
    fn check(&self, site: &Site) -> Result<()> {
        check_site("fusion", site)?;
        let wrong = |what: &str, problem: String| Err(Error::invalid(what, problem));
        if self.query_source == QuerySource::Norm && site.kind != SiteKind::Sublayer {
            return Err(Error::unsupported(
                format!("`query_source` = \"norm\" at a site of kind {:?}", site.kind),
                "only a sub-layer has a norm that follows; take \"output\"",
            ));
        }
        if self.query_source == QuerySource::Input && site.input != site.output {
            let (from, to) = (site.input, site.output);
            let problem = format!("is \"input\", which is {from} wide, and the output {to}");
            return wrong("fusion.query_source", problem);
        }
        if !(self.regularisation.is_finite() && self.regularisation >= 0.0) {
            let problem = format!("is {}, wants 0 or more", self.regularisation);
            return wrong("fusion.regularisation", problem);
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let problem = format!("is {}, wants a probability in [0, 1)", self.dropout);
            return wrong("fusion.dropout", problem);
        }
        Ok(())
    }

    /// The fusion of a site, with its parameters in `scope`.
    pub(crate) fn at(&self, site: &Site, scope: &mut Scope) -> Result<Fused> {
        self.check(site)?;
        let d = site.output;
        let square = [d, d];
        let mut linear = |name: &str| -> Result<(Tensor, Tensor)> {
            let weight = scope.param(&format!("{name}.weight"), &square, Init::Normal(STD))?;
            Ok((weight, scope.param(&format!("{name}.bias"), &[d], Init::Zeros)?))
        };
        let query = self.query.then(|| linear("query")).transpose()?;
        let key = self.key.then(|| linear("key")).transpose()?;
        let (kind, device) = (scope.kind(), scope.device());
        let eye = |off: f64| Tensor::eye(d, kind, device)?.mul_scalar(1.0 - off)?.add_scalar(off);
        const VALUE: &str = "value.weight";
        let value = match self.value {
            ValueStart::None => None,
            ValueStart::Normal => Some(scope.param(VALUE, &square, Init::Normal(STD))?),
            ValueStart::NearIdentity => {
                Some(scope.param_drawn(VALUE, &square, || eye(OFF_DIAGONAL))?)
            }
            ValueStart::Identity => Some(scope.param_drawn(VALUE, &square, || eye(0.0))?),
        };
        let cooling = self.temperature.build("fusion.temperature", scope)?;
        Ok(Fused { config: *self, query, key, value, cooling, place: scope.path().to_owned() })
    }
}

impl AggregatorConfig for Fusion {
    fn kind(&self) -> &'static str {
        "fusion"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("fusion", self)
    }

    fn build(&self, site: &Site, scope: &mut Scope) -> Result<Box<dyn Aggregator>> {
        Ok(Box::new(self.at(site, scope)?))
    }
}

/// The fusion of one site.
#[derive(Debug)]
pub(crate) struct Fused {
    config: Fusion,
    /// `[dim, dim]` and `[dim]`.
    query: Option<(Tensor, Tensor)>,
    key: Option<(Tensor, Tensor)>,
    /// `[dim, dim]`.
    value: Option<Tensor>,
    cooling: Cooling,
    /// Where dropout draws.
    place: String,
}

impl Fused {
    /// Its settings.
    pub(crate) fn config(&self) -> &Fusion {
        &self.config
    }

    /// What asks, as wide as the output.
    fn asks(&self, changes: &Changes, f: &Host, x: &Signal, cx: &Context) -> Result<Tensor> {
        let kind = changes.y.kind();
        match self.config.query_source {
            QuerySource::Output => Ok(changes.y.clone()),
            QuerySource::Input => x.x.to_kind(kind),
            QuerySource::Norm => {
                let both = x.replace(changes.base.x.clone());
                f.stage("norm", &both, cx)?.x.to_kind(kind)
            }
        }
    }

    /// sⱼ ⁄ T of the query `[…, dim]` and zⱼ `[…, k, dim]`, `[…, k]`.
    ///
    /// q·(K zⱼ + b) is (Kᵀq)·zⱼ + q·b: one product instead of k.
    fn scores(&self, asks: &Tensor, z: &Tensor, cx: &Context) -> Result<Tensor> {
        let kind = z.kind();
        let q = match &self.query {
            Some((w, b)) => asks.linear(&w.to_kind(kind)?, Some(&b.to_kind(kind)?))?,
            None => asks.clone(),
        };
        let scores = match &self.key {
            None => z.matmul(&q.unsqueeze(-1)?)?.squeeze(-1)?,
            Some((w, b)) => {
                let of_bias = q.matmul(&b.to_kind(kind)?.unsqueeze(-1)?)?; // […, 1]
                let q = q.matmul(&w.to_kind(kind)?)?;
                z.matmul(&q.unsqueeze(-1)?)?.squeeze(-1)?.add(&of_bias)?
            }
        };
        let scores = match cx.train && self.config.dropout > 0.0 {
            true => dropout(&scores, self.config.dropout, cx.draw(&self.place))?,
            false => scores,
        };
        self.cooling.apply(&scores)
    }

    /// y of f_θ(x) and what modules change.
    pub(crate) fn fuse(
        &self,
        changes: &Changes,
        f: &Host,
        x: &Signal,
        cx: &Context,
    ) -> Result<Signal> {
        let Some(z) = &changes.z else { return Ok(changes.base.clone()) };
        let asks = self.asks(changes, f, x, cx)?;
        let z = match self.config.residual_before {
            true => z.add(&changes.y.unsqueeze(-2)?)?,
            false => z.clone(),
        };
        let p = attend(&self.scores(&asks, &z, cx)?, &changes.alpha)?;
        let mut sum = blend(&p, &z)?;
        if let Some(v) = &self.value {
            // V Σ pⱼ zⱼ is Σ pⱼ V zⱼ.
            sum = sum.linear(&v.to_kind(sum.kind())?, None)?;
        }
        let y = match self.config.residual_before {
            false => changes.y.add(&sum)?,
            // A row without a module is left to f.
            true => {
                let any = p.detach()?.sum_dims(&[-1], true)?;
                sum.add(&changes.y.mul(&any.neg()?.add_scalar(1.0)?.gt_scalar(0.5)?)?)?
            }
        };
        changes.give(&y)
    }
}

impl Aggregator for Fused {
    fn kind(&self) -> &'static str {
        "fusion"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        let changes = Changes::of("fusion", h)?;
        self.fuse(&changes, h.host(), h.input(), h.context())
    }

    fn penalty(&self, _: &Context) -> Result<Option<Tensor>> {
        let factor = self.config.regularisation;
        match &self.value {
            Some(v) if v.requires_grad() && factor > 0.0 => {
                let eye = Tensor::eye(v.len_of(0), v.kind(), v.device())?;
                v.sub(&eye)?.square()?.sum()?.mul_scalar(factor).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn after_step(&self, done: u64, _: u64) -> Result<()> {
        self.cooling.after_step(done)
    }
}

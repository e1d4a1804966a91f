//! The backbone of the experiments: something before and something after one site, at which the
//! modules stand. The base function is 0, so that modules stand for themselves, or a matrix that
//! they change.

use std::fmt;

use modl_core::{
    Backbone, Context, Error, Layers, ParamStore, Result, Scope, Seed, Signal, Site, SiteKind,
    Tensor, Tensors,
};
use serde_json::{Value, json};

/// The path of the site.
pub(super) const SITE: &str = "experts";

/// What comes before the site: inputs → x `[batch, input]`.
pub(super) type Before = Box<dyn Fn(&Tensors) -> Result<Tensor> + Send>;
/// What comes after it: y `[batch, output]` → the prediction.
pub(super) type After = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send>;

/// A network with one site.
pub(super) struct Network {
    sites: Vec<Site>,
    params: ParamStore,
    config: Value,
    /// `weight` where the base function is one.
    theta: Tensors,
    before: Before,
    after: After,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("sites", &self.sites).finish_non_exhaustive()
    }
}

impl Network {
    /// A network whose site has vectors of width `input` in and `output` out. `make` makes the
    /// parameters of what is before and after.
    pub(super) fn new(
        input: i64,
        output: i64,
        seed: Seed,
        make: impl FnOnce(&mut Scope) -> Result<(Before, After)>,
    ) -> Result<Self> {
        let mut params = ParamStore::new();
        let (before, after) = make(&mut Scope::new(&mut params, seed))?;
        let site = Site { path: SITE.into(), kind: SiteKind::Linear, input, output, index: 0 };
        let config = json!({"model_type": "experiment"});
        let theta = Tensors::new();
        Ok(Network { sites: vec![site], params, config, theta, before, after })
    }

    /// The same with y = W x as the base function of the site, W `[output, input]`, which is not
    /// trained.
    pub(super) fn over(mut self, weight: &Tensor) -> Result<Self> {
        let mut scope = Scope::new(&mut self.params, Seed(0));
        let weight = scope.sub(SITE).buffer("weight", weight)?;
        self.theta = Tensors::new().with("weight", weight);
        Ok(self)
    }
}

impl Backbone for Network {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn theta(&self, _: &Site) -> Result<Tensors> {
        Ok(self.theta.clone())
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let x = Signal::from((self.before)(inputs)?);
        let [site] = self.sites.as_slice() else {
            return Err(Error::invalid("network", "is to have one site"));
        };
        let base = |theta: &Tensors, x: &Signal, _: &Context| match theta.get("weight") {
            Some(weight) => x.x.linear(weight, None).map(Signal::from),
            None => {
                let shape = [x.rows(), site.output];
                Tensor::zeros(&shape, x.x.kind(), x.x.device()).map(Signal::from)
            }
        };
        let y = layers.run(site, &self.theta, &x, cx, &base)?.x;
        Ok(Tensors::new().with("predicted", (self.after)(&y)?))
    }
}

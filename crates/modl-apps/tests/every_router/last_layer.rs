//! A backbone of one site, so that a step costs one product.

use modl_core::{
    Backbone, Context, Device, Kind, Layers, ParamStore, Result, Select, Signal, Site, SiteKind,
    Tensor, Tensors,
};
use serde_json::{Value, json};

/// A linear map of hidden states that come as the feature `hidden`.
#[derive(Debug)]
pub struct LastLayer {
    site: Site,
    params: ParamStore,
    config: Value,
}

impl LastLayer {
    /// `factor` times the identity.
    pub fn new(width: i64, factor: f64) -> Result<Self> {
        let (path, kind) = ("last".to_owned(), SiteKind::Linear);
        let mut params = ParamStore::new();
        let eye = Tensor::eye(width, Kind::Float, Device::Cpu)?;
        params.insert("last.weight", eye.mul_scalar(factor)?)?;
        params.train_only(&Select::none())?;
        let site = Site { path, kind, input: width, output: width, index: 0 };
        Ok(LastLayer { site, params, config: json!({"model_type": "last_layer"}) })
    }
}

impl Backbone for LastLayer {
    fn sites(&self) -> &[Site] {
        std::slice::from_ref(&self.site)
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn theta(&self, _: &Site) -> Result<Tensors> {
        Ok(Tensors::new().with("weight", self.params.get("last.weight")?.clone()))
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn forward(&self, _: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let f = |theta: &Tensors, s: &Signal, _: &Context| {
            Ok(s.replace(s.x.linear(theta.need("weight")?, None)?))
        };
        let x = Signal::from(cx.feature("hidden")?.clone());
        let y = layers.run(&self.site, &self.theta(&self.site)?, &x, cx, &f)?.x;
        Ok(Tensors::new().with("last_hidden_state", y))
    }
}

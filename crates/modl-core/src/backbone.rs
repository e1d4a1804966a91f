//! Backbones: networks that publish their sites.

use std::fmt::Debug;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    Context, Device, Error, Host, HostFn, Kind, ModularLayer, ParamStore, Result, ResultExt, Seed,
    Segments, Signal, Site, Tensors,
};

/// A pretrained network whose sub-functions can be reached by name.
pub trait Backbone: Debug + Send {
    /// The places at which modules can stand, in the order in which a forward pass meets them.
    fn sites(&self) -> &[Site];

    /// θ, under the names that transformers gives them.
    fn params(&self) -> &ParamStore;

    /// θ of one site by short names: `weight`, `bias`.
    ///
    /// The tensors share storage with [`Backbone::params`].
    fn theta(&self, site: &Site) -> Result<Tensors>;

    /// The architecture's settings, as in `config.json`.
    fn config(&self) -> &Value;

    /// The site path that this backbone has for `path`, where other versions of transformers, or
    /// the same network with or without a head, name a site or a parameter below it differently;
    /// `path` itself where it is nobody's other name.
    fn canonical(&self, path: &str) -> String {
        path.to_owned()
    }

    /// What earlier versions of transformers called the site at `path`, by which old files choose
    /// their sites; `path` itself where it was called so from the start.
    fn former(&self, path: &str) -> String {
        path.to_owned()
    }

    /// One pass: named inputs (`input_ids`, `attention_mask`) to named outputs
    /// (`last_hidden_state`). At each site it runs [`Layers::run`].
    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors>;

    /// Whether what stands at a site may depend on the tokens before each token alone, as in a
    /// decoder.
    fn causal(&self, _site: &Site) -> bool {
        false
    }

    /// The losses that it wants to be added in training, as mixtures of experts do to keep their own
    /// routers balanced. [`crate::Modular::forward`] records them beside those of modules' routers.
    fn own_losses(&self) -> Vec<OwnLoss> {
        Vec::new()
    }

    /// Itself in pieces, where it can be run so.
    fn segments(&self) -> Option<Box<dyn Segments + '_>> {
        None
    }

    /// A fingerprint of θ: names, shapes and a few values of each parameter. Module files carry
    /// it, so that a module is not put on another backbone by mistake. It does not depend on the
    /// kind in which θ was loaded.
    fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for (name, p) in self.params().iter() {
            let t = p.tensor();
            hash.update(format!("{name}{:?}", t.size()));
            let flat = t.reshape(&[-1])?;
            let sample = flat.narrow(0, 0, flat.len_of(0).min(4)).at(name)?;
            // Compared as bf16, so that a backbone loaded as bf16 is the same backbone.
            hash.update(sample.to_kind(Kind::BFloat16)?.to_bytes()?);
        }
        Ok(hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect())
    }
}

/// The settings of a backbone that is drawn, not loaded: what a recipe has under `fresh`.
pub trait FreshBackbone: Debug + Send + Sync {
    /// The name in recipes: `mlp`.
    fn kind(&self) -> &'static str;

    /// A backbone whose θ is drawn from `seed`, in this kind on this device.
    ///
    /// # Errors
    /// Where a setting is out of range.
    fn build(&self, seed: Seed, kind: Kind, device: Device) -> Result<Box<dyn Backbone>>;
}

/// A loss that a backbone gives by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnLoss {
    /// What it is called where it is weighed: `aux_loss`.
    pub name: String,
    /// The outputs whose sum it is: those of them that a pass has.
    pub outputs: Vec<String>,
    /// What it counts where a recipe does not say.
    pub weight: f64,
}

/// The modular layers of a network, by site.
#[derive(Debug, Default)]
pub struct Layers(Vec<Option<ModularLayer>>);

impl Layers {
    /// No modules anywhere.
    pub fn none(sites: usize) -> Self {
        Layers((0..sites).map(|_| None).collect())
    }

    /// The layer at a site, if any.
    pub fn at(&self, site: &Site) -> Option<&ModularLayer> {
        self.0.get(site.index)?.as_ref()
    }

    pub(crate) fn slot(&mut self, site: &Site) -> Result<&mut Option<ModularLayer>> {
        self.0.get_mut(site.index).ok_or_else(|| {
            Error::invalid(&site.path, "is not a site of the backbone that these layers are for")
        })
    }

    pub(crate) fn nth(&mut self, index: usize) -> Option<&mut ModularLayer> {
        self.0.get_mut(index)?.as_mut()
    }

    pub(crate) fn take(&mut self, index: usize) -> Option<ModularLayer> {
        self.0.get_mut(index)?.take()
    }

    pub(crate) fn set(&mut self, index: usize, layer: ModularLayer) {
        if let Some(slot) = self.0.get_mut(index) {
            *slot = Some(layer);
        }
    }

    /// Runs f at `site`, through the modular layer where there is one.
    pub fn run(
        &self,
        site: &Site,
        theta: &Tensors,
        x: &Signal,
        cx: &Context,
        f: &HostFn,
    ) -> Result<Signal> {
        self.run_staged(site, theta, x, cx, f, &[])
    }

    /// [`Layers::run`] for a site with named stages.
    pub fn run_staged(
        &self,
        site: &Site,
        theta: &Tensors,
        x: &Signal,
        cx: &Context,
        f: &HostFn,
        stages: &[(&str, &HostFn)],
    ) -> Result<Signal> {
        match self.at(site) {
            None => f(theta, x, cx),
            Some(layer) => {
                layer.forward(&Host::new(site, theta, f).with_stages(stages), x, cx).at(&site.path)
            }
        }
    }
}

//! A step of a mixture of SwiGLU experts alone, 2 of them for each token, as one block of Mixtral
//! has them: forward, and backward to x and all parameters.

use anyhow::{Context as _, Result, bail};
use modl_aggregate::WeightedSum;
use modl_compute::FeedForward;
use modl_core::{
    AggregatorConfig, Attachment, Bank, Base, Context, Device, Host, Init, Kind, ModularLayer,
    ModuleConfig, ParamStore, RouterConfig, Scope, Seed, Signal, Site, SiteKind, Tensor, Tensors,
    no_grad,
};
use modl_route::{Input, Scores, TopK};

const WIDTH: i64 = 512;

pub struct Mixture {
    layer: ModularLayer,
    site: Site,
    x: Signal,
    probe: Tensor,
    leaves: Vec<Tensor>,
    train: bool,
}

impl Mixture {
    /// From `mixture:EXPERTS:INNER:TOKENS:train` or `…:infer`.
    pub fn new(work: &str, kind: Kind) -> Result<Self> {
        let parts: Vec<&str> = work.split(':').collect();
        let [_, experts, inner, tokens, mode] = parts.as_slice() else {
            bail!("`{work}` is not mixture:EXPERTS:INNER:TOKENS:MODE");
        };
        let (inner, tokens) = (inner.parse()?, tokens.parse::<i64>()?);
        let (path, kind_of_site) = ("layer.0.mlp".to_owned(), SiteKind::Sublayer);
        let site = Site { path, kind: kind_of_site, input: WIDTH, output: WIDTH, index: 0 };
        let (theta, mut store) = (Tensors::new(), ParamStore::new());
        let mut scope = Scope::new(&mut store, Seed(0)).on(kind, Device::Cpu);
        let config = FeedForward { inner: Some(inner), ..FeedForward::default() };
        let mut bank = Bank::new();
        for j in 0..experts.parse::<usize>()? {
            let mut scope = scope.sub(&format!("expert{j}"));
            bank.insert(
                j.to_string(),
                config.build(&Attachment::alone(&site, &theta), &mut scope)?,
            )?;
        }
        let scores = Scores { input: Input::Tokens, init_std: 0.02, ..Scores::default() };
        let router = TopK { k: 2, scores, ..TopK::default() };
        let router = router.build(&site, &bank, &mut scope.sub("router"))?;
        let sum = WeightedSum { base: Base::Replaced }.build(&site, &mut scope)?;
        let draw = |name: &str| -> Result<Tensor> {
            let t = Init::Normal(1.0).tensor(
                &[1, tokens, WIDTH],
                Seed(0).child(name),
                Kind::Float,
                Device::Cpu,
            )?;
            Ok(t.to_kind(kind)?)
        };
        let x = draw("x")?;
        x.set_requires_grad(*mode == "train")?;
        let mut leaves: Vec<Tensor> = store.iter().map(|(_, p)| p.tensor().clone()).collect();
        leaves.push(x.clone());
        Ok(Mixture {
            layer: ModularLayer::from_boxes(bank, router, sum),
            site,
            x: x.into(),
            probe: draw("probe")?,
            leaves,
            train: *mode == "train",
        })
    }

    pub fn run(&self) -> Result<()> {
        let theta = Tensors::new();
        let same = |_: &Tensors, x: &Signal, _: &Context| Ok(x.clone());
        let host = Host::new(&self.site, &theta, &same);
        let forward = || self.layer.forward(&host, &self.x, &Context::eval());
        if !self.train {
            no_grad(forward)?;
            return Ok(());
        }
        let loss = forward()?.x.mul(&self.probe)?.sum()?;
        let leaves: Vec<&Tensor> = self.leaves.iter().collect();
        let found = loss.gradients(&leaves, false)?;
        found.last().and_then(Option::as_ref).context("x has no gradient")?;
        Ok(())
    }
}

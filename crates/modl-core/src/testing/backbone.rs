//! A backbone with a site of every kind, small enough to differentiate numerically.

use serde_json::{Value, json};

use crate::{
    Backbone, Context, Device, Init, Kind, Layers, ParamStore, Result, Scope, Seed, Select, Signal,
    Site, SiteKind, Tensor, Tensors,
};

const VOCAB: i64 = 16;
const DIM: i64 = 8;
const HEADS: i64 = 2;
const MAX_LEN: i64 = 24;

/// One transformer layer of width 8 with 2 heads over 16 tokens: sites of every kind, under short
/// names.
#[derive(Debug)]
pub struct TinyBackbone {
    sites: Vec<Site>,
    params: ParamStore,
    config: Value,
}

impl TinyBackbone {
    /// Random θ from a seed. Use `Kind::Double` for numerical derivatives.
    pub fn new(seed: Seed, kind: Kind) -> Result<Self> {
        use SiteKind::{Attention, Block, Conv, Embedding, Linear, Norm, Sublayer, Tokens};
        let table: [(&str, SiteKind, i64, i64); 12] = [
            ("embeddings.words", Embedding, VOCAB, DIM),
            ("embeddings", Tokens, DIM, DIM),
            ("layer.0", Block, DIM, DIM),
            ("layer.0.query", Linear, DIM, DIM),
            ("layer.0.key", Linear, DIM, DIM),
            ("layer.0.value", Linear, DIM, DIM),
            ("layer.0.attention", Attention, DIM, DIM),
            ("layer.0.output", Sublayer, DIM, DIM),
            ("layer.0.output.dense", Linear, DIM, DIM),
            ("layer.0.output.norm", Norm, DIM, DIM),
            ("conv", Conv, DIM, DIM),
            ("head", Linear, DIM, 5),
        ];
        let mut params = ParamStore::new();
        let mut scope = Scope::new(&mut params, seed).on(kind, Device::Cpu);
        let mut sites = Vec::new();
        for (index, (path, site_kind, input, output)) in table.into_iter().enumerate() {
            sites.push(Site { path: path.into(), kind: site_kind, input, output, index });
            let mut scope = scope.sub(path);
            match site_kind {
                Linear => {
                    scope.param("weight", &[output, input], Init::Normal(0.4))?;
                    scope.param("bias", &[output], Init::Normal(0.1))?;
                }
                Conv => {
                    scope.param("weight", &[output, input, 1, 3], Init::Normal(0.2))?;
                    scope.param("bias", &[output], Init::Normal(0.1))?;
                }
                Embedding => drop(scope.param("weight", &[input, output], Init::Normal(1.0))?),
                Tokens => drop(scope.param("positions", &[MAX_LEN, DIM], Init::Normal(0.3))?),
                Norm => {
                    scope.param("weight", &[DIM], Init::Ones)?;
                    scope.param("bias", &[DIM], Init::Normal(0.1))?;
                }
                _ => {}
            }
        }
        params.train_only(&Select::none())?;
        Ok(TinyBackbone { sites, params, config: json!({"model_type": "tiny"}) })
    }

    /// A batch for it: `rows` sentences of different length, padded to `len` tokens.
    pub fn inputs(rows: i64, len: i64, seed: Seed) -> Result<Tensors> {
        let draw = Init::Uniform(1.0).tensor(&[rows, len], seed, Kind::Double, Device::Cpu)?;
        let ids: Vec<i64> =
            draw.to_vec::<f64>()?.iter().map(|u| (((u + 1.0) * 8.0) as i64).min(15)).collect();
        let real = |r: i64, t: i64| f32::from(u8::from(t < (len - r % 3).max(1)));
        let mask: Vec<f32> = (0..rows).flat_map(|r| (0..len).map(move |t| real(r, t))).collect();
        Ok(Tensors::new()
            .with("input_ids", Tensor::from_slice(&ids, &[rows, len], Device::Cpu)?)
            .with("attention_mask", Tensor::from_slice(&mask, &[rows, len], Device::Cpu)?))
    }

    fn site(&self, path: &str) -> Result<&Site> {
        let known = || self.sites.iter().map(|s| s.path.as_str());
        let found = self.sites.iter().find(|s| s.path == path);
        found.ok_or_else(|| crate::Error::unknown("site", path, known()))
    }

    fn linear(&self, path: &str, x: &Tensor, layers: &Layers, cx: &Context) -> Result<Tensor> {
        let site = self.site(path)?;
        let f = |theta: &Tensors, x: &Signal, _: &Context| {
            Ok(x.replace(x.x.linear(theta.need("weight")?, theta.get("bias"))?))
        };
        Ok(layers.run(site, &self.theta(site)?, &x.clone().into(), cx, &f)?.x)
    }

    /// A convolution over neighbouring tokens, `[batch, seq, dim]` → the same.
    fn conv(&self, x: &Tensor, layers: &Layers, cx: &Context) -> Result<Tensor> {
        let site = self.site("conv")?;
        let f = |theta: &Tensors, x: &Signal, _: &Context| {
            let (w, b) = (theta.need("weight")?, theta.get("bias"));
            Ok(x.replace(x.x.conv2d(w, b, &[1, 1], &[0, 1], 1)?))
        };
        // Padding is nothing to its neighbours.
        let real = x.mul(&cx.feature("mask")?.to_kind(x.kind())?.unsqueeze(-1)?)?;
        let image = real.transpose(1, 2)?.unsqueeze(2)?;
        let y = layers.run(site, &self.theta(site)?, &image.into(), cx, &f)?.x;
        y.squeeze(2)?.transpose(1, 2)
    }

    fn norm(&self, x: &Tensor, layers: &Layers, cx: &Context) -> Result<Tensor> {
        let site = self.site("layer.0.output.norm")?;
        let f = |theta: &Tensors, x: &Signal, _: &Context| {
            Ok(x.replace(x.x.layer_norm(theta.need("weight")?, theta.need("bias")?, 1e-5)?))
        };
        Ok(layers.run(site, &self.theta(site)?, &x.clone().into(), cx, &f)?.x)
    }

    fn block(&self, x: &Signal, layers: &Layers, cx: &Context) -> Result<Signal> {
        let size = x.x.size();
        let (batch, seq) = (x.x.len_of(0), x.x.len_of(1));
        let heads = |t: Tensor| t.reshape(&[batch, seq, HEADS, DIM / HEADS])?.transpose(1, 2);
        let query = heads(self.linear("layer.0.query", &x.x, layers, cx)?)?;
        let key = heads(self.linear("layer.0.key", &x.x, layers, cx)?)?;
        let value = heads(self.linear("layer.0.value", &x.x, layers, cx)?)?;
        let mask = x.with.need("mask")?;
        let additive = mask.neg()?.add_scalar(1.0)?.mul_scalar(-1e9)?.unsqueeze(1)?.unsqueeze(1)?;
        let with = Tensors::new().with("key", key).with("value", value).with("mask", additive);
        let f = |_: &Tensors, s: &Signal, _: &Context| {
            let scale = ((DIM / HEADS) as f64).sqrt().recip();
            let scores = s.x.matmul(&s.with.need("key")?.t()?)?.mul_scalar(scale)?;
            let p = scores.add(s.with.need("mask")?)?.softmax(-1)?;
            p.matmul(s.with.need("value")?).map(Signal::from)
        };
        let attention = self.site("layer.0.attention")?;
        let context = layers.run(attention, &Tensors::new(), &Signal { x: query, with }, cx, &f)?.x;
        let context = context.transpose(1, 2)?.reshape(&size)?;
        let inner = |_: &Tensors, s: &Signal, cx: &Context| {
            Ok(s.replace(self.linear("layer.0.output.dense", &s.x, layers, cx)?))
        };
        let norm = |_: &Tensors, s: &Signal, cx: &Context| {
            self.norm(&s.x.add(s.with.need("residual")?)?, layers, cx).map(Signal::from)
        };
        let sub = Signal { x: context, with: Tensors::new().with("residual", x.x.clone()) };
        let output = self.site("layer.0.output")?;
        let h = layers.run_staged(output, &Tensors::new(), &sub, cx, &inner, &[("norm", &norm)])?;
        Ok(x.replace(self.norm(&h.x.add(&x.x)?, layers, cx)?))
    }
}

impl Backbone for TinyBackbone {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn theta(&self, site: &Site) -> Result<Tensors> {
        let own = |(name, p): (&str, &crate::Param)| {
            let short = name.strip_prefix(site.path.as_str())?.strip_prefix('.')?;
            (!short.contains('.')).then(|| (short.to_owned(), p.tensor().clone()))
        };
        Ok(self.params.iter().filter_map(own).collect())
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let ids = Signal::from(inputs.need("input_ids")?.clone());
        let mask = inputs.need("attention_mask")?;
        let words = self.site("embeddings.words")?;
        let look_up = |theta: &Tensors, s: &Signal, _: &Context| {
            Ok(theta.need("weight")?.embedding(&s.x)?.into())
        };
        let x = layers.run(words, &self.theta(words)?, &ids, cx, &look_up)?.x;
        let mask = mask.to_kind(x.kind())?;
        let tokens = self.site("embeddings")?;
        let place = |theta: &Tensors, s: &Signal, _: &Context| {
            let positions = theta.need("positions")?.embedding(s.with.need("positions")?)?;
            Ok(s.replace(s.x.add(&positions)?))
        };
        let positions = Tensor::arange(x.len_of(1), Device::Cpu)?.expand(&[x.len_of(0), -1])?;
        let with = Tensors::new().with("mask", mask).with("positions", positions);
        let first = Signal { x, with };
        let x = layers.run(tokens, &self.theta(tokens)?, &first, cx, &place)?;
        let mask = x.with.need("mask")?.clone();
        let longer = (mask.len_of(1) != ids.x.len_of(1)).then(|| mask.clone());
        let cx = cx.clone().with_feature("mask", mask);
        let f = |_: &Tensors, s: &Signal, cx: &Context| self.block(s, layers, cx);
        let x = layers.run(self.site("layer.0")?, &Tensors::new(), &x, &cx, &f)?.x;
        let x = x.add(&self.conv(&x, layers, &cx)?)?;
        let logits = self.linear("head", &x, layers, &cx)?;
        let mut outputs = Tensors::new().with("last_hidden_state", x).with("logits", logits);
        if let Some(mask) = longer {
            outputs.set("attention_mask", mask);
        }
        Ok(outputs)
    }
}

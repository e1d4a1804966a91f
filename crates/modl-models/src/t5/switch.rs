//! Switch Transformers' feed-forward networks: every token has the one expert that the router finds
//! likeliest, as long as that expert has room.
//!
//! p = softmax(x Wᵀ) in f32, e = argmax p; y = pₑ · expertₑ(x), and 0 for tokens that come after
//! the first `expert_capacity` of their sequence for e. In training the router sees x times numbers
//! from [1 − jitter, 1 + jitter].
//!
//! Fedus et al. 2021, *Switch Transformers*, arXiv 2101.03961; the z-loss is of Zoph et al. 2022,
//! *ST-MoE*, arXiv 2202.08906.

use modl_core::{
    Activation, HostFn, Kind, OwnLoss, Result, ResultExt, Signal, SiteKind, Tensor, Tensors,
};
use serde_json::Value;

use crate::dropout::Drop;
use crate::moe::{Expert, Reader, RouterLogits, Use, WI, WO, Within, jitter, mix};
use crate::place::{Pass, Place, Surveyor};
use crate::settings::{Fixed, check_fixed, check_positive, check_weight, refuse};

/// The settings of Switch Transformers' mixtures, with the defaults of transformers'
/// `SwitchTransformersConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct SwitchConfig {
    /// The number of experts, `num_experts`: 8.
    pub experts: i64,
    /// How many tokens of a sequence an expert takes, `expert_capacity`: 64.
    pub capacity: i64,
    /// Whether the router has a bias, `router_bias`.
    pub router_bias: bool,
    /// How far the router's inputs are off in training, `router_jitter_noise`: 0.01.
    pub jitter: f64,
    /// In the encoder and in the decoder, every so-manieth layer has experts, from the second on; 1
    /// for all, 0 for none: `encoder_sparse_step` and `decoder_sparse_step`, or from the numbers of
    /// layers and of sparse ones, 12 and 3.
    pub steps: [i64; 2],
    /// Whether `encoder_router_logits.N` and `decoder_router_logits.N` and their losses are among
    /// the outputs, `output_router_logits`.
    pub router_logits: bool,
    /// What `aux_loss` and `z_loss` count in training, the sums of both stacks':
    /// `router_aux_loss_coef` and `router_z_loss_coef`, 0.001 each.
    pub loss_weights: [f64; 2],
}

const FIXED: [Fixed; 1] = [("router_dtype", |v| v == "float32", "only `float32` is")];

impl SwitchConfig {
    /// Reads the settings where the architecture has them.
    ///
    /// # Errors
    /// By name where one has the wrong type, is out of range or is not supported.
    pub(super) fn read(config: &Value) -> Result<Option<Self>> {
        if config.get("model_type").is_none_or(|t| t != "switch_transformers") {
            return Ok(None);
        }
        check_fixed(config, "Switch Transformers", &FIXED)?;
        let from = Reader(config);
        let layers = from.number("num_layers", 12)?;
        let step = |name, sparse, layers: i64| {
            let sparse = from.number(sparse, 3)?;
            from.number(name, if sparse > 0 { layers / sparse } else { layers })
        };
        let decoder = from.number("num_decoder_layers", layers)?;
        let settings = SwitchConfig {
            experts: from.number("num_experts", 8)?,
            capacity: from.number("expert_capacity", 64)?,
            router_bias: from.flag("router_bias", false)?,
            jitter: from.real("router_jitter_noise", 0.01)?,
            steps: [
                step("encoder_sparse_step", "num_sparse_encoder_layers", layers)?,
                step("decoder_sparse_step", "num_sparse_decoder_layers", decoder)?,
            ],
            router_logits: from.flag("output_router_logits", false)?,
            loss_weights: [
                from.real("router_aux_loss_coef", 0.001)?,
                from.real("router_z_loss_coef", 0.001)?,
            ],
        };
        check_weight("router_aux_loss_coef", settings.loss_weights[0])?;
        check_weight("router_z_loss_coef", settings.loss_weights[1])?;
        let (experts, capacity) = (settings.experts, settings.capacity);
        check_positive(&[("num_experts", experts), ("expert_capacity", capacity)])?;
        if !(0.0..1.0).contains(&settings.jitter) {
            refuse("router_jitter_noise", settings.jitter, "is to be in [0, 1)")?;
        }
        Ok(Some(settings))
    }

    /// The losses of the routers, where they are wanted.
    pub(super) fn own_losses(&self) -> Vec<OwnLoss> {
        let [aux, z] = self.loss_weights;
        let loss = |(name, weight): (&str, f64)| OwnLoss {
            name: name.to_owned(),
            outputs: ["encoder", "decoder"].map(|stack| format!("{stack}_{name}")).to_vec(),
            weight,
        };
        let all = [("aux_loss", aux), ("z_loss", z)];
        all.into_iter().filter(|_| self.router_logits).map(loss).collect()
    }

    /// Whether layer `n` of the encoder, or of the decoder where it is `causal`, has experts.
    pub fn has(&self, causal: bool, n: usize) -> bool {
        let step = self.steps[usize::from(causal)];
        step > 0 && (step == 1 || n as i64 % step == 1)
    }
}

/// A router and its experts.
#[derive(Debug)]
pub(super) struct Switch {
    router: Place,
    experts: Place,
    /// The first and the last matrix of each expert; their parameters are stacked in `experts`.
    each: Vec<[Place; 2]>,
    settings: SwitchConfig,
    act: Activation,
    /// The number of its layer.
    layer: usize,
}

impl Switch {
    /// The mixture at `path` for vectors of `width`, with experts `inner` wide.
    pub(super) fn new(
        to: &mut Surveyor,
        path: &str,
        [width, inner]: [i64; 2],
        settings: &SwitchConfig,
        act: Activation,
        layer: usize,
    ) -> Self {
        let router = format!("{path}.router.classifier");
        let router = to.place(&router, SiteKind::Router, width, settings.experts);
        let experts = to.place(&format!("{path}.experts"), SiteKind::Experts, width, width);
        let each = (0..settings.experts).map(|e| {
            [(WI, width, inner), (WO, inner, width)].map(|(name, input, output)| {
                let path = format!("{path}.experts.expert_{e}.{name}");
                to.place(&path, SiteKind::Linear, input, output)
            })
        });
        let each = each.collect();
        Switch { router, experts, each, settings: settings.clone(), act, layer }
    }

    /// One matrix of an expert through the modules that stand there. Each token is a row of its own,
    /// with what the context says of its row among rows of `seq` tokens.
    fn within(&self, own: Use, seq: i64, pass: Pass) -> Result<Tensor> {
        let place =
            self.each.get(own.expert).map(|[first, last]| if own.last { last } else { first });
        let Some(place) = place.filter(|p| p.modular(pass)) else {
            return own.matrix.apply(own.x);
        };
        let rows: Vec<i64> = own.tokens.iter().map(|token| token / seq.max(1)).collect();
        let cx = pass.cx.select_rows(&rows)?;
        let theta = Tensors::new().with("weight", own.matrix.whole()?);
        place.linear_with(&theta, &own.x.unsqueeze(1)?, pass.of(&cx))?.squeeze(1)
    }

    /// x `[batch, seq, dim]`, of the same shape, with `drop` within experts.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        drop: Drop,
        said: &RouterLogits,
        pass: Pass,
    ) -> Result<Tensor> {
        let seen = jitter(x, self.settings.jitter, &self.router, pass)?;
        let logits = self.router.wide_linear(&seen, pass)?;
        said.note(self.layer, &logits);
        let (gate, index) = logits.softmax(-1)?.to_kind(x.kind())?.max_dim(-1)?; // [batch, seq]
        let chosen = index.one_hot(self.settings.experts)?;
        let place = chosen.cumsum(1)?.mul(&chosen)?.sum_dims(&[-1], false)?; // from 1 on
        let full = place.gt_scalar(self.settings.capacity as f64)?;
        let gates = gate.masked_fill(&full, 0.0)?.unsqueeze(-1)?;
        let expert = Expert::Plain(self.act, drop);
        let modular = self.each.iter().flatten().any(|place| place.modular(pass));
        let host: &HostFn = &|theta, s, cx| {
            let (index, gates) = (s.with.need("experts")?, s.with.need("gates")?);
            let within = |own: Use| self.within(own, s.x.len_of(1), pass.of(cx));
            let within = modular.then_some(&within as Within);
            Ok(s.replace(mix(theta, &s.x, index, gates, expert, within)?))
        };
        let with = Tensors::new().with("experts", index.unsqueeze(-1)?).with("gates", gates);
        let x = Signal { x: x.clone(), with };
        Ok(self.experts.run(&x, pass, host).at(&self.experts.site.path)?.x)
    }
}

/// What the routers of a stack said, for `mask` `[batch, seq]`: `NAME_router_logits.N`
/// `[batch, seq, experts]`, and over all of them `NAME_z_loss` and `NAME_aux_loss` `[]`.
///
/// z = mean (ln Σₑ e^logit)²; aux = E² · mean over sequences and experts of fₑ Pₑ, the share of
/// tokens for which e is likeliest, in whatever layer, and its mean probability. Padding counts, and
/// so do tokens for which there was no room, as in transformers.
pub(super) fn outputs(name: &str, said: &RouterLogits, mask: &Tensor) -> Result<Tensors> {
    let mut outputs = Tensors::new();
    let mut all = Vec::new();
    for (n, logits) in said.by_layer(mask.numel() as i64)? {
        let logits = logits.reshape(&[mask.len_of(0), mask.len_of(1), -1])?;
        all.push(logits.clone());
        outputs.set(format!("{name}_router_logits.{n}"), logits);
    }
    if all.is_empty() {
        return Ok(outputs);
    }
    let logits = Tensor::cat(&all, 1)?; // [batch, layers · seq, experts]
    let experts = logits.len_of(-1);
    outputs.set(format!("{name}_z_loss"), logits.logsumexp(-1)?.pow(2.0)?.mean()?);
    let p = logits.softmax(-1)?;
    let chosen = p.argmax(-1)?.one_hot(experts)?.to_kind(Kind::Float)?.mean_dims(&[1], false)?;
    let both = chosen.mul(&p.mean_dims(&[1], false)?)?.mean()?;
    outputs.set(format!("{name}_aux_loss"), both.mul_scalar((experts * experts) as f64)?);
    Ok(outputs)
}

//! The logits of all routers of a pass, and the auxiliary loss of them.
//!
//! L = E · Σₑ fₑ Pₑ over the E experts: fₑ is the number of times that e is among a token's k
//! experts and Pₑ its probability, both averaged over the real tokens of all layers together
//! (Fedus et al. 2021, arXiv 2101.03961, eq. 4–6, as transformers has it for several experts of a
//! token: it is k where loads are equal).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use modl_core::{Context, Kind, Result, Tensor, Tensors};

use super::MixtureConfig;

/// Where routers leave their logits during a pass, if anybody wants them. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct RouterLogits(Option<Rc<RefCell<ByLayer>>>);

/// What was left for each layer, one after the other.
type ByLayer = BTreeMap<usize, Vec<Tensor>>;

impl RouterLogits {
    /// A place for them.
    pub(crate) fn wanted() -> Self {
        RouterLogits(Some(Rc::default()))
    }

    /// Leaves those of a layer, `[…, experts]`.
    pub(crate) fn note(&self, layer: usize, logits: &Tensor) {
        if let Some(all) = &self.0 {
            all.borrow_mut().entry(layer).or_default().push(logits.clone());
        }
    }

    /// Says aside what was left, so that it outlasts a part of the pass.
    pub(crate) fn say(&self, cx: &Context) {
        for (layer, all) in self.0.iter().flat_map(|all| all.take()) {
            all.into_iter().for_each(|logits| cx.say(layer.to_string(), logits));
        }
    }

    /// What parts of the pass have said aside.
    pub(crate) fn said(cx: &Context) -> Self {
        let all = RouterLogits::wanted();
        for (layer, logits) in cx.take_said() {
            if let Ok(layer) = layer.parse() {
                all.note(layer, &logits);
            }
        }
        all
    }

    /// `[tokens, experts]` by layer. Layers that did not see all `tokens` once, because modules
    /// around them sent rows this way and that, are not among them.
    pub(crate) fn by_layer(&self, tokens: i64) -> Result<BTreeMap<usize, Tensor>> {
        let mut found = BTreeMap::new();
        for (layer, all) in self.0.iter().flat_map(|all| all.take()) {
            if let [logits] = all.as_slice() {
                let logits = logits.reshape(&[-1, logits.len_of(-1)])?;
                if logits.len_of(0) == tokens {
                    found.insert(layer, logits);
                }
            }
        }
        Ok(found)
    }

    /// `router_logits.N` `[batch · seq, experts]` for each layer N with a mixture, and `aux_loss`
    /// `[]`, given the `mask` `[batch, seq]` of real tokens. The loss is left out where a layer's
    /// logits are.
    pub(crate) fn outputs(
        &self,
        layers: usize,
        settings: &MixtureConfig,
        mask: &Tensor,
    ) -> Result<Tensors> {
        let found = self.by_layer(mask.numel() as i64)?;
        let mut outputs = Tensors::new();
        let wanted = (0..layers).filter(|n| settings.layers.has(*n)).count();
        if settings.loss_weight.is_some() && wanted > 0 && found.len() == wanted {
            let all: Vec<&Tensor> = found.values().collect();
            outputs.set("aux_loss", balance(&all, settings.top_k, mask)?);
        }
        for (n, logits) in found {
            outputs.set(format!("router_logits.{n}"), logits);
        }
        Ok(outputs)
    }
}

/// The loss for `logits` `[tokens, experts]` of each layer.
fn balance(logits: &[&Tensor], top_k: i64, mask: &Tensor) -> Result<Tensor> {
    let real = mask.to_kind(Kind::Float)?.reshape(&[-1, 1])?; // [tokens, 1]
    let mut sums: Option<(Tensor, Tensor)> = None;
    for logits in logits {
        let p = logits.softmax(-1)?.to_kind(Kind::Float)?;
        let (_, index) = p.topk(top_k, -1)?;
        let chosen = p.zeros_like()?.scatter_add(-1, &index, &real.expand(&index.size())?)?;
        let own = (chosen.sum_dims(&[0], false)?, p.mul(&real)?.sum_dims(&[0], false)?);
        sums = Some(match sums {
            None => own,
            Some((f, p)) => (f.add(&own.0)?, p.add(&own.1)?),
        });
    }
    let none = Tensor::zeros(&[1], Kind::Float, mask.device())?;
    let (chosen, p) = sums.unwrap_or((none.clone(), none));
    let tokens = real.sum()?.mul_scalar(logits.len() as f64)?;
    let experts = p.len_of(0) as f64;
    chosen.div(&tokens)?.mul(&p.div(&tokens)?)?.sum()?.mul_scalar(experts)
}

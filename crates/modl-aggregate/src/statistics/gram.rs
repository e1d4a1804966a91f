//! XᵀX of the inputs of linear layers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use modl_core::{
    Attachment, Bank, Context, Error, Host, Kind, Modular, Module, ModuleConfig, Result, Router,
    RouterConfig, Routing, Scope, Signal, Site, SiteKind, Targets, Tensor, Tensors, Weights,
    no_grad,
};
use serde_json::{Value, json};

use crate::WeightedSum;

/// The name of what listens.
const NAME: &str = "gram";

/// XᵀX `[in, in]` of the inputs X `[tokens, in]` at each linear site that `targets` takes, over all
/// `batches`, under the name of the site's weight. Summed in f64, given in f32. Where the context has
/// a `mask` of real tokens, others do not count.
///
/// The model is to have no modules: what they do is not the weight's. It has none afterwards, and no
/// router; its aggregator is the weighted sum.
///
/// # Errors
/// Where a target is no linear site, or a forward pass fails.
pub fn gram(
    model: &mut Modular,
    targets: &Targets,
    batches: impl IntoIterator<Item = Tensors>,
) -> Result<Tensors> {
    if !model.modules().is_empty() {
        let problem = "has modules; merge them into the backbone first";
        return Err(Error::invalid("model", problem));
    }
    let listener = Listener::default();
    model.attach(NAME, Box::new(listener.clone()), targets)?;
    let ready = model.aggregate(Box::new(WeightedSum::default()));
    let heard = ready.and_then(|()| model.route(Box::new(Always), false)).and_then(|()| {
        let forward = |batch| no_grad(|| model.forward(&batch, &Context::eval())).map(|_| ());
        batches.into_iter().try_for_each(forward)
    });
    model.detach(NAME)?;
    heard?;
    let sums = std::mem::take(&mut *listener.0.lock().unwrap_or_else(PoisonError::into_inner));
    if sums.is_empty() {
        return Err(Error::invalid("products of inputs", "no batch came by a site"));
    }
    let one =
        |(site, sum): (String, Tensor)| Ok((format!("{site}.weight"), sum.to_kind(Kind::Float)?));
    Tensors::distinct(sums.into_iter().map(one).collect::<Result<Vec<_>>>()?)
}

type Sums = Arc<Mutex<BTreeMap<String, Tensor>>>;

/// Leaves the base function as it is, and adds up what it is given.
#[derive(Debug, Clone, Default)]
struct Listener(Sums);

#[derive(Debug)]
struct Ear {
    site: String,
    sums: Sums,
}

impl ModuleConfig for Listener {
    fn kind(&self) -> &'static str {
        NAME
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, at: &Attachment, _: &mut Scope) -> Result<Box<dyn Module>> {
        if at.site.kind != SiteKind::Linear {
            let problem = "is no linear layer; choose such sites";
            return Err(Error::invalid(&at.site.path, problem));
        }
        Ok(Box::new(Ear { site: at.site.path.clone(), sums: self.0.clone() }))
    }
}

/// Everything goes by the listener.
#[derive(Debug, Clone, Copy)]
struct Always;

impl Router for Always {
    fn kind(&self) -> &'static str {
        NAME
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        Ok(Routing::new(Weights::Fixed(vec![(0, 1.0)]), bank.len()))
    }
}

impl RouterConfig for Always {
    fn kind(&self) -> &'static str {
        NAME
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(Always))
    }
}

impl Module for Ear {
    fn kind(&self) -> &'static str {
        NAME
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let input = x.x.to_kind(Kind::Double)?;
        let size = input.size();
        let width = size.last().copied().unwrap_or(1);
        let real = match cx.find("mask") {
            Some(mask) if size.len() == 3 && mask.size() == size[..2] => {
                input.mul(&mask.to_kind(Kind::Double)?.unsqueeze(-1)?)?
            }
            _ => input,
        };
        let flat = real.reshape(&[-1, width])?;
        let product = flat.t()?.matmul(&flat)?;
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = match sums.get(&self.site) {
            Some(sum) => sum.add(&product)?,
            None => product,
        };
        sums.insert(self.site.clone(), sum);
        drop(sums);
        f.call(x, cx)
    }
}

//! Plain networks by their tensors, for experiments about merging: layers `0`, `1`, … with ReLU
//! between them.

use anyhow::{Context as _, Result};
use modl_core::{Device, Init, Kind, Seed, Tensor, Tensors, no_grad};
use modl_train::OptimizerConfig;

/// Layers of these widths, drawn as PyTorch does.
pub(super) fn network(widths: &[i64], seed: Seed) -> Result<Tensors> {
    let mut all = Tensors::new();
    for (n, pair) in widths.windows(2).enumerate() {
        let [input, output] = pair else { continue };
        let seed = seed.nth(n as u64);
        let bound = 1.0 / (*input as f64).sqrt();
        for (part, shape) in [("weight", vec![*output, *input]), ("bias", vec![*output])] {
            let t =
                Init::Uniform(bound).tensor(&shape, seed.child(part), Kind::Float, Device::Cpu)?;
            all.set(format!("{n}.{part}"), t);
        }
    }
    Ok(all)
}

/// The input of each layer, and at the end the output of the last.
pub(super) fn activations(net: &Tensors, x: &Tensor) -> modl_core::Result<Vec<Tensor>> {
    let mut all = vec![x.clone()];
    for n in 0..net.len() / 2 {
        let (w, b) = (net.need(&format!("{n}.weight"))?, net.need(&format!("{n}.bias"))?);
        let input = all.last().unwrap_or(x);
        let input = if n > 0 { input.relu()? } else { input.clone() };
        let output = input.linear(w, Some(b))?;
        if let Some(last) = all.last_mut() {
            *last = input;
        }
        all.push(output);
    }
    Ok(all)
}

/// The output of the last layer.
pub(super) fn output(net: &Tensors, x: &Tensor) -> modl_core::Result<Tensor> {
    Ok(activations(net, x)?.pop().unwrap_or_else(|| x.clone()))
}

/// Tensors with storage of their own.
pub(super) fn copy(net: &Tensors) -> Result<Tensors> {
    Ok(net.map(|_, t| t.detach()?.copy())?)
}

/// Trains the tensors in place by Adam.
pub(super) fn train(
    parts: &[(&str, &Tensors)],
    steps: u64,
    lr: f64,
    tick: &dyn Fn(),
    mut loss: impl FnMut(u64) -> Result<Tensor>,
) -> Result<()> {
    let params: Vec<(String, Tensor)> = parts
        .iter()
        .flat_map(|(p, ts)| ts.iter().map(move |(n, t)| (format!("{p}.{n}"), t.clone())))
        .collect();
    for (_, t) in &params {
        t.set_requires_grad(true)?;
    }
    let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
    let mut optimizer = OptimizerConfig::default().build()?;
    for step in 0..steps {
        let gradients = loss(step)?.gradients(&leaves, false).context("gradients")?;
        optimizer.step(&params, &gradients, &|_| lr)?;
        tick();
    }
    for (_, t) in &params {
        t.set_requires_grad(false)?;
    }
    Ok(())
}

/// The share of rows whose largest logit is the right one.
pub(super) fn accuracy(logits: &Tensor, classes: &Tensor) -> Result<f64> {
    let hits = no_grad(|| logits.argmax(1)?.equal(classes)?.to_kind(Kind::Double)?.mean()?.item())?;
    Ok(hits)
}

//! The static hypernetwork: a small network makes the weights of all layers, each from an embedding
//! of its own.
//!
//! A weight `[out, in, …]` is laid out in tiles of `tile` × `tile` kernels, each with its own z:
//!
//! aᵢ = Wᵢ z + Bᵢ for the columns i of a tile, Kᵢ = W_out aᵢ + B_out
//!
//! where Kᵢ holds the kernels from input i to the tile's outputs (1 × 1 for a linear layer), and
//! all layers share Wᵢ, Bᵢ, W_out and B_out. A weight that is no whole number of tiles is cut.
//! Vectors, such as biases, are not generated but trained as they are.
//!
//! By default K takes the place of the site's own weight, from its mean square; with
//! `Full { form: Form::Delta }` it is added to it, from 0. It looks at no context, and so it can be
//! merged.
//!
//! Ha, Dai and Le 2016, *HyperNetworks*, arXiv 1609.09106. Survey §3.4. Tiles of 16 and embeddings
//! of 64 are those of the authors' residual networks; they, too, let the width of aᵢ be that of z.

use modl_core::{Attachment, Init, Module, ModuleConfig, Result, Scope, Targets, Tensor, Tensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::builder::{Builder, Whose};
use super::network::{Generator, Layer, Part};
use crate::{Form, Full, Nested};

/// Configuration of static hypernetworks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HyperNetwork {
    /// What is generated; default: the site's own parameters.
    pub config: Nested,
    /// The inputs and outputs of a tile; default 16.
    pub tile: i64,
    /// The width of z and aᵢ; default 64.
    pub embedding_dim: i64,
}

impl Default for HyperNetwork {
    fn default() -> Self {
        let config = Nested::new(Full { form: Form::Copy });
        HyperNetwork { config, tile: 16, embedding_dim: 64 }
    }
}

impl ModuleConfig for HyperNetwork {
    fn kind(&self) -> &'static str {
        "hyper_network"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        self.config.usual_targets()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let mut g = Builder::new(self.kind(), &self.config, at, scope)?;
        g.positive("tile", self.tile)?;
        g.positive("embedding_dim", self.embedding_dim)?;
        let parts = g.parts.clone();
        let parts = parts.iter().map(|part| self.part(&mut g, part)).collect::<Result<_>>()?;
        Ok(g.finish(Tiles { tile: self.tile, parts }))
    }
}

impl HyperNetwork {
    fn part(&self, g: &mut Builder, part: &Part) -> Result<Tiled> {
        let (t, d) = (self.tile, self.embedding_dim);
        let &[out, inputs, ref kernel @ ..] = part.shape.as_slice() else {
            return Ok(Tiled::Own(g.own(part)?));
        };
        let kernel: i64 = kernel.iter().product();
        let grid =
            [out.unsigned_abs().div_ceil(t as u64), inputs.unsigned_abs().div_ceil(t as u64)]
                .map(|n| n as i64);
        // Layers share the network but not the size of their weights, which z therefore carries.
        let (spread, last) = if part.spread == 0.0 { (1.0, 0.0) } else { (part.spread, 1.0) };
        let shape = [grid[0] * grid[1], d];
        let z = g.param(Whose::Site, format!("z.{}", part.name), &shape, Init::Normal(spread))?;
        let unit = (d as f64).sqrt().recip();
        let name = format!("{}.{kernel}", part.name);
        let shape = (t.saturating_mul(d), d);
        let first = g.linear(Whose::All, &format!("{name}.first"), shape, unit, true)?;
        let shape = (t.saturating_mul(kernel), d);
        let last = g.linear(Whose::All, &format!("{name}.out"), shape, last * unit, true)?;
        Ok(Tiled::Generated { z, first, last, grid })
    }
}

/// How a part comes about, by the names of parameters in η.
#[derive(Debug)]
enum Tiled {
    /// As it is.
    Own(String),
    /// From one row of z for each tile of the grid.
    Generated { z: String, first: Layer, last: Layer, grid: [i64; 2] },
}

#[derive(Debug)]
struct Tiles {
    tile: i64,
    parts: Vec<Tiled>,
}

impl Generator for Tiles {
    fn generate(&self, eta: &Tensors, _: &Tensor, parts: &[Part]) -> Result<Vec<Tensor>> {
        let t = self.tile;
        let make = |(how, part): (&Tiled, &Part)| match how {
            Tiled::Own(name) => eta.need(name).cloned(),
            Tiled::Generated { z, first, last, grid: [rows, columns] } => {
                let z = eta.need(z)?; // [tiles, d]
                let a = first.apply(eta, z)?.reshape(&[-1, z.len_of(1)])?; // [tiles · t, d]
                let k = last.apply(eta, &a)?; // [tiles · t, t · kernel]
                let k = k.reshape(&[*rows, *columns, t, t, -1])?; // tile's row, column, i, output
                let k = k.permute(&[0, 3, 1, 2, 4])?.reshape(&[rows * t, columns * t, -1])?;
                let size = |d: usize| part.shape.get(d).copied().unwrap_or(1);
                k.narrow(0, 0, size(0))?.narrow(1, 0, size(1))
            }
        };
        self.parts.iter().zip(parts).map(make).collect()
    }
}

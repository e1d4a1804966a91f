//! Git Re-Basin of two networks of linear layers.

use anyhow::Result;
use modl_aggregate::rebasin::{Permutations, match_weights};
use modl_core::{Device, Seed, Tensors, checkpoint};

/// Two networks with layers `0`, `1`, …
pub(crate) struct Pair {
    a: Tensors,
    b: Tensors,
    layers: Permutations,
    done: u64,
}

impl Pair {
    pub(crate) fn open(file: &str) -> Result<Self> {
        let all: Tensors = checkpoint::open(file)?.tensors(Device::Cpu)?.into_iter().collect();
        let of = |name: &str| -> Tensors {
            let own = all.iter().filter_map(|(n, t)| Some((n.strip_prefix(name)?, t)));
            own.map(|(n, t)| (n.to_owned(), t.clone())).collect()
        };
        let (a, b) = (of("a."), of("b."));
        let names: Vec<String> = (0..a.len() / 2).map(|n| n.to_string()).collect();
        let layers = Permutations::mlp(&names.iter().map(String::as_str).collect::<Vec<_>>());
        Ok(Pair { a, b, layers, done: 0 })
    }

    /// Each time in another order of layers.
    pub(crate) fn run(&mut self) -> Result<()> {
        self.done += 1;
        match_weights(&self.layers, &self.a, &self.b, Seed(self.done))?;
        Ok(())
    }
}

//! A speaker encoder trained with GE2E (Wan et al. 2018, *Generalized End-to-End Loss for Speaker
//! Verification*, arXiv 1710.10467): LSTM layers over mel spectrograms; the last state through a
//! linear layer and ReLU, at length 1. Resemblyzer publishes one of 3 × 256 over 40 mels.

use std::path::Path;

use modl_core::checkpoint::{self, TensorFile, TorchFile};
use modl_core::{Error, Result, Tensor};

use super::lstm::{self, Lstm};
use crate::LoadOptions;
use crate::folder::{Shapes, Weights};

/// Where training checkpoints have the network, beside the optimiser.
const PART: &str = "model_state";

/// Parameters of the loss it was trained with.
const LOSS: &str = "similarity_";

/// From mel spectrograms to a vector for each speaker; frozen.
#[derive(Debug)]
pub struct SpeakerEncoder {
    layers: Vec<Lstm>,
    weight: Tensor,
    bias: Tensor,
    mels: i64,
}

impl SpeakerEncoder {
    /// Loads a file of weights: safetensors, or PyTorch's with the network at the top or in
    /// `model_state`, as Resemblyzer's `pretrained.pt`. Its shapes say the sizes.
    ///
    /// # Errors
    /// Where the file is broken, or its tensors are not those of such a network.
    pub fn load(file: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let file = file.as_ref();
        let mut open = checkpoint::open(file)?;
        if open.names().iter().any(|n| n.starts_with("model_state.")) {
            open = Box::new(TorchFile::open(file)?.below(PART)?);
        }
        let (first, _) = open.info("lstm.weight_ih_l0")?;
        let (last, _) = open.info("linear.weight")?;
        let ([rows, mels], [output, _]) = (first.as_slice(), last.as_slice()) else {
            return Err(Error::file(file, "has LSTM weights that are no matrices"));
        };
        let (width, mels) = (rows / 4, *mels);
        let layers = depth(open.as_ref());
        let mut shapes = Shapes::new();
        for n in 0..layers {
            let input = if n == 0 { mels } else { width };
            shapes.extend(lstm::shapes("lstm", &format!("_l{n}"), input, width));
        }
        shapes.insert("linear.weight".into(), vec![*output, width]);
        shapes.insert("linear.bias".into(), vec![*output]);
        let own = |stored: &str| (!stored.starts_with(LOSS)).then(|| stored.to_owned());
        let weights = Weights::of(file, vec![open], own)?;
        let params = weights.load(&shapes, "linear.weight", options)?;
        let layers = (0..layers).map(|n| Lstm::new(&params, "lstm", &format!("_l{n}")));
        Ok(SpeakerEncoder {
            layers: layers.collect::<Result<_>>()?,
            weight: params.get("linear.weight")?.clone(),
            bias: params.get("linear.bias")?.clone(),
            mels,
        })
    }

    /// The vectors `[batch, out]`, each of length 1 and without negative numbers, for mel
    /// spectrograms `[batch, frames, mels]`. Resemblyzer takes 160 frames at 10 ms, and the mean of
    /// several windows for longer speech.
    ///
    /// # Errors
    /// Where the spectrograms have another number of mels, or no frames.
    pub fn embed(&self, mels: &Tensor) -> Result<Tensor> {
        let size = mels.size();
        if size.len() != 3 || mels.len_of(2) != self.mels || mels.len_of(1) == 0 {
            let problem = format!("are {size:?}, wants [batch, frames, {}]", self.mels);
            return Err(Error::invalid("mel spectrograms", problem));
        }
        let mut x = mels.to_device(self.weight.device())?.to_kind(self.weight.kind())?;
        for layer in &self.layers {
            x = layer.sequence(&x)?;
        }
        let raw = x.select(1, -1)?.linear(&self.weight, Some(&self.bias))?.relu()?;
        raw.div(&raw.square()?.sum_dims(&[1], true)?.sqrt()?)
    }
}

/// The number of layers that a file has.
fn depth(file: &dyn TensorFile) -> usize {
    let names = file.names();
    (0..names.len())
        .take_while(|n| names.binary_search(&format!("lstm.weight_ih_l{n}")).is_ok())
        .count()
}

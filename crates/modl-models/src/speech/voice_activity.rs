//! Silero VAD 5 (Silero Team, <https://github.com/snakers4/silero-vad>): the probability of speech
//! in each chunk of a waveform. |STFT| as a convolution, four convolutions of kernel 3, an LSTM cell
//! whose state goes from chunk to chunk, and a linear layer.
//!
//! With windows of n samples (256, that is 16 ms at 16 kHz) a chunk has 2n samples; n ⁄ 4 samples
//! before it are seen as well, and n ⁄ 4 behind it are mirrored.

use std::path::Path;

use modl_core::{Error, ParamStore, Result, Tensor, checkpoint};

use super::lstm::{self, Lstm, State};
use crate::LoadOptions;
use crate::folder::{Shapes, Weights};

/// The convolutions' strides.
const STRIDES: [i64; 4] = [1, 2, 2, 1];

/// The smallest window: the strides leave one position of its frames.
const LEAST_WINDOW: i64 = 8;

/// From a waveform to probabilities of speech; frozen.
#[derive(Debug)]
pub struct VoiceActivity {
    params: ParamStore,
    cell: Lstm,
    window: i64,
}

impl VoiceActivity {
    /// Loads a file of weights, as `silero_vad_16k.safetensors`. Its shapes say the sizes.
    ///
    /// # Errors
    /// Where the file is broken, or its tensors are not those of such a network.
    pub fn load(file: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let file = file.as_ref();
        let open = checkpoint::open(file)?;
        let (stft, _) = open.info("stft_conv.weight")?;
        let window = stft.last().copied().unwrap_or(0);
        if window < LEAST_WINDOW || window % 4 != 0 {
            return Err(Error::file(file, format!("has windows of {window} samples")));
        }
        let mut shapes = Shapes::new();
        shapes.insert("stft_conv.weight".into(), vec![window + 2, 1, window]);
        let mut width = window / 2 + 1;
        for n in 1..=STRIDES.len() {
            let (found, _) = open.info(&format!("conv{n}.weight"))?;
            let output = found.first().copied().unwrap_or(0);
            shapes.insert(format!("conv{n}.weight"), vec![output, width, 3]);
            shapes.insert(format!("conv{n}.bias"), vec![output]);
            width = output;
        }
        let (state, _) = open.info("lstm_cell.weight_hh")?;
        let state = state.last().copied().unwrap_or(0);
        shapes.extend(lstm::shapes("lstm_cell", "", width, state));
        shapes.insert("final_conv.weight".into(), vec![1, state, 1]);
        shapes.insert("final_conv.bias".into(), vec![1]);
        let weights = Weights::of(file, vec![open], |stored| Some(stored.to_owned()))?;
        let params = weights.load(&shapes, "stft_conv.weight", options)?;
        let cell = Lstm::new(&params, "lstm_cell", "")?;
        Ok(VoiceActivity { params, cell, window })
    }

    /// Samples in a chunk: 512 in the published model, 32 ms at 16 kHz.
    pub fn chunk(&self) -> i64 {
        2 * self.window
    }

    /// The probabilities `[batch, ⌈samples ⁄ chunk⌉]` for waveforms `[batch, samples]` from −1 to 1,
    /// which start in silence; zeros fill the last chunk.
    ///
    /// # Errors
    /// Where there are no samples.
    pub fn probabilities(&self, waves: &Tensor) -> Result<Tensor> {
        let samples = waves.len_of(1);
        if waves.dim() != 2 || samples == 0 {
            let problem = format!("are {:?}, wants [batch, samples]", waves.size());
            return Err(Error::invalid("waveforms", problem));
        }
        let (chunk, before) = (self.chunk(), self.window / 4);
        let first = self.params.get("stft_conv.weight")?;
        let waves = waves.to_device(first.device())?.to_kind(first.kind())?;
        let chunks = samples.saturating_add(chunk - 1) / chunk;
        let waves = waves.pad(&[before, chunks * chunk - samples])?;
        let mut state = self.cell.start(waves.len_of(0))?;
        let mut all = Vec::new();
        for n in 0..chunks {
            let (p, next) = self.step(&waves.narrow(1, n * chunk, before + chunk)?, &state)?;
            state = next;
            all.push(p);
        }
        Tensor::cat(&all, 1)
    }

    /// The probability `[batch, 1]` for a chunk with the samples before it.
    fn step(&self, x: &Tensor, state: &State) -> Result<(Tensor, State)> {
        let mirrored = self.window / 4;
        let x = Tensor::op("reflection_pad1d", &[&x.unsqueeze(1)?], |t| {
            t[0].f_reflection_pad1d([0, mirrored])
        })?;
        let parts = self.convolve(&x, "stft_conv", self.window / 2, 0)?;
        let bins = self.window / 2 + 1;
        let (re, im) = (parts.narrow(1, 0, bins)?, parts.narrow(1, bins, bins)?);
        let mut x = re.square()?.add(&im.square()?)?.sqrt()?;
        for (n, stride) in STRIDES.into_iter().enumerate() {
            x = self.convolve(&x, &format!("conv{}", n + 1), stride, 1)?.relu()?;
        }
        let state = self.cell.step(&x.squeeze(-1)?, state)?;
        let last = self.convolve(&state.0.relu()?.unsqueeze(-1)?, "final_conv", 1, 0)?;
        Ok((last.sigmoid()?.squeeze(-1)?, state))
    }

    /// A convolution along the last dimension of `[batch, in, length]`.
    fn convolve(&self, x: &Tensor, name: &str, stride: i64, padding: i64) -> Result<Tensor> {
        let weight = self.params.get(&format!("{name}.weight"))?.unsqueeze(2)?;
        let bias = self.params.find(&format!("{name}.bias"));
        let x = x.unsqueeze(2)?;
        x.conv2d(&weight, bias, &[1, stride], &[0, padding], 1)?.squeeze(2)
    }
}

//! GPT-2 (Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*): a decoder
//! with learned positions and layer normalisation before each sub-layer.
//!
//! | site | kind |
//! |---|---|
//! | `transformer.wte` | embedding |
//! | `transformer.wpe` (adds positions; dropout) | tokens |
//! | `transformer.h.N` | block |
//! | `transformer.h.N.{ln_1,ln_2}`, `transformer.ln_f` | norm |
//! | `transformer.h.N.attn.{c_attn,c_proj}`, `transformer.h.N.mlp.{c_fc,c_proj}` | linear |
//! | `transformer.h.N.attn` | attention |
//! | `transformer.h.N.attn.output` (`c_proj` and dropout), `transformer.h.N.mlp` | sub-layer |
//! | `lm_head` | linear |
//!
//! Without an output layer (`GPT2Model`) there is no `transformer.`. Files have the weights of
//! linear sites as `[in, out]`, and so has [`Backbone::params`]; θ of such a site is a view of it as
//! `[out, in]`. A sub-layer is not normalised after its residual connection: there is no stage
//! `norm`.

mod config;
mod layer;

use std::path::Path;

use modl_core::{
    Backbone, Context, Error, Layers, Result, ResultExt, Site, SiteKind, Tensor, Tensors,
};
use serde_json::Value;

pub use config::Gpt2Config;
use layer::Layer;

use crate::LoadOptions;
use crate::decoder::{Architecture, Decoder, HEAD, Naming, Seen, backbone};
use crate::dropout::dropout;
use crate::folder::{Shapes, Weights, read_config};
use crate::place::{Pass, Place, Surveyor, transposed};

/// A GPT-2 decoder.
///
/// Inputs: `input_ids` `[batch, seq]` i64; `attention_mask` `[batch, seq]` of ones and zeros (ones
/// where it is not given); `position_ids` `[batch, seq]` i64 (from the number of tokens in the
/// context's cache, or 0, where they are not given). With a cache all are of the new tokens alone.
/// Outputs: `last_hidden_state` `[batch, seq, n_embd]`; `logits` `[batch, seq, vocab_size]`; and,
/// where a module has lengthened the sequence, `attention_mask` of the longer one.
///
/// The context's feature `mask` is the attention mask in the kind of the hidden states.
#[derive(Debug)]
pub struct Gpt2 {
    decoder: Decoder,
    settings: Gpt2Config,
    layers: Vec<Layer>,
    norm: Place,
}

impl Gpt2 {
    /// Loads a folder with `config.json` and `model.safetensors` (or shards with their index).
    ///
    /// `architectures` says whether there is an output layer; names in the file may be with or
    /// without `transformer.`.
    ///
    /// # Errors
    /// Where a file is missing or broken, a setting is not supported, or the tensors are not
    /// exactly those of the configuration: then with all that is missing, unexpected or misshapen.
    pub fn load(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let dir = dir.as_ref();
        Self::from_config(dir, read_config(dir)?, options)
    }

    pub(crate) fn from_config(dir: &Path, config: Value, options: &LoadOptions) -> Result<Self> {
        let mut settings = Gpt2Config::read(&config).at(dir.to_string_lossy())?;
        if let Some(p) = options.dropout {
            settings = settings.with_dropout(p)?;
        }
        let naming = Naming::read(&config, "transformer.", "GPT2Model", "GPT2LMHeadModel")?;
        let tied = settings.tie_word_embeddings;
        let own = |stored: &str| naming.stored(stored, tied, &[".attn.bias", ".attn.masked_bias"]);
        let weights = Weights::open(dir, own)?;
        let wanted = shapes(&settings, naming);
        let words = naming.path("wte");
        let params = weights.load(&wanted, &format!("{words}.weight"), options)?;
        let width = settings.n_embd;
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let words = to.place(&words, SiteKind::Embedding, settings.vocab_size, width);
        let tokens = to.place(&naming.path("wpe"), SiteKind::Tokens, width, width);
        let (mut blocks, mut layers) = (Vec::new(), Vec::new());
        for n in 0..settings.n_layer {
            let path = naming.path(&format!("h.{n}"));
            blocks.push(to.place(&path, SiteKind::Block, width, width));
            layers.push(Layer::new(&mut to, &path, n, &settings));
        }
        let norm = to.place(&naming.path("ln_f"), SiteKind::Norm, width, width);
        let head = naming.head_place(&mut to, &words, tied);
        let sites = to.sites;
        let decoder = Decoder { config, params, sites, naming, words, tokens, blocks, head, tied };
        Ok(Gpt2 { decoder, settings, layers, norm })
    }

    /// The settings, with the dropout that is in force.
    pub fn settings(&self) -> &Gpt2Config {
        &self.settings
    }
}

impl Architecture for Gpt2 {
    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn place_tokens(
        &self,
        theta: &Tensors,
        x: &Tensor,
        positions: &Tensor,
        pass: Pass,
    ) -> Result<Tensor> {
        let table = theta.need("weight")?;
        let end = positions.largest()?.item()? as i64 + 1;
        if end > table.len_of(0) {
            let problem = format!("reaches position {end}, but n_positions is {}", table.len_of(0));
            return Err(Error::invalid("sequence", problem));
        }
        let x = x.add(&table.embedding(positions)?)?;
        dropout(x, pass.dropout("drop", self.settings.embd_pdrop))
    }

    fn layer(&self, n: usize, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor> {
        self.layers.get(n).map_or_else(|| Ok(x.clone()), |layer| layer.forward(x, seen, pass))
    }

    fn normalise(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        self.norm.layer_norm(x, self.settings.layer_norm_epsilon, pass)
    }

    fn theta(&self, site: &Site) -> Result<Tensors> {
        let theta = self.decoder.theta(site)?;
        if site.kind == SiteKind::Linear && site.path != HEAD {
            transposed(&theta)
        } else {
            Ok(theta)
        }
    }
}

backbone!(Gpt2);

/// All parameters with their shapes.
fn shapes(settings: &Gpt2Config, naming: Naming) -> Shapes {
    let (width, inner) = (settings.n_embd, settings.inner_width());
    let mut all = Shapes::new();
    let mut one = |path: &str, shape: &[i64]| {
        all.insert(naming.path(path), shape.to_vec());
    };
    one("wte.weight", &[settings.vocab_size, width]);
    one("wpe.weight", &[settings.n_positions, width]);
    let mut pair = |path: &str, weight: &[i64]| {
        one(&format!("{path}.bias"), weight.last().map_or(&[][..], std::slice::from_ref));
        one(&format!("{path}.weight"), weight);
    };
    for n in 0..settings.n_layer {
        pair(&format!("h.{n}.ln_1"), &[width]);
        pair(&format!("h.{n}.attn.c_attn"), &[width, 3 * width]);
        pair(&format!("h.{n}.attn.c_proj"), &[width, width]);
        pair(&format!("h.{n}.ln_2"), &[width]);
        pair(&format!("h.{n}.mlp.c_fc"), &[width, inner]);
        pair(&format!("h.{n}.mlp.c_proj"), &[inner, width]);
    }
    pair("ln_f", &[width]);
    if naming.head && !settings.tie_word_embeddings {
        all.insert(format!("{HEAD}.weight"), vec![settings.vocab_size, width]);
    }
    all
}

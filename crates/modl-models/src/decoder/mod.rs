//! What decoders share: a stack of layers in which no token looks ahead, with a cache of the tokens
//! that have been seen, and logits from the last hidden states.

mod pass;

use std::fmt::Debug;

use modl_core::{Cache, Context, Error, Kind, ParamStore, Result, Site, SiteKind, Tensor, Tensors};
use serde_json::Value;

pub(crate) use pass::DecoderPass;

use crate::dropout::Drop;
use crate::ids::{check_shape, in_range};
use crate::mask::{causal, read_mask};
use crate::moe::{MixtureConfig, RouterLogits};
use crate::place::{Pass, Place, Surveyor, theta, theta_of};
use crate::rope::Rotation;
use crate::settings;

/// The output layer.
pub(crate) const HEAD: &str = "lm_head";

/// How an architecture's paths start, by the class that `config.json` names.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Naming {
    /// What stands before the names of the network where it has a head: `transformer.`.
    prefix: &'static str,
    /// Whether there is an output layer.
    pub(crate) head: bool,
}

impl Naming {
    /// Reads `architectures`, of which `bare` is the network alone and `headed` the one with an
    /// output layer; the latter where nothing is said.
    ///
    /// # Errors
    /// Where it is another one.
    pub(crate) fn read(
        config: &Value,
        prefix: &'static str,
        bare: &str,
        headed: &str,
    ) -> Result<Self> {
        match settings::class(config, headed) {
            class if class == bare => Ok(Naming { prefix, head: false }),
            class if class == headed => Ok(Naming { prefix, head: true }),
            class => Err(Error::unsupported(
                format!("the architecture {class}"),
                format!("set `architectures` to {bare} or {headed}"),
            )),
        }
    }

    /// The path of a place that is called `path` in the network alone.
    pub(crate) fn path(self, path: &str) -> String {
        if self.head { format!("{}{path}", self.prefix) } else { path.to_owned() }
    }

    /// The name of a stored tensor, or `None` where it is not a parameter: one that ends with one
    /// of `buffers`, or an output layer that is not there or is the table of words.
    pub(crate) fn stored(self, name: &str, tied: bool, buffers: &[&str]) -> Option<String> {
        let head = name.starts_with(HEAD) && (tied || !self.head);
        let none = head || buffers.iter().any(|end| name.ends_with(end));
        (!none).then(|| self.canonical(name))
    }

    /// The output layer, where there is one; with the table of `words` as θ where it is `tied`.
    pub(crate) fn head_place(self, to: &mut Surveyor, words: &Place, tied: bool) -> Option<Place> {
        let Site { input: rows, output: width, .. } = words.site;
        let place = self.head.then(|| to.place(HEAD, SiteKind::Linear, width, rows))?;
        Some(if tied { Place { theta: words.theta.clone(), ..place } } else { place })
    }

    /// The path here for one of the network with or without a head.
    pub(crate) fn canonical(self, path: &str) -> String {
        match path.strip_prefix(HEAD) {
            Some(rest) if rest.is_empty() || rest.starts_with('.') => path.to_owned(),
            _ => self.path(path.strip_prefix(self.prefix).unwrap_or(path)),
        }
    }
}

/// What a layer sees besides its input.
#[derive(Debug)]
pub(crate) struct Seen {
    /// Of the tokens of this pass, `[batch, seq]`.
    mask: Tensor,
    /// `[batch, seq]`.
    positions: Tensor,
    /// What is added to scores, `[batch, 1, seq, keys]`.
    hidden_keys: Tensor,
    /// How queries and keys turn, where they do.
    pub(crate) rotation: Option<Rotation>,
    /// Where routers leave their logits.
    pub(crate) router_logits: RouterLogits,
}

/// What differs among decoders.
pub(crate) trait Architecture: Debug {
    /// The parts that all have.
    fn decoder(&self) -> &Decoder;

    /// From token vectors `[batch, seq, dim]` at `positions` `[batch, seq]` to the first hidden
    /// states, by θ of the `Tokens` site.
    fn place_tokens(
        &self,
        theta: &Tensors,
        x: &Tensor,
        positions: &Tensor,
        pass: Pass,
    ) -> Result<Tensor>;

    /// How queries and keys turn at `positions`.
    fn rotation(&self, _positions: &Tensor) -> Result<Option<Rotation>> {
        Ok(None)
    }

    /// The settings of its mixtures, where it has them.
    fn mixture(&self) -> Option<&MixtureConfig> {
        None
    }

    /// The layer `n` on x `[batch, seq, dim]`.
    fn layer(&self, n: usize, x: &Tensor, seen: &Seen, pass: Pass) -> Result<Tensor>;

    /// The normalisation of the last hidden states.
    fn normalise(&self, x: &Tensor, pass: Pass) -> Result<Tensor>;

    /// θ at a site.
    fn theta(&self, site: &Site) -> Result<Tensors> {
        self.decoder().theta(site)
    }

    /// Which tokens see which, given the context that the rows are of.
    fn seen(&self, mask: &Tensor, positions: &Tensor, cx: &Context) -> Result<Seen> {
        let past = cx.cache().map(Cache::mask).transpose()?.flatten();
        let all = match past {
            Some(past) => Tensor::cat(&[past, mask.clone()], 1)?,
            None => mask.clone(),
        };
        Ok(Seen {
            mask: mask.clone(),
            positions: positions.clone(),
            hidden_keys: causal(&all, mask.len_of(1))?,
            rotation: self.rotation(positions)?,
            router_logits: RouterLogits::default(),
        })
    }
}

/// Makes a decoder a backbone.
macro_rules! backbone {
    ($type:ident) => {
        impl Backbone for $type {
            fn sites(&self) -> &[Site] {
                &self.decoder.sites
            }

            fn params(&self) -> &modl_core::ParamStore {
                &self.decoder.params
            }

            fn theta(&self, site: &Site) -> Result<Tensors> {
                Architecture::theta(self, site)
            }

            fn config(&self) -> &Value {
                &self.decoder.config
            }

            fn canonical(&self, path: &str) -> String {
                self.decoder.naming.canonical(path)
            }

            fn causal(&self, _: &Site) -> bool {
                true
            }

            fn own_losses(&self) -> Vec<modl_core::OwnLoss> {
                let wanted = Architecture::mixture(self).filter(|m| m.router_logits);
                let loss = |weight| modl_core::OwnLoss {
                    name: "aux_loss".into(),
                    outputs: vec!["aux_loss".into()],
                    weight,
                };
                wanted.and_then(|m| m.loss_weight).map(loss).into_iter().collect()
            }

            fn segments(&self) -> Option<Box<dyn modl_core::Segments + '_>> {
                Some(Box::new($crate::decoder::DecoderPass(self)))
            }

            fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
                $crate::decoder::DecoderPass(self).forward(inputs, layers, cx)
            }
        }
    };
}

pub(crate) use backbone;

/// The parts of a decoder.
#[derive(Debug)]
pub(crate) struct Decoder {
    pub(crate) config: Value,
    pub(crate) params: ParamStore,
    pub(crate) sites: Vec<Site>,
    pub(crate) naming: Naming,
    pub(crate) words: Place,
    pub(crate) tokens: Place,
    pub(crate) blocks: Vec<Place>,
    pub(crate) head: Option<Place>,
    /// Whether the output layer computes with the table of words.
    pub(crate) tied: bool,
}

impl Decoder {
    /// θ at a site.
    pub(crate) fn theta(&self, site: &Site) -> Result<Tensors> {
        if self.tied && site.path == HEAD {
            return Ok(theta(&self.params, &self.words.site.path));
        }
        theta_of(&self.sites, &self.params, site)
    }

    /// The kind in which it computes.
    pub(crate) fn kind(&self) -> Kind {
        self.words.theta.get("weight").map_or(Kind::Float, Tensor::kind)
    }

    /// Checks the inputs: ids, mask, positions.
    fn read(&self, inputs: &Tensors, past: i64) -> Result<(Tensor, Tensor, Tensor)> {
        let device = self.words.theta.need("weight")?.device();
        let ids = inputs.need("input_ids")?.to_device(device)?;
        check_shape("input_ids", &ids)?;
        in_range("input_ids", &ids, self.words.site.input)?;
        let mask = read_mask(inputs.get("attention_mask"), &ids, self.kind())?;
        let positions = match inputs.get("position_ids") {
            None => Tensor::arange(ids.len_of(1), device)?.shift(past)?.expand(&ids.size())?,
            Some(given) => {
                check_shape("position_ids", given)?;
                in_range("position_ids", given, i64::MAX)?;
                if given.size() != ids.size() {
                    let problem = format!("{given:?} for input_ids {ids:?}");
                    return Err(Error::invalid("position_ids", problem));
                }
                given.to_device(device)?
            }
        };
        Ok((ids, mask, positions))
    }
}

/// Attention at a site: query `[batch, heads, seq, d]` over all keys and values that have been seen,
/// of which those of this pass are `[batch, groups, seq, d]` → `[batch, seq, heads · d]`.
pub(crate) fn attention(
    place: &Place,
    [query, key, value]: [Tensor; 3],
    seen: &Seen,
    scale: f64,
    drop: Drop,
    pass: Pass,
) -> Result<Tensor> {
    let path = &place.site.path;
    let (key, value) = match pass.cx.cache() {
        Some(cache) => cache.extend(path, &key, &value)?,
        None => (key, value),
    };
    let mask = Some(&seen.hidden_keys);
    let context = place.attend([query, key, value], mask, scale, drop, pass)?;
    let size = context.size();
    let &[batch, heads, seq, width] = size.as_slice() else {
        return Err(Error::invalid(path, format!("modules made {size:?} of attention")));
    };
    context.transpose(1, 2)?.reshape(&[batch, seq, heads * width])
}

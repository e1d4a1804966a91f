//! A block of T5: self-attention, in the decoder cross-attention, and a feed-forward network, each
//! of a normalised copy of the residual stream and added to it.

use modl_core::{Activation, Error, HostFn, Result, ResultExt, Signal, SiteKind, Tensor, Tensors};

use super::T5Config;
use super::switch::Switch;
use super::view::View;
use crate::attention::attend;
use crate::dropout::{Drop, dropout};
use crate::place::{Pass, Place, Surveyor};

/// What happens after a sub-layer's network: its dropout (the site ends here) and the residual
/// connection.
#[derive(Debug)]
struct Sublayer {
    norm: Place,
    place: Place,
    eps: f64,
    /// Where its dropout draws from.
    draw: String,
    dropout: f64,
}

impl Sublayer {
    /// The normalised stream.
    fn normed(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        self.norm.rms_norm(x, self.eps, pass)
    }

    /// residual + dropout(f(x)).
    fn add(
        &self,
        residual: &Tensor,
        x: Tensor,
        pass: Pass,
        f: impl Fn(&Tensor, Pass) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.place.sublayer(&x, residual, pass, |x, pass| {
            dropout(f(x, pass)?, pass.dropout(&self.draw, self.dropout))
        })
    }
}

/// Attention, of the stream itself or over the encoder's.
#[derive(Debug)]
struct Attention {
    query: Place,
    key: Place,
    value: Place,
    place: Place,
    sublayer: Sublayer,
    out: Place,
    draw: String,
    heads: i64,
    dropout: f64,
}

impl Attention {
    fn new(to: &mut Surveyor, layer: &str, name: &str, settings: &T5Config) -> Self {
        let (width, inner) = (settings.d_model, settings.heads_width());
        let path = format!("{layer}.{name}");
        let norm = norm(to, layer, settings);
        let mut projection =
            |name| to.place(&format!("{path}.{name}"), SiteKind::Linear, width, inner);
        Attention {
            query: projection("q"),
            key: projection("k"),
            value: projection("v"),
            place: to.place(&path, SiteKind::Attention, inner, inner),
            sublayer: sublayer(to, layer, norm, inner, settings),
            out: to.place(&format!("{path}.o"), SiteKind::Linear, inner, width),
            draw: format!("{path}.dropout"),
            heads: settings.num_heads,
            dropout: settings.dropout_rate,
        }
    }

    /// x `[batch, seq, d_model]` over itself, normalised, or `across` the encoder's states.
    fn forward(&self, x: &Tensor, view: &View, across: bool, pass: Pass) -> Result<Tensor> {
        let normed = self.sublayer.normed(x, pass)?;
        let over = if across { view.with.need("encoder_hidden_states")? } else { &normed };
        let split = |place: &Place, x: &Tensor| {
            let y = place.linear(x, pass)?;
            let shape = [y.len_of(0), y.len_of(1), self.heads, y.len_of(2) / self.heads];
            y.reshape(&shape)?.transpose(1, 2).at(&place.site.path)
        };
        let (query, key) = (split(&self.query, &normed)?, split(&self.key, over)?);
        let value = split(&self.value, over)?;
        let drop = pass.dropout(&self.draw, self.dropout);
        let qkv = [query, key, value];
        let context = match across {
            true => self.place.attend(qkv, view.across.as_ref(), 1.0, drop, pass),
            false => self.attend(qkv, view, drop, pass),
        }?;
        let shape = [x.len_of(0), x.len_of(1), self.out.site.input];
        let context = context.transpose(1, 2)?.reshape(&shape).at(&self.place.site.path)?;
        self.sublayer.add(x, context, pass, |c, pass| self.out.linear(c, pass))
    }

    /// Attention of the stream itself. Keys that a module puts before its own stand right before
    /// the first token, as far as relative positions go.
    fn attend(&self, qkv: [Tensor; 3], view: &View, drop: Drop, pass: Pass) -> Result<Tensor> {
        if !self.place.modular(pass) {
            return self.place.attend(qkv, Some(&view.own), 1.0, drop, pass);
        }
        let [query, key, value] = qkv;
        let (rows, own) = (query.len_of(0), key.len_of(2));
        let host: &HostFn = &|_, s, _| {
            let (key, value) = (s.with.need("key")?, s.with.need("value")?);
            let mut mask = s.with.need("mask")?.clone();
            let front = key.len_of(2) - own;
            if front > 0 {
                let near = view.bias.before(s.with.need("positions")?, front)?;
                mask = mask.add(&near.pad(&[0, own])?)?;
            }
            attend(&s.x, key, value, Some(&mask), 1.0, drop).map(Signal::from)
        };
        let with = Tensors::new()
            .with("key", key)
            .with("value", value)
            .with("mask", view.own.expand(&[rows, -1, -1, -1])?)
            .with("positions", view.with.need("positions")?.expand(&[rows, -1])?);
        Ok(self.place.run(&Signal { x: query, with }, pass, host)?.x)
    }
}

/// The feed-forward sub-layer.
#[derive(Debug)]
struct FeedForward {
    sublayer: Sublayer,
    network: Network,
    draw: String,
}

#[derive(Debug)]
enum Network {
    Dense(Dense),
    Switch(Switch),
}

/// σ(x Wᵢ) Wₒ, or (σ(x W₀) ⊙ x W₁) Wₒ where it is gated.
#[derive(Debug)]
struct Dense {
    into: Place,
    gated: Option<Place>,
    out: Place,
    activation: Activation,
}

impl FeedForward {
    /// That of block `n` of the encoder, or of the decoder where it is `causal`.
    fn new(
        to: &mut Surveyor,
        layer: &str,
        (causal, n): (bool, usize),
        settings: &T5Config,
    ) -> Result<Self> {
        let (width, inner) = (settings.d_model, settings.d_ff);
        let (activation, gated) = settings.feed_forward()?;
        let path = format!("{layer}.{}", settings.network());
        let norm = norm(to, layer, settings);
        let sublayer = sublayer(to, layer, norm, width, settings);
        let draw = format!("{path}.dropout");
        if let Some(switch) = settings.switch.as_ref().filter(|s| s.has(causal, n)) {
            let network = Switch::new(to, &path, [width, inner], switch, activation, n);
            return Ok(FeedForward { sublayer, network: Network::Switch(network), draw });
        }
        let mut linear = |name: &str, input, output| {
            to.place(&format!("{path}.{name}"), SiteKind::Linear, input, output)
        };
        let network = Network::Dense(Dense {
            into: linear(if gated { "wi_0" } else { "wi" }, width, inner),
            gated: gated.then(|| linear("wi_1", width, inner)),
            out: linear("wo", inner, width),
            activation,
        });
        Ok(FeedForward { sublayer, network, draw })
    }

    fn forward(&self, x: &Tensor, view: &View, pass: Pass) -> Result<Tensor> {
        let normed = self.sublayer.normed(x, pass)?;
        self.sublayer.add(x, normed, pass, |x, pass| {
            let drop = pass.dropout(&self.draw, self.sublayer.dropout);
            match &self.network {
                Network::Dense(network) => network.forward(x, drop, pass),
                Network::Switch(network) => network.forward(x, drop, &view.router_logits, pass),
            }
        })
    }
}

impl Dense {
    fn forward(&self, x: &Tensor, drop: Drop, pass: Pass) -> Result<Tensor> {
        let mut inner = self.into.linear_then(x, pass, self.activation)?;
        if let Some(gated) = &self.gated {
            inner = inner.mul(&gated.linear(x, pass)?)?;
        }
        self.out.linear(&dropout(inner, drop)?, pass)
    }
}

fn norm(to: &mut Surveyor, layer: &str, settings: &T5Config) -> Place {
    let width = settings.d_model;
    to.place(&format!("{layer}.layer_norm"), SiteKind::Norm, width, width)
}

fn sublayer(
    to: &mut Surveyor,
    layer: &str,
    norm: Place,
    input: i64,
    settings: &T5Config,
) -> Sublayer {
    Sublayer {
        norm,
        place: to.place(layer, SiteKind::Sublayer, input, settings.d_model),
        eps: settings.layer_norm_epsilon,
        draw: format!("{layer}.dropout"),
        dropout: settings.dropout_rate,
    }
}

/// A block with all its sites.
#[derive(Debug)]
pub(super) struct Block {
    place: Place,
    own: Attention,
    across: Option<Attention>,
    feed_forward: FeedForward,
}

impl Block {
    /// Block `n` of `stack`, which is the decoder where it is `causal`.
    pub(super) fn new(
        to: &mut Surveyor,
        stack: &str,
        (causal, n): (bool, usize),
        settings: &T5Config,
    ) -> Result<Self> {
        let path = &format!("{stack}.block.{n}");
        let layer = |k: usize| format!("{path}.layer.{k}");
        Ok(Block {
            place: to.place(path, SiteKind::Block, settings.d_model, settings.d_model),
            own: Attention::new(to, &layer(0), "SelfAttention", settings),
            across: causal.then(|| Attention::new(to, &layer(1), "EncDecAttention", settings)),
            feed_forward: {
                let layer = layer(1 + usize::from(causal));
                FeedForward::new(to, &layer, (causal, n), settings)?
            },
        })
    }

    /// x `[batch, seq, d_model]`, of the same shape.
    pub(super) fn forward(&self, x: &Tensor, view: &View, pass: Pass) -> Result<Tensor> {
        if !self.place.modular(pass) {
            return self.inner(x, view, pass);
        }
        // Modules may send some of the rows only, so that the view is that of the signal.
        let host: &HostFn = &|_, s, cx| {
            let router_logits = view.router_logits.clone();
            let view = View { router_logits, ..View::new(view.bias, s.with.clone())? };
            Ok(s.replace(self.inner(&s.x, &view, pass.of(cx))?))
        };
        let with = view.companions()?;
        Ok(self.place.run(&Signal { x: x.clone(), with }, pass, host)?.x)
    }

    fn inner(&self, x: &Tensor, view: &View, pass: Pass) -> Result<Tensor> {
        if x.dim() != 3 {
            let problem =
                format!("hidden states of shape {:?}, not [batch, seq, hidden]", x.size());
            return Err(Error::invalid(&self.place.site.path, problem));
        }
        let mut x = self.own.forward(x, view, false, pass)?;
        if let Some(across) = &self.across {
            x = across.forward(&x, view, true, pass)?;
        }
        self.feed_forward.forward(&x, view, pass)
    }
}

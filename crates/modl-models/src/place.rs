//! A site with its parameters, and how a backbone runs it.
//!
//! Where no module stands, a call here is the operation itself: nothing is allocated for modules
//! that are not there.

use modl_core::{
    Activation, Context, Error, HostFn, Kind, Layers, ParamStore, Result, ResultExt, Signal, Site,
    SiteKind, Tensor, Tensors,
};

use crate::dropout::Drop;
use crate::moe::{CHOICE_BIAS, DOWN, GATE_UP, WI, WO};

/// A site and θ there.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) site: Site,
    pub(crate) theta: Tensors,
}

/// The parameters that a site at `path` may have below it.
const SHORT: [&str; 9] =
    ["weight", "bias", GATE_UP, DOWN, WI, WO, CHOICE_BIAS, "running_mean", "running_var"];

/// The parameters of the site at `path`: `PATH.weight`, `PATH.bias`.
pub(crate) fn theta(params: &ParamStore, path: &str) -> Tensors {
    let named = |short: &'static str| Some((short, params.find(&format!("{path}.{short}"))?));
    let all = SHORT.into_iter().filter_map(named);
    all.map(|(short, t)| (short, t.clone())).collect()
}

/// θ with the weight's dimensions exchanged, as a view.
pub(crate) fn transposed(theta: &Tensors) -> Result<Tensors> {
    theta.map(|name, t| if name == "weight" { t.t() } else { Ok(t.clone()) })
}

/// Makes places one after the other and remembers their sites in that order.
#[derive(Debug)]
pub(crate) struct Surveyor<'a> {
    pub(crate) params: &'a ParamStore,
    pub(crate) sites: Vec<Site>,
}

impl Surveyor<'_> {
    /// The next place.
    pub(crate) fn place(&mut self, path: &str, kind: SiteKind, input: i64, output: i64) -> Place {
        let site = Site { path: path.to_owned(), kind, input, output, index: self.sites.len() };
        self.sites.push(site.clone());
        Place { theta: theta(self.params, path), site }
    }
}

/// What a forward pass carries through the network.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) layers: &'a Layers,
    pub(crate) cx: &'a Context,
}

impl<'a> Pass<'a> {
    /// The same pass over the rows that `cx` is of.
    pub(crate) fn of<'b>(&self, cx: &'b Context) -> Pass<'b>
    where
        'a: 'b,
    {
        Pass { layers: self.layers, cx }
    }

    /// Dropout with probability `p` in training, drawn for the place that is called `draw`.
    pub(crate) fn dropout(&self, draw: &str, p: f64) -> Drop {
        (self.cx.train && p > 0.0).then(|| (p, self.cx.draw(draw)))
    }
}

impl Place {
    /// Whether modules stand here.
    pub(crate) fn modular(&self, pass: Pass) -> bool {
        pass.layers.at(&self.site).is_some()
    }

    /// Runs f through the modules that stand here.
    pub(crate) fn run(&self, x: &Signal, pass: Pass, f: &HostFn) -> Result<Signal> {
        pass.layers.run(&self.site, &self.theta, x, pass.cx, f)
    }

    /// Runs `f` on one tensor without companions.
    fn simple(
        &self,
        x: &Tensor,
        pass: Pass,
        f: impl Fn(&Tensors, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.simple_on(&self.theta, x, pass, f)
    }

    /// [`Place::simple`] with θ as given.
    fn simple_on(
        &self,
        theta: &Tensors,
        x: &Tensor,
        pass: Pass,
        f: impl Fn(&Tensors, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if !self.modular(pass) {
            return f(theta, x).at(&self.site.path);
        }
        let host: &HostFn = &|theta, x, _| Ok(x.replace(f(theta, &x.x)?));
        Ok(pass.layers.run(&self.site, theta, &Signal::from(x.clone()), pass.cx, host)?.x)
    }

    /// f at a sub-layer site and its residual connection: residual + f(x).
    pub(crate) fn sublayer(
        &self,
        x: &Tensor,
        residual: &Tensor,
        pass: Pass,
        f: impl Fn(&Tensor, Pass) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let y = if self.modular(pass) {
            let host: &HostFn = &|_, s, cx| Ok(s.replace(f(&s.x, pass.of(cx))?));
            let with = Tensors::new().with("residual", residual.clone());
            self.run(&Signal { x: x.clone(), with }, pass, host)?.x
        } else {
            f(x, pass)?
        };
        residual.add(&y).at(&self.site.path)
    }

    /// x Wᵀ + b.
    pub(crate) fn linear(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        self.linear_with(&self.theta, x, pass)
    }

    /// σ(x Wᵀ + b), in one pass where no module stands between the two and σ allows it.
    pub(crate) fn linear_then(&self, x: &Tensor, pass: Pass, act: Activation) -> Result<Tensor> {
        if act != Activation::Relu || self.modular(pass) {
            return act.apply(&self.linear(x, pass)?);
        }
        let y = x.linear_relu(self.theta.need("weight")?, self.theta.get("bias"));
        y.at(&self.site.path)
    }

    /// [`Place::linear`] with θ as given.
    pub(crate) fn linear_with(&self, theta: &Tensors, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let f = |theta: &Tensors, x: &Tensor| x.linear(theta.need("weight")?, theta.get("bias"));
        self.simple_on(theta, x, pass, f)
    }

    /// x Wᵀ + b in f32 at least.
    pub(crate) fn wide_linear(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let wide = |t: &Tensor| match t.kind() {
            Kind::Half | Kind::BFloat16 => t.to_kind(Kind::Float),
            _ => Ok(t.clone()),
        };
        self.simple(&wide(x)?, pass, |theta, x| {
            let bias = theta.get("bias").map(wide).transpose()?;
            x.linear(&wide(theta.need("weight")?)?, bias.as_ref())
        })
    }

    /// x W + b for a weight that is stored `[in, out]`, as GPT-2 has it. Modules see it `[out, in]`.
    pub(crate) fn conv1d(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        // Not kept: a view does not notice when its parameter is to be trained.
        let theta = transposed(&self.theta).at(&self.site.path)?;
        self.linear_with(&theta, x, pass)
    }

    /// The convolution of images `[batch, in, height, width]` whose kernels stand side by side.
    pub(crate) fn patches(&self, x: &Tensor, side: i64, pass: Pass) -> Result<Tensor> {
        self.simple(x, pass, |theta, x| {
            x.conv2d(theta.need("weight")?, theta.get("bias"), &[side, side], &[0, 0], 1)
        })
    }

    /// A convolution padded with zeros as TensorFlow's `same`: to ⌈side ⁄ stride⌉ positions, the odd
    /// one of the padding at the end.
    pub(crate) fn same_conv(
        &self,
        x: &Tensor,
        stride: i64,
        groups: i64,
        pass: Pass,
    ) -> Result<Tensor> {
        self.simple(x, pass, |theta, x| {
            let weight = theta.need("weight")?;
            let padding = |dim: i64| {
                let (side, kernel) = (x.len_of(dim), weight.len_of(dim));
                let all = ((side + stride - 1) / stride - 1) * stride + kernel - side;
                (all.max(0) / 2, all.max(0) - all.max(0) / 2)
            };
            let ((top, bottom), (left, right)) = (padding(2), padding(3));
            let (x, around) = if top == bottom && left == right {
                (x.clone(), [top, left])
            } else {
                (x.pad(&[left, right, top, bottom])?, [0, 0])
            };
            x.conv2d(weight, theta.get("bias"), &[stride, stride], &around, groups)
        })
    }

    /// Batch normalisation by the stored averages.
    pub(crate) fn batch_norm(&self, x: &Tensor, eps: f64, pass: Pass) -> Result<Tensor> {
        self.simple(x, pass, |theta, x| {
            let all = ["weight", "bias", "running_mean", "running_var"];
            let [weight, bias, mean, var] = all.map(|name| theta.need(name));
            Tensor::op("batch_norm", &[x, weight?, bias?, mean?, var?], |t| {
                t[0].f_batch_norm(
                    Some(t[1]),
                    Some(t[2]),
                    Some(t[3]),
                    Some(t[4]),
                    false,
                    0.0,
                    eps,
                    true,
                )
            })
        })
    }

    /// Rows of the table by ids.
    pub(crate) fn embedding(&self, ids: &Tensor, pass: Pass) -> Result<Tensor> {
        self.simple(ids, pass, |theta, ids| theta.need("weight")?.embedding(ids))
    }

    /// Normalisation by the root of the mean square over the last dimension.
    pub(crate) fn rms_norm(&self, x: &Tensor, eps: f64, pass: Pass) -> Result<Tensor> {
        self.simple(x, pass, |theta, x| x.rms_norm(theta.need("weight")?, eps))
    }

    /// The layer's normalisation over the last dimension.
    pub(crate) fn layer_norm(&self, x: &Tensor, eps: f64, pass: Pass) -> Result<Tensor> {
        self.simple(x, pass, |theta, x| {
            x.layer_norm(theta.need("weight")?, theta.need("bias")?, eps)
        })
    }
}

/// θ at `site`, which has to be one of `sites`.
pub(crate) fn theta_of(sites: &[Site], params: &ParamStore, site: &Site) -> Result<Tensors> {
    if sites.get(site.index).is_some_and(|s| s.path == site.path) {
        return Ok(theta(params, &site.path));
    }
    Err(Error::unknown("site", &site.path, sites.iter().map(|s| s.path.as_str())))
}

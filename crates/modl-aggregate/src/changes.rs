//! What each active module changes at a site, side by side, and weights over them.

use modl_core::{Error, Kind, Outputs, Result, Signal, Site, SiteKind, Tensor, Weights};

/// Far below any score, and still a number.
const OUT: f64 = -1e30;

/// f_θ(x) and what the active modules change, zⱼ = hⱼ − f_θ(x).
pub(crate) struct Changes {
    /// y = f_θ(x).
    pub(crate) base: Signal,
    /// y in the kind of scores, `[…, dim]`.
    pub(crate) y: Tensor,
    /// zⱼ in the kind of scores, `[…, k, dim]`; `None` where no module is active.
    pub(crate) z: Option<Tensor>,
    /// α of the k active modules, to be multiplied with scores `[…, k]`.
    pub(crate) alpha: Tensor,
}

/// # Errors
/// Where what a site gives is not one vector of its width for each token.
pub(crate) fn check_site(kind: &str, site: &Site) -> Result<()> {
    use SiteKind::{Attention, BatchNorm, Conv, ConvBlock};
    match site.kind {
        Attention | BatchNorm | Conv | ConvBlock => Err(Error::unsupported(
            format!("`{kind}` at a site of kind {:?}", site.kind),
            "attach the modules to sites that give a vector for each token",
        )),
        _ => Ok(()),
    }
}

/// The kind in which scores are computed: f32, or f64 where the model is in f64.
pub(crate) fn score_kind(of: Kind) -> Kind {
    if of == Kind::Double { Kind::Double } else { Kind::Float }
}

impl Changes {
    pub(crate) fn of(kind: &str, h: &Outputs) -> Result<Changes> {
        if let Weights::Slots { .. } = &h.active().routing().weights {
            return Err(Error::unsupported(
                format!("`{kind}` of modules that see mixtures of tokens"),
                "choose the aggregator `weighted_sum`",
            ));
        }
        let (f, x, cx) = (h.host(), h.input(), h.context());
        let (base, all) = f.sharing(x, || {
            let base = f.call(x, cx)?;
            let mut all = Vec::with_capacity(h.active().len());
            for (_, name, module) in h.active().modules() {
                let z = match module.delta(f, x, cx)? {
                    Some(z) => z,
                    None => {
                        let own = module.forward(f, x, cx)?.x;
                        if own.size() != base.x.size() {
                            return Err(Error::unsupported(
                                format!("`{kind}` of module `{name}`, which makes {:?} of {:?}", own.size(), base.x.size()),
                                "attention over modules wants outputs of one length; prompts are combined by `attempt`",
                            ));
                        }
                        own.sub(&base.x)?
                    }
                };
                all.push(z.to_kind(score_kind(z.kind()))?);
            }
            Ok((base, all))
        })?;
        let y = base.x.to_kind(score_kind(base.x.kind()))?;
        let z = side_by_side(&all)?;
        let alpha = prior(kind, h, &y)?;
        Ok(Changes { base, y, z, alpha })
    }

    /// What each of `outputs` changes of `base`, all with the same weight.
    pub(crate) fn between(base: Signal, outputs: &[Signal]) -> Result<Changes> {
        let y = base.x.to_kind(score_kind(base.x.kind()))?;
        let own = |o: &Signal| o.x.to_kind(y.kind())?.sub(&y);
        let z = side_by_side(&outputs.iter().map(own).collect::<Result<Vec<_>>>()?)?;
        let alpha = Tensor::ones(&[outputs.len() as i64], y.kind(), y.device())?;
        Ok(Changes { base, y, z, alpha })
    }

    /// Weights `[…, k]` or `[k]` for all, one row of them for each token of z.
    pub(crate) fn to_all(&self, p: &Tensor) -> Result<Tensor> {
        let mut shape = self.y.size();
        if let Some(last) = shape.last_mut() {
            *last = p.len_of(-1);
        }
        p.expand(&shape)
    }

    /// y in the kind of the base function's output.
    pub(crate) fn give(&self, y: &Tensor) -> Result<Signal> {
        Ok(self.base.replace(y.to_kind(self.base.x.kind())?))
    }
}

fn side_by_side(all: &[Tensor]) -> Result<Option<Tensor>> {
    if all.is_empty() { Ok(None) } else { Tensor::stack(all, -2).map(Some) }
}

/// α of the active modules in a shape that is multiplied with scores of `y` `[…, dim]`.
fn prior(kind: &str, h: &Outputs, y: &Tensor) -> Result<Tensor> {
    let routing = h.active().routing();
    let support: Vec<i64> = h.active().modules().map(|(j, ..)| j as i64).collect();
    let index = Tensor::from_slice(&support, &[support.len() as i64], y.device())?;
    let mut alpha = routing.dense(y.kind(), y.device())?.index_select(-1, &index)?;
    alpha.check_finite("weights")?;
    if !support.is_empty() && alpha.detach()?.neg()?.largest()?.item()? > 0.0 {
        let problem = "are below 0, where they are the prior of an attention over modules";
        return Err(Error::invalid(format!("{kind}: the router's weights"), problem));
    }
    if alpha.dim() == 3 && (y.dim() != 3 || y.len_of(1) != alpha.len_of(1)) {
        return Err(Error::unsupported(
            format!("an α for each of {} tokens where f gives {:?}", alpha.len_of(1), y.size()),
            "route per example, or leave this site out of the targets",
        ));
    }
    if alpha.dim() >= 2 {
        while alpha.dim() < y.dim() {
            alpha = alpha.unsqueeze(1)?;
        }
    }
    Ok(alpha)
}

/// p ∝ α exp(s) along the last dimension; 0 where no α is above 0.
pub(crate) fn attend(scores: &Tensor, alpha: &Tensor) -> Result<Tensor> {
    scores.check_finite("scores")?;
    let out = alpha.eq_scalar(0.0)?;
    let s = scores.masked_fill(&out, OUT)?;
    let top = s.detach()?.max_dim(-1)?.0.unsqueeze(-1)?;
    let w = s.sub(&top)?.exp()?.mul(alpha)?;
    let total = w.sum_dims(&[-1], true)?;
    let nobody = total.detach()?.eq_scalar(0.0)?.to_kind(total.kind())?;
    w.div(&total.add(&nobody)?)
}

/// Σⱼ pⱼ zⱼ of p `[…, k]` and z `[…, k, dim]`, `[…, dim]`.
pub(crate) fn blend(p: &Tensor, z: &Tensor) -> Result<Tensor> {
    p.unsqueeze(-2)?.matmul(z)?.squeeze(-2)
}

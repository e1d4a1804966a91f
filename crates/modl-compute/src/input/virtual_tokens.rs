//! Vectors before the first token: what all prompts have in common.

use modl_core::{Context, Error, Host, Result, Signal, Site, SiteKind, Tensor};

/// # Errors
/// Where the site is not the one of the embeddings, or there are no virtual tokens.
pub(super) fn check(method: &str, site: &Site, count: i64) -> Result<()> {
    if site.kind != SiteKind::Tokens {
        return Err(Error::unsupported(
            format!("{method} at a site of kind {:?}", site.kind),
            "attach it to the site of the embeddings, `all-tokens`",
        ));
    }
    if count < 1 {
        let problem = format!("is {count}, wants at least 1");
        return Err(Error::invalid(format!("{method}.num_virtual_tokens"), problem));
    }
    Ok(())
}

/// f_θ(\[P; x\]): `prompt` `[p, dim]`, or `[batch, p, dim]` where each row has its own, before each
/// row, seen by all, at the first positions.
pub(super) fn prepend(prompt: &Tensor, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
    if cx.past() > 0 {
        return f.call(x, cx); // The tokens seen before have it in front of them.
    }
    let (kind, p) = (x.x.kind(), prompt.len_of(-2));
    let prompt = prompt.to_kind(kind)?.expand(&[x.rows(), -1, -1])?;
    let mask = x.with.need("mask")?;
    let seen = Tensor::ones(&[x.rows(), p], mask.kind(), mask.device())?;
    let positions = x.with.need("positions")?;
    let count = Tensor::arange(p, positions.device())?.unsqueeze(0)?;
    let first = positions.narrow(1, 0, 1)?.add(&count)?;
    let mut with = x.with.clone();
    with.set("mask", Tensor::cat(&[seen, mask.clone()], 1)?);
    with.set("positions", Tensor::cat(&[first, positions.shift(p)?], 1)?);
    f.call(&Signal { x: Tensor::cat(&[prompt, x.x.clone()], 1)?, with }, cx)
}

/// \[P; f_θ(x)\]: `prompt` `[p, dim]`, or `[batch, p, dim]`, before what the embeddings give for each
/// row, seen by all.
pub(super) fn prepend_after(prompt: &Tensor, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
    let h = f.call(x, cx)?;
    if cx.past() > 0 {
        return Ok(h);
    }
    let own = prompt.to_kind(h.x.kind())?.expand(&[h.rows(), -1, -1])?;
    let mask = h.with.need("mask")?;
    let seen = Tensor::ones(&[h.rows(), prompt.len_of(-2)], mask.kind(), mask.device())?;
    let with = h.with.clone().with("mask", Tensor::cat(&[seen, mask.clone()], 1)?);
    Ok(Signal { x: Tensor::cat(&[own, h.x], 1)?, with })
}

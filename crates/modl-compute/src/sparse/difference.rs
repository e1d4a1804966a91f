//! A difference of weights as a sparse one: the K largest changes of all sites together, as LT-SFT
//! keeps them, and what that loses.

use std::collections::BTreeSet;

use modl_core::{
    Backbone, Error, Kind, Modular, Result, ResultExt, Select, Site, SiteKind, Targets, Tensor,
    Tensors, no_grad,
};

use super::LtSft;
use super::masked::{DELTA, MASK};
use super::top_k::{check_share, share, top_k_across};

/// A sparse difference that has been attached.
#[derive(Debug, Clone)]
pub struct Difference {
    /// The sites whose parameters have changed, with how many numbers are kept of how many.
    pub sites: Vec<(String, usize, usize)>,
    /// ‖θ' − θ‖ over these sites.
    pub norm: f64,
    /// What is lost of it: ‖(1 − m) ⊙ (θ' − θ)‖ ⁄ ‖θ' − θ‖.
    pub lost: f64,
    /// Parameters of no site that have changed, with the norm of their change.
    pub left_out: Vec<(String, f64)>,
}

/// Attaches what fine-tuning has changed as an [`LtSft`] called `name`, with the share `density` of
/// all numbers of the sites that have changed.
///
/// # Errors
/// Where the two models are not of one architecture, nothing has changed, or the change is not
/// finite.
pub fn attach_difference(
    model: &mut Modular,
    tuned: &dyn Backbone,
    name: &str,
    density: f64,
) -> Result<Difference> {
    check_share("density", density)?;
    let base = model.backbone();
    let (mut changes, mut seen, mut left_out) = (Vec::new(), BTreeSet::new(), Vec::new());
    let stacks: Vec<&Site> = base.sites().iter().filter(|s| s.kind == SiteKind::Experts).collect();
    // The matrix of one expert is a part of a stack, and would be counted twice.
    for site in base.sites().iter().filter(|s| !stacks.iter().any(|stack| s.is_within(stack))) {
        let (old, new) = (base.theta(site)?, tuned.theta(site).at("the fine-tuned model")?);
        seen.extend(old.names().map(|short| format!("{}.{short}", site.path)));
        if let Some(change) = changed(&old, &new).at(&site.path)? {
            changes.push((site.clone(), change));
        }
    }
    for (full, p) in base.params().iter().filter(|(n, _)| !seen.contains(*n)) {
        let new = tuned.params().get(full).at("the fine-tuned model")?;
        if !p.tensor().bit_equal(new)? {
            left_out.push((full.to_owned(), norm(&minus(new, p.tensor())?)?));
        }
    }
    attach(model, name, density, &changes, left_out)
}

/// θ' − θ of the parameters that are learned, if any of them has changed.
fn changed(old: &Tensors, new: &Tensors) -> Result<Option<Tensors>> {
    let (mut any, mut all) = (false, Tensors::new());
    for (name, t) in old.iter().filter(|(n, _)| !n.starts_with("running_")) {
        let other = new.need(name)?;
        any |= !t.bit_equal(other)?;
        all.set(name.to_owned(), minus(other, t)?);
    }
    Ok(any.then_some(all))
}

fn minus(new: &Tensor, old: &Tensor) -> Result<Tensor> {
    let single = |t: &Tensor| t.detach()?.to_kind(Kind::Float);
    single(new)?.sub(&single(old)?)
}

fn norm(t: &Tensor) -> Result<f64> {
    Ok(t.to_kind(Kind::Double)?.square()?.sum()?.item()?.sqrt())
}

fn attach(
    model: &mut Modular,
    name: &str,
    density: f64,
    changes: &[(Site, Tensors)],
    left_out: Vec<(String, f64)>,
) -> Result<Difference> {
    if changes.is_empty() {
        return Err(Error::invalid("difference", "no parameter of a site has changed"));
    }
    let full = |site: &Site, part: &str, short: &str| format!("{}.{part}.{short}", site.path);
    let each = || changes.iter().flat_map(|(s, own)| own.iter().map(move |(n, t)| (s, n, t)));
    let scores: Tensors =
        each().map(|(s, n, t)| Ok((full(s, MASK, n), t.abs()?))).collect::<Result<_>>()?;
    let numbers = scores.iter().map(|(_, t)| t.numel()).sum();
    let masks = top_k_across(&scores, share(density, numbers))?;
    let (mut values, mut whole, mut rest) = (masks.clone(), 0.0, 0.0);
    for (site, short, t) in each() {
        let kept = t.mul(masks.need(&full(site, MASK, short))?)?;
        whole += norm(t)?.powi(2);
        rest += norm(&t.sub(&kept)?)?.powi(2);
        values.set(full(site, DELTA, short), kept);
    }
    let mut sites = Vec::new();
    for (site, own) in changes {
        let mut kept = 0;
        for (short, _) in own.iter() {
            let mask = masks.need(&full(site, MASK, short))?;
            kept += mask.to_kind(Kind::Int64)?.sum()?.item()? as usize;
        }
        sites.push((site.path.clone(), kept, own.iter().map(|(_, t)| t.numel()).sum()));
    }
    let paths: Vec<String> = changes.iter().map(|(s, _)| regex::escape(&s.path)).collect();
    let (config, targets) =
        (LtSft { density, ..LtSft::default() }, Targets::pattern(paths.join("|")));
    let params = model.parameters_of(&config, &targets)?;
    no_grad(|| params.load("difference", values.iter(), &Select::all()))?;
    model.attach_with(name, Box::new(config), &targets, &params)?;
    let lost = if whole > 0.0 { (rest / whole).sqrt() } else { 0.0 };
    Ok(Difference { sites, norm: whole.sqrt(), lost, left_out })
}

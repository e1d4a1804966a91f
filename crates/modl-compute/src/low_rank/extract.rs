//! Extraction: any change of weights as LoRA, by a truncated singular value decomposition.
//!
//! ΔW = U Σ Vᵀ ≈ (U_r √Σ_r)(√Σ_r V_rᵀ) = B A, the best approximation of rank r (Eckart and Young
//! 1936). What is lost is told: ‖ΔW − BA‖ ⁄ ‖ΔW‖ in the Frobenius norm. It turns modules of any
//! method that can be merged, and fully fine-tuned models, into adapters that every runtime loads.

use modl_core::{
    Backbone, Error, Kind, LowRank, Modular, Result, ResultExt, Select, Site, SiteKind, Targets,
    Tensor, Tensors, no_grad,
};

use super::Lora;

/// The change of one site's weight as a low-rank product.
#[derive(Debug, Clone)]
pub struct Extracted {
    /// The site's path.
    pub path: String,
    /// A and B, with scale 1.
    pub factors: LowRank,
    /// ‖ΔW‖.
    pub norm: f64,
    /// ‖ΔW − BA‖ ⁄ ‖ΔW‖, 0 where nothing was lost.
    pub lost: f64,
}

/// What was extracted, and what a low-rank product cannot hold.
#[derive(Debug, Clone, Default)]
pub struct Extraction {
    /// Sites whose weight has changed.
    pub sites: Vec<Extracted>,
    /// Other parameters that have changed, with the norm of their change.
    pub left_out: Vec<(String, f64)>,
}

/// The change `[out, in]` (further dimensions count as inputs) in rank `rank` or less.
///
/// # Errors
/// Where it has not two dimensions or more, is not finite, or `rank` is not positive.
pub fn truncate(path: &str, delta: &Tensor, rank: i64) -> Result<Extracted> {
    if rank < 1 {
        return Err(Error::invalid("rank", format!("is {rank}, wants at least 1")));
    }
    let delta = delta.detach()?.to_kind(Kind::Double)?;
    let delta = delta.reshape(&[delta.len_of(0), -1])?;
    let norm = delta.square()?.sum()?.item()?.sqrt();
    if !norm.is_finite() {
        return Err(Error::invalid(path, "its change holds NaN or infinity"));
    }
    let (u, s, vt) = delta.svd()?;
    let kept = rank.min(s.len_of(0));
    let root = s.narrow(0, 0, kept)?.sqrt()?;
    let up = u.narrow(1, 0, kept)?.mul(&root)?;
    let down = vt.narrow(0, 0, kept)?.mul(&root.unsqueeze(1)?)?;
    let rest = delta.sub(&up.matmul(&down)?)?.square()?.sum()?.item()?.sqrt();
    let lost = if norm > 0.0 { rest / norm } else { 0.0 };
    let single = |t: Tensor| t.to_kind(Kind::Float);
    let factors = LowRank { down: single(down)?, up: single(up)?, scale: 1.0 };
    Ok(Extracted { path: path.to_owned(), factors, norm, lost })
}

/// What an attached module changes, at linear sites, in rank `rank` or less.
///
/// # Errors
/// Where there is no such module, or it does not change weights.
pub fn extract(model: &Modular, name: &str, rank: i64) -> Result<Extraction> {
    let mut found = Extraction::default();
    for (site, theta, composed) in composed(model, name)? {
        found.take(site, &theta, &composed, rank).at(&site.path)?;
    }
    Ok(found)
}

/// What an attached module changes at a linear site.
#[derive(Debug, Clone)]
pub struct WholeChange {
    /// The site's path.
    pub path: String,
    /// ΔW `[out, in]`, in f64.
    pub weight: Tensor,
    /// The change of the bias `[out]`, in f64; a bias where there was none.
    pub bias: Option<Tensor>,
}

/// What an attached module changes, whole: for methods whose change is no product of thin matrices.
///
/// # Errors
/// Where there is no such module, it does not change weights, or stands at other sites than linear
/// ones.
pub fn changes(model: &Modular, name: &str) -> Result<Vec<WholeChange>> {
    let mut found = Vec::new();
    for (site, theta, composed) in composed(model, name)? {
        if site.kind != SiteKind::Linear {
            return Err(Error::unsupported(
                format!("the change of `{}`, a site of kind {:?}", site.path, site.kind),
                "only modules at linear sites can be merged as changes of weights",
            ));
        }
        let wide = |t: &Tensor| t.detach()?.to_kind(Kind::Double);
        let weight = wide(composed.need("weight")?)?.sub(&wide(theta.need("weight")?)?)?;
        let bias = match (theta.get("bias"), composed.get("bias")) {
            (Some(old), Some(new)) if !old.bit_equal(new)? => Some(wide(new)?.sub(&wide(old)?)?),
            (None, Some(new)) => Some(wide(new)?),
            _ => None,
        };
        found.push(WholeChange { path: site.path.clone(), weight, bias });
    }
    Ok(found)
}

/// θ and θ ⊕ φ at each site of an attached module.
fn composed<'a>(model: &'a Modular, name: &str) -> Result<Vec<(&'a Site, Tensors, Tensors)>> {
    let (_, targets) = model.recipe(name)?;
    let mut found = Vec::new();
    for site in targets.select(model.backbone().sites())? {
        let theta = model.backbone().theta(site)?;
        let bank = model.layer(site).map(|l| &l.bank);
        let module = bank.and_then(|b| b.module(b.position(name).ok()?));
        let composed = module.map(|m| no_grad(|| m.compose(&theta))).transpose().at(&site.path)?;
        let Some(Some(composed)) = composed else {
            return Err(Error::unsupported(
                format!("module `{name}` as a change of weights at `{}`", site.path),
                "only methods that can be merged can become LoRA",
            ));
        };
        found.push((site, theta, composed));
    }
    Ok(found)
}

/// What fine-tuning has changed, at linear sites, in rank `rank` or less.
///
/// # Errors
/// Where the two are not of one architecture.
pub fn extract_difference(
    base: &dyn Backbone,
    tuned: &dyn Backbone,
    rank: i64,
) -> Result<Extraction> {
    let mut found = Extraction::default();
    let mut seen = Vec::new();
    for site in base.sites() {
        let (theta, other) = (base.theta(site)?, tuned.theta(site).at("the fine-tuned model")?);
        seen.extend(theta.iter().map(|(short, _)| format!("{}.{short}", site.path)));
        if is_cut_up(site, base.sites()) {
            continue;
        }
        no_grad(|| found.take(site, &theta, &other, rank)).at(&site.path)?;
    }
    for (name, p) in base.params().iter().filter(|(n, _)| !seen.iter().any(|s| s == n)) {
        let other = tuned.params().get(name).at("the fine-tuned model")?;
        found.note(name.to_owned(), p.tensor(), other).at(name)?;
    }
    Ok(found)
}

/// Whether the parameters of a site are those of sites within it, too, one by one.
fn is_cut_up(site: &Site, sites: &[Site]) -> bool {
    site.kind == SiteKind::Experts && sites.iter().any(|s| s.is_within(site))
}

impl Extraction {
    fn take(&mut self, site: &Site, before: &Tensors, after: &Tensors, rank: i64) -> Result<()> {
        for (short, old) in before.iter() {
            let new = after.need(short)?;
            let name = format!("{}.{short}", site.path);
            if short != "weight" || site.kind != SiteKind::Linear {
                self.note(name, old, new)?;
            } else if !old.bit_equal(new)? {
                let wide = |t: &Tensor| t.detach()?.to_kind(Kind::Double);
                self.sites.push(truncate(&site.path, &wide(new)?.sub(&wide(old)?)?, rank)?);
            }
        }
        Ok(())
    }

    fn note(&mut self, name: String, old: &Tensor, new: &Tensor) -> Result<()> {
        if !old.bit_equal(new)? {
            let wide = |t: &Tensor| t.detach()?.to_kind(Kind::Double);
            let change = wide(new)?.sub(&wide(old)?)?.square()?.sum()?.item()?.sqrt();
            self.left_out.push((name, change));
        }
        Ok(())
    }

    /// Attaches what was extracted as a LoRA.
    ///
    /// # Errors
    /// Where nothing was extracted, or `name` is taken.
    pub fn attach(&self, model: &mut Modular, name: &str) -> Result<()> {
        let rank = |e: &Extracted| e.factors.down.len_of(0);
        let r = self.sites.iter().map(rank).max().ok_or_else(|| {
            Error::invalid("extraction", "no weight of a linear site has changed")
        })?;
        let smaller = self.sites.iter().filter(|e| rank(e) < r);
        let own = smaller.map(|e| (regex::escape(&e.path), e));
        let own: Vec<(String, &Extracted)> = own.collect();
        let lora = Lora {
            r,
            alpha: r as f64,
            rank_pattern: own.iter().map(|(key, e)| (key.clone(), rank(e))).collect(),
            alpha_pattern: own.iter().map(|(key, e)| (key.clone(), rank(e) as f64)).collect(),
            ..Lora::default()
        };
        let targets = Targets::names(self.sites.iter().map(|e| e.path.clone()));
        let params = model.parameters_of(&lora, &targets)?;
        let factors: Vec<(String, &Tensor)> = self
            .sites
            .iter()
            .flat_map(|e| {
                let named = |short: &str| format!("{}.{short}", e.path);
                [(named("lora_A.weight"), &e.factors.down), (named("lora_B.weight"), &e.factors.up)]
            })
            .collect();
        let factors = factors.iter().map(|(n, t)| (n.as_str(), *t));
        params.load("extraction", factors, &Select::all())?;
        model.attach_with(name, Box::new(lora), &targets, &params)
    }
}

//! Merging changes of weights, site by site and sites side by side.
//!
//! The sum is exact: with A = [A₁; …; Aₖ] and B = [w₁s₁B₁ … wₖsₖBₖ], B A = Σ wⱼsⱼBⱼAⱼ. One adapter of
//! weight 1 is given back as it is, whatever the others are that have the weight 0.

use modl_core::{
    Device, Error, Kind, LowRank, Result, ResultExt, Seed, Tensor, no_grad, on_threads,
};

use super::change::result_kind;
use super::truncate::{Truncated, truncate_product, truncate_whole};
use super::{Change, Delta, SiteChanges, Way};
use crate::merge::{Base, Elements, Group, Input, MergeMethod, Settings, merge_group};

/// The merged change of one site.
#[derive(Debug, Clone)]
pub struct MergedSite {
    /// The site's path.
    pub path: String,
    /// ΔW as a product; f32, or f64 where a change was.
    pub factors: LowRank,
    /// What is added to the output, `[out]`.
    pub bias: Option<Tensor>,
    /// What truncation has lost of what the way gives, ‖M − BA‖ ⁄ ‖M‖; 0 where there was none.
    pub lost: f64,
}

/// Merges what the adapters of these names change. Sites where only adapters of weight 0 stand are
/// left out.
///
/// # Errors
/// Where there are not as many weights as adapters, shapes or ranks do not fit, or a method refuses.
pub fn merge(
    sites: Vec<SiteChanges>,
    names: &[String],
    weights: &[f64],
    way: &Way,
    seed: Seed,
) -> Result<Vec<MergedSite>> {
    check(names, weights, way)?;
    let merged = no_grad(|| {
        on_threads(sites, |site: SiteChanges| {
            Merging { names, weights, seed }.site(&site, way).at(&site.path)
        })
    });
    let merged: Vec<MergedSite> = merged?.into_iter().flatten().collect();
    match merged.is_empty() {
        true => Err(Error::invalid("weights", "are all 0, or no adapter stands anywhere")),
        false => Ok(merged),
    }
}

fn check(names: &[String], weights: &[f64], way: &Way) -> Result<()> {
    if names.len() != weights.len() {
        let problem = format!("there are {} for {} adapters", weights.len(), names.len());
        return Err(Error::invalid("weights", problem));
    }
    if let Some(w) = weights.iter().find(|w| !w.is_finite()) {
        return Err(Error::invalid("weights", format!("{w} is no number")));
    }
    if let Way::OfChanges { method, .. } | Way::OfFactors { method, .. } = way {
        let spec = method.spec();
        if !spec.has("weight") && weights.iter().any(|w| *w != 1.0) {
            let problem = format!("`{}` has none; leave them out", spec.name);
            return Err(Error::invalid("weights", problem));
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Merging<'a> {
    names: &'a [String],
    weights: &'a [f64],
    seed: Seed,
}

impl Merging<'_> {
    fn site(self, site: &SiteChanges, way: &Way) -> Result<Option<MergedSite>> {
        if site.changes.len() != self.names.len() {
            let problem = format!("{} for {} adapters", site.changes.len(), self.names.len());
            return Err(Error::invalid("changes", problem));
        }
        let parts: Vec<(usize, &Change)> = site.present().collect();
        let Some((first, change)) = parts.first() else { return Ok(None) };
        let shape = change.weight.shape();
        for (j, other) in &parts {
            let own = other.weight.shape();
            if own != shape {
                let name = |j: &usize| self.names.get(*j).map_or("?", String::as_str);
                return Err(Error::invalid(
                    "adapters",
                    format!(
                        "`{}` changes a weight of the shape {shape:?}, `{}` one of {own:?}",
                        name(first),
                        name(j)
                    ),
                ));
            }
        }
        let kind = result_kind(parts.iter().map(|(_, c)| *c));
        let (factors, bias, lost) = match way {
            Way::Sum { rank } => {
                let weighted: Vec<(f64, &Change)> =
                    parts.iter().map(|(j, c)| (self.weight(*j), *c)).collect();
                let weighted: Vec<_> = weighted.into_iter().filter(|(w, _)| *w != 0.0).collect();
                if weighted.is_empty() {
                    return Ok(None);
                }
                let (factors, lost) = sum(&weighted, *rank, kind)?;
                (factors, sum_of_biases(&weighted, kind)?, lost)
            }
            Way::OfChanges { method, settings, rank } => {
                let wanted = parts.iter().map(|(_, c)| c.weight.rank()).max().unwrap_or(1);
                let merged = self.of_changes(site, shape, *method, settings)?;
                let found = truncate_whole(&merged, rank.unwrap_or(wanted))?;
                let bias = self.of_biases(site, shape, *method, settings)?;
                let Truncated { factors, lost } = found;
                (cast(factors, kind)?, bias, lost)
            }
            Way::OfFactors { method, settings } => {
                (self.of_factors(&site.path, &parts, *method, settings)?, None, 0.0)
            }
        };
        Ok(Some(MergedSite { path: site.path.clone(), factors, bias, lost }))
    }

    fn weight(self, j: usize) -> f64 {
        self.weights.get(j).copied().unwrap_or_default()
    }

    /// The method over the ΔWⱼ, where an adapter that does not stand here changes nothing.
    fn of_changes(
        self,
        site: &SiteChanges,
        shape: [i64; 2],
        method: &dyn MergeMethod,
        settings: &Settings,
    ) -> Result<Tensor> {
        let zeros = || vec![0f32; (shape[0] * shape[1]) as usize];
        let numbers = |change: &Option<Change>| match change {
            Some(c) => c.weight.whole()?.to_kind(Kind::Float)?.to_vec(),
            None => Ok(zeros()),
        };
        let all: Result<Vec<Vec<f32>>> = site.changes.iter().map(numbers).collect();
        self.method(&site.path, &shape, &all?, method, settings, self.weights)
    }

    /// The method over the biases, if there are any.
    fn of_biases(
        self,
        site: &SiteChanges,
        shape: [i64; 2],
        method: &dyn MergeMethod,
        settings: &Settings,
    ) -> Result<Option<Tensor>> {
        if site.present().all(|(_, c)| c.bias.is_none()) {
            return Ok(None);
        }
        let numbers = |change: &Option<Change>| match change.as_ref().and_then(|c| c.bias.as_ref())
        {
            Some(bias) => bias.to_kind(Kind::Float)?.to_vec(),
            None => Ok(vec![0f32; shape[0] as usize]),
        };
        let all: Result<Vec<Vec<f32>>> = site.changes.iter().map(numbers).collect();
        let name = format!("{}.bias", site.path);
        self.method(&name, &[shape[0]], &all?, method, settings, self.weights).map(Some)
    }

    /// PEFT's way: the method over the Aⱼ and over the Bⱼ.
    fn of_factors(
        self,
        path: &str,
        parts: &[(usize, &Change)],
        method: &dyn MergeMethod,
        settings: &Settings,
    ) -> Result<LowRank> {
        let (mut names, mut weights) = (Vec::new(), [Vec::new(), Vec::new()]);
        let mut factors = [Vec::new(), Vec::new()];
        let mut shapes = [Vec::new(), Vec::new()];
        for (j, change) in parts {
            let (Delta::Product(p), None) = (&change.weight, &change.bias) else {
                return Err(Error::unsupported(
                    "merging A and B by themselves where there is more: DoRA or `lora_bias`",
                    "PEFT loses it; leave out the convention `peft`",
                ));
            };
            let signed = self.weight(*j) * p.scale;
            let root = signed.abs().sqrt();
            names.extend(self.names.get(*j).cloned());
            for (n, (w, t)) in
                [(root.copysign(signed), &p.down), (root, &p.up)].into_iter().enumerate()
            {
                if shapes[n].is_empty() {
                    shapes[n] = t.size();
                } else if shapes[n] != t.size() {
                    return Err(Error::invalid(
                        "adapters",
                        format!(
                            "are of the ranks {} and {}, and A and B by themselves can only be merged \
                             where all have one; leave out the convention `peft`, or take a method \
                             that ends with `_svd`",
                            shapes[0].first().copied().unwrap_or_default(),
                            p.down.len_of(0)
                        ),
                    ));
                }
                weights[n].push(w);
                factors[n].push(t.to_kind(Kind::Float)?.to_vec::<f32>()?);
            }
        }
        // Settings of each adapter are those of the ones that stand here.
        let settings = match settings.each("density") {
            Ok(all) => {
                let own = parts.iter().filter_map(|(j, _)| all.get(*j).copied());
                settings.clone().set_each("density", own)
            }
            Err(_) => settings.clone(),
        };
        let here = Merging { names: &names, ..self };
        let merged = |n: usize, part: &str| {
            let name = format!("{path}.{part}");
            here.method(&name, &shapes[n], &factors[n], method, &settings, &weights[n])
        };
        Ok(LowRank { down: merged(0, "A")?, up: merged(1, "B")?, scale: 1.0 })
    }

    /// A method over tensors of one shape, in f32.
    fn method(
        self,
        name: &str,
        shape: &[i64],
        tensors: &[Vec<f32>],
        method: &dyn MergeMethod,
        settings: &Settings,
        weights: &[f64],
    ) -> Result<Tensor> {
        let spec = method.spec();
        let sizes: Vec<usize> = shape.iter().map(|n| *n as usize).collect();
        let nothing = vec![0f32; sizes.iter().product()];
        let mut inputs: Vec<Input> = self
            .names
            .iter()
            .zip(tensors)
            .map(|(model, t)| Input::new(model, t as &dyn Elements))
            .collect();
        let base = (spec.base != Base::Input).then_some(inputs.len());
        if base.is_some() {
            inputs.push(Input::new("base", &nothing));
        }
        let group = Group::new(name, &sizes, inputs, self.seed).with_base(base);
        let settings = match spec.has("weight") {
            true => settings.clone().set_each("weight", weights.iter().copied()),
            false => settings.clone(),
        };
        let merged = merge_group(method, group, settings)?;
        Tensor::from_slice(&merged, shape, Device::Cpu)
    }
}

/// Σ wⱼΔWⱼ and what is lost of it.
fn sum(parts: &[(f64, &Change)], rank: Option<i64>, kind: Kind) -> Result<(LowRank, f64)> {
    let together: i64 = parts.iter().map(|(_, c)| c.weight.rank()).sum();
    let products: Option<Vec<(f64, &LowRank)>> = parts
        .iter()
        .map(|(w, c)| match &c.weight {
            Delta::Product(p) => Some((*w, p)),
            Delta::Whole(_) => None,
        })
        .collect();
    let Some(products) = products else {
        let whole = whole_sum(parts)?;
        let (rows, columns) = (whole.len_of(0), whole.len_of(1));
        if let Some(r) = rank.filter(|r| *r < rows.min(columns)) {
            let found = truncate_whole(&whole, r)?;
            return Ok((cast(found.factors, kind)?, found.lost));
        }
        // A product with the identity is exact.
        let one = |n: i64| Tensor::eye(n, kind, Device::Cpu);
        let whole = whole.to_kind(kind)?;
        let factors = if rows <= columns {
            LowRank { up: one(rows)?, down: whole, scale: 1.0 }
        } else {
            LowRank { up: whole, down: one(columns)?, scale: 1.0 }
        };
        return Ok((factors, 0.0));
    };
    if let ([(w, only)], true) = (products.as_slice(), rank.is_none_or(|r| r >= together))
        && *w == 1.0
    {
        return Ok(((*only).clone(), 0.0));
    }
    let joined = joined(&products)?;
    match rank {
        Some(r) if r < together => {
            let up = joined.up.mul_scalar(joined.scale)?;
            let found = truncate_product(&up, &joined.down, r)?;
            Ok((cast(found.factors, kind)?, found.lost))
        }
        _ => Ok((cast(joined, kind)?, 0.0)),
    }
}

/// A and B of all, joined, in f64. A factor that all share stays the factor.
pub(super) fn joined(parts: &[(f64, &LowRank)]) -> Result<LowRank> {
    let first = parts.first().map_or(1.0, |(_, p)| p.scale);
    let shared = parts.iter().all(|(_, p)| p.scale == first);
    let (mut downs, mut ups) = (Vec::new(), Vec::new());
    for (w, p) in parts {
        let factor = if shared { *w } else { w * p.scale };
        downs.push(p.down.to_kind(Kind::Double)?);
        ups.push(p.up.to_kind(Kind::Double)?.mul_scalar(factor)?);
    }
    Ok(LowRank {
        down: Tensor::cat(&downs, 0)?,
        up: Tensor::cat(&ups, 1)?,
        scale: if shared { first } else { 1.0 },
    })
}

/// Σ wⱼΔWⱼ in f64.
pub(super) fn whole_sum(parts: &[(f64, &Change)]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (w, change) in parts {
        let term = match &change.weight {
            Delta::Whole(t) => t.to_kind(Kind::Double)?.mul_scalar(*w)?,
            Delta::Product(p) => {
                let up = p.up.to_kind(Kind::Double)?.mul_scalar(w * p.scale)?;
                up.matmul(&p.down.to_kind(Kind::Double)?)?
            }
        };
        sum = Some(sum.map_or_else(|| Ok(term.clone()), |s| s.add(&term))?);
    }
    sum.ok_or_else(|| Error::invalid("adapters", "there are none"))
}

fn sum_of_biases(parts: &[(f64, &Change)], kind: Kind) -> Result<Option<Tensor>> {
    let mut sum: Option<Tensor> = None;
    for (w, bias) in parts.iter().filter_map(|(w, c)| Some((w, c.bias.as_ref()?))) {
        let term = bias.to_kind(Kind::Double)?.mul_scalar(*w)?;
        sum = Some(sum.map_or_else(|| Ok(term.clone()), |s| s.add(&term))?);
    }
    sum.map(|s| s.to_kind(kind)).transpose()
}

fn cast(factors: LowRank, kind: Kind) -> Result<LowRank> {
    Ok(LowRank {
        down: factors.down.to_kind(kind)?.contiguous()?,
        up: factors.up.to_kind(kind)?.contiguous()?,
        scale: factors.scale,
    })
}

//! Names and conventions to ways of merging changes of weights.

use modl_core::{Error, Result};

use super::SiteChanges;
use crate::merge::{MergeMethod, MergeMethods, Settings};

/// How changes of weights are merged.
#[derive(Debug, Clone)]
pub enum Way<'a> {
    /// Σ wⱼΔWⱼ: exactly, of the rank Σ rⱼ, or the nearest of the rank that is asked for.
    Sum {
        /// The rank to keep at most.
        rank: Option<i64>,
    },
    /// A method of whole models over the ΔWⱼ, with 0 as the base; then the nearest product.
    OfChanges {
        /// The method.
        method: &'a dyn MergeMethod,
        /// Its settings but the weights.
        settings: Settings,
        /// The rank to keep at most; the largest of the adapters' at the site where it is left out.
        rank: Option<i64>,
    },
    /// The method over the Aⱼ and over the Bⱼ, each with √|wⱼsⱼ|, the sign of which is A's: cross
    /// terms BᵢAⱼ included, as PEFT has it.
    OfFactors {
        /// The method.
        method: &'a dyn MergeMethod,
        /// Its settings but the weights.
        settings: Settings,
    },
}

/// PEFT's names of sums, all of which are exact without its convention.
const SUMS: &[&str] = &["concat", "cat", "svd", "linear", "task_arithmetic"];
/// What PEFT computes on A and B by themselves.
const OF_FACTORS: &[&str] = &["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"];

impl<'a> Way<'a> {
    /// The way of this name.
    ///
    /// `concat` (or `cat`, `svd`, `linear`, `task_arithmetic`) is the sum; every other name is a method
    /// of `methods` over the ΔWⱼ, with or without PEFT's ending `_svd`. With the convention `peft`,
    /// `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` work on A and B, and with
    /// `_svd` on ΔW, by PEFT's reading; `cat` and `svd` are the sum in both. The convention
    /// `mergekit` is a method's own over the ΔWⱼ.
    ///
    /// # Errors
    /// Where there is no such name or convention, or a setting or a rank does not belong to it.
    pub fn named(
        name: &str,
        convention: Option<&str>,
        methods: &'a MergeMethods,
        settings: Settings,
        rank: Option<i64>,
    ) -> Result<Self> {
        let peft = match convention {
            None | Some("mergekit") => false,
            Some("peft") => true,
            Some(other) => return Err(Error::unknown("convention", other, ["mergekit", "peft"])),
        };
        if rank.is_some_and(|r| r < 1) {
            let given = rank.unwrap_or_default();
            return Err(Error::invalid("rank", format!("is {given}, wants at least 1")));
        }
        if SUMS.contains(&name) && !(peft && name == "linear") {
            if settings != Settings::default() {
                return Err(Error::invalid(
                    format!("settings {settings}"),
                    format!("`{name}` of adapters has no settings but weights and a rank"),
                ));
            }
            return match (name, peft, rank) {
                ("cat" | "concat", true, Some(_)) => Err(Error::invalid(
                    "rank",
                    "`cat` has the rank that the adapters have together; `svd` is of a given rank",
                )),
                _ => Ok(Way::Sum { rank }),
            };
        }
        let bare = name.strip_suffix("_svd").unwrap_or(name);
        let known = || {
            let all = methods.iter().map(|m| m.spec().name);
            Error::unknown("merge method", name, all.chain(SUMS.iter().copied()))
        };
        let found = if peft && bare == "linear" { "task_arithmetic" } else { bare };
        let method = methods.find(found).map_err(|_| known())?;
        let has = |setting: &str| method.spec().settings.iter().any(|s| s.name == setting);
        let settings = match convention {
            Some(c) if has("convention") => settings.set("convention", c),
            Some("peft") if !OF_FACTORS.contains(&bare) => {
                return Err(Error::unsupported(
                    format!("`{name}` with the convention of PEFT, which has no such method,"),
                    "leave out the convention",
                ));
            }
            _ => settings,
        };
        if peft && bare == name {
            if rank.is_some() {
                return Err(Error::invalid(
                    "rank",
                    format!(
                        "`{name}` works on A and B as PEFT does, which keep their rank; `{name}_svd` is of a given rank"
                    ),
                ));
            }
            return Ok(Way::OfFactors { method, settings });
        }
        Ok(Way::OfChanges { method, settings, rank })
    }

    /// The rank at most of what it makes of a site.
    pub fn rank_of(&self, site: &SiteChanges) -> i64 {
        let ranks = || site.present().map(|(_, c)| c.weight.rank());
        let largest = ranks().max().unwrap_or(0);
        let whole = site.present().map(|(_, c)| c.weight.shape()).map(|[a, b]| a.min(b)).min();
        let wanted = match self {
            Way::Sum { rank } => rank.map_or(ranks().sum(), |r| r.min(ranks().sum())),
            Way::OfChanges { rank, .. } => rank.unwrap_or(largest),
            Way::OfFactors { .. } => largest,
        };
        match (self, whole) {
            // Joined factors are as many as they are; what is cut has no more than the matrix.
            (Way::OfChanges { .. } | Way::Sum { rank: Some(_) }, Some(whole)) => wanted.min(whole),
            _ => wanted,
        }
    }

    /// Whether the result may be far from a product of the adapters' ranks, so that it is cut.
    pub fn truncates(&self) -> bool {
        matches!(self, Way::Sum { rank: Some(_) } | Way::OfChanges { .. })
    }
}

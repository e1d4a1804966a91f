//! What the numbers say is wrong: the issues that survey §4.2.1 names.

use serde::Serialize;

use super::SiteUse;

/// Something that looks wrong at a site.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sign {
    /// Module collapse: these modules are hardly ever used.
    Dead {
        /// Their names.
        modules: Vec<String>,
    },
    /// Module collapse: one module has most of the weight.
    Dominant {
        /// Its name.
        module: String,
        /// Its share of all weight.
        share: f64,
    },
    /// Each unit gets all modules with nearly the same weight.
    Undecided {
        /// The mean entropy of a unit's weights as a share of ln m.
        entropy: f64,
    },
    /// Which modules are used does not depend on the label.
    Indifferent {
        /// The mutual information as a share of what is possible.
        information: f64,
    },
    /// Full modules drop many choices.
    Dropping {
        /// The share of choices that were dropped.
        share: f64,
    },
    /// Overfitting: the router is surer of what it was trained on.
    Overfitted {
        /// Mean entropy in test less that in training, as a share of ln m.
        gap: f64,
    },
}

/// From where on a number is a sign.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Thresholds {
    /// A module is dead whose share of all weight is below this part of 1⁄m. Default: 0.01.
    pub dead: f64,
    /// A module dominates where its share is above 1⁄m + this part of what is left, 1 − 1⁄m.
    /// Default: 0.5 (0.75 of two modules, 0.625 of four, 0.56 of eight).
    pub dominant: f64,
    /// A router is undecided where the mean entropy is above this part of ln m. Default: 0.95.
    pub undecided: f64,
    /// It is indifferent where the mutual information of label and module is below this part of
    /// min(H(label), ln m). Default: 0.01.
    pub indifferent: f64,
    /// Drops count from this share of all choices on. Default: 0.1.
    pub dropping: f64,
    /// It overfits where the mean entropy rises from training to test by more than this part of
    /// ln m. Default: 0.1.
    pub overfitted: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Thresholds {
            dead: 0.01,
            dominant: 0.5,
            undecided: 0.95,
            indifferent: 0.01,
            dropping: 0.1,
            overfitted: 0.1,
        }
    }
}

/// What looks wrong at a site; nothing where no unit has a module, or there is but one module.
pub fn signs(site: &SiteUse, t: &Thresholds) -> Vec<Sign> {
    let (all, m) = (site.all(), site.modules.len() as f64);
    if all.routed() == 0 || m < 2.0 {
        return Vec::new();
    }
    let (shares, stats) = (all.mean_shares(), all.stats());
    let mut found = Vec::new();
    let names = site.modules.iter().zip(&shares);
    let dead: Vec<String> =
        names.clone().filter(|(_, s)| **s * m < t.dead).map(|(n, _)| n.clone()).collect();
    if !dead.is_empty() {
        found.push(Sign::Dead { modules: dead });
    }
    let limit = 1.0 / m + t.dominant * (1.0 - 1.0 / m);
    let dominant = names.filter(|(_, s)| **s > limit);
    found.extend(dominant.map(|(n, s)| Sign::Dominant { module: n.clone(), share: *s }));
    let entropy = stats.mean_entropy / m.ln();
    if entropy > t.undecided {
        found.push(Sign::Undecided { entropy });
    }
    if let Some(information) = site.relative_information().filter(|i| *i < t.indifferent) {
        found.push(Sign::Indifferent { information });
    }
    if stats.overflow > t.dropping {
        found.push(Sign::Dropping { share: stats.overflow });
    }
    found
}

/// Whether the router of a site is surer of its choices in training than in test.
pub fn overfitting(train: &SiteUse, test: &SiteUse, t: &Thresholds) -> Option<Sign> {
    let most = (test.modules.len() as f64).ln();
    let gap = (test.stats().mean_entropy - train.stats().mean_entropy) / most;
    let both = train.all().routed() > 0 && test.all().routed() > 0;
    (both && most > 0.0 && gap > t.overfitted).then_some(Sign::Overfitted { gap })
}

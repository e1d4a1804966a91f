//! DELLA: drop numbers of the task vectors at random, small ones rather than large ones.
//!
//! In each row of τᵢ the probability to be kept rises with the rank of the magnitude, from
//! `density − epsilon` to `density + epsilon`; what is kept is rescaled to the L1 norm of the whole; then
//! signs are elected (`della`) or not (`della_linear`) (Deep et al. 2024, arXiv 2406.11617). What is
//! dropped depends on the seed, the tensor's name and the model's place alone.

use modl_core::Result;

use super::sparsity::{Keep, by_rank};
use super::task_vectors::{
    DENSITY, Divisor, Election, INT8_MASK, LAMBDA, Rescale, TaskVectors, WEIGHT, normalize,
    rescale, sparse,
};
use crate::merge::{Base, Blend, Group, MergeMethod, Setting, Settings, Spec};

/// Drop small numbers rather than large ones.
#[derive(Debug, Clone, Copy)]
pub struct Della {
    /// Whether signs are elected.
    pub ties: bool,
}

const EPSILON: Setting =
    Setting::each_or("epsilon", 0.15, "how far probabilities differ from the density");

impl MergeMethod for Della {
    fn spec(&self) -> Spec {
        const TIES: &[Setting] =
            &[WEIGHT, DENSITY, EPSILON, LAMBDA, normalize(true), rescale(true), INT8_MASK];
        const LINEAR: &[Setting] =
            &[WEIGHT, DENSITY, EPSILON, LAMBDA, normalize(false), rescale(true), INT8_MASK];
        let (name, title, settings) = match self.ties {
            true => ("della", "Drop by rank, then elect signs", TIES),
            false => ("della_linear", "Drop by rank, then add", LINEAR),
        };
        Spec::new(name, title, "Deep et al. 2024").settings(settings).base(Base::Required).by_rows()
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let densities = settings.each("density")?;
        let keep = by_rank(group, &densities, &settings.each("epsilon")?)?;
        self.merge(group, keep, settings)?.blend(group)
    }
}

impl Della {
    fn merge(self, group: &Group, keep: Vec<Keep>, settings: &Settings) -> Result<TaskVectors> {
        let kept = sparse(group, keep, Rescale::of(settings)?, &settings.each("density")?)?;
        let election = if self.ties { Election::Weighted } else { Election::None };
        TaskVectors::of(settings, kept, (election, Divisor::of(settings)?))
    }
}

#[cfg(test)]
mod tests {
    use modl_core::Seed;

    use super::super::dare::tests::{fixture, largest_difference, mask, read};
    use super::*;
    use crate::merge::{Input, Source, merge_group};

    const MODELS: [&str; 3] = ["ft0", "ft1", "ft2"];
    const DENSITY: [f64; 3] = [0.5, 0.6, 0.7];
    const NAMES: [(bool, &str, f64); 2] = [(true, "della", 0.1), (false, "della_linear", 0.15)];

    fn tensors(models: &[Source], name: &str) -> Vec<Vec<f32>> {
        models.iter().map(|m| read(m, name)).collect()
    }

    fn models() -> Vec<Source> {
        let all = MODELS.iter().chain(&["base"]);
        all.map(|m| fixture(&format!("mergekit/models/{m}"))).collect()
    }

    #[test]
    fn with_its_masks_it_gives_what_mergekit_gives() {
        for (ties, name, _) in NAMES {
            let masks = fixture(&format!("mergekit/{name}/masks.safetensors"));
            let theirs = fixture(&format!("mergekit/{name}/merged.safetensors"));
            for tensor in theirs.tensors().keys() {
                let tensors = tensors(&models(), tensor);
                let shape = [tensors[0].len()];
                let inputs = tensors.iter().map(|t| Input::new("m", t)).collect();
                let group = Group::new("t", &shape, inputs, Seed(0)).with_base(3);
                let settings = Settings::default()
                    .set_each("weight", [0.5, 0.3, 0.4])
                    .set_each("density", DENSITY);
                let settings = settings.complete(&Della { ties }.spec(), 3).unwrap();
                let keep = MODELS.map(|m| Keep::Given(mask(&masks, &format!("{m}.{tensor}"))));
                let found = Della { ties }.merge(&group, keep.into(), &settings).unwrap();
                let blend = found.blend(&group).unwrap();
                let pieces = group.each(|chunk| {
                    let mut out = vec![0.0; chunk.len()];
                    blend(chunk, &mut out);
                    Ok(out)
                });
                let off = largest_difference(&pieces.unwrap().concat(), &read(&theirs, tensor));
                assert!(off <= 1e-6, "{name} {tensor}: {off}");
            }
        }
    }

    /// How many numbers of each fifth of the ranks are kept, of how many, and the sum of p(1 − p).
    type Fifths = [(f64, f64, f64); 5];

    /// Counts what is kept in each row of a mask, by the rank of |τ|; p is as the paper has it.
    fn count(
        tau: &[f32],
        kept: &[bool],
        row: usize,
        [d, e]: [f64; 2],
        all: &mut Fifths,
        of: &mut Fifths,
    ) {
        for (tau, kept) in tau.chunks(row).zip(kept.chunks(row)) {
            // Of a number that has not changed nobody sees whether it is kept: 40 % of each row.
            for (n, x) in tau.iter().enumerate().filter(|(_, x)| **x != 0.0) {
                let rank = tau.iter().filter(|y| y.abs() < x.abs()).count();
                let p = d - e + 2.0 * e * rank as f64 / (row - 1) as f64;
                let place = (5 * rank / row).min(4);
                let (fifth, wanted) = (&mut all[place], &mut of[place]);
                *fifth = (fifth.0 + f64::from(u8::from(kept[n])), fifth.1 + 1.0, 0.0);
                *wanted = (wanted.0 + p, wanted.1 + 1.0, wanted.2 + p * (1.0 - p));
            }
        }
    }

    /// In each fifth of the ranks as many are kept as the probabilities say, within four standard errors,
    /// by mergekit's draws and by those of three seeds here.
    #[test]
    fn what_is_kept_rises_with_the_rank_as_in_mergekit() {
        let models = models();
        for (ties, name, epsilon) in NAMES {
            let masks = fixture(&format!("mergekit/{name}/masks.safetensors"));
            for (m, model) in MODELS.iter().enumerate() {
                let (mut ours, mut theirs) = (Fifths::default(), Fifths::default());
                let (mut wanted, mut wanted_theirs) = (Fifths::default(), Fifths::default());
                for (tensor, place) in models[0].tensors() {
                    let row = place.shape[place.shape.len() - 1];
                    let (tuned, base) = (read(&models[m], tensor), read(&models[3], tensor));
                    let tau: Vec<f32> = tuned.iter().zip(&base).map(|(x, b)| x - b).collect();
                    let zeros = vec![0.0; tau.len()];
                    let kept = mask(&masks, &format!("{model}.{tensor}"));
                    let kept: Vec<bool> = kept.iter().map(|k| *k != 0.0).collect();
                    let p = [DENSITY[m], epsilon];
                    count(&tau, &kept, row, p, &mut theirs, &mut wanted_theirs);
                    for seed in 0..3 {
                        // One model alone, as it is drawn: the other settings leave it as it is.
                        let inputs = [&tau, &zeros].map(|t| Input::new("m", t)).into();
                        let group = Group::new(tensor, &place.shape, inputs, Seed(seed));
                        let settings = Settings::default()
                            .set("rescale", false)
                            .set_each("weight", [1.0])
                            .set_each("density", [DENSITY[m]])
                            .set_each("epsilon", [epsilon]);
                        let group = group.with_base(1);
                        let out = merge_group(&Della { ties }, group, settings).unwrap();
                        let kept: Vec<bool> = out.iter().map(|x| *x != 0.0).collect();
                        count(&tau, &kept, row, p, &mut ours, &mut wanted);
                    }
                }
                for (what, found, wanted) in
                    [("ours", ours, wanted), ("theirs", theirs, wanted_theirs)]
                {
                    // What has changed has the upper ranks.
                    for n in 2..5 {
                        let ((kept, of, _), (mean, _, variance)) = (found[n], wanted[n]);
                        let off = (kept - mean) / variance.sqrt();
                        let place = format!("{what} {name} {model} fifth {n} of {of}");
                        assert!(of > 2000.0 && off.abs() < 4.0, "{place}: {off} standard errors");
                    }
                    let share = |n: usize| found[n].0 / found[n].1;
                    // 0.8 ε is expected.
                    assert!(share(4) - share(2) > 0.4 * epsilon, "{what} {name} {model}");
                }
            }
        }
    }
}

//! DARE: drop numbers of the task vectors at random, and rescale what is left.
//!
//! τ̃ = m ⊙ τ · s with m ~ Bernoulli(density); then the sum (`dare_linear`) or the election of signs
//! (`dare_ties`) (Yu et al. 2024, arXiv 2311.03099). The paper, and PEFT, take s = 1 ⁄ density, so that
//! E[τ̃] = τ; mergekit takes s = ‖τ‖₁ ⁄ ‖m ⊙ τ‖₁ of the tensor, which is near it where magnitudes are
//! alike. `convention: peft` and `convention: paper` take the former, and elect as PEFT's TIES.
//!
//! What is dropped depends on the seed, the tensor's name and the model's place alone.

use modl_core::Result;

use super::sparsity::{Sparse, random};
use super::task_vectors::{
    CONVENTION, Convention, DENSITY, Divisor, Election, INT8_MASK, LAMBDA, Rescale, TaskVectors,
    WEIGHT, convention, normalize, rescale, sparse,
};
use super::ties::{MAJORITY, consensus};
use crate::merge::{Base, Blend, Group, MergeMethod, Setting, Settings, Spec};

/// Drop and rescale.
#[derive(Debug, Clone, Copy)]
pub struct Dare {
    /// Whether signs are elected.
    pub ties: bool,
}

const SETTINGS: &[Setting] =
    &[WEIGHT, DENSITY, LAMBDA, normalize(false), rescale(true), INT8_MASK, CONVENTION, MAJORITY];

impl MergeMethod for Dare {
    fn spec(&self) -> Spec {
        let (name, title) = match self.ties {
            true => ("dare_ties", "Drop at random, then elect signs"),
            false => ("dare_linear", "Drop at random, then add"),
        };
        Spec::new(name, title, "Yu et al. 2024").settings(SETTINGS).base(Base::Required)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let densities = settings.each("density")?;
        let kept = sparse(group, random(group, &densities), rescaling(settings)?, &densities)?;
        self.merge(kept, settings)?.blend(group)
    }
}

impl Dare {
    fn merge(self, kept: Vec<Sparse>, settings: &Settings) -> Result<TaskVectors> {
        let mixed = match self.ties {
            true => consensus(settings)?,
            false => (Election::None, Divisor::of(settings)?),
        };
        TaskVectors::of(settings, kept, mixed)
    }
}

fn rescaling(settings: &Settings) -> Result<Rescale> {
    Ok(match (settings.flag("rescale")?, convention(settings)?) {
        (false, _) => Rescale::No,
        (true, Convention::Mergekit) => Rescale::L1,
        (true, Convention::Peft | Convention::Paper) => Rescale::Density,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use modl_core::Seed;

    use super::*;
    use crate::merge::{Elements, Input, Source, merge_group};
    use crate::parameters::sparsity::Keep;

    pub(in crate::parameters) fn fixture(path: &str) -> Source {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path);
        Source::open(&path.display().to_string(), &path).unwrap()
    }

    pub(in crate::parameters) fn read(source: &Source, name: &str) -> Vec<f32> {
        let mut values = vec![0.0; source.place(name).unwrap().shape.iter().product()];
        source.elements(name, None).unwrap().read(0, &mut values).unwrap();
        values
    }

    /// The bytes of a mask.
    pub(in crate::parameters) fn mask(source: &Source, name: &str) -> Vec<f32> {
        let place = source.place(name).unwrap();
        let mut bytes = vec![0; place.bytes as usize];
        source.bytes(place, 0, &mut bytes).unwrap();
        bytes.into_iter().map(f32::from).collect()
    }

    fn with_masks(
        ties: bool,
        tensors: &[Vec<f32>],
        base: usize,
        masks: Vec<Vec<f32>>,
        settings: Settings,
    ) -> Vec<f32> {
        let shape = [tensors[0].len()];
        let inputs = tensors.iter().map(|t| Input::new("m", t)).collect();
        let group = Group::new("t", &shape, inputs, Seed(0)).with_base(base);
        let dare = Dare { ties };
        let settings = settings.complete(&dare.spec(), tensors.len() - 1).unwrap();
        let densities = settings.each("density").unwrap();
        let keep = masks.into_iter().map(Keep::Given).collect();
        let kept = sparse(&group, keep, rescaling(&settings).unwrap(), &densities).unwrap();
        let blend = dare.merge(kept, &settings).unwrap().blend(&group).unwrap();
        let pieces = group.each(|chunk| {
            let mut out = vec![0.0; chunk.len()];
            blend(chunk, &mut out);
            Ok(out)
        });
        pieces.unwrap().concat()
    }

    pub(in crate::parameters) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn with_its_masks_it_gives_what_mergekit_gives() {
        let models =
            ["ft0", "ft1", "ft2", "base"].map(|m| fixture(&format!("mergekit/models/{m}")));
        for (ties, name) in [(false, "dare_linear"), (true, "dare_ties")] {
            let masks = fixture(&format!("mergekit/{name}/masks.safetensors"));
            let theirs = fixture(&format!("mergekit/{name}/merged.safetensors"));
            for tensor in theirs.tensors().keys() {
                let tensors: Vec<Vec<f32>> = models.iter().map(|m| read(m, tensor)).collect();
                let drawn = ["ft0", "ft1", "ft2"].map(|m| mask(&masks, &format!("{m}.{tensor}")));
                let settings = Settings::default()
                    .set_each("weight", [0.5, 0.3, 0.4])
                    .set_each("density", [0.5, 0.6, 0.7]);
                let ours = with_masks(ties, &tensors, 3, drawn.to_vec(), settings);
                let off = largest_difference(&ours, &read(&theirs, tensor));
                assert!(off <= 1e-6, "{name} {tensor}: {off}");
            }
        }
    }

    #[test]
    fn with_its_masks_it_gives_what_peft_gives() {
        let file = fixture("peft/merge_utils.safetensors");
        let mut tensors: Vec<Vec<f32>> = (0..3).map(|i| read(&file, &format!("t{i}"))).collect();
        tensors.push(vec![0.0; tensors[0].len()]);
        for (ties, name) in [(false, "dare_linear"), (true, "dare_ties_total")] {
            let masks = (0..3).map(|i| mask(&file, &format!("{name}_mask{i}"))).collect();
            let settings = Settings::default()
                .set("convention", "peft")
                .set_each("weight", [0.5, 0.3, 0.4])
                .set_each("density", [0.5; 3]);
            let ours = with_masks(ties, &tensors, 3, masks, settings);
            let off = largest_difference(&ours, &read(&file, &format!("{name}_d0.5")));
            assert!(off <= 1e-6, "{name}: {off}");
        }
    }

    /// The mean over seeds lies within three standard errors of τ: var τ̃ = τ² (1 − d) ⁄ d.
    #[test]
    fn what_it_drops_at_random_is_there_on_average() {
        let base = vec![0.0f32; 40];
        let tau: Vec<f32> = (1..=40).map(|i| i as f32 / 10.0).collect();
        let (draws, density) = (4000, 0.3);
        let mut mean = vec![0.0; 40];
        for seed in 0..draws {
            let inputs = [&tau, &base].map(|t| Input::new("m", t));
            let group = Group::new("t", &[40], inputs.into(), Seed(seed)).with_base(1);
            let settings = Settings::default()
                .set("convention", "peft")
                .set_each("weight", [1.0])
                .set_each("density", [density]);
            let out = merge_group(&Dare { ties: false }, group, settings).unwrap();
            mean.iter_mut().zip(out).for_each(|(m, o)| *m += f64::from(o) / draws as f64);
        }
        for (mean, tau) in mean.iter().zip(&tau) {
            let tau = f64::from(*tau);
            let error = tau * ((1.0 - density) / density / draws as f64).sqrt();
            // 40 numbers: 3.5 standard errors leave 2 % for any of them to lie outside.
            assert!((mean - tau).abs() < 3.5 * error, "{mean} {tau}");
        }
    }
}

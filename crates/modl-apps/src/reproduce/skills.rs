//! Tasks that are made of skills: y = (W₀ + mean of Uₛ over the task's skills s) x, where each Uₛ is a
//! matrix of low rank and x ~ N(0, I).

use anyhow::Result;
use modl_core::{Device, Init, Kind, Modular, Seed, Tensor, Tensors};

use super::fit::{Examples, below};

/// S.
pub(super) const SKILLS: usize = 4;
/// The rank of each Uₛ.
pub(super) const RANK: i64 = 2;
/// The width of x and y.
pub(super) const WIDTH: i64 = 32;
/// Tasks to learn from.
pub(super) const SEEN: usize = 24;
/// Held-out tasks.
pub(super) const HELD: usize = 8;
/// Examples of each task.
pub(super) const SHOTS: i64 = 16;
/// Inputs on which each task is tested.
pub(super) const TESTS: i64 = 512;

/// The mean squared error of each row, over its examples and outputs.
pub(super) fn squared(predicted: &Tensor, target: &Tensor) -> modl_core::Result<Tensor> {
    predicted.sub(target)?.square()?.mean_dims(&[-1, -2], false)
}

/// The name of a task.
pub(super) fn task(t: usize) -> String {
    format!("t{t}")
}

/// A set of skills, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Subset(pub(super) u8);

impl Subset {
    pub(super) fn has(self, skill: usize) -> bool {
        self.0 >> skill & 1 == 1
    }
}

/// The tasks; those to learn from are first.
pub(super) struct World {
    /// W₀, `[32, 32]`.
    pub(super) base: Tensor,
    /// By task.
    pub(super) skills: Vec<Subset>,
    /// By task, drawn for the control.
    pub(super) lots: Vec<Subset>,
    /// W₀ with each task's change, transposed: `[tasks, 32, 32]`.
    maps: Tensor,
    /// x of the examples to learn from, `[tasks, 16, 32]`.
    x: Tensor,
}

fn normal(std: f64, shape: &[i64], seed: Seed) -> modl_core::Result<Tensor> {
    Init::Normal(std).tensor(shape, seed, Kind::Float, Device::Cpu)
}

impl World {
    pub(super) fn new(seed: Seed) -> Result<Self> {
        let (skills, tasks) = (subsets(seed.child("subsets"))?, (SEEN + HELD) as i64);
        let lots = below(15, SEEN + HELD, seed.child("lots"))?;
        let lots = lots.into_iter().map(|n| Subset(n as u8 + 1)).collect();
        let std = (WIDTH as f64).sqrt().recip();
        let base = normal(std, &[WIDTH, WIDTH], seed.child("base"))?;
        // A skill alone changes each output by 1 on average.
        let up =
            normal((RANK as f64).sqrt().recip(), &[SKILLS as i64, WIDTH, RANK], seed.child("up"))?;
        let down = normal(std, &[SKILLS as i64, RANK, WIDTH], seed.child("down"))?;
        let changes = up.bmm(&down)?.reshape(&[SKILLS as i64, WIDTH * WIDTH])?;
        let alpha = |z: &Subset| {
            let z = *z;
            (0..SKILLS).map(move |s| f64::from(z.has(s)) / f64::from(z.0.count_ones()))
        };
        let alpha: Vec<f64> = skills.iter().flat_map(alpha).collect();
        let alpha = Tensor::from_slice(&alpha, &[tasks, SKILLS as i64], Device::Cpu)?;
        let changes = alpha.to_kind(Kind::Float)?.matmul(&changes)?;
        let maps = changes.reshape(&[tasks, WIDTH, WIDTH])?.add(&base)?.transpose(1, 2)?;
        let x = normal(1.0, &[tasks, SHOTS, WIDTH], seed.child("x"))?;
        Ok(World { base, skills, lots, maps, x })
    }

    /// Each of these tasks with inputs of its own, `[tasks, inputs, 32]`.
    fn examples(&self, tasks: &[usize], x: Tensor) -> Result<Examples> {
        let target = x.bmm(&self.of(&self.maps, tasks)?)?;
        let inputs = Tensors::new().with("x", x);
        let names = tasks.iter().map(|t| task(*t)).collect();
        Ok(Examples { inputs, target, origin: tasks.to_vec(), tasks: Some(names) })
    }

    fn of(&self, all: &Tensor, tasks: &[usize]) -> Result<Tensor> {
        let index: Vec<i64> = tasks.iter().map(|t| *t as i64).collect();
        let index = Tensor::from_slice(&index, &[index.len() as i64], Device::Cpu)?;
        Ok(all.index_select(0, &index)?)
    }

    /// The examples that there are to learn from.
    pub(super) fn shots(&self, tasks: &[usize]) -> Result<Examples> {
        self.examples(tasks, self.of(&self.x, tasks)?)
    }

    /// The mean error of a model on other examples of these tasks.
    pub(super) fn test(&self, model: &Modular, tasks: &[usize], seed: Seed) -> Result<f64> {
        let draw = |t: &usize| normal(1.0, &[TESTS, WIDTH], seed.child("test").nth(*t as u64));
        let x: Vec<Tensor> = tasks.iter().map(draw).collect::<modl_core::Result<_>>()?;
        let examples = self.examples(tasks, Tensor::stack(&x, 0)?)?;
        let (predicted, _) = examples.predict(model)?;
        Ok(squared(&predicted, &examples.target)?.mean()?.item()?)
    }
}

/// The skills of all tasks: eight of the 15 subsets for the held-out ones, the others in turn for
/// the ones to learn from, of which each skill has some and any two skills are told apart by some.
/// That is when they span all others: of the planes through 0 that hold seven such subsets there are
/// those where a skill is missing and those where two go together.
fn subsets(seed: Seed) -> Result<Vec<Subset>> {
    for round in 0..100 {
        let keys = Init::Uniform(1.0).tensor(&[15], seed.nth(round), Kind::Double, Device::Cpu)?;
        let mut all: Vec<(f64, Subset)> =
            keys.to_vec::<f64>()?.into_iter().zip((1..=15).map(Subset)).collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (held, seen) = all.split_at(HELD);
        let told_apart = |a: usize, b: usize| seen.iter().any(|(_, z)| z.has(a) != z.has(b));
        let spans = (0..SKILLS)
            .all(|a| seen.iter().any(|(_, z)| z.has(a)) && (0..a).all(|b| told_apart(a, b)));
        if spans {
            return Ok(seen.iter().cycle().take(SEEN).chain(held).map(|(_, z)| *z).collect());
        }
    }
    anyhow::bail!("no subsets of skills were found")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_tasks_are_new_and_what_is_learned_spans_them() {
        for seed in 0..50 {
            let all = subsets(Seed(seed)).unwrap();
            let (seen, held) = all.split_at(SEEN);
            assert!(held.iter().all(|z| !seen.contains(z) && z.0 > 0 && z.0 < 16));
            assert!((0..HELD).all(|i| !held[..i].contains(&held[i])));
            // The determinant of ZᵀZ is not 0.
            let z: Vec<f64> =
                seen.iter().flat_map(|z| (0..4).map(|s| f64::from(u8::from(z.has(s))))).collect();
            let z = Tensor::from_slice(&z, &[SEEN as i64, 4], Device::Cpu).unwrap();
            let (_, s, _) = z.svd().unwrap();
            assert!(s.to_vec::<f64>().unwrap()[3] > 0.1, "seed {seed}");
        }
    }

    #[test]
    fn targets_are_the_base_and_the_mean_of_the_skills() {
        let world = World::new(Seed(5)).unwrap();
        let tasks: Vec<usize> = (0..SEEN + HELD).collect();
        let e = world.shots(&tasks).unwrap();
        // Each task's change is a mean, so that changes of single skills add up to all others.
        let x = Tensor::eye(WIDTH, Kind::Float, Device::Cpu).unwrap();
        let x = Tensor::stack(&vec![x; tasks.len()], 0).unwrap();
        let y = world.examples(&tasks, x).unwrap().target; // the maps themselves
        let change = |t: usize| {
            let own = y.select(0, t as i64).unwrap().t().unwrap();
            let n = f64::from(world.skills[t].0.count_ones());
            own.sub(&world.base).unwrap().mul_scalar(n).unwrap()
        };
        // Of two tasks with nothing in common, and the one with both.
        let at = |z: u8| tasks.iter().copied().find(|t| world.skills[*t].0 == z).unwrap();
        for (a, b) in [(1, 2), (3, 4), (5, 10), (7, 8)] {
            let sum = change(at(a)).add(&change(at(b))).unwrap();
            assert!(sum.max_abs_diff(&change(at(a | b))).unwrap() < 1e-5);
        }
        let (_, s, _) = change(at(1)).svd().unwrap();
        let s = s.to_vec::<f32>().unwrap();
        assert!(s[1] > 0.1 && s[2] < 1e-5, "{s:?}");
        assert_eq!(e.inputs.need("x").unwrap().size(), [32, 16, 32]);
    }
}

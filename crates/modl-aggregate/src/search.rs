//! Weights of a merge that are searched for without gradients: by a loss that the caller measures.
//!
//! [`Evolution`] is CMA-ES (Hansen 2016, arXiv 1604.00772) with the Cholesky factor in place of the
//! square root of the covariance matrix (Krause, Arbonès, Igel 2016). [`lora_hub`] searches as LoraHub
//! does (Huang et al. 2023, arXiv 2307.13269; survey §5.1): weights in ±1.5 that start at 0, and a
//! penalty of 0.05 times the mean of |w|.

use modl_core::{Device, Error, Init, Kind, Result, Seed};

/// LoraHub's bound of a weight.
const HUB_BOUND: f64 = 1.5;
/// LoraHub's factor of the mean of |w|.
const HUB_PENALTY: f64 = 0.05;

/// A search by mutation and selection, whose steps learn their size and direction.
#[derive(Debug, Clone, PartialEq)]
pub struct Evolution {
    /// The standard deviation of the first steps. Default: 0.3.
    pub step: f64,
    /// What each weight stays in. Default: no bound.
    pub bounds: Option<(f64, f64)>,
    /// Losses that are measured at most, without that of the start; the last generation is not begun
    /// where it would need more, nor one whose steps are too small to change a weight. Default: 400.
    pub evaluations: usize,
    /// Points of a generation. Default: 4 + ⌊3 ln n⌋ for n weights.
    pub population: Option<usize>,
    /// Where the points come from. Default: 0.
    pub seed: Seed,
}

impl Default for Evolution {
    fn default() -> Self {
        Evolution { step: 0.3, bounds: None, evaluations: 400, population: None, seed: Seed(0) }
    }
}

/// The best weights that a search has met.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The weights.
    pub weights: Vec<f64>,
    /// Their loss.
    pub loss: f64,
    /// The least loss so far: of the start, and after each generation.
    pub curve: Vec<f64>,
}

/// Searches as LoraHub does: with so many losses measured, the least of `loss` + 0.05 mean |w|.
///
/// # Errors
/// What [`Evolution::minimize`] gives.
pub fn lora_hub(
    modules: usize,
    evaluations: usize,
    seed: Seed,
    mut loss: impl FnMut(&[f64]) -> Result<f64>,
) -> Result<Found> {
    let bounds = Some((-HUB_BOUND, HUB_BOUND));
    let search = Evolution { bounds, evaluations, seed, ..Evolution::default() };
    search.minimize(&vec![0.0; modules], |w| {
        let size = w.iter().map(|w| w.abs()).sum::<f64>() / w.len() as f64;
        Ok(loss(w)? + HUB_PENALTY * size)
    })
}

impl Evolution {
    /// Looks for the weights with the least loss around `start`. The same seed and losses give the
    /// same weights.
    ///
    /// # Errors
    /// Where there is no weight, the settings make no sense, or the loss of the start is no number; a
    /// loss that is none later counts as the worst. What `loss` gives.
    pub fn minimize(
        &self,
        start: &[f64],
        mut loss: impl FnMut(&[f64]) -> Result<f64>,
    ) -> Result<Found> {
        self.check(start)?;
        let first = loss(start)?;
        if first.is_nan() {
            return Err(Error::invalid("loss", "of the start is no number"));
        }
        let mut best = Found { weights: start.to_vec(), loss: first, curve: vec![first] };
        let mut state = State::new(self, start);
        for generation in 0..self.evaluations / state.population {
            if state.settled() {
                break;
            }
            let normal = Init::Normal(1.0).tensor(
                &[(state.population * start.len()) as i64],
                self.seed.nth(generation as u64),
                Kind::Double,
                Device::Cpu,
            )?;
            let normal = normal.to_vec::<f64>()?;
            let mut points = Vec::with_capacity(state.population);
            for z in normal.chunks(start.len()) {
                let point = state.point(z, self.bounds);
                let found = loss(&point)?;
                let found = if found.is_nan() { f64::INFINITY } else { found };
                if found < best.loss {
                    (best.weights, best.loss) = (point.clone(), found);
                }
                points.push((found, point));
            }
            // A stable sort: of equal losses the one that was drawn first.
            points.sort_by(|(a, _), (b, _)| a.total_cmp(b));
            best.curve.push(best.loss);
            state.learn(&points);
        }
        Ok(best)
    }

    fn check(&self, start: &[f64]) -> Result<()> {
        let wrong = |what: &str| Err(Error::invalid("search", what));
        if start.is_empty() {
            return wrong("has no weight to look for");
        }
        if !(self.step.is_finite() && self.step > 0.0) {
            return wrong("needs a `step` above 0");
        }
        if self.population.is_some_and(|p| p < 2) {
            return wrong("needs a `population` of at least 2");
        }
        if let Some((lo, hi)) = self.bounds
            && !(lo < hi && start.iter().all(|w| (lo..=hi).contains(w)))
        {
            return wrong("needs bounds that the start lies in");
        }
        Ok(())
    }
}

/// Where the points of the next generation are drawn, N(mean, step² C).
struct State {
    population: usize,
    mean: Vec<f64>,
    step: f64,
    covariance: Vec<Vec<f64>>,
    /// A with A Aᵀ = C.
    factor: Vec<Vec<f64>>,
    path: Vec<f64>,
    path_of_step: Vec<f64>,
    generation: i32,
    shares: Vec<f64>,
}

impl State {
    fn new(search: &Evolution, start: &[f64]) -> Self {
        let n = start.len();
        let usual = 4 + (3.0 * (n as f64).ln()) as usize;
        let population = search.population.unwrap_or(usual);
        let half = population / 2;
        let raw = (1..=half).map(|i| ((population + 1) as f64 / 2.0).ln() - (i as f64).ln());
        let raw: Vec<f64> = raw.collect();
        let total: f64 = raw.iter().sum();
        let eye: Vec<Vec<f64>> =
            (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
        State {
            population,
            mean: start.to_vec(),
            step: search.step,
            covariance: eye.clone(),
            factor: eye,
            path: vec![0.0; n],
            path_of_step: vec![0.0; n],
            generation: 0,
            shares: raw.iter().map(|w| w / total).collect(),
        }
    }

    /// Whether steps are too small to change any weight: what follows would divide by nothing.
    fn settled(&self) -> bool {
        let spread = self.factor.iter().map(|row| row.iter().map(|a| a.abs()).sum::<f64>());
        self.mean.iter().zip(spread).all(|(m, s)| *m + self.step * s == *m)
    }

    /// mean + step A z, moved into the bounds.
    fn point(&self, z: &[f64], bounds: Option<(f64, f64)>) -> Vec<f64> {
        let along = |row: &Vec<f64>| row.iter().zip(z).map(|(a, z)| a * z).sum::<f64>();
        let raw = self.mean.iter().zip(&self.factor).map(|(m, row)| m + self.step * along(row));
        match bounds {
            Some((lo, hi)) => raw.map(|w| w.clamp(lo, hi)).collect(),
            None => raw.collect(),
        }
    }

    /// Moves to the better half of the points, best first.
    fn learn(&mut self, points: &[(f64, Vec<f64>)]) {
        let n = self.mean.len() as f64;
        let mass = 1.0 / self.shares.iter().map(|w| w * w).sum::<f64>();
        let fade_step = (mass + 2.0) / (n + mass + 5.0);
        let damping = 1.0 + 2.0 * (((mass - 1.0) / (n + 1.0)).sqrt() - 1.0).max(0.0) + fade_step;
        let fade = (4.0 + mass / n) / (n + 4.0 + 2.0 * mass / n);
        let of_path = 2.0 / ((n + 1.3).powi(2) + mass);
        let of_points =
            (1.0 - of_path).min(2.0 * (mass - 2.0 + 1.0 / mass) / ((n + 2.0).powi(2) + mass));
        let usual = n.sqrt() * (1.0 - 1.0 / (4.0 * n) + 1.0 / (21.0 * n * n));

        // Steps as they were taken, bounds included.
        let steps: Vec<Vec<f64>> = points
            .iter()
            .take(self.shares.len())
            .map(|(_, p)| p.iter().zip(&self.mean).map(|(p, m)| (p - m) / self.step).collect())
            .collect();
        let mut moved = vec![0.0; self.mean.len()];
        for (step, w) in steps.iter().zip(&self.shares) {
            moved.iter_mut().zip(step).for_each(|(m, s)| *m += w * s);
        }
        self.mean.iter_mut().zip(&moved).for_each(|(m, d)| *m += self.step * d);
        let white = solve_lower(&self.factor, &moved);
        let gain = (fade_step * (2.0 - fade_step) * mass).sqrt();
        for (p, w) in self.path_of_step.iter_mut().zip(&white) {
            *p = (1.0 - fade_step) * *p + gain * w;
        }
        self.generation += 1;
        let length = self.path_of_step.iter().map(|p| p * p).sum::<f64>().sqrt();
        let settled = (1.0 - (1.0 - fade_step).powi(2 * self.generation)).sqrt();
        let steady = length / settled < (1.4 + 2.0 / (n + 1.0)) * usual;
        let gain = if steady { (fade * (2.0 - fade) * mass).sqrt() } else { 0.0 };
        for (p, m) in self.path.iter_mut().zip(&moved) {
            *p = (1.0 - fade) * *p + gain * m;
        }
        // What the path lacks while it waits is made up for.
        let kept = if steady { 0.0 } else { of_path * fade * (2.0 - fade) };
        for (i, row) in self.covariance.iter_mut().enumerate() {
            for (j, c) in row.iter_mut().enumerate() {
                let product = |x: &[f64]| x.get(i).zip(x.get(j)).map_or(0.0, |(a, b)| a * b);
                let of_steps: f64 =
                    steps.iter().zip(&self.shares).map(|(s, w)| w * product(s)).sum();
                *c = (1.0 - of_path - of_points + kept) * *c
                    + of_path * product(&self.path)
                    + of_points * of_steps;
            }
        }
        self.step *= (fade_step / damping * (length / usual - 1.0)).min(1.0).exp();
        // Where rounding has made the matrix no covariance any more, the last factor serves on.
        if let Some(factor) = cholesky(&self.covariance) {
            self.factor = factor;
        }
    }
}

/// The lower triangle A with A Aᵀ = C, where C is positive definite.
fn cholesky(c: &[Vec<f64>]) -> Option<Vec<Vec<f64>>> {
    let n = c.len();
    let mut a = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| a[i][k] * a[j][k]).sum();
            let rest = c[i][j] - sum;
            if i != j {
                a[i][j] = rest / a[j][j];
            } else if rest > 0.0 && rest.is_finite() {
                a[i][i] = rest.sqrt();
            } else {
                return None;
            }
        }
    }
    Some(a)
}

/// z with A z = y for a lower triangle.
fn solve_lower(a: &[Vec<f64>], y: &[f64]) -> Vec<f64> {
    let mut z: Vec<f64> = Vec::with_capacity(y.len());
    for (row, y) in a.iter().zip(y) {
        let sum: f64 = row.iter().zip(&z).map(|(a, z)| a * z).sum();
        let diagonal = row.get(z.len()).copied().unwrap_or(1.0);
        z.push((y - sum) / diagonal);
    }
    z
}

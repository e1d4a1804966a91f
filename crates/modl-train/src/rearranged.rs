//! Numbers in other places: permutations and rotations of images.

use std::ops::{Add, Mul};
use std::sync::Arc;

use modl_core::{Error, Result, Seed};
use rand::seq::SliceRandom;
use sha2::{Digest, Sha256};

/// A fixed linear map of few terms, y[p] = Σₜ wₜ[p] · x[fromₜ[p]].
#[derive(Debug, Clone)]
pub(crate) struct Rearranged(Arc<Vec<Term>>);

/// A term for each number: where it comes from, and what it counts there, which is 1 in a permutation.
#[derive(Debug)]
struct Term {
    from: Vec<u32>,
    weights: Option<Vec<f32>>,
}

impl Rearranged {
    /// A permutation of `n` numbers, drawn from `seed`.
    pub(crate) fn permutation(n: i64, seed: Seed) -> Result<Self> {
        let mut from: Vec<u32> = (0..places(n)?).collect();
        from.shuffle(&mut seed.rng());
        Ok(Rearranged(Arc::new(vec![Term { from, weights: None }])))
    }

    /// Images `[height, width]` turned counter-clockwise about their centre: bilinear between the
    /// four pixels around the place that a pixel comes from, of which those beyond the edge are 0.
    pub(crate) fn rotation(shape: &[i64], degrees: f64) -> Result<Self> {
        let &[height, width] = shape else {
            let problem =
                format!("of shape {shape:?} cannot be turned; images are [height, width]");
            return Err(Error::invalid("examples", problem));
        };
        let (sin, cos) = degrees.to_radians().sin_cos();
        places(height * width)?;
        let centre = ((height - 1) as f64 / 2.0, (width - 1) as f64 / 2.0);
        // Whole places are not to be missed by rounding.
        let tidy = |v: f64| (v * 1e9).round() / 1e9;
        let mut taps = vec![(Vec::new(), Vec::new()); 4];
        for row in 0..height {
            for column in 0..width {
                let (dy, dx) = (row as f64 - centre.0, column as f64 - centre.1);
                let y = tidy(centre.0 + dy * cos + dx * sin);
                let x = tidy(centre.1 + dx * cos - dy * sin);
                for (tap, (from, weights)) in taps.iter_mut().enumerate() {
                    let (down, right) = ((tap / 2) as f64, (tap % 2) as f64);
                    let (r, c) = (y.floor() + down, x.floor() + right);
                    let part = |v: f64, whole: f64| 1.0 - (v - whole).abs();
                    let within = r >= 0.0 && c >= 0.0 && r < height as f64 && c < width as f64;
                    let place = r as i64 * width + c as i64;
                    from.push(if within { place as u32 } else { 0 });
                    weights.push(if within { (part(y, r) * part(x, c)) as f32 } else { 0.0 });
                }
            }
        }
        let term = |(from, weights)| Term { from, weights: Some(weights) };
        Ok(Rearranged(Arc::new(taps.into_iter().map(term).collect())))
    }

    /// Adds a row to others, rearranged.
    pub(crate) fn push<T>(&self, row: &[T], to: &mut Vec<T>)
    where
        T: Copy + Default + From<f32> + Mul<Output = T> + Add<Output = T>,
    {
        let start = to.len();
        for (t, term) in self.0.iter().enumerate() {
            let moved = term.from.iter().map(|i| row.get(*i as usize).copied().unwrap_or_default());
            match &term.weights {
                None => to.extend(moved),
                Some(weights) => {
                    let parts = moved.zip(weights).map(|(x, w)| x * T::from(*w));
                    match t {
                        0 => to.extend(parts),
                        _ => to.iter_mut().skip(start).zip(parts).for_each(|(y, x)| *y = *y + x),
                    }
                }
            }
        }
    }

    /// Whether the other is a copy of this very one.
    pub(crate) fn is(&self, other: &Rearranged) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Adds itself to a fingerprint.
    pub(crate) fn digest(&self, hash: &mut Sha256) {
        let places = self.0.iter().flat_map(|term| &term.from);
        places.for_each(|i| hash.update(i64::from(*i).to_le_bytes()));
        let weights = self.0.iter().filter_map(|term| term.weights.as_ref()).flatten();
        weights.for_each(|w| hash.update(w.to_le_bytes()));
    }
}

/// The number of places of a row, which are counted in 32 bits.
fn places(n: i64) -> Result<u32> {
    let problem = |_| Error::invalid("examples", format!("have rows of {n} numbers, too many"));
    u32::try_from(n).map_err(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turned(image: &[f64], shape: [i64; 2], degrees: f64) -> Vec<f64> {
        let mut found = Vec::new();
        Rearranged::rotation(&shape, degrees).unwrap().push(image, &mut found);
        found
    }

    #[test]
    fn quarter_turns_move_pixels_counter_clockwise() {
        // 1 2 3      3 6 9
        // 4 5 6  →   2 5 8
        // 7 8 9      1 4 7
        let image: Vec<f64> = (1..10).map(f64::from).collect();
        assert_eq!(turned(&image, [3, 3], 0.0), image);
        assert_eq!(turned(&image, [3, 3], 90.0), [3., 6., 9., 2., 5., 8., 1., 4., 7.]);
        assert_eq!(turned(&image, [3, 3], 180.0), [9., 8., 7., 6., 5., 4., 3., 2., 1.]);
        assert_eq!(turned(&image, [3, 3], -90.0), turned(&image, [3, 3], 270.0));
        let even: Vec<f64> = (1..5).map(f64::from).collect();
        assert_eq!(turned(&even, [2, 2], 90.0), [2., 4., 1., 3.]);
    }

    /// Bilinear interpolation is exact for a plane a x + b y, which turned is a plane.
    #[test]
    fn a_plane_stays_a_plane_within_and_is_0_beyond() {
        let (n, a, b) = (21i64, 0.5, -1.25);
        let plane = |y: f64, x: f64| a * x + b * y + 40.0;
        let half = (n - 1) as f64 / 2.0;
        let place = |i: i64| (((i / n) as f64 - half), ((i % n) as f64 - half));
        let image: Vec<f64> = (0..n * n).map(|i| plane(place(i).0, place(i).1)).collect();
        for degrees in [30.0f64, 45.0, -77.0] {
            let (sin, cos) = degrees.to_radians().sin_cos();
            let mut checked = 0;
            for (i, found) in turned(&image, [n, n], degrees).into_iter().enumerate() {
                let (y, x) = place(i as i64);
                // Where it comes from: turned back, that is clockwise, with y downwards.
                let (fy, fx) = (y * cos + x * sin, x * cos - y * sin);
                if fy.abs() <= half && fx.abs() <= half {
                    assert!((found - plane(fy, fx)).abs() < 1e-4, "{degrees} {i}: {found}");
                    checked += 1;
                } else if fy.abs() >= half + 1.0 || fx.abs() >= half + 1.0 {
                    assert_eq!(found, 0.0);
                }
            }
            assert!(checked > 300, "{checked}");
        }
    }

    #[test]
    fn a_permutation_is_one_and_follows_its_seed() {
        let x: Vec<f64> = (0..50).map(f64::from).collect();
        let of = |seed| -> Vec<f64> {
            let mut found = Vec::new();
            Rearranged::permutation(50, Seed(seed)).unwrap().push(&x, &mut found);
            found
        };
        let mut sorted = of(1);
        assert_ne!(sorted, of(2));
        assert_eq!(sorted, of(1));
        sorted.sort_by(f64::total_cmp);
        assert_eq!(sorted, x);
    }
}

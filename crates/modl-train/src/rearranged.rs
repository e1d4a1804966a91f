//! Numbers in other places: permutations and rotations of images.

use modl_core::{Device, Error, Result, Seed, Tensor};
use rand::seq::SliceRandom;
use sha2::{Digest, Sha256};

/// A fixed linear map of few terms, y[p] = Σₜ wₜ[p] · x[fromₜ[p]].
#[derive(Debug, Clone)]
pub(crate) struct Rearranged {
    /// For each t, `[numbers]` i64; with a permutation there is one.
    from: Vec<Tensor>,
    /// For each t, `[numbers]` f32; none where all are 1.
    weights: Vec<Tensor>,
}

impl Rearranged {
    /// A permutation of `n` numbers, drawn from `seed`.
    pub(crate) fn permutation(n: i64, seed: Seed) -> Result<Self> {
        let mut from: Vec<i64> = (0..n).collect();
        from.shuffle(&mut seed.rng());
        Ok(Rearranged {
            from: vec![Tensor::from_slice(&from, &[n], Device::Cpu)?],
            weights: Vec::new(),
        })
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
                    from.push(if within { r as i64 * width + c as i64 } else { 0 });
                    weights.push(if within { (part(y, r) * part(x, c)) as f32 } else { 0.0 });
                }
            }
        }
        let n = [height * width];
        let (mut from, mut weights) = (Vec::new(), Vec::new());
        for (places, parts) in taps {
            from.push(Tensor::from_slice(&places, &n, Device::Cpu)?);
            weights.push(Tensor::from_slice(&parts, &n, Device::Cpu)?);
        }
        Ok(Rearranged { from, weights })
    }

    /// Rows `[rows, numbers]` rearranged.
    pub(crate) fn of(&self, rows: &Tensor) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (t, from) in self.from.iter().enumerate() {
            let moved = rows.index_select(1, from)?;
            let part = match self.weights.get(t) {
                Some(weights) => moved.mul(&weights.to_kind(rows.kind())?)?,
                None => moved,
            };
            sum = Some(match sum {
                Some(sum) => sum.add(&part)?,
                None => part,
            });
        }
        sum.map_or_else(|| Ok(rows.clone()), Ok)
    }

    /// Where each number comes from, `[numbers]` i64, if it is one number as it is.
    pub(crate) fn order(&self) -> Option<&Tensor> {
        match (self.from.as_slice(), self.weights.is_empty()) {
            ([from], true) => Some(from),
            _ => None,
        }
    }

    /// Whether the other is a copy of this very one.
    pub(crate) fn is(&self, other: &Rearranged) -> bool {
        let shared = |(a, b): (&Tensor, &Tensor)| a.shares(b);
        self.from.len() == other.from.len() && self.from.iter().zip(&other.from).all(shared)
    }

    /// Adds itself to a fingerprint.
    pub(crate) fn digest(&self, hash: &mut Sha256) -> Result<()> {
        for t in self.from.iter().chain(&self.weights) {
            hash.update(t.to_bytes()?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turned(image: &[f64], shape: [i64; 2], degrees: f64) -> Vec<f64> {
        let n = shape[0] * shape[1];
        let x = Tensor::from_slice(image, &[1, n], Device::Cpu).unwrap();
        Rearranged::rotation(&shape, degrees).unwrap().of(&x).unwrap().to_vec().unwrap()
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
        let x = Tensor::from_slice(&x, &[1, 50], Device::Cpu).unwrap();
        let of = |seed| -> Vec<f64> {
            Rearranged::permutation(50, Seed(seed)).unwrap().of(&x).unwrap().to_vec().unwrap()
        };
        let mut sorted = of(1);
        assert_ne!(sorted, of(2));
        assert_eq!(sorted, of(1));
        sorted.sort_by(f64::total_cmp);
        assert_eq!(sorted, x.to_vec::<f64>().unwrap());
    }
}

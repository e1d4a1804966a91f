//! k-means: vectors to the nearest of k centres, centres to the means of their vectors, in turn,
//! until nothing changes (Lloyd 1982). Centres start at vectors that are drawn with probabilities ∝
//! the squared distance to the nearest centre so far (k-means++: Arthur, Vassilvitskii 2007).

use modl_core::{Device, Error, Init, Kind, Result, Seed, Tensor, no_grad};

/// At most so many turns.
const TURNS: usize = 100;

/// The cluster of each of the vectors `[n, width]`. None of the k clusters is empty.
///
/// # Errors
/// Where there are fewer than k different vectors, or one is NaN or infinite.
pub(crate) fn k_means(vectors: &Tensor, k: usize, seed: Seed) -> Result<Vec<i64>> {
    let [n, _] = vectors.size()[..] else {
        return Err(Error::invalid("vectors", format!("are {vectors:?}, not [n, width]")));
    };
    vectors.check_finite("vectors to be clustered")?;
    let too_few = || Error::invalid("vectors", format!("fewer than {k} of {n} are different"));
    if k == 0 || n < k as i64 {
        return Err(too_few());
    }
    no_grad(|| {
        let x = vectors.detach()?.to_device(Device::Cpu)?.to_kind(Kind::Double)?;
        let lots = Init::Uniform(0.5).tensor(&[k as i64], seed, Kind::Double, Device::Cpu)?;
        let lots = lots.add_scalar(0.5)?.to_vec::<f64>()?;
        let mut centres: Option<Tensor> = None;
        for lot in lots {
            let weights = match &centres {
                None => vec![1.0; n as usize],
                Some(c) => nearest(&x, c)?.1,
            };
            let at = pick(&weights, lot).ok_or_else(too_few)?;
            let new = x.narrow(0, at as i64, 1)?;
            centres = Some(match centres {
                None => new,
                Some(c) => Tensor::cat(&[c, new], 0)?,
            });
        }
        let mut centres = centres.ok_or_else(too_few)?;
        let (mut table, mut far) = nearest(&x, &centres)?;
        for _ in 0..TURNS {
            let one_hot = Tensor::from_slice(&table, &[n], Device::Cpu)?.one_hot(k as i64)?;
            let one_hot = one_hot.to_kind(Kind::Double)?;
            let counts = one_hot.sum_dims(&[0], false)?;
            let means =
                one_hot.t()?.matmul(&x)?.div(&counts.clamp(1.0, f64::INFINITY)?.unsqueeze(-1)?)?;
            let mut rows = means.unbind(0)?;
            for (row, count) in rows.iter_mut().zip(counts.to_vec::<f64>()?) {
                // A centre without vectors goes to the vector that is farthest from its own.
                if count == 0.0 {
                    let farthest = (0..far.len()).max_by(|a, b| far[*a].total_cmp(&far[*b]));
                    let at = farthest.filter(|at| far[*at] > 0.0).ok_or_else(too_few)?;
                    *row = x.select(0, at as i64)?;
                    far[at] = 0.0;
                }
            }
            centres = Tensor::stack(&rows, 0)?;
            let (next, next_far) = nearest(&x, &centres)?;
            let settled = next == table;
            (table, far) = (next, next_far);
            if settled {
                break;
            }
        }
        Ok(table)
    })
}

/// For each vector the nearest centre, the first of equal ones, and the squared distance to it.
fn nearest(x: &Tensor, centres: &Tensor) -> Result<(Vec<i64>, Vec<f64>)> {
    let own = x.square()?.sum_dims(&[-1], true)?;
    let of_centres = centres.square()?.sum_dims(&[-1], false)?;
    let distances = own.add(&of_centres)?.sub(&x.linear(centres, None)?.mul_scalar(2.0)?)?;
    let (largest, index) = distances.neg()?.max_dim(-1)?;
    let distances = largest.neg()?.clamp(0.0, f64::INFINITY)?;
    Ok((index.to_vec()?, distances.to_vec()?))
}

/// The place at which the sum of the weights passes a share `lot` of their total.
fn pick(weights: &[f64], lot: f64) -> Option<usize> {
    let mut left = lot * weights.iter().sum::<f64>();
    for (i, w) in weights.iter().enumerate() {
        left -= w;
        if left < 0.0 {
            return Some(i);
        }
    }
    weights.iter().rposition(|w| *w > 0.0)
}

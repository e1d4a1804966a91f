//! Linear mode connectivity: what happens on the straight line between two models (Frankle et al.
//! 2020, arXiv 1912.05671; survey §5.1).

use modl_core::{Error, Result, Tensors};

/// The losses along a line.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// λ and the loss at (1 − λ)θ_a + λθ_b, from λ = 0 to 1.
    pub points: Vec<(f64, f64)>,
    /// max over λ of L(θ(λ)) − ((1 − λ)L_a + λL_b): 0 where the line never bends up.
    pub barrier: f64,
    /// The λ of the barrier.
    pub at: f64,
}

impl Curve {
    /// The curve through losses that were measured: λ and the loss there, from λ = 0 to 1.
    ///
    /// # Errors
    /// Where there are fewer than 2, they are not in this order, or a loss is no number.
    pub fn through(points: Vec<(f64, f64)>) -> Result<Self> {
        let (Some((from, first)), Some((to, last))) = (points.first(), points.last()) else {
            return Err(Error::invalid("points", "are fewer than 2"));
        };
        if (*from, *to) != (0.0, 1.0) || !points.is_sorted_by(|a, b| a.0 < b.0) {
            return Err(Error::invalid("points", "are not in the order of λ from 0 to 1"));
        }
        let (mut barrier, mut at) = (0.0, 0.0);
        for (lambda, loss) in &points {
            if loss.is_nan() {
                return Err(Error::invalid("loss", format!("at λ = {lambda} is no number")));
            }
            let height = loss - ((1.0 - lambda) * first + lambda * last);
            // At the ends it is 0 but for rounding.
            if height > barrier && (0.0 < *lambda && *lambda < 1.0) {
                (barrier, at) = (height, *lambda);
            }
        }
        Ok(Curve { points, barrier, at })
    }
}

/// (1 − λ)θ_a + λθ_b. At λ = 0 and 1 the models themselves, bit for bit.
///
/// # Errors
/// Where the models have not the same tensors.
pub fn between(a: &Tensors, b: &Tensors, lambda: f64) -> Result<Tensors> {
    if a.len() != b.len() {
        return Err(Error::invalid("models", format!("have {} and {} tensors", a.len(), b.len())));
    }
    a.map(|name, a| {
        let b = b.need(name)?;
        if a.size() != b.size() {
            let problem = format!("is {:?} and {:?}", a.size(), b.size());
            return Err(Error::invalid(name, problem));
        }
        if lambda == 0.0 {
            return Ok(a.clone());
        }
        if lambda == 1.0 {
            return Ok(b.clone());
        }
        a.mul_scalar(1.0 - lambda)?.add(&b.mul_scalar(lambda)?)
    })
}

/// The losses at so many `points` at equal distances from one model to the other, both among them; 25
/// are usual.
///
/// # Errors
/// Where there are fewer than 2 points, the models differ in their tensors, or a loss is no number.
pub fn curve(
    a: &Tensors,
    b: &Tensors,
    points: usize,
    mut loss: impl FnMut(&Tensors) -> Result<f64>,
) -> Result<Curve> {
    if points < 2 {
        return Err(Error::invalid("points", format!("{points} are fewer than 2")));
    }
    let mut all = Vec::with_capacity(points);
    for n in 0..points {
        let lambda = n as f64 / (points - 1) as f64;
        let loss = loss(&between(a, b, lambda)?)?;
        // Before the others are measured.
        if loss.is_nan() {
            return Err(Error::invalid("loss", format!("at λ = {lambda} is no number")));
        }
        all.push((lambda, loss));
    }
    Curve::through(all)
}

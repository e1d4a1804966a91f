//! What the tests of mixtures share beside the routers of [`super::made`].

use modl_core::{Context, Routing, Seed, Tensor, Weights};

pub use super::made::{Made, assert_close as close, bank, normal, numbered, site, softmax, t, top};

/// What these tests take as it is, and not as a result.
pub trait Sure {
    fn routed(&self, x: &Tensor, cx: &Context) -> Routing;

    /// α, one vector for each unit.
    fn alphas(&self, x: &Tensor, cx: &Context) -> Vec<Vec<f64>>;
}

impl Sure for Made {
    fn routed(&self, x: &Tensor, cx: &Context) -> Routing {
        self.route(x, cx).unwrap()
    }

    fn alphas(&self, x: &Tensor, cx: &Context) -> Vec<Vec<f64>> {
        rows(&self.dense(x, cx).unwrap())
    }
}

/// W that hands the first coordinates of x on as scores.
pub fn identity(modules: usize, width: usize) -> Vec<f64> {
    let one = |i: usize| f64::from(u8::from(i / width == i % width));
    (0..modules * width).map(one).collect()
}

/// Vectors along the last dimension.
pub fn rows(x: &Tensor) -> Vec<Vec<f64>> {
    let n = x.len_of(-1).max(1) as usize;
    x.to_vec::<f64>().unwrap().chunks(n).map(<[f64]>::to_vec).collect()
}

/// Indices and weights of each unit.
pub fn sparse(routing: &Routing) -> (Vec<Vec<i64>>, Vec<Vec<f64>>) {
    let Weights::Sparse { index, weight } = &routing.weights else { panic!("{routing:?}") };
    let k = index.len_of(-1) as usize;
    let index = index.to_vec::<i64>().unwrap().chunks(k).map(<[i64]>::to_vec).collect();
    (index, rows(weight))
}

pub fn loss(routing: &Routing, name: &str) -> Tensor {
    let found = routing.losses.iter().find(|(n, _)| n == name);
    found.unwrap_or_else(|| panic!("no loss `{name}`: {:?}", routing.losses)).1.clone()
}

pub fn noted(routing: &Routing, name: &str) -> Vec<f64> {
    routing.noted.need(name).unwrap().to_vec().unwrap()
}

pub fn gradient(of: &Tensor, by: &Tensor) -> Vec<f64> {
    of.gradients(&[by], false).unwrap()[0].as_ref().unwrap().to_vec().unwrap()
}

/// Variance over all numbers by the squared mean.
pub fn cv2(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n / mean.powi(2)
}

/// A step of training.
pub fn training(step: u64) -> Context {
    Context::train(Seed(7), step)
}

//! Dropout inside a module, drawn from the context's seed and the module's own place.

use modl_core::{Context, Error, Result, Scope, Tensor, dropout};

/// A probability in [0, 1) and the place that draws.
#[derive(Debug, Clone)]
pub(crate) struct Dropout {
    p: f64,
    place: String,
}

impl Dropout {
    /// `p` is called `what` in errors.
    ///
    /// # Errors
    /// Where it is not a probability below 1.
    pub(crate) fn new(what: &str, p: f64, scope: &Scope) -> Result<Self> {
        if (0.0..1.0).contains(&p) {
            return Ok(Dropout { p, place: scope.path().to_owned() });
        }
        Err(Error::invalid(what, format!("is {p}, wants a probability in [0, 1)")))
    }

    /// Whether it does anything in this context.
    pub(crate) fn active(&self, cx: &Context) -> bool {
        cx.train && self.p > 0.0
    }

    /// x, in training with dropped elements.
    pub(crate) fn apply(&self, x: &Tensor, cx: &Context) -> Result<Tensor> {
        self.apply_nth(x, cx, 0)
    }

    /// [`Dropout::apply`] at the `n`th place of several with draws of their own.
    pub(crate) fn apply_nth(&self, x: &Tensor, cx: &Context, n: u64) -> Result<Tensor> {
        if !self.active(cx) {
            return Ok(x.clone());
        }
        let seed = cx.draw(&self.place);
        dropout(x, self.p, if n == 0 { seed } else { seed.nth(n) })
    }
}

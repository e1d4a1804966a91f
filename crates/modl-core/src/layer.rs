//! Algorithm 1 of the survey: the forward pass of a modular function.

use crate::{Aggregator, Bank, Context, Host, Order, Result, Router, Signal};

/// A site with its modules, its router and its aggregator.
#[derive(Debug)]
pub struct ModularLayer {
    /// M, the modules to choose from.
    pub bank: Bank,
    router: Box<dyn Router>,
    aggregator: Box<dyn Aggregator>,
}

impl ModularLayer {
    /// A layer of its three parts.
    pub fn new(
        bank: Bank,
        router: impl Router + 'static,
        aggregator: impl Aggregator + 'static,
    ) -> Self {
        Self::from_boxes(bank, Box::new(router), Box::new(aggregator))
    }

    /// [`ModularLayer::new`] for parts whose types are not known, as a registry makes them.
    pub fn from_boxes(
        bank: Bank,
        router: Box<dyn Router>,
        aggregator: Box<dyn Aggregator>,
    ) -> Self {
        ModularLayer { bank, router, aggregator }
    }

    /// The router.
    pub fn router(&self) -> &dyn Router {
        self.router.as_ref()
    }

    /// Another router.
    pub fn set_router(&mut self, router: Box<dyn Router>) {
        self.router = router;
    }

    /// The aggregator.
    pub fn aggregator(&self) -> &dyn Aggregator {
        self.aggregator.as_ref()
    }

    /// Another aggregator.
    pub fn set_aggregator(&mut self, aggregator: Box<dyn Aggregator>) {
        self.aggregator = aggregator;
    }

    /// Algorithm 1: route → select → (compute → aggregate | aggregate → compute).
    pub fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let alpha = self.router.route(x, &self.bank, cx)?; // α ← r(x, t)
        cx.record(&f.site().path, &alpha);
        let active = self.bank.select(&alpha, x.rows())?; // K ← {j : αⱼ ≠ 0}
        match self.aggregator.order() {
            Order::Outputs => {
                let h = active.compute(f, x, cx); // hⱼ ← f'(x; θ, φⱼ)
                self.aggregator.outputs(&alpha, &h) // y ← g(α, {hⱼ})
            }
            Order::Parameters => active.per_alpha(x, cx, |active, x, cx| {
                let phi = self.aggregator.parameters(active, f.theta())?; // φ̄ ← g(α, {φⱼ})
                phi.forward(f, x, cx) // y ← f'(x; θ, φ̄)
            }),
        }
    }
}

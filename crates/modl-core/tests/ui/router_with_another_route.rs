//! A router that wants to change itself while it routes; what is learned is a buffer of its scope.

use modl_core::{Bank, Context, Result, Router, Routing, Signal, Weights};

#[derive(Debug)]
struct Counting(usize);

impl Router for Counting {
    fn kind(&self) -> &'static str {
        "counting"
    }

    fn route(&mut self, _x: &Signal, bank: &Bank, _cx: &Context) -> Result<Routing> {
        self.0 += 1;
        Ok(Routing::new(Weights::Fixed(vec![(self.0, 1.0)]), bank.len()))
    }
}

fn main() {}

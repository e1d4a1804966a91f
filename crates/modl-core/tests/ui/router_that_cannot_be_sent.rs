//! A router that holds what stays on one thread.

use std::rc::Rc;

use modl_core::{Bank, Context, Result, Router, Routing, Signal, Weights};

#[derive(Debug)]
struct Counting(Rc<usize>);

impl Router for Counting {
    fn kind(&self) -> &'static str {
        "counting"
    }

    fn route(&self, _x: &Signal, bank: &Bank, _cx: &Context) -> Result<Routing> {
        Ok(Routing::new(Weights::Fixed(vec![(*self.0, 1.0)]), bank.len()))
    }
}

fn main() {}

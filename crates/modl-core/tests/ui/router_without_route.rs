//! A router that does not route.

use modl_core::Router;

#[derive(Debug)]
struct Nearest;

impl Router for Nearest {
    fn kind(&self) -> &'static str {
        "nearest"
    }
}

fn main() {}

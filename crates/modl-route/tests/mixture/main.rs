//! The routers of mixtures of experts against arithmetic in f64, closed forms and published
//! properties.

#![allow(clippy::unwrap_used, clippy::panic)]

mod capacity;
mod deepseek;
mod expert_choice;
mod laws;
mod layers;
mod learning;
#[path = "../made/mod.rs"]
mod made;
mod noisy;
mod settings;
mod soft_moe;
mod support;
mod switch;
mod two_level;

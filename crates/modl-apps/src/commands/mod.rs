//! One file for each command.

pub(crate) mod eval;
pub(crate) mod forward;
pub(crate) mod inspect;
pub(crate) mod list;
pub(crate) mod train;

mod adapter;
mod run_folder;

//! One file for each command.

pub(crate) mod align;
pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod diff;
pub(crate) mod eval;
pub(crate) mod forward;
mod health;
pub(crate) mod inspect;
pub(crate) mod list;
pub(crate) mod merge;
pub(crate) mod route_report;
pub(crate) mod train;
pub(crate) mod upcycle;

mod adapter;
mod inspect_run;
mod run_folder;

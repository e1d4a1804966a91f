//! One file for each command.

pub(crate) mod align;
pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod diff;
pub(crate) mod eval;
pub(crate) mod forward;
mod health;
pub(crate) mod inspect;
pub(crate) mod lib;
pub(crate) mod list;
pub(crate) mod merge;
pub(crate) mod plan;
pub(crate) mod route_report;
pub(crate) mod sweep;
pub(crate) mod train;
pub(crate) mod upcycle;
pub(crate) mod watch;

mod adapter;
mod inspect_run;
mod run_events;
mod run_folder;
mod study;
mod train_report;

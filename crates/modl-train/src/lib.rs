#![doc = include_str!("../README.md")]

mod batches;
mod clip;
mod config;
mod data;
mod evaluate;
mod events;
mod length_groups;
mod methods;
mod metrics;
mod objective;
pub mod optim;
pub mod recipe;
mod run;
mod schedule;
mod state;
mod strategies;
mod trainer;
mod tsv;

pub use batches::{Batches, Cursor};
pub use clip::clip_grad_norm;
pub use config::TrainConfig;
pub use data::{Batch, Dataset, Describe, Example, held_out};
pub use evaluate::{Prediction, evaluate};
pub use events::{Event, Fanout, JsonLines, Sink};
pub use length_groups::length_groups;
pub use methods::Methods;
pub use metrics::{Interval, interval, mean_absolute_error, scores, sign_accuracy, spearman};
pub use objective::{Objective, Regression, sentence_vectors};
pub use optim::{Optimizer, OptimizerConfig};
pub use recipe::{Phase, Recipe};
pub use run::{restore, run};
pub use schedule::{Decay, Schedule, Warmup};
pub use strategies::{Job, Joint, PerTask, RoutingOnly, Strategy};
pub use trainer::Trainer;
pub use tsv::{Row, read_tsv, sample};

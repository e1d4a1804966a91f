#![doc = include_str!("../README.md")]

mod ada_merging;
mod assignments;
mod average;
mod batch;
mod batches;
mod bootstrap;
mod clip;
mod config;
mod data;
mod dense;
mod early_stop;
mod evaluate;
mod events;
mod example_features;
mod few_shot;
mod formats;
mod gradients;
mod length_groups;
mod library;
mod loss_sums;
mod methods;
mod metrics;
mod not_finite;
mod objective;
pub mod optim;
mod outcome;
mod passes;
mod rearranged;
pub mod recipe;
mod routed;
mod run;
mod run_folder;
mod schedule;
mod spill;
mod state;
mod step;
mod stored_rows;
mod strategies;
mod streams;
mod task_losses;
mod temperature_sampling;
mod tensorboard;
mod token_ids;
mod trainer;

pub use ada_merging::{AdaMerged, AdaMerging, Factors, entropy, task_vectors, trimmed};
pub use batch::{Batch, Describe};
pub use batches::{Batches, Cursor};
pub use bootstrap::{Bounds, bootstrap};
pub use clip::clip_grad_norm;
pub use config::TrainConfig;
pub use data::{Dataset, Example, held_out};
pub use early_stop::{Stop, less_is_better};
pub use evaluate::{Prediction, base_vectors, evaluate};
pub use events::{Event, Fanout, JsonLines, LossWeight, Sink};
pub use formats::{Row, read_tsv, sample};
pub use length_groups::length_groups;
pub use library::{Card, Library};
pub use methods::Methods;
pub use metrics::{
    Interval, accuracy, interval, macro_f1, mean_absolute_error, scores, sign_accuracy, spearman,
};
pub use not_finite::OnNan;
pub use objective::{
    Classification, MaskedTokens, Metric, NextToken, Objective, Regression, Said, Shown,
    SpecialTokens, sentence_vectors,
};
pub use optim::{Optimizer, OptimizerConfig};
pub use passes::{Combine, Passes, StepLoss};
pub use recipe::{Phase, Recipe};
pub use run::{Examples, Work, restore, restore_at, run, run_in};
pub use run_folder::RunFolder;
pub use schedule::{Decay, Schedule, Warmup};
pub use step::{Plain, StepContext, StepGradients, StepRule};
pub use strategies::joint;
pub use strategies::{
    AGem, AccuracyMatrix, Adaptation, As, Continual, Convention, Ewc, Gem, Growth, InferredTask,
    Job, Joint, Labels, Learner, Lwf, Maml, ModulePerTask, Naive, Order, PerTask, Replay, Reptile,
    RoutingOnly, Si, Strategy, TaskContext, TaskInference,
};
pub use temperature_sampling::Sampling;
pub use tensorboard::TensorBoard;
pub use token_ids::TokenIds;
pub use trainer::Trainer;

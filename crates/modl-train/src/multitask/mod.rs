//! Joint multitask optimisation (survey §6.1): how the losses of several tasks become one step.
//!
//! The functions here work on numbers and gradients alone and can be used in any loop; the strategies
//! of the same names use them in recipes.

mod cagrad;
mod dwa;
mod gradnorm;
mod gram;
mod mgda;
mod nash_mtl;
mod pcgrad;
mod scalarisation;
mod simplex;
mod task_gradients;
mod temperature_sampling;
mod uncertainty;

pub use cagrad::cagrad;
pub use dwa::dwa_weights;
pub use gradnorm::gradnorm_slopes;
pub use gram::Gram;
pub use mgda::mgda;
pub use nash_mtl::{nash_bargain, nash_mtl};
pub use pcgrad::pcgrad;
pub use scalarisation::Scalarised;
pub use task_gradients::TaskGradients;
pub use temperature_sampling::Sampling;
pub use uncertainty::Form;

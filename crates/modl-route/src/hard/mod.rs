//! Hard routing that is learned: one module each, or a few, chosen by draws (survey §4.2.2).

mod agents;
mod annealing;
mod concrete_bernoulli;
mod draws;
mod gumbel_softmax;
mod modular_network;
mod path_net;
mod policy;
mod reinforce;
mod relax;
mod reward;
mod routing_network;

pub use agents::Agent;
pub use annealing::{Annealing, AnnealingShape};
pub use concrete_bernoulli::{ConcreteBernoulli, GateAtTest};
pub use gumbel_softmax::GumbelSoftmax;
pub use modular_network::{ModularNetwork, keep_better};
pub use path_net::{PathNet, next_task, next_task_after, off_path, winning_path};
pub use reinforce::{Baseline, Reinforce};
pub use relax::Relax;
pub use reward::Reward;
pub use routing_network::RoutingNetwork;

use modl_core::{Registry, Result};

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<GumbelSoftmax>("Relaxed categorical draws", "Jang et al. 2016", "4.2.2")?;
    r.register::<ConcreteBernoulli>(
        "A relaxed gate for each module",
        "Maddison et al. 2016",
        "4.2.2",
    )?;
    r.register::<Reinforce>("Draws that learn from rewards", "Williams 1992", "4.2.2")?;
    r.register::<Relax>("REINFORCE with a control variate", "Grathwohl et al. 2017", "4.2.2")?;
    r.register::<RoutingNetwork>("Tabular agents by task", "Rosenbaum et al. 2018", "4.2.2")?;
    r.register::<PathNet>("A tournament of paths", "Fernando et al. 2017", "4.2.2")?;
    r.register::<ModularNetwork>("A controller trained by EM", "Kirsch et al. 2018", "4.2.2")?;
    Ok(())
}

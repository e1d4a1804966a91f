//! Routing networks: at each site an agent for each task chooses a module, and learns from rewards.
//!
//! Each site has a table with a row for each task ([`Agent`]: WPL, REINFORCE or Q-learning; the
//! formulas stand there), and so the agents of a network are many and know no input. The return of a
//! choice is the row's reward ([`Reward`]) and ρ times the share of this module in past choices of
//! all tasks at this site, which draws tasks to the same modules (`collaboration`). In training a row
//! is routed by (1 − ε) π + ε⁄m; in evaluation by the largest of the table. The tables are buffers,
//! learned without gradients: no loss has to be weighed.
//!
//! With the default reward the agents of early steps judge modules that have not learned anything yet;
//! what is chosen most then learns most, and policies may collapse in the first few hundred steps.
//!
//! Rosenbaum, Klinger, Riemer 2018, arXiv 1711.01239 (tabular agents by task, WPL, the
//! collaboration reward); survey §4.2.2.
//!
//! ```toml
//! router = { type = "routing_network", tasks = ["pos", "ner"], agent = "wpl", collaboration = 0.3 }
//! ```

use modl_core::{
    Bank, Context, Device, Error, Kind, Outcome, Result, Router, RouterConfig, Routing, Scope,
    Seed, Signal, Site, Tensor, Weights, no_grad,
};
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::agents::{Agent, Row, largest};
use super::policy::one_each;
use super::reward::Reward;

/// Tabular agents by task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoutingNetwork {
    /// The names of the tasks, each with an agent of its own. To be given.
    pub tasks: Vec<String>,
    /// The kind of label that names the task of a row. Default: `task`.
    pub by: String,
    /// How agents learn. Default: `wpl`.
    pub agent: Agent,
    /// η of the table, in (0, 1]; also the least weight of a new return in the mean of past ones.
    /// Default: 0.05.
    pub rate: f64,
    /// ε: the share of choices in training that are made without regard to π, in [0, 1]. Default:
    /// 0.1.
    pub epsilon: f64,
    /// The reward of a row. Default: `neg_loss`.
    pub reward: Reward,
    /// ρ of the collaboration reward, 0 or above. Default: 0.
    pub collaboration: f64,
    /// How much of the shares of past choices is kept in a step, in [0, 1). Default: 0.99.
    pub memory: f64,
    /// Where the order comes from in which equal modules are taken. Default: 0.
    pub seed: u64,
}

impl Default for RoutingNetwork {
    fn default() -> Self {
        RoutingNetwork {
            tasks: Vec::new(),
            by: "task".into(),
            agent: Agent::Wpl,
            rate: 0.05,
            epsilon: 0.1,
            reward: Reward::NegLoss,
            collaboration: 0.0,
            memory: 0.99,
            seed: 0,
        }
    }
}

impl RoutingNetwork {
    fn check(&self) -> Result<()> {
        for (key, fits, range) in [
            ("rate", self.rate > 0.0 && self.rate <= 1.0, "above 0, and 1 at most"),
            ("epsilon", (0.0..=1.0).contains(&self.epsilon), "from 0 to 1"),
            (
                "collaboration",
                self.collaboration >= 0.0 && self.collaboration.is_finite(),
                "0 or above",
            ),
            ("memory", (0.0..1.0).contains(&self.memory), "0 or above, and below 1"),
        ] {
            if !fits {
                let key = format!("routing_network.{key}");
                return Err(Error::invalid(key, format!("is to be {range}")));
            }
        }
        if let Some(twice) =
            self.tasks.iter().enumerate().find(|(i, t)| self.tasks.iter().take(*i).any(|u| u == *t))
        {
            return Err(Error::invalid(
                "routing_network.tasks",
                format!("has `{}` twice", twice.1),
            ));
        }
        Ok(())
    }
}

impl RouterConfig for RoutingNetwork {
    fn kind(&self) -> &'static str {
        "routing_network"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, _: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        self.check()?;
        if self.tasks.is_empty() {
            let problem = "is to name the tasks: tasks = [\"pos\", \"ner\"]";
            return Err(Error::invalid("routing_network.tasks", problem));
        }
        if bank.is_empty() {
            return Err(Error::invalid("routing_network", "there is no module to choose from"));
        }
        let (t, m) = (self.tasks.len() as i64, bank.len() as i64);
        let full = |shape: &[i64], v: f64| Tensor::full(shape, v, Kind::Double, Device::Cpu);
        Ok(Box::new(RoutingNetworkRouter {
            config: self.clone(),
            table: scope.buffer("table", &full(&[t, m], self.agent.start(bank.len()))?)?,
            values: scope.buffer("values", &full(&[t, m], 0.0)?)?,
            visits: scope.buffer("visits", &full(&[t, m], 0.0)?)?,
            shares: scope.buffer("shares", &full(&[m], 1.0 / m as f64)?)?,
            path: scope.path().to_owned(),
        }))
    }
}

#[derive(Debug)]
struct RoutingNetworkRouter {
    config: RoutingNetwork,
    /// π, ℓ or Q of each task, `[tasks, modules]`.
    table: Tensor,
    /// The mean return of each choice, `[tasks, modules]`.
    values: Tensor,
    /// How often each was made, `[tasks, modules]`.
    visits: Tensor,
    /// The share of each module in past choices, `[modules]`.
    shares: Tensor,
    path: String,
}

impl Router for RoutingNetworkRouter {
    fn kind(&self) -> &'static str {
        "routing_network"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let m = bank.len();
        let (places, table) = (self.places(cx)?, self.table.to_vec::<f64>()?);
        let mut rng = cx.draw(&self.path).rng();
        let mut chosen = Vec::with_capacity(places.len());
        for task in &places {
            let row = table.get(task * m..(task + 1) * m).unwrap_or_default();
            let rank = self.rank(*task, m);
            chosen.push(if cx.train {
                pick(&self.behaviour(row, &rank), rng.r#gen())
            } else {
                largest(row, &rank)
            } as i64);
        }
        let index = Tensor::from_slice(&chosen, &[chosen.len() as i64, 1], x.x.device())?;
        let kind = if x.x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let like = Tensor::zeros(&[1], kind, x.x.device())?;
        one_each(index, &like, m)
    }

    fn learn(&self, routing: &Routing, outcome: &Outcome) -> Result<()> {
        let Weights::Sparse { index, .. } = &routing.weights else { return Ok(()) };
        let m = routing.modules;
        let counts = outcome.chosen.map(Tensor::to_vec::<f64>).transpose()?;
        let rewards = self.config.reward.of(outcome.loss)?.to_vec::<f64>()?;
        let (places, chosen) = (self.places(outcome.cx)?, index.to_vec::<i64>()?);
        let mut table = self.table.to_vec::<f64>()?;
        let mut values = self.values.to_vec::<f64>()?;
        let mut visits = self.visits.to_vec::<f64>()?;
        let shares = self.shares.to_vec::<f64>()?;
        let before = table.clone();
        let (mut used, mut rows) = (vec![0.0; m], 0.0);
        for (r, ((task, a), reward)) in places.iter().zip(&chosen).zip(rewards).enumerate() {
            if counts.as_ref().is_some_and(|c| c.get(r).is_some_and(|c| *c == 0.0)) {
                continue;
            }
            let (a, at) = (usize::try_from(*a).unwrap_or(usize::MAX), task * m..(task + 1) * m);
            let (Some(share), Some(used), Some(old)) =
                (shares.get(a), used.get_mut(a), before.get(at.clone()))
            else {
                continue;
            };
            *used += 1.0;
            rows += 1.0;
            let drawn_with = self.behaviour(old, &self.rank(*task, m)).get(a).copied();
            if let (Some(table), Some(values), Some(visits)) =
                (table.get_mut(at.clone()), values.get_mut(at.clone()), visits.get_mut(at))
            {
                let r = reward + self.config.collaboration * share;
                let drawn_with = drawn_with.unwrap_or(0.0);
                let mut row = Row { table, values, visits };
                self.config.agent.learn(&mut row, a, r, drawn_with, self.config.rate);
            }
        }
        if rows == 0.0 {
            return Ok(());
        }
        let keep = self.config.memory;
        let new = shares.iter().zip(used).map(|(s, u)| keep * s + (1.0 - keep) * u / rows);
        let new: Vec<f64> = new.collect();
        for (kept, new) in [
            (&self.table, &table),
            (&self.values, &values),
            (&self.visits, &visits),
            (&self.shares, &new),
        ] {
            let new = Tensor::from_slice(new, &kept.size(), Device::Cpu)?;
            no_grad(|| kept.clone().copy_from(&new.to_device(kept.device())?))?;
        }
        Ok(())
    }

    /// Probabilities and shares of the first modules keep their ratios, and a new one has an even
    /// share; where the table holds no probabilities, a new module starts as all did.
    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let (t, old) = (self.table.len_of(0), self.table.len_of(1));
        let new = modules as i64 - old;
        let part = old as f64 / modules.max(1) as f64;
        let mut more = |name: &str, kept: &Tensor, shape: &[i64], start: f64| {
            let rows = Tensor::full(shape, start, kept.kind(), kept.device())?;
            scope.replace(name, &Tensor::cat(&[kept.clone(), rows], -1)?)
        };
        let start = self.config.agent.start(modules);
        let table = match self.config.agent {
            Agent::Wpl => self.table.mul_scalar(part)?,
            _ => self.table.clone(),
        };
        let shares = self.shares.mul_scalar(part)?;
        Ok(Box::new(RoutingNetworkRouter {
            config: self.config.clone(),
            table: more("table", &table, &[t, new], start)?,
            values: more("values", &self.values, &[t, new], 0.0)?,
            visits: more("visits", &self.visits, &[t, new], 0.0)?,
            shares: more("shares", &shares, &[new], 1.0 / modules.max(1) as f64)?,
            path: self.path.clone(),
        }))
    }
}

impl RoutingNetworkRouter {
    /// The row of the table for each row of the batch.
    fn places(&self, cx: &Context) -> Result<Vec<usize>> {
        let tasks = &self.config.tasks;
        let place = |name: &std::sync::Arc<str>| {
            let at = tasks.iter().position(|t| **t == **name);
            at.ok_or_else(|| Error::unknown("task of the routing network", name, tasks))
        };
        cx.labels(&self.config.by)?.iter().map(place).collect()
    }

    /// (1 − ε) π + ε ⁄ m.
    fn behaviour(&self, row: &[f64], rank: &[usize]) -> Vec<f64> {
        let epsilon = self.config.epsilon;
        let p = self.config.agent.policy(row, rank);
        p.iter().map(|p| (1.0 - epsilon) * p + epsilon / row.len() as f64).collect()
    }

    /// The order in which equal modules are taken for a task.
    fn rank(&self, task: usize, m: usize) -> Vec<usize> {
        let seed = Seed(self.config.seed).child(&self.path).nth(task as u64);
        let mut keyed: Vec<(u64, usize)> = (0..m).map(|j| (seed.nth(j as u64).0, j)).collect();
        keyed.sort_unstable();
        keyed.into_iter().map(|(_, j)| j).collect()
    }
}

/// The place at which the running sum of `p` passes `u`.
fn pick(p: &[f64], mut u: f64) -> usize {
    for (j, p) in p.iter().enumerate() {
        if u < *p {
            return j;
        }
        u -= p;
    }
    // Rounding has left something over: the last with any weight.
    p.iter().rposition(|p| *p > 0.0).unwrap_or(0)
}

//! PathNet: paths through the modules compete, and the better one overwrites the other.
//!
//! A path is a genotype: for each site `active` genes, numbers of modules, which run together for all
//! rows; a module that is named twice runs once. Of a population two are drawn; one is the path of the
//! first `evaluate_for` steps, the other that of the next. Whichever had the lower mean loss
//! overwrites the other, whose every gene is then, with probability 1 ⁄ (N·L) for N genes at L sites,
//! moved by a number drawn from −2, …, 2, mod m. In evaluation the winner of the last tournament is
//! the path.
//!
//! Each site has a router with its own genes. All draw the same pairs, for the same steps, and hear
//! the same losses, and so they agree who won: together their genes are the paper's genotypes, if
//! `layers` says how many sites there are. (One router for all sites gives them all the same genes.)
//! Nothing else is drawn: α in training depends on the step alone, so that passes of one batch have
//! one path.
//!
//! After a task: [`winning_path`] says which modules are to be kept, and [`off_path`] gives the
//! patterns of all other parameters, which are the ones to train then. [`next_task`] lets these begin
//! again from a new seed, and the population with them, as the paper does; a phase of a recipe asks for
//! it with `next_task = true`.
//!
//! Fernando et al. 2017, arXiv 1701.08734 (m = 10 to 20, N = 3 or 4, 64 genotypes); survey §4.2.2.
//!
//! ```toml
//! router = { type = "path_net", active = 3, layers = 12, evaluate_for = 50 }
//! ```

use std::collections::BTreeMap;

use modl_core::{
    Bank, Context, Device, Error, Modular, ModularLayer, Outcome, Result, Router, RouterConfig,
    Routing, Scope, Seed, Select, Signal, Site, Tensor, Weights, no_grad,
};
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A tournament of paths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PathNet {
    /// N, the genes of a site: at most so many modules run. Default: 3.
    pub active: usize,
    /// L, the number of sites, which only the mutation depends on. Default: 1.
    pub layers: usize,
    /// The number of genotypes, 2 or more. Default: 64.
    pub population: usize,
    /// Steps for which a path is tried in a tournament. Default: 50.
    pub evaluate_for: u64,
    /// The weight of a module: 1 each, as in the paper, or where `average` 1 ⁄ (number of modules
    /// that run). Default: false.
    pub average: bool,
    /// Where pairs are drawn from, the same at all sites. Default: 0.
    pub seed: u64,
}

impl Default for PathNet {
    fn default() -> Self {
        PathNet { active: 3, layers: 1, population: 64, evaluate_for: 50, average: false, seed: 0 }
    }
}

impl RouterConfig for PathNet {
    fn kind(&self) -> &'static str {
        "path_net"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, _: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        for (key, value, least) in [
            ("active", self.active as u64, 1),
            ("layers", self.layers as u64, 1),
            ("population", self.population as u64, 2),
            ("evaluate_for", self.evaluate_for, 1),
        ] {
            if value < least {
                let key = format!("path_net.{key}");
                return Err(Error::invalid(key, format!("is {value}, is to be {least} or more")));
            }
        }
        if bank.is_empty() {
            return Err(Error::invalid("path_net", "there is no module to choose from"));
        }
        let shape = [self.population as i64, self.active as i64];
        let seed = scope.seed().child("genes");
        let first = || genes(&shape, bank.len(), seed, Device::Cpu);
        let zero = Tensor::from_slice(&[0i64], &[1], Device::Cpu)?;
        Ok(Box::new(PathNetRouter {
            config: self.clone(),
            seed: scope.seed(),
            population: scope.buffer_drawn("population", &shape, first)?,
            leader: scope.buffer("leader", &zero)?,
            tournament: scope.buffer("tournament", &zero)?,
            fitness: scope
                .buffer("fitness", &Tensor::from_slice(&[0f64; 4], &[2, 2], Device::Cpu)?)?,
        }))
    }
}

#[derive(Debug, Clone)]
struct PathNetRouter {
    config: PathNet,
    /// Of this site's mutations.
    seed: Seed,
    /// Genes, `[population, active]`.
    population: Tensor,
    /// The winner of the last tournament, `[1]`.
    leader: Tensor,
    /// The number of the tournament that is on, `[1]`.
    tournament: Tensor,
    /// For both paths the sum of losses and the number of rows, `[2, 2]`.
    fitness: Tensor,
}

/// What the buffers say.
#[derive(Debug)]
struct State {
    population: Vec<Vec<i64>>,
    leader: usize,
    tournament: u64,
    fitness: [[f64; 2]; 2],
}

impl Router for PathNetRouter {
    fn kind(&self) -> &'static str {
        "path_net"
    }

    fn route(&self, _: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let m = bank.len();
        let mut state = self.state(m)?;
        let path = if cx.train {
            let (tournament, turn) = self.at(cx.step);
            self.advance(&mut state, tournament, m);
            self.pair(tournament)[turn]
        } else {
            // A tournament that is over, and was not followed by another step.
            self.settle(&mut state, m);
            state.leader
        };
        let mut genes = state.population.get(path).cloned().unwrap_or_default();
        genes.sort_unstable();
        genes.dedup();
        let weight = if self.config.average { 1.0 / genes.len().max(1) as f64 } else { 1.0 };
        let modules = genes.iter().flat_map(|g| usize::try_from(*g));
        Ok(Routing::new(Weights::Fixed(modules.map(|j| (j, weight)).collect()), m))
    }

    fn learn(&self, routing: &Routing, outcome: &Outcome) -> Result<()> {
        let mut state = self.state(routing.modules)?;
        let (tournament, turn) = self.at(outcome.cx.step);
        self.advance(&mut state, tournament, routing.modules);
        let losses = outcome.loss.to_vec::<f64>()?;
        let counts = outcome.chosen.map(Tensor::to_vec::<f64>).transpose()?;
        let [sum, rows] = &mut state.fitness[turn];
        for (r, loss) in losses.iter().enumerate() {
            let counted = counts.as_ref().and_then(|c| c.get(r)).is_none_or(|c| *c > 0.0);
            if counted {
                *sum += loss;
                *rows += 1.0;
            }
        }
        self.write(&state)
    }

    fn grown(&self, _: usize, _: &mut Scope) -> Result<Box<dyn Router>> {
        // Genes that are there stay in range; mutations reach the new module.
        Ok(Box::new(self.clone()))
    }
}

impl PathNetRouter {
    /// The tournament of a step, and whose turn it is.
    fn at(&self, step: u64) -> (u64, usize) {
        let turn = step / self.config.evaluate_for.max(1);
        (turn / 2, usize::from(turn % 2 == 1))
    }

    /// Two different places in the population.
    fn pair(&self, tournament: u64) -> [usize; 2] {
        let mut rng = Seed(self.config.seed).child("path_net").nth(tournament).rng();
        let n = self.config.population.max(2);
        let first = rng.gen_range(0..n);
        let second = rng.gen_range(0..n - 1);
        [first, if second < first { second } else { second + 1 }]
    }

    /// The buffers, with genes in range whatever is in them.
    fn state(&self, modules: usize) -> Result<State> {
        let m = modules.max(1) as i64;
        let genes = self.population.to_vec::<i64>()?;
        let genes: Vec<i64> = genes.iter().map(|g| g.rem_euclid(m)).collect();
        let population: Vec<Vec<i64>> =
            genes.chunks(self.config.active.max(1)).map(<[i64]>::to_vec).collect();
        let first =
            |t: &Tensor| -> Result<i64> { Ok(t.to_vec::<i64>()?.first().copied().unwrap_or(0)) };
        let leader = first(&self.leader)?.rem_euclid(population.len().max(1) as i64);
        let fitness = match self.fitness.to_vec::<f64>()?.as_slice() {
            &[a, n, b, k] => [[a, n], [b, k]],
            _ => [[0.0; 2]; 2],
        };
        let tournament = first(&self.tournament)?.unsigned_abs();
        Ok(State { population, leader: leader as usize, tournament, fitness })
    }

    fn write(&self, s: &State) -> Result<()> {
        let one = |v: i64| Tensor::from_slice(&[v], &[1], Device::Cpu);
        let shape = self.population.size();
        for (kept, new) in [
            (&self.population, Tensor::from_slice(&s.population.concat(), &shape, Device::Cpu)?),
            (&self.leader, one(s.leader as i64)?),
            (&self.tournament, one(s.tournament as i64)?),
            (&self.fitness, Tensor::from_slice(&s.fitness.concat(), &[2, 2], Device::Cpu)?),
        ] {
            no_grad(|| kept.clone().copy_from(&new.to_device(kept.device())?))?;
        }
        Ok(())
    }

    /// Ends the tournament that is on, if another one has begun.
    fn advance(&self, state: &mut State, tournament: u64, modules: usize) {
        if state.tournament != tournament {
            self.settle(state, modules);
            state.fitness = [[0.0; 2]; 2];
            state.tournament = tournament;
        }
    }

    /// The winner overwrites the loser, where both have been tried.
    fn settle(&self, state: &mut State, modules: usize) {
        let [[a, n], [b, k]] = state.fitness;
        if n <= 0.0 || k <= 0.0 {
            return;
        }
        let [first, second] = self.pair(state.tournament);
        // Of two that are equal a coin decides, the same at all sites.
        let coin = Seed(self.config.seed).child("coin").nth(state.tournament).0.is_multiple_of(2);
        let (a, b) = (a / n, b / k);
        let (winner, loser) =
            if a < b || (a == b && coin) { (first, second) } else { (second, first) };
        let mut genes = state.population.get(winner).cloned().unwrap_or_default();
        mutate(
            &mut genes,
            1.0 / (self.config.active * self.config.layers).max(1) as f64,
            modules,
            self.seed.child("mutation").nth(state.tournament),
        );
        if let Some(place) = state.population.get_mut(loser) {
            *place = genes;
        }
        state.leader = winner;
        state.fitness = [[0.0; 2]; 2];
    }
}

/// Moves each gene with probability `p` by a number from −2 to 2, mod m.
fn mutate(genes: &mut [i64], p: f64, modules: usize, seed: Seed) {
    let (mut rng, m) = (seed.rng(), modules.max(1) as i64);
    for gene in genes {
        if rng.r#gen::<f64>() < p {
            *gene = (*gene + rng.gen_range(-2..=2)).rem_euclid(m);
        }
    }
}

/// The modules of the winning path of each site, by the sites' paths, in the bank's order.
///
/// # Errors
/// Where a site has another router.
pub fn winning_path(model: &Modular) -> Result<BTreeMap<String, Vec<String>>> {
    let (mut path, cx) = (BTreeMap::new(), Context::eval()); // one pass, as a shared router wants
    for site in model.modular_sites() {
        let Some(layer) = model.layer(&site) else { continue };
        let kind = layer.router().kind();
        // A place that follows one router for all sites says `shared`.
        if !["path_net", "shared"].contains(&kind) {
            let problem = format!("is routed by `{kind}`, which has no winning path");
            return Err(Error::invalid(&site.path, problem));
        }
        path.insert(site.path.clone(), names(layer, &cx)?);
    }
    Ok(path)
}

/// What a layer's router chooses in evaluation, whatever x is.
fn names(layer: &ModularLayer, cx: &Context) -> Result<Vec<String>> {
    let nothing = Signal::from(Tensor::from_slice(&[0f32], &[1, 1], Device::Cpu)?);
    let routing = layer.router().route(&nothing, &layer.bank, cx)?;
    let names = layer.bank.names();
    Ok(routing.support()?.into_iter().filter_map(|j| names.get(j).cloned()).collect())
}

/// The patterns of the parameters of all modules that are not on the winning path.
///
/// # Errors
/// As [`winning_path`].
pub fn off_path(model: &Modular) -> Result<Vec<String>> {
    Ok(beside(model, &winning_path(model)?))
}

fn beside(model: &Modular, path: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut patterns = Vec::new();
    for site in model.modular_sites() {
        let Some(layer) = model.layer(&site) else { continue };
        let kept = path.get(&site.path);
        for name in layer.bank.names() {
            if !kept.is_some_and(|kept| kept.contains(name)) {
                patterns.push(format!("modules.{name}.{}.*", site.path));
            }
        }
    }
    patterns
}

/// A population by lot, each gene one of so many modules.
fn genes(shape: &[i64], modules: usize, seed: Seed, device: Device) -> Result<Tensor> {
    let mut rng = seed.rng();
    let drawn = (0..shape.iter().product()).map(|_| rng.gen_range(0..modules as i64));
    Tensor::from_slice(&drawn.collect::<Vec<i64>>(), shape, device)
}

/// What the paper does between two tasks: the modules of the winning path stay as they are, all others
/// begin again from `seed`, and so does the population, whose routers hear no losses of the last task
/// any more. Gives the patterns of what the next task is to train: with all else frozen the path is
/// kept, and a new path may go through its modules.
///
/// # Errors
/// As [`winning_path`]; then nothing has been changed.
pub fn next_task(model: &Modular, seed: Seed) -> Result<Vec<String>> {
    next_task_after(model, &[winning_path(model)?], seed)
}

/// [`next_task`] after several tasks, with the winning path of each: the modules of all stay.
///
/// # Errors
/// Where nothing is known of a module that the model has; then nothing has been changed.
pub fn next_task_after(
    model: &Modular,
    paths: &[BTreeMap<String, Vec<String>>],
    seed: Seed,
) -> Result<Vec<String>> {
    let mut path: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for site in model.modular_sites() {
        let of_site = paths.iter().filter_map(|p| p.get(&site.path)).flatten().cloned();
        path.insert(site.path.clone(), of_site.collect());
    }
    let mut free = beside(model, &path);
    let mut new: Vec<(Tensor, Tensor)> = Vec::new();
    for name in model.modules() {
        for (part, fresh) in model.fresh_parameters(name, seed.child("modules"))?.iter() {
            let of = |site: &&String| part.starts_with(&format!("{site}."));
            let on = |kept: &Vec<String>| kept.iter().any(|k| k == name);
            // What sites share is kept where the module is on the path of any.
            let kept = match path.keys().filter(of).max_by_key(|site| site.len()) {
                Some(site) => path.get(site).is_some_and(on),
                None => path.values().any(on),
            };
            if !kept {
                let full = format!("modules.{name}.{part}");
                let own = model.params().get(&full)?;
                if !free.iter().any(|pattern| Select::new(pattern.as_str()).matches(&full)) {
                    free.push(full); // shared by sites
                }
                new.push((own.clone(), fresh.tensor().detach()?));
            }
        }
    }
    let banks: BTreeMap<String, usize> = model
        .modular_sites()
        .iter()
        .filter_map(|site| Some((site.path.clone(), model.layer(site)?.bank.len())))
        .collect();
    let most = banks.values().copied().max().unwrap_or(0);
    for (name, p) in model.params().iter() {
        let Some((router, buffer)) = name.strip_prefix("routers.").and_then(|n| n.rsplit_once('.'))
        else {
            continue;
        };
        let t = p.tensor();
        let fresh = match buffer {
            "population" => {
                let modules = banks.get(router).copied().unwrap_or(most).max(1);
                genes(&t.size(), modules, seed.child("genes").child(router), t.device())?
            }
            "leader" | "tournament" | "fitness" => t.zeros_like()?,
            _ => continue,
        };
        new.push((t.clone(), fresh));
    }
    for (own, fresh) in new {
        no_grad(|| own.clone().copy_from(&fresh))?;
    }
    Ok(free)
}

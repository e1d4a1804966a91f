//! Random routing: K is drawn, all sets of k modules alike, and αⱼ = 1⁄k for j ∈ K.
//!
//! Nothing is learned: it is the control at which a learned router shows whether what it learned is
//! worth anything (survey §4.2.1). For each batch, each row or each token there is a draw of its own
//! at each site. Draws come from the seed of the context, which in training is another one for each
//! step, from the `seed` here, and from the position in the batch.
//!
//! ```toml
//! router = { type = "random", k = 2, level = "token" }
//! ```

use modl_core::{
    Bank, Context, Device, Error, Init, Kind, Level, Result, Router, RouterConfig, Routing, Scope,
    Seed, Signal, Site, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Input;

/// What routers that draw their choices in training do in evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evaluation {
    /// They draw as in training.
    Draw,
    /// All modules with weight 1⁄m: the expected choice.
    All,
}

/// k modules by lot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Random {
    /// How many modules are active. Default: 1.
    pub k: usize,
    /// What has a draw of its own: the batch (`static`), a row (`example`) or a `token`. Default:
    /// `example`.
    pub level: Level,
    /// What happens in evaluation. Default: `draw`.
    pub evaluation: Evaluation,
    /// A part of the draws. Default: 0.
    pub seed: u64,
}

impl Default for Random {
    fn default() -> Self {
        Random { k: 1, level: Level::Example, evaluation: Evaluation::Draw, seed: 0 }
    }
}

impl Random {
    /// The router under the name of a method that is made of it. Where passes go `by_turns`, those of
    /// a batch have different modules as long as there are any.
    pub(crate) fn router(
        self,
        kind: &'static str,
        site: &Site,
        bank: &Bank,
        path: &str,
        by_turns: bool,
    ) -> Result<Box<dyn Router>> {
        if self.k == 0 || self.k > bank.len() {
            let problem = format!("is {}, there are {} modules to choose from", self.k, bank.len());
            return Err(Error::invalid(format!("{kind}.k"), problem));
        }
        if self.level == Level::Token {
            Input::Tokens.check(site)?;
        }
        Ok(Box::new(RandomRouter { kind, config: self, path: path.to_owned(), by_turns }))
    }
}

impl RouterConfig for Random {
    fn kind(&self) -> &'static str {
        "random"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        self.router("random", site, bank, scope.path(), false)
    }
}

#[derive(Debug, Clone)]
struct RandomRouter {
    kind: &'static str,
    config: Random,
    /// Where this router's draws are.
    path: String,
    /// Whether passes of a batch share an order of the modules and take the next ones in turn.
    by_turns: bool,
}

impl Router for RandomRouter {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let (m, k) = (bank.len(), self.config.k);
        if !cx.train && self.config.evaluation == Evaluation::All {
            let all = (0..m).map(|j| (j, 1.0 / m as f64)).collect();
            return Ok(Routing::new(Weights::Fixed(all), m).normalised());
        }
        let lots = |units: i64| match self.by_turns {
            true => {
                let (pass, seed) = cx.pass(&self.path);
                turn(units, m, k, pass, seed.nth(self.config.seed))
            }
            false => draw(units, m, k, cx.draw(&self.path).nth(self.config.seed)),
        };
        let units = match self.config.level {
            Level::Static => {
                let chosen = lots(1)?.to_vec::<i64>()?;
                let chosen = chosen.into_iter().flat_map(usize::try_from);
                let all = chosen.map(|j| (j, 1.0 / k as f64)).collect();
                return Ok(Routing::new(Weights::Fixed(all), m).normalised());
            }
            Level::Example => vec![x.rows()],
            Level::Token if x.x.dim() == 3 => vec![x.rows(), x.x.len_of(1)],
            Level::Token => {
                let problem =
                    format!("a draw for each token wants [batch, seq, dim], x is {:?}", x.x);
                return Err(Error::invalid(format!("{}.level", self.kind), problem));
            }
        };
        let index = lots(units.iter().product())?;
        let shape: Vec<i64> = units.into_iter().chain([k as i64]).collect();
        let index = index.reshape(&shape)?.to_device(x.x.device())?;
        let weight = Tensor::full(&shape, 1.0 / k as f64, Kind::Float, x.x.device())?;
        Ok(Routing::new(Weights::Sparse { index, weight }, m).normalised())
    }

    fn grown(&self, _: usize, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(self.clone()))
    }
}

/// k different ones of m modules for each of `units`, `[units, k]`: the largest of m uniform numbers.
pub(super) fn draw(units: i64, m: usize, k: usize, seed: Seed) -> Result<Tensor> {
    let lots = Init::Uniform(1.0).tensor(&[units, m as i64], seed, Kind::Double, Device::Cpu)?;
    lots.topk(k as i64, -1).map(|(_, index)| index)
}

/// The part of an order by lot of m modules that is the turn of a pass, k of them, `[units, k]`. After
/// the m ⁄ k passes for which there is enough comes another order.
fn turn(units: i64, m: usize, k: usize, pass: u64, seed: Seed) -> Result<Tensor> {
    let turns = (m / k.max(1)).max(1) as u64;
    let order = draw(units, m, m, seed.nth(pass / turns))?;
    order.narrow(-1, (pass % turns) as i64 * k as i64, k as i64)
}

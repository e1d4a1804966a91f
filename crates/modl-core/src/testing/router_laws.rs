//! The laws of routing.

use super::{Findings, RouterClaims, Sum, TinyBackbone, noise_like, perturb, standins};
use crate::{
    Bank, Context, Device, Error, Kind, Level, LowRank, Modular, ParamStore, Registry, Result,
    Router, RouterConfig, Routing, Scope, Seed, Select, Signal, Site, SiteKind, Targets, Tensor,
    Weights,
};

const SEED: Seed = Seed(101);
const DIM: i64 = 8;
const LEN: i64 = 5;
const NAMES: [&str; 3] = ["a", "b", "c"];

/// Puts a router through the laws of routing over three modules named `a`, `b` and `c`:
/// α fits the bank, is finite, sums to 1 and is as sparse as claimed; the same input gives the same
/// α; rows are routed alone as in a batch, and in any order, unless the router looks at the batch;
/// an empty batch and one of a single token pass, and one module to choose from is enough or too few
/// in words; a seed gives the same draws in training, and evaluation draws nothing; an α of a token
/// knows no later token unless that is claimed; scores that are no numbers are an error; gradients
/// reach ρ if it learns; low precision does not change its arithmetic; growing works or is refused
/// in words; a file brings back the same routing, by the name under which `registry` has the
/// router.
///
/// # Panics
/// With all that does not hold.
pub fn check_router(
    make: &dyn Fn() -> Box<dyn RouterConfig>,
    claims: &RouterClaims,
    registry: &Registry,
) {
    let kind = make().kind();
    let t = Laws { make, claims, registry };
    let mut findings = Findings::default();
    findings.expect("α fits the bank, is finite and as sparse as claimed", t.fits());
    findings.expect("the same input gives the same α", t.deterministic());
    findings.expect("a row alone is routed as in a batch, in any order", t.row_by_row());
    findings.expect("an empty batch passes", t.empty_batch());
    findings.expect("a single token passes", t.single_token());
    findings.expect("one module is enough, or refused in words", t.one_module());
    findings.expect("training draws by its seed, as claimed", t.draws());
    findings.expect("a token is routed without later ones, unless claimed", t.looks_ahead());
    findings.expect("scores that are no numbers are an error", t.not_a_number());
    findings.expect("gradients reach the router's parameters, as claimed", t.gradients());
    findings.expect("bf16 input is routed with f32 arithmetic", t.low_precision());
    findings.expect("growing works or is refused", t.growing());
    findings.expect("save and load bring back the same routing", t.save_and_load());
    findings.conclude(&format!("router `{kind}`"));
}

struct Laws<'a> {
    make: &'a dyn Fn() -> Box<dyn RouterConfig>,
    claims: &'a RouterClaims,
    registry: &'a Registry,
}

struct Made {
    router: Box<dyn Router>,
    bank: Bank,
    params: ParamStore,
}

fn bank(names: &[&str]) -> Result<Bank> {
    let mut bank = Bank::new();
    for name in names {
        let factor = |part: &str, shape: &[i64]| {
            crate::Init::Normal(0.5).tensor(
                shape,
                SEED.child(name).child(part),
                Kind::Float,
                Device::Cpu,
            )
        };
        let module =
            LowRank { down: factor("down", &[2, DIM])?, up: factor("up", &[DIM, 2])?, scale: 1.0 };
        bank.insert(*name, Box::new(module))?;
    }
    Ok(bank)
}

impl Laws<'_> {
    fn site(&self) -> Site {
        Site { path: "site".into(), kind: SiteKind::Linear, input: DIM, output: DIM, index: 0 }
    }

    fn made(&self) -> Result<Made> {
        self.made_over(&NAMES)
    }

    fn made_over(&self, names: &[&str]) -> Result<Made> {
        let mut params = ParamStore::new();
        let bank = bank(names)?;
        let mut scope = Scope::at(&mut params, "router", SEED);
        let router = (self.make)().build(&self.site(), &bank, &mut scope)?;
        for (name, p) in params.iter() {
            let t = p.tensor();
            // Tables of ids are no numbers to be changed a little.
            if !crate::is_float(t.kind()) {
                continue;
            }
            let noise = noise_like(&t.size(), t, SEED.child(name))?;
            crate::no_grad(|| t.clone().add_in_place(&noise))?;
        }
        Ok(Made { router, bank, params })
    }

    fn input(&self, rows: i64, kind: Kind) -> Result<Tensor> {
        let like = Tensor::zeros(&[1], Kind::Float, Device::Cpu)?;
        noise_like(&[rows, LEN, DIM], &like, SEED.child("x"))?.to_kind(kind)
    }

    fn context(&self, rows: i64) -> Result<Context> {
        self.described(Context::eval(), rows)
    }

    fn described(&self, mut cx: Context, rows: i64) -> Result<Context> {
        let known = &self.claims.tasks;
        if !known.is_empty() {
            let names = (0..rows).map(|r| known[r as usize % known.len()].as_str());
            cx = cx.with_labels(self.claims.label, names);
        }
        if let Some(vocabulary) = self.claims.vocabulary {
            let mut ids = Vec::new();
            for r in 0..rows as u64 {
                ids.extend((0..LEN as u64).map(|i| (SEED.nth(r).nth(i).0 % vocabulary) as i64));
            }
            cx = cx.with_feature("input_ids", Tensor::from_slice(&ids, &[rows, LEN], Device::Cpu)?);
        }
        let like = Tensor::zeros(&[1], Kind::Float, Device::Cpu)?;
        for (name, shape) in &self.claims.features {
            let shape: Vec<i64> = [rows].iter().chain(shape).copied().collect();
            cx = cx.with_feature(name, noise_like(&shape, &like, SEED.child(name))?);
        }
        Ok(cx)
    }

    fn routed(&self, made: &Made, x: &Tensor, cx: &Context) -> Result<Routing> {
        let signal = Signal::from(x.clone());
        let routing = made.router.route(&signal, &made.bank, cx)?;
        routing.check(made.bank.len(), signal.rows())?;
        Ok(routing)
    }

    fn dense(&self, routing: &Routing) -> Result<Tensor> {
        routing.dense(Kind::Double, Device::Cpu)?.detach()
    }

    fn fits(&self) -> Result<bool> {
        let made = self.made()?;
        let routing = self.routed(&made, &self.input(6, Kind::Float)?, &self.context(6)?)?;
        let alpha = self.dense(&routing)?.reshape(&[-1, NAMES.len() as i64])?.to_vec::<f64>()?;
        for row in alpha.chunks(NAMES.len()) {
            let active = row.iter().filter(|w| **w != 0.0).count();
            let sum: f64 = row.iter().sum();
            let summed = !self.claims.sums_to_one || (sum - 1.0).abs() < 1e-5;
            let sparse = self.claims.at_most.is_none_or(|k| active <= k);
            if !(row.iter().all(|w| w.is_finite()) && summed && sparse) {
                return Err(Error::invalid("α", format!("{row:?}")));
            }
        }
        Ok(!routing.normalised || self.claims.sums_to_one)
    }

    fn deterministic(&self) -> Result<bool> {
        let x = self.input(6, Kind::Float)?;
        let once = || self.dense(&self.routed(&self.made()?, &x, &self.context(6)?)?);
        once()?.bit_equal(&once()?)
    }

    fn row_by_row(&self) -> Result<bool> {
        if self.claims.looks_at_batch {
            return Ok(true);
        }
        let (made, x, cx) = (self.made()?, self.input(6, Kind::Float)?, self.context(6)?);
        let all = self.routed(&made, &x, &cx)?;
        if all.level() == Level::Static {
            return Ok(true);
        }
        let whole = self.dense(&all)?;
        for r in [4i64, 0, 5] {
            let index = Tensor::from_slice(&[r], &[1], Device::Cpu)?;
            let routing =
                self.routed(&made, &x.index_select(0, &index)?, &cx.select_rows(&[r])?)?;
            // A row alone may be routed by one α for all.
            let alone = match routing.level() {
                Level::Static => self.dense(&routing)?.unsqueeze(0)?,
                _ => self.dense(&routing)?,
            };
            if !alone.all_close(&whole.index_select(0, &index)?, 1e-6, 1e-6)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn empty_batch(&self) -> Result<bool> {
        let routing =
            self.routed(&self.made()?, &self.input(0, Kind::Float)?, &self.context(0)?)?;
        Ok(routing.level() == Level::Static || self.dense(&routing)?.len_of(0) == 0)
    }

    fn single_token(&self) -> Result<bool> {
        let x = self.input(1, Kind::Float)?.narrow(1, 0, 1)?;
        let mut cx = self.context(1)?;
        if let Some(ids) = cx.find("input_ids").cloned() {
            cx = cx.with_feature("input_ids", ids.narrow(1, 0, 1)?);
        }
        self.routed(&self.made()?, &x, &cx).map(|_| true)
    }

    fn one_module(&self) -> Result<bool> {
        let (x, cx) = (self.input(6, Kind::Float)?, self.context(6)?);
        match self.made_over(&NAMES[..1]).and_then(|made| self.routed(&made, &x, &cx)) {
            Err(Error::Invalid { .. } | Error::Unknown { .. } | Error::Unsupported { .. }) => {
                Ok(true)
            }
            other => other.map(|_| true),
        }
    }

    fn draws(&self) -> Result<bool> {
        let (made, x) = (self.made()?, self.input(6, Kind::Float)?);
        let drawn = |seed: u64| {
            let cx = self.described(Context::train(Seed(seed), 3), 6)?;
            self.dense(&self.routed(&made, &x, &cx)?)
        };
        let first = drawn(1)?;
        let mut differs = false;
        for seed in 2..8 {
            differs |= !drawn(seed)?.bit_equal(&first)?;
        }
        Ok(drawn(1)?.bit_equal(&first)? && differs == self.claims.draws)
    }

    fn looks_ahead(&self) -> Result<bool> {
        let made = self.made()?;
        if made.router.looks_ahead() != self.claims.looks_ahead {
            return Ok(false);
        }
        let x = self.input(6, Kind::Float)?;
        let (cx, last) = (self.context(6)?, x.len_of(1) - 1);
        let before = self.routed(&made, &x, &cx)?;
        if before.level() != Level::Token || self.claims.looks_at_batch {
            return Ok(true);
        }
        let earlier = x.narrow(1, 0, last)?;
        let changed = Tensor::cat(&[earlier, x.narrow(1, last, 1)?.mul_scalar(-7.0)?], 1)?;
        let after = self.routed(&made, &changed, &cx)?;
        let earlier = |r: &Routing| self.shares(r)?.narrow(1, 0, last);
        let same = earlier(&before)?.all_close(&earlier(&after)?, 1e-6, 1e-6)?;
        Ok(same != self.claims.looks_ahead)
    }

    /// α, or how much of each token goes where.
    fn shares(&self, routing: &Routing) -> Result<Tensor> {
        match &routing.weights {
            Weights::Slots { dispatch, .. } => dispatch.detach(),
            _ => self.dense(routing),
        }
    }

    /// Where x is read at all.
    fn not_a_number(&self) -> Result<bool> {
        let made = self.made()?;
        let (x, cx) = (self.input(6, Kind::Float)?, self.context(6)?);
        let known = self.dense(&self.routed(&made, &x, &cx)?)?;
        let other = self.dense(&self.routed(&made, &x.mul_scalar(-3.0)?, &cx)?)?;
        if known.bit_equal(&other)? {
            return Ok(true);
        }
        for bad in [f64::NAN, f64::INFINITY] {
            if self.routed(&made, &x.mul_scalar(bad)?, &cx).is_ok() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn gradients(&self) -> Result<bool> {
        let made = self.made()?;
        let routing = self.routed(&made, &self.input(6, Kind::Float)?, &self.context(6)?)?;
        let alpha = routing.dense(Kind::Float, Device::Cpu)?;
        let trained = made.params.iter().filter(|(_, p)| !p.is_buffer());
        let parameters: Vec<&Tensor> = trained.map(|(_, p)| p.tensor()).collect();
        if !alpha.requires_grad() {
            return Ok(!self.claims.learns);
        }
        let weights = noise_like(&alpha.size(), &alpha, SEED.child("loss"))?;
        let grads = alpha.mul(&weights)?.sum()?.gradients(&parameters, false)?;
        let mut reached = false;
        for g in grads.iter().flatten() {
            reached |= g.abs()?.sum()?.item()? > 0.0;
        }
        Ok(reached == self.claims.learns)
    }

    fn low_precision(&self) -> Result<bool> {
        let made = self.made()?;
        let (x, cx) = (self.input(6, Kind::BFloat16)?, self.context(6)?);
        let low = self.routed(&made, &x, &cx)?;
        let high = self.routed(&made, &x.to_kind(Kind::Float)?, &cx)?;
        let kind = match &low.weights {
            Weights::Dense(w) | Weights::Sparse { weight: w, .. } => w.kind(),
            _ => Kind::Float,
        };
        Ok(kind == Kind::Float && self.dense(&low)?.all_close(&self.dense(&high)?, 1e-5, 1e-5)?)
    }

    fn growing(&self) -> Result<bool> {
        let mut made = self.made()?;
        let mut scope = Scope::at(&mut made.params, "router", SEED);
        match made.router.grown(NAMES.len() + 1, &mut scope) {
            Err(Error::Unsupported { .. }) => Ok(true),
            Err(other) => Err(other),
            Ok(grown) => {
                made.router = grown;
                made.bank = bank(&["a", "b", "c", "d"])?;
                self.routed(&made, &self.input(6, Kind::Float)?, &self.context(6)?).map(|_| true)
            }
        }
    }

    fn save_and_load(&self) -> Result<bool> {
        let model = |seed: Seed| -> Result<Modular> {
            let mut model = Modular::new(TinyBackbone::new(SEED, Kind::Float)?, seed)?;
            for name in NAMES {
                model.attach(name, Box::new(standins::Thin), &Targets::names(["query"]))?;
            }
            perturb(&model, &Select::new("modules.*"), 0.5, SEED)?;
            model.route((self.make)(), false)?;
            Ok(model)
        };
        let output = |model: &mut Modular| {
            model.aggregate(Box::new(Sum::default()))?;
            let inputs = TinyBackbone::inputs(6, LEN, SEED)?;
            model.forward(&inputs, &self.context(6)?)?.need("logits").cloned()
        };
        let mut first = model(SEED)?;
        perturb(&first, &Select::new("routers.*"), 1.0, SEED)?;
        let path = std::env::temp_dir().join(format!(
            "modl-router-{}-{:p}.safetensors",
            std::process::id(),
            self
        ));
        first.save_routing(&path)?;
        let mut second = model(SEED)?;
        let loaded = second.load_routing(&path, self.registry);
        let _ = std::fs::remove_file(&path);
        loaded?;
        output(&mut first)?.bit_equal(&output(&mut second)?)
    }
}

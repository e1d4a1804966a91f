//! Trunks that were fine-tuned from one, each for a view of the digits, and how they become one again:
//! what `merging.rs` compares.

use anyhow::{Context as _, Result, bail};
use modl_aggregate::merge::{Base, Elements, Group, Input, MergeMethods, Settings, merge_group};
use modl_aggregate::statistics::diagonal_fisher;
use modl_core::{Device, Seed, Tensor, Tensors, no_grad};
use modl_train::{AdaMerging, Factors, entropy, task_vectors, trimmed};

use super::experiment::Lab;
use super::glyphs::{CLASSES, SIDE, VIEWS, glyphs};
use super::merging::{BATCH, EASY, HARD, RATE, STATISTICS, UNLABELLED, WIDTH, steps};
use super::mlp::{activations, copy, network, output, train};

/// What factors are learned by, of logits and classes.
type Loss = fn(&Tensor, &Tensor) -> modl_core::Result<Tensor>;

fn unsure(logits: &Tensor, _: &Tensor) -> modl_core::Result<Tensor> {
    entropy(logits)
}

fn wrong(logits: &Tensor, classes: &Tensor) -> modl_core::Result<Tensor> {
    logits.cross_entropy(classes)
}

/// The logits of a trunk under a head.
pub(super) fn logits(trunk: &Tensors, head: &Tensors, x: &Tensor) -> modl_core::Result<Tensor> {
    output(head, &output(trunk, x)?.relu()?)
}

/// A trunk from which trunks and heads of all views were fine-tuned.
pub(super) struct Tasks {
    start: Tensors,
    pub(super) trunks: Vec<Tensors>,
    pub(super) heads: Vec<Tensors>,
}

impl Tasks {
    pub(super) fn train(lab: &Lab) -> Result<Self> {
        let [all, each, ..] = steps(lab.quick);
        let start = network(&[(SIDE * SIDE) as i64, WIDTH, WIDTH], lab.seed.child("trunk"))?;
        let head =
            |view: usize| network(&[WIDTH, CLASSES], lab.seed.child("head").nth(view as u64));
        let heads: Vec<Tensors> = (0..VIEWS).map(head).collect::<Result<_>>()?;
        let names: Vec<String> = (0..VIEWS).map(|v| format!("head{v}")).collect();
        let mut parts: Vec<(&str, &Tensors)> = vec![("trunk", &start)];
        parts.extend(names.iter().map(String::as_str).zip(&heads));
        train(&parts, all, RATE, lab.tick, |step| {
            let mut sum: Option<Tensor> = None;
            for (view, head) in heads.iter().enumerate() {
                let seed = lab.seed.child("easy").nth(step).nth(view as u64);
                let (x, y) = glyphs(BATCH / VIEWS, view, EASY, seed)?;
                let loss = logits(&start, head, &x)?.cross_entropy(&y)?;
                sum = Some(sum.map_or(Ok(loss.clone()), |s| s.add(&loss))?);
            }
            Ok(sum.context("no view")?.mul_scalar(1.0 / VIEWS as f64)?)
        })?;
        let mut trunks = Vec::new();
        for (view, head) in heads.iter().enumerate() {
            let trunk = copy(&start)?;
            let seed = lab.seed.child("hard").nth(view as u64);
            train(&[("trunk", &trunk), ("head", head)], each, RATE, lab.tick, |step| {
                let (x, y) = glyphs(BATCH, view, HARD, seed.nth(step))?;
                Ok(logits(&trunk, head, &x)?.cross_entropy(&y)?)
            })?;
            trunks.push(trunk);
        }
        Ok(Tasks { start, trunks, heads })
    }

    /// One trunk of all.
    pub(super) fn merged(&self, condition: &str, lab: &Lab) -> Result<Tensors> {
        let ada = AdaMerging { steps: steps(lab.quick)[2], ..AdaMerging::default() };
        let tasks = AdaMerging { factors: Factors::Tasks, ..ada.clone() };
        let plain = Settings::default;
        let each = |name: &str, c: f64| plain().set_each(name, [c; VIEWS]);
        Ok(match condition {
            "pretrained" => copy(&self.start)?,
            "average" => self.by("linear", &[], each("weight", 1.0))?,
            "task_arithmetic" => self.by("task_arithmetic", &[], each("weight", 0.3))?,
            "ties" => {
                // The paper's: the mean of those that agree.
                let settings = each("weight", 1.0).set_each("density", [0.2; VIEWS]);
                self.by("ties", &[], settings.set("convention", "peft"))?
            }
            "fisher" => self.by("fisher", &self.fisher(lab)?, plain())?,
            "reg_mean" => self.by("reg_mean", &self.grams(lab)?, plain())?,
            "ada_tasks" => self.adapted(&tasks, &self.vectors()?, unsure, lab)?,
            "ada_layers" => self.adapted(&ada, &self.vectors()?, unsure, lab)?,
            "ada_layers_pp" => self.adapted(&ada, &trimmed(&self.vectors()?, 0.2)?, unsure, lab)?,
            "ada_labels" => self.adapted(&ada, &self.vectors()?, wrong, lab)?,
            other => bail!("there is no method `{other}`"),
        })
    }

    fn vectors(&self) -> Result<Vec<Tensors>> {
        Ok(task_vectors(&self.start, &self.trunks)?)
    }

    fn adapted(
        &self,
        ada: &AdaMerging,
        vectors: &[Tensors],
        loss: Loss,
        lab: &Lab,
    ) -> Result<Tensors> {
        let seed = lab.seed.child("unlabelled");
        let found = ada.run(&self.start, vectors, |step, trunk| {
            self.on_all(trunk, UNLABELLED, seed.nth(step), loss)
                .map_err(|e| modl_core::Error::invalid("digits", e.to_string()))
        })?;
        Ok(found.model)
    }

    /// The sum over views of a trunk's losses on `n` fresh digits each.
    fn on_all(&self, trunk: &Tensors, n: usize, seed: Seed, loss: Loss) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (view, head) in self.heads.iter().enumerate() {
            let (x, y) = glyphs(n, view, HARD, seed.nth(view as u64))?;
            let own = loss(&logits(trunk, head, &x)?, &y)?;
            sum = Some(sum.map_or(Ok(own.clone()), |s| s.add(&own))?);
        }
        sum.context("there is no view")
    }

    /// The cosine between the derivatives of entropy and cross-entropy by all factors of layers, where
    /// AdaMerging starts: whether it is the way to fewer errors.
    pub(super) fn slopes(&self, lab: &Lab) -> Result<f64> {
        let (start, (_, n)) = (AdaMerging::default().start, STATISTICS);
        let vectors = self.vectors()?;
        let theta = self.start.map(|name, t| {
            let sum = vectors
                .iter()
                .try_fold(t.clone(), |sum, v| sum.add(&v.need(name)?.mul_scalar(start)?))?;
            sum.detach()?.copy()
        })?;
        let leaves: Vec<&Tensor> = theta.iter().map(|(_, t)| t).collect();
        for leaf in &leaves {
            leaf.set_requires_grad(true)?;
        }
        let slopes = |loss: Loss| -> Result<Vec<f64>> {
            let value = self.on_all(&theta, n, lab.seed.child("statistics"), loss)?;
            let gradients = value.gradients(&leaves, false)?;
            let mut all = Vec::new();
            for vector in &vectors {
                for ((_, tau), g) in vector.iter().zip(&gradients) {
                    let g = g.as_ref().context("a tensor takes no part")?;
                    all.push(g.mul(tau)?.sum()?.item()?);
                }
            }
            Ok(all)
        };
        let (a, b) = (slopes(unsure)?, slopes(wrong)?);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        Ok(dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt())
    }

    /// The Fisher information of each trunk on its own view.
    fn fisher(&self, lab: &Lab) -> Result<Vec<Tensors>> {
        let (n, _) = STATISTICS;
        let n = if lab.quick { 2 } else { n };
        let one = |(view, (trunk, head)): (usize, (&Tensors, &Tensors))| {
            let seed = lab.seed.child("statistics").nth(view as u64);
            let (x, _) = glyphs(n, view, HARD, seed)?;
            Ok(diagonal_fisher(trunk, n, |i| {
                let row = x.narrow(0, i as i64, 1)?;
                logits(trunk, head, &row)?.squeeze(0)?.log_softmax(0)
            })?)
        };
        self.trunks.iter().zip(&self.heads).enumerate().map(one).collect()
    }

    /// XᵀX of the inputs of each trunk's layers on its own view.
    fn grams(&self, lab: &Lab) -> Result<Vec<Tensors>> {
        let (_, n) = STATISTICS;
        let one = |(view, trunk): (usize, &Tensors)| {
            let seed = lab.seed.child("statistics").nth(view as u64);
            let (x, _) = glyphs(n, view, HARD, seed)?;
            let all = no_grad(|| activations(trunk, &x))?;
            let mut grams = Tensors::new();
            for (layer, x) in all.iter().take(trunk.len() / 2).enumerate() {
                grams.set(format!("{layer}.weight"), x.t()?.matmul(x)?);
            }
            Ok(grams)
        };
        self.trunks.iter().enumerate().map(one).collect()
    }

    /// The trunks merged by a method. TIES trims over all tensors as one; the others don't mind.
    fn by(&self, method: &str, statistics: &[Tensors], settings: Settings) -> Result<Tensors> {
        let methods = MergeMethods::default();
        let method = methods.find(method)?;
        let spec = method.spec();
        let start = (spec.base != Base::Input).then_some(&self.start);
        let models: Vec<&Tensors> = self.trunks.iter().chain(start).collect();
        let numbers = |t: &Tensor| t.reshape(&[-1])?.to_vec::<f32>();
        let merge = |shape: &[i64], tensors: Vec<Vec<f32>>, known: Vec<Vec<f32>>| {
            let shape: Vec<usize> = shape.iter().map(|n| *n as usize).collect();
            let inputs = tensors.iter().enumerate().map(|(i, t)| {
                Input::new("m", t).with_statistics(known.get(i).map(|s| s as &dyn Elements))
            });
            let group = Group::new("trunk", &shape, inputs.collect(), Seed(0));
            let group = if start.is_some() { group.with_base(tensors.len() - 1) } else { group };
            merge_group(method, group, settings.clone())
        };
        if !statistics.is_empty() {
            return Ok(self.start.map(|name, t| {
                let of = |m: &&Tensors| numbers(m.need(name)?);
                let tensors = models.iter().map(of).collect::<modl_core::Result<_>>()?;
                let known = statistics.iter().filter_map(|s| s.get(name)).map(numbers);
                let known = known.collect::<modl_core::Result<_>>()?;
                Tensor::from_slice(&merge(&t.size(), tensors, known)?, &t.size(), Device::Cpu)
            })?);
        }
        let flat = |m: &&Tensors| -> modl_core::Result<Vec<f32>> {
            let parts: Vec<Vec<f32>> =
                m.iter().map(|(_, t)| numbers(t)).collect::<modl_core::Result<_>>()?;
            Ok(parts.concat())
        };
        let tensors: Vec<Vec<f32>> = models.iter().map(flat).collect::<modl_core::Result<_>>()?;
        let n = tensors.first().map_or(0, Vec::len);
        let merged = merge(&[n as i64], tensors, Vec::new())?;
        let mut rest = merged.as_slice();
        Ok(self.start.map(|_, t| {
            let (own, others) = rest.split_at(t.numel().min(rest.len()));
            rest = others;
            Tensor::from_slice(own, &t.size(), Device::Cpu)
        })?)
    }
}

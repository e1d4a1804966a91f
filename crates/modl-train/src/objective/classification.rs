//! One of several classes for a text.

use std::collections::BTreeMap;

use modl_core::{Context, Error, Init, Kind, Modular, Result, Seed, Tensor};

use super::task_heads::TaskHeads;
use super::{Metric, Objective, Said, apply_head, make_head, symmetric_kl};
use crate::{Batch, Prediction, accuracy, macro_f1};

/// One of K classes for a text: logits ℓ = W h̄ + b with h̄ the mean of the last hidden states over
/// real tokens, and the cross entropy −Σₖ qₖ ln pₖ with p = softmax(ℓ) and q the right class, smoothed
/// by ε: q_y = 1 − ε + ε⁄K, and ε⁄K elsewhere (Szegedy et al. 2015, arXiv 1512.00567, section 7).
///
/// Targets are indices of classes. The head is `heads.NAME.weight` `[K, dim]` (uniform in ±1⁄√dim)
/// and `heads.NAME.bias` `[K]` (0). Two predictions are apart by ½ (KL(p‖q) + KL(q‖p)), as in THOR
/// (arXiv 2110.04260). Of equal logits the first one is what is said.
///
/// With [`Classification::of_backbone`] there is no head: ℓ are the `logits` of the backbone's own output
/// layer, `[batch, K]`. With [`Classification::tasks`] each task has a head of its own over its own classes, and the logits
/// of all others are [`Classification::ABSENT`]: their probability is 0. With more
/// [`Classification::outputs`] than classes, or more logits, the superfluous ones have a part in the softmax, but are
/// never right and never said (SupSup, Wortsman et al. 2020, arXiv 2006.14769).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Classification {
    /// The name of the head.
    pub head: String,
    /// The width of the model.
    pub dim: i64,
    /// The names of the classes, in the order of their indices.
    pub classes: Vec<String>,
    /// ε, the share of probability that is spread over all classes in training, in [0, 1). It does
    /// not count in metrics.
    pub label_smoothing: f64,
    /// The outputs of a head; as many as it has classes where `None`.
    pub outputs: Option<usize>,
    /// The tasks that have a head of their own, each with the indices of its classes; none where all
    /// share one.
    pub tasks: Vec<(String, Vec<usize>)>,
    /// Whether the backbone's own output layer is the head; then nothing is said of `outputs` and
    /// `tasks`.
    pub of_backbone: bool,
}

impl Classification {
    /// The logit of what a task does not have.
    pub const ABSENT: f64 = -1e9;

    /// What predictions are measured by.
    pub const METRICS: &'static [Metric] = &[
        Metric { key: "accuracy", title: "accuracy" },
        Metric { key: "macro_f1", title: "macro F1" },
    ];
}

impl Classification {
    /// The columns of the classes, without superfluous ones.
    fn real(&self, of: &Tensor) -> Result<Tensor> {
        match self.classes.len() as i64 {
            n if n < of.len_of(-1) => of.narrow(-1, 0, n),
            _ => Ok(of.clone()),
        }
    }

    fn shared_outputs(&self) -> Result<i64> {
        let (outputs, classes) = (self.outputs.unwrap_or(self.classes.len()), self.classes.len());
        match outputs < classes {
            true => Err(Error::invalid(
                "outputs",
                format!("are {outputs} for {classes} classes; give them as many at least"),
            )),
            false => Ok(outputs as i64),
        }
    }

    /// The `logits` of the backbone.
    fn own_logits(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        let outputs = model.forward(&batch.inputs, cx)?;
        let Some(logits) = outputs.get("logits") else {
            let problem = "are not among the backbone's outputs; give it an output layer (`outputs`), \
                           or the objective a head";
            return Err(Error::invalid("logits", problem));
        };
        let (size, classes) = (logits.size(), self.classes.len());
        match size.as_slice() {
            [_, n] if *n >= classes as i64 => logits.to_kind(Kind::Float),
            _ => {
                let problem =
                    format!("have shape {size:?}; {classes} classes want [batch, {classes}]");
                Err(Error::invalid("logits", format!("{problem} or more outputs")))
            }
        }
    }

    fn task_heads(&self) -> Result<Option<TaskHeads<'_>>> {
        let heads = || TaskHeads::new(&self.tasks, self.classes.len(), self.outputs);
        (!self.tasks.is_empty()).then(heads).transpose()
    }
}

impl Objective for Classification {
    fn setup(&self, model: &mut Modular) -> Result<()> {
        if self.of_backbone {
            return Ok(());
        }
        match self.task_heads()? {
            Some(heads) => heads.make(model, &self.head, self.dim),
            None => make_head(model, &self.head, self.shared_outputs()?, self.dim),
        }
    }

    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        if self.of_backbone {
            return self.own_logits(model, batch, cx);
        }
        match self.task_heads()? {
            Some(heads) => heads.apply(model, &self.head, batch, cx),
            None => apply_head(model, &self.head, batch, cx),
        }
    }

    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor> {
        if self.label_smoothing == 0.0 {
            return predicted.cross_entropy_of_rows(&batch.targets);
        }
        let log_p = predicted.log_softmax(-1)?;
        let hard = log_p.nll(&batch.targets.to_kind(Kind::Int64)?)?;
        let own = self.real(&log_p)?;
        let spread = match self.tasks.is_empty() {
            true => own.mean_dims(&[-1], false)?,
            false => {
                let there = self.real(predicted)?.gt_scalar(Self::ABSENT / 2.0)?;
                let there = there.to_kind(own.kind())?;
                let count = there.sum_dims(&[-1], false)?;
                own.mul(&there)?.sum_dims(&[-1], false)?.div(&count)?
            }
        };
        let epsilon = self.label_smoothing;
        hard.mul_scalar(1.0 - epsilon)?.sub(&spread.mul_scalar(epsilon)?)
    }

    fn draw(&self, predicted: &Tensor, seed: Seed) -> Result<Tensor> {
        // Gumbel-max: argmax of ln p − ln(−ln u).
        let size = predicted.size();
        let u = Init::Uniform(0.5).tensor(&size, seed, Kind::Double, predicted.device())?;
        let u = u.add_scalar(0.5)?.clamp(f64::MIN_POSITIVE, 1.0 - f64::EPSILON)?;
        let noise = u.log()?.neg()?.log()?.neg()?;
        let (_, drawn) = predicted.to_kind(Kind::Double)?.add(&noise)?.max_dim(-1)?;
        drawn.to_kind(Kind::Float)
    }

    fn divergence(&self, a: &Tensor, b: &Tensor, _: &Batch) -> Result<Tensor> {
        symmetric_kl(a, b)
    }

    fn asks_task(&self) -> bool {
        !self.tasks.is_empty()
    }

    fn said(&self, predicted: &Tensor, batch: &Batch) -> Result<Vec<Said>> {
        let (_, said) = self.real(predicted)?.max_dim(-1)?;
        let all = said.to_vec::<i64>()?.into_iter().zip(batch.targets.to_vec::<f64>()?);
        let said = |(k, target)| Said { target, prediction: k as f64, weight: 1.0 };
        Ok(all.map(said).collect())
    }

    fn metrics(&self) -> &'static [Metric] {
        Self::METRICS
    }

    fn scores(&self, predictions: &[&Prediction]) -> BTreeMap<String, f64> {
        let pairs = predictions.iter().map(|p| (p.prediction as i64, p.target as i64));
        let (said, right): (Vec<i64>, Vec<i64>) = pairs.unzip();
        let all = [("accuracy", accuracy(&said, &right)), ("macro_f1", macro_f1(&said, &right))];
        all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }
}

//! The composition algebra of AdapterHub as values, and as they stand in recipes.
//!
//! | in JSON; in TOML with `=` | |
//! |---|---|
//! | `"a"` | module `a` |
//! | `{"stack": ["a", "b"]}` | b on a: a is the base function of b |
//! | `{"fuse": ["a", "b"]}`, `{"fuse": {"parts": ["a", "b"], "value": "identity"}}` | AdapterFusion, with its settings |
//! | `{"average": ["a", "b"]}`, `{"average": {"parts": ["a", "b"], "weights": [1, 3]}}` | Σ wⱼ hⱼ ⁄ Σ wⱼ |
//! | `{"split": {"parts": ["a", "b"], "splits": [3, 7]}}` | a on the first 3 tokens, b on the other 7 |
//! | `{"batch_split": {"parts": ["a", "b"], "batch_sizes": [1, 2]}}` | a on the first row, b on the other two |
//! | `{"parallel": ["a", "b"]}` | `batch_split` into equal parts, of a batch that repeats its rows for each |
//!
//! Parts are compositions again, as deep as one likes. Pfeiffer, Rücklé, Poth, Kamath, Vulić, Ruder,
//! Cho, Gurevych 2020, *AdapterHub: A Framework for Adapting Transformers*, arXiv 2007.07779.

use modl_core::{Error, Result, Tensor, Tensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::attention::Fusion;

/// A composition of modules.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum Composition {
    /// A module; where it does not stand at a site, the function stays as it is there.
    Module(String),
    /// Each on the one before; of nothing, the base function.
    Stack(Vec<Composition>),
    /// AdapterFusion of what the parts change. Parts without a module at a site take no part there.
    Fuse(Vec<Composition>, Fusion),
    /// The weighted mean of what the parts give; by default all have the same weight.
    Average(Vec<Composition>, Option<Vec<f64>>),
    /// Parts of the sequence, with their lengths in tokens.
    Split(Vec<Composition>, Vec<i64>),
    /// Parts of the batch, with their numbers of rows.
    BatchSplit(Vec<Composition>, Vec<i64>),
    /// As many equal parts of the batch, whose rows are to be repeated ([`Composition::repeat`]).
    Parallel(Vec<Composition>),
}

impl Default for Composition {
    /// The base function.
    fn default() -> Self {
        Composition::Stack(Vec::new())
    }
}

impl From<&str> for Composition {
    fn from(module: &str) -> Self {
        Composition::Module(module.to_owned())
    }
}

impl Composition {
    /// Each on the one before.
    pub fn stack<P: Into<Composition>>(parts: impl IntoIterator<Item = P>) -> Self {
        Composition::Stack(all(parts))
    }

    /// AdapterFusion with its defaults.
    pub fn fuse<P: Into<Composition>>(parts: impl IntoIterator<Item = P>) -> Self {
        Composition::Fuse(all(parts), Fusion::default())
    }

    /// The mean.
    pub fn average<P: Into<Composition>>(parts: impl IntoIterator<Item = P>) -> Self {
        Composition::Average(all(parts), None)
    }

    /// One on the first tokens, the next on the following ones.
    pub fn split<P: Into<Composition>>(
        parts: impl IntoIterator<Item = P>,
        splits: impl Into<Vec<i64>>,
    ) -> Self {
        Composition::Split(all(parts), splits.into())
    }

    /// One on the first rows, the next on the following ones.
    pub fn batch_split<P: Into<Composition>>(
        parts: impl IntoIterator<Item = P>,
        batch_sizes: impl Into<Vec<i64>>,
    ) -> Self {
        Composition::BatchSplit(all(parts), batch_sizes.into())
    }

    /// Each on the whole batch, which has been repeated for each.
    pub fn parallel<P: Into<Composition>>(parts: impl IntoIterator<Item = P>) -> Self {
        Composition::Parallel(all(parts))
    }

    /// A setup as AdapterHub writes it, `adapter_config` in its `adapter_setup.json`:
    /// `{"type": "Stack", "children": […]}`. Weights of an average sum to 1 there.
    ///
    /// # Errors
    /// Where it is none, or of a type that modl does not have.
    pub fn from_adapterhub(setup: &Value) -> Result<Self> {
        let wrong = |problem: &str| Error::invalid("setup of AdapterHub", problem.to_owned());
        let kind =
            setup.get("type").and_then(Value::as_str).ok_or_else(|| wrong("has no `type`"))?;
        let children = setup.get("children").and_then(Value::as_array);
        let children = children.ok_or_else(|| wrong("has no `children`"))?;
        if kind == "single" {
            return match children.as_slice() {
                [Value::String(name)] => Ok(Composition::Module(name.clone())),
                _ => Err(wrong("has other than one name as `single`")),
            };
        }
        let block = match kind {
            "Stack" | "Fuse" | "Average" | "Split" | "Parallel" => kind.to_lowercase(),
            "BatchSplit" => "batch_split".to_owned(),
            other => {
                return Err(Error::unsupported(
                    format!("AdapterHub's composition `{other}`"),
                    "modl has Stack, Fuse, Average, Split, BatchSplit, Parallel",
                ));
            }
        };
        let parts: Vec<Composition> =
            children.iter().map(Composition::from_adapterhub).collect::<Result<_>>()?;
        let mut settings = match setup.get("kwargs") {
            Some(Value::Object(settings)) => settings.clone(),
            _ => Map::new(),
        };
        settings.insert("parts".to_owned(), json!(parts));
        Composition::try_from(json!({ block: settings }))
    }

    /// The parts that it is made of, one level down.
    pub fn parts(&self) -> &[Composition] {
        use Composition::{Average, BatchSplit, Fuse, Module, Parallel, Split, Stack};
        match self {
            Module(_) => &[],
            Stack(parts) | Parallel(parts) => parts,
            Fuse(parts, _) | Average(parts, _) | Split(parts, _) | BatchSplit(parts, _) => parts,
        }
    }

    /// The names of all modules, as they come.
    pub fn modules(&self) -> Vec<&str> {
        match self {
            Composition::Module(name) => vec![name],
            _ => self.parts().iter().flat_map(Composition::modules).collect(),
        }
    }

    /// The last module, after which AdapterHub calls a fusion.
    fn last(&self) -> Option<&str> {
        match self {
            Composition::Module(name) => Some(name),
            _ => self.parts().last()?.last(),
        }
    }

    /// The name of a fusion of these parts: the last module of each, joined by commas.
    pub(crate) fn name_of(parts: &[Composition]) -> String {
        let names: Vec<&str> = parts.iter().filter_map(Composition::last).collect();
        names.join(",")
    }

    /// How often a batch is to be repeated: the number of parallel parts, 1 where there are none.
    pub fn channels(&self) -> usize {
        let below = self.parts().iter().map(Composition::channels).max().unwrap_or(1);
        match self {
            Composition::Parallel(parts) => parts.len().max(below),
            _ => below,
        }
    }

    /// The inputs of a model, all rows one time for each parallel part: first all for the first part,
    /// then all for the second.
    ///
    /// # Errors
    /// What libtorch refuses.
    pub fn repeat(&self, inputs: &Tensors) -> Result<Tensors> {
        let n = self.channels();
        inputs.map(|_, t| Tensor::cat(&vec![t.clone(); n], 0))
    }

    /// Checks lengths and weights.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |what: &str, problem: String| Err(Error::invalid(what, problem));
        let fits = |what: &str, parts: &[Composition], n: &[i64]| {
            if parts.len() != n.len() || n.iter().any(|n| *n < 0) {
                let problem = format!("are {n:?} for {} parts", parts.len());
                return wrong(what, problem);
            }
            Ok(())
        };
        match self {
            Composition::Fuse(parts, _) | Composition::Parallel(parts) if parts.is_empty() => {
                return wrong("composition", "has a block without parts".to_owned());
            }
            Composition::Average(parts, weights) => {
                let sum: f64 = weights.as_ref().map_or(parts.len() as f64, |w| w.iter().sum());
                let count = weights.as_ref().map_or(parts.len(), Vec::len);
                if count != parts.len() || parts.is_empty() || !sum.is_finite() || sum == 0.0 {
                    let problem = format!("are {weights:?} for {} parts", parts.len());
                    return wrong("composition.average.weights", problem);
                }
            }
            Composition::Split(parts, n) => fits("composition.split.splits", parts, n)?,
            Composition::BatchSplit(parts, n) => {
                fits("composition.batch_split.batch_sizes", parts, n)?;
            }
            _ => {}
        }
        self.parts().iter().try_for_each(Composition::check)
    }
}

fn all<P: Into<Composition>>(parts: impl IntoIterator<Item = P>) -> Vec<Composition> {
    parts.into_iter().map(Into::into).collect()
}

/// The names of the blocks in recipes.
const BLOCKS: [&str; 6] = ["stack", "fuse", "average", "split", "batch_split", "parallel"];

impl TryFrom<Value> for Composition {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        let wrong = |problem: String| Error::invalid("composition", problem);
        let mut table = match value {
            Value::String(name) => return Ok(Composition::Module(name)),
            Value::Object(table) if table.len() == 1 => table.into_iter(),
            other => {
                let blocks = BLOCKS.join("`, `");
                return Err(wrong(format!(
                    "{other} is neither the name of a module nor a table with one of `{blocks}`"
                )));
            }
        };
        let Some((block, inside)) = table.next() else { return Ok(Composition::default()) };
        if !BLOCKS.contains(&block.as_str()) {
            return Err(Error::unknown("block of a composition", &block, BLOCKS));
        }
        let mut settings = match inside {
            Value::Array(parts) => Map::from_iter([("parts".to_owned(), Value::Array(parts))]),
            Value::Object(settings) => settings,
            other => return Err(wrong(format!("`{block}` has {other} instead of parts"))),
        };
        let parts = settings.shift_remove("parts").unwrap_or_default();
        let parts: Vec<Composition> = match parts {
            Value::Array(parts) => {
                parts.into_iter().map(Composition::try_from).collect::<Result<_>>()?
            }
            other => return Err(wrong(format!("`{block}.parts` is {other}, wants a list"))),
        };
        let mut lengths = |what: &str| -> Result<Vec<i64>> {
            let own = settings.shift_remove(what);
            let own = own.ok_or_else(|| wrong(format!("`{block}` has no `{what}`")))?;
            modl_core::from_json(&format!("composition.{block}.{what}"), own)
        };
        let composed = match block.as_str() {
            "stack" => Composition::Stack(parts),
            "parallel" => Composition::Parallel(parts),
            "split" => Composition::Split(parts, lengths("splits")?),
            "batch_split" => Composition::BatchSplit(parts, lengths("batch_sizes")?),
            "average" => {
                let weights = settings.shift_remove("weights");
                let read = |w| modl_core::from_json("composition.average.weights", w);
                Composition::Average(parts, weights.map(read).transpose()?)
            }
            _ => {
                let own = Value::Object(std::mem::take(&mut settings));
                Composition::Fuse(parts, modl_core::from_json("composition.fuse", own)?)
            }
        };
        match settings.keys().next() {
            Some(key) => Err(wrong(format!("`{block}` has no setting `{key}`"))),
            None => Ok(composed),
        }
    }
}

impl From<Composition> for Value {
    fn from(c: Composition) -> Value {
        match c {
            Composition::Module(name) => json!(name),
            Composition::Stack(parts) => json!({"stack": parts}),
            Composition::Parallel(parts) => json!({"parallel": parts}),
            Composition::Average(parts, None) => json!({"average": parts}),
            Composition::Average(parts, Some(w)) => {
                json!({"average": {"parts": parts, "weights": w}})
            }
            Composition::Split(parts, n) => json!({"split": {"parts": parts, "splits": n}}),
            Composition::BatchSplit(parts, n) => {
                json!({"batch_split": {"parts": parts, "batch_sizes": n}})
            }
            Composition::Fuse(parts, config) if config == Fusion::default() => {
                json!({"fuse": parts})
            }
            Composition::Fuse(parts, config) => {
                let mut table = json!(config);
                table["parts"] = json!(parts);
                json!({"fuse": table})
            }
        }
    }
}

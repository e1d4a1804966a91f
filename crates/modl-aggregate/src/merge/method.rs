//! The seam of merging: a method looks at the tensors of all models and says how each piece of the
//! result is computed.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::RangeInclusive;

use modl_core::{Error, Result};
use serde_json::Value;

use super::{Chunk, Group, Largest};

/// A way to make one model of several, tensor by tensor.
///
/// Everything here is of two parts: what has to be known of the whole tensors (norms, inner products,
/// the magnitude above which a share of the numbers lies) and, with that, a formula for each number.
/// The parts meet in [`MergeMethod::prepare`]; tensors are therefore never whole in memory.
pub trait MergeMethod: Debug + Send + Sync {
    /// What it is called and takes.
    fn spec(&self) -> Spec;

    /// Looks at the tensors of a group and gives the formula for its pieces.
    ///
    /// # Errors
    /// Where the settings do not fit the tensors.
    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>>;

    /// Looks at all tensors together, before any is prepared: what it finds of each comes back to it in
    /// [`Group::among`]. Most methods look at each tensor alone.
    ///
    /// # Errors
    /// Where the settings do not fit.
    fn over_model(&self, _tensors: &[(&Group, &Settings)]) -> Result<Option<Vec<Vec<Largest>>>> {
        Ok(None)
    }
}

/// The formula of a prepared group: writes the merged numbers of a piece, all of `out`.
pub type Blend<'a> = Box<dyn Fn(&Chunk, &mut [f32]) + Send + Sync + 'a>;

/// What a method is called and takes.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// The name in configurations: `ties`.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// The paper or where it comes from.
    pub citation: &'static str,
    /// Its settings.
    pub settings: &'static [Setting],
    /// Whether it needs a base model.
    pub base: Base,
    /// How many models it takes, without the base.
    pub models: (usize, usize),
    /// Whether pieces are to hold whole rows (the last dimension).
    pub by_rows: bool,
    /// Whether it selects the largest of a tensor's numbers, which takes memory.
    pub selects: bool,
    /// What it reads beside the tensors of each model.
    pub statistics: Option<Statistics>,
}

/// What a method reads beside the tensors of each model: tensors of the same names in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistics {
    /// A number for each number of a tensor: the diagonal of a Fisher matrix.
    Fisher,
    /// XᵀX of the inputs X of a linear layer, `[in, in]` for its weight `[out, in]`.
    Gram,
}

impl Statistics {
    /// What the file is called beside a model, where the configuration names no other.
    pub const fn file(self) -> &'static str {
        match self {
            Statistics::Fisher => "fisher.safetensors",
            Statistics::Gram => "gram.safetensors",
        }
    }

    /// The shape that belongs to a tensor of this one; `None` where there is no such.
    pub fn shape(self, of: &[usize]) -> Option<Vec<usize>> {
        match (self, of) {
            (Statistics::Fisher, _) => Some(of.to_vec()),
            (Statistics::Gram, [_, inputs]) => Some(vec![*inputs, *inputs]),
            (Statistics::Gram, _) => None,
        }
    }
}

impl Spec {
    /// A method that takes any number of models and needs no base.
    pub const fn new(name: &'static str, title: &'static str, citation: &'static str) -> Self {
        let (settings, base): (&[Setting], _) = (&[], Base::Input);
        let models = (1, usize::MAX);
        let (by_rows, selects, statistics) = (false, false, None);
        Spec { name, title, citation, settings, base, models, by_rows, selects, statistics }
    }

    /// With these settings.
    pub const fn settings(self, settings: &'static [Setting]) -> Self {
        Spec { settings, ..self }
    }

    /// With this part for the base.
    pub const fn base(self, base: Base) -> Self {
        Spec { base, ..self }
    }

    /// With so many models, without the base.
    pub const fn models(self, models: RangeInclusive<usize>) -> Self {
        Spec { models: (*models.start(), *models.end()), ..self }
    }

    /// Whether it has a setting of this name.
    pub fn has(&self, setting: &str) -> bool {
        self.settings.iter().any(|s| s.name == setting)
    }

    /// With pieces of whole rows.
    pub const fn by_rows(self) -> Self {
        Spec { by_rows: true, ..self }
    }

    /// With a selection of the largest numbers.
    pub const fn selects(self) -> Self {
        Spec { selects: true, ..self }
    }

    /// With such a file beside each model.
    pub const fn statistics(self, statistics: Statistics) -> Self {
        Spec { statistics: Some(statistics), ..self }
    }
}

/// What a base model is to a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// It has to be there, and the others are compared with it.
    Required,
    /// Where it is there, the others are compared with it.
    Optional,
    /// It is one of the models.
    Input,
}

/// One setting of a method.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// Of what it is.
    pub of: Of,
    /// Its value where the configuration is silent; `None` where that is an error.
    pub default: Option<Scalar>,
    /// What it does, for `modl list`.
    pub about: &'static str,
}

/// Of what a setting is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Of the merge.
    All,
    /// Of each model; for methods with a base, of each but the base.
    Each,
}

/// A value of a setting.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scalar {
    /// A number.
    Number(f64),
    /// Yes or no.
    Flag(bool),
    /// A word.
    Word(&'static str),
}

impl Setting {
    /// A number for each model that has to be given.
    pub const fn each(name: &'static str, about: &'static str) -> Self {
        Setting { name, of: Of::Each, default: None, about }
    }

    /// A number for each model.
    pub const fn each_or(name: &'static str, default: f64, about: &'static str) -> Self {
        Setting { name, of: Of::Each, default: Some(Scalar::Number(default)), about }
    }

    /// A number of the merge that has to be given.
    pub const fn number(name: &'static str, about: &'static str) -> Self {
        Setting { name, of: Of::All, default: None, about }
    }

    /// A number of the merge.
    pub const fn number_or(name: &'static str, default: f64, about: &'static str) -> Self {
        Setting { name, of: Of::All, default: Some(Scalar::Number(default)), about }
    }

    /// A yes or no of the merge.
    pub const fn flag(name: &'static str, default: bool, about: &'static str) -> Self {
        Setting { name, of: Of::All, default: Some(Scalar::Flag(default)), about }
    }

    /// A word of the merge.
    pub const fn word(name: &'static str, default: &'static str, about: &'static str) -> Self {
        Setting { name, of: Of::All, default: Some(Scalar::Word(default)), about }
    }
}

/// The values of a method's settings for one tensor.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    all: BTreeMap<String, Value>,
    each: BTreeMap<String, Vec<Value>>,
}

impl Settings {
    /// Sets a value of the merge.
    pub fn set(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.all.insert(name.to_owned(), value.into());
        self
    }

    /// Sets one value for each model that has this setting, in the order of the models.
    pub fn set_each<V: Into<Value>>(
        mut self,
        name: &str,
        values: impl IntoIterator<Item = V>,
    ) -> Self {
        self.each.insert(name.to_owned(), values.into_iter().map(Into::into).collect());
        self
    }

    /// Fills in what is silent, for so many models.
    ///
    /// # Errors
    /// Where something unknown is set, or something that has no default is not.
    pub fn complete(mut self, spec: &Spec, models: usize) -> Result<Self> {
        for name in self.all.keys().chain(self.each.keys()) {
            if !spec.has(name) {
                let known = spec.settings.iter().map(|s| s.name);
                return Err(Error::unknown(format!("setting of `{}`", spec.name), name, known));
            }
        }
        for s in spec.settings {
            let default = s.default.map(Value::from);
            match s.of {
                Of::All if !self.all.contains_key(s.name) => {
                    let value = default.ok_or_else(|| missing(spec, s))?;
                    self.all.insert(s.name.to_owned(), value);
                }
                Of::Each if !self.each.contains_key(s.name) => {
                    let value = default.ok_or_else(|| missing(spec, s))?;
                    self.each.insert(s.name.to_owned(), vec![value; models]);
                }
                _ => {}
            }
        }
        Ok(self)
    }

    /// Names and values, for people; those of each model in a list.
    pub fn shown(&self) -> BTreeMap<String, String> {
        let list = |v: &Vec<Value>| {
            let all: Vec<String> = v.iter().map(Value::to_string).collect();
            format!("[{}]", all.join(", "))
        };
        let each = self.each.iter().map(|(name, v)| (name.clone(), list(v)));
        each.chain(self.all.iter().map(|(name, v)| (name.clone(), v.to_string()))).collect()
    }

    /// A number of the merge.
    ///
    /// # Errors
    /// Where it is none.
    pub fn number(&self, name: &str) -> Result<f64> {
        let value = self.all.get(name);
        value.and_then(number).ok_or_else(|| wrong(name, value, "a number"))
    }

    /// A yes or no of the merge.
    ///
    /// # Errors
    /// Where it is none.
    pub fn flag(&self, name: &str) -> Result<bool> {
        let value = self.all.get(name);
        value.and_then(Value::as_bool).ok_or_else(|| wrong(name, value, "true or false"))
    }

    /// One of some words.
    ///
    /// # Errors
    /// Where it is none of them.
    pub fn word(&self, name: &str, known: &[&'static str]) -> Result<&'static str> {
        let value = self.all.get(name);
        let word = value.and_then(Value::as_str).ok_or_else(|| wrong(name, value, "a word"))?;
        let found = known.iter().find(|k| **k == word);
        found.copied().ok_or_else(|| Error::unknown(name, word, known))
    }

    /// A number for each model that has it.
    ///
    /// # Errors
    /// Where one is none.
    pub fn each(&self, name: &str) -> Result<Vec<f64>> {
        let values = self.each.get(name).ok_or_else(|| wrong(name, None, "a number"))?;
        values.iter().map(|v| number(v).ok_or_else(|| wrong(name, Some(v), "a number"))).collect()
    }
}

impl std::fmt::Display for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all = self.shown().into_iter().map(|(name, value)| format!("{name} {value}"));
        f.write_str(&all.collect::<Vec<_>>().join(", "))
    }
}

/// A number, also one that YAML holds for a text (`1e-5`).
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

fn missing(spec: &Spec, s: &Setting) -> Error {
    let of = if s.of == Of::Each { "of each model " } else { "" };
    let problem = format!("`{}` needs it {of}({})", spec.name, s.about);
    Error::invalid(format!("parameter `{}`", s.name), problem)
}

fn wrong(name: &str, value: Option<&Value>, what: &str) -> Error {
    let found = value.map_or_else(|| "nothing".to_owned(), Value::to_string);
    Error::invalid(format!("parameter `{name}`"), format!("is to be {what}, not {found}"))
}

impl From<Scalar> for Value {
    fn from(s: Scalar) -> Value {
        match s {
            Scalar::Number(n) => n.into(),
            Scalar::Flag(f) => f.into(),
            Scalar::Word(w) => w.into(),
        }
    }
}

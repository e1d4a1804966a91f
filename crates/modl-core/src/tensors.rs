//! A few named tensors in the order in which they were put in.

use std::borrow::Cow;
use std::collections::HashSet;

use crate::{Error, Result, Tensor};

/// Named tensors in insertion order: θ at a site, φ of a module, a batch, a model's outputs.
///
/// Lookups scan: there are seldom more than a dozen.
#[derive(Debug, Clone, Default)]
pub struct Tensors(Vec<(Cow<'static, str>, Tensor)>);

impl Tensors {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor, or replaces the one of that name.
    pub fn set(&mut self, name: impl Into<Cow<'static, str>>, tensor: Tensor) {
        let name = name.into();
        match self.0.iter_mut().find(|(n, _)| *n == name) {
            Some(slot) => slot.1 = tensor,
            None => self.0.push((name, tensor)),
        }
    }

    /// [`Tensors::set`] in a chain.
    pub fn with(mut self, name: impl Into<Cow<'static, str>>, tensor: Tensor) -> Self {
        self.set(name, tensor);
        self
    }

    /// All of these tensors, of which each has a name of its own.
    ///
    /// # Errors
    /// [`Error::Duplicate`] with all names that come again.
    pub fn distinct<N: Into<Cow<'static, str>>>(
        all: impl IntoIterator<Item = (N, Tensor)>,
    ) -> Result<Tensors> {
        let (mut seen, mut twice, mut kept) = (HashSet::new(), Vec::new(), Vec::new());
        for (name, tensor) in all {
            let name: Cow<'static, str> = name.into();
            if !seen.insert(name.clone()) {
                twice.push(name.to_string());
            }
            kept.push((name, tensor));
        }
        match twice.is_empty() {
            true => Ok(Tensors(kept)),
            false => Err(Error::Duplicate { kind: "tensor", name: twice.join("`, `") }),
        }
    }

    /// The tensor of that name, if any.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, t)| t)
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the names that there are.
    pub fn need(&self, name: &str) -> Result<&Tensor> {
        self.get(name).ok_or_else(|| Error::unknown("tensor", name, self.names()))
    }

    /// The names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(n, _)| n.as_ref())
    }

    /// Names and tensors in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(n, t)| (n.as_ref(), t))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The same names with each tensor changed.
    pub fn map(&self, mut f: impl FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<Tensors> {
        self.0.iter().map(|(n, t)| Ok((n.clone(), f(n, t)?))).collect::<Result<_>>().map(Tensors)
    }
}

impl<N: Into<Cow<'static, str>>> FromIterator<(N, Tensor)> for Tensors {
    fn from_iter<I: IntoIterator<Item = (N, Tensor)>>(iter: I) -> Self {
        iter.into_iter().fold(Tensors::new(), |all, (n, t)| all.with(n, t))
    }
}

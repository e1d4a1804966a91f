//! Named parameters: ordered, without duplicates, frozen by selector.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::{Error, Mismatch, Result, ResultExt, Tensor, no_grad};

/// A parameter of a [`ParamStore`].
#[derive(Debug, Clone)]
pub struct Param {
    pub(crate) tensor: Tensor,
    pub(crate) buffer: bool,
}

impl Param {
    /// The tensor, which shares storage with the one that a module holds.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether gradients are computed for it.
    pub fn trainable(&self) -> bool {
        self.tensor.requires_grad()
    }

    /// Whether it is kept and saved like a parameter, but is never trained.
    pub fn is_buffer(&self) -> bool {
        self.buffer
    }
}

/// Parameters by name, in the names' order.
///
/// A store and the modules that use it share tensors: what is loaded into the store or changed by
/// an optimiser is at once what the modules compute with.
#[derive(Debug, Default)]
pub struct ParamStore {
    pub(crate) params: BTreeMap<String, Param>,
    /// New parameters have a shape, and no memory until something is loaded into them.
    pub(crate) shapes_only: bool,
}

impl ParamStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn of_shapes() -> Self {
        ParamStore { shapes_only: true, ..Self::default() }
    }

    /// Adds a parameter.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) -> Result<()> {
        self.add(name.into(), Param { tensor, buffer: false })
    }

    pub(crate) fn add(&mut self, name: String, param: Param) -> Result<()> {
        if self.params.contains_key(&name) {
            return Err(Error::Duplicate { kind: "parameter", name });
        }
        self.params.insert(name, param);
        Ok(())
    }

    /// The parameters whose names start with `prefix`, without it. They share their tensors with
    /// this store.
    pub fn below(&self, prefix: &str) -> ParamStore {
        let entry =
            |(n, p): (&String, &Param)| Some((n.strip_prefix(prefix)?.to_owned(), p.clone()));
        ParamStore { params: self.range(prefix).filter_map(entry).collect(), ..Self::default() }
    }

    /// Those whose names start with `prefix`, found without a look at the others.
    fn range(&self, prefix: &str) -> impl Iterator<Item = (&String, &Param)> {
        let from = self.params.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        from.take_while(move |(name, _)| name.starts_with(prefix))
    }

    /// The parameters that `own` gives a name, under it. They share their tensors with this store.
    pub fn renamed(&self, own: impl Fn(&str) -> Option<String>) -> ParamStore {
        let entry = |(n, p): (&String, &Param)| Some((own(n)?, p.clone()));
        ParamStore { params: self.params.iter().filter_map(entry).collect(), ..Self::default() }
    }

    /// The parameters whose names start with `prefix`, as they are called here.
    pub(crate) fn under(&self, prefix: &str) -> ParamStore {
        let params = self.range(prefix).map(|(n, p)| (n.clone(), p.clone())).collect();
        ParamStore { params, ..Self::default() }
    }

    /// Takes out all parameters whose names start with `prefix`.
    pub(crate) fn take_under(&mut self, prefix: &str) -> ParamStore {
        let own = self.under(prefix);
        own.params.keys().for_each(|name| drop(self.params.remove(name)));
        own
    }

    /// Takes over all parameters of another store, in place of those of the same names.
    pub(crate) fn absorb(&mut self, other: ParamStore) {
        self.params.extend(other.params);
    }

    /// Refuses names that are taken already.
    pub(crate) fn check_free(&self, other: &ParamStore) -> Result<()> {
        let taken = other.params.keys().filter(|n| self.params.contains_key(*n));
        let taken: Vec<&str> = taken.map(String::as_str).collect();
        match taken.is_empty() {
            true => Ok(()),
            false => Err(Error::Duplicate { kind: "parameter", name: taken.join("`, `") }),
        }
    }

    /// The tensor of that name, if there is one.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.params.get(name).map(|p| &p.tensor)
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        match self.params.get(name) {
            Some(p) => Ok(&p.tensor),
            None => Err(Error::unknown("parameter", name, self.params.keys())),
        }
    }

    /// Removes all parameters whose names start with `prefix`, and says how many.
    pub fn remove_below(&mut self, prefix: &str) -> usize {
        self.take_under(prefix).params.len()
    }

    /// Names and parameters in the names' order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Param)> {
        self.params.iter().map(|(n, p)| (n.as_str(), p))
    }

    /// The parameters that `select` takes.
    pub fn select<'a>(&'a self, select: &'a Select) -> impl Iterator<Item = (&'a str, &'a Tensor)> {
        self.iter().filter(|(n, _)| select.matches(n)).map(|(n, p)| (n, &p.tensor))
    }

    /// Makes exactly the selected parameters trainable, and freezes all others. Buffers are never
    /// trained.
    ///
    /// # Errors
    /// Where a selected one is not made of floats; then nothing has been changed.
    pub fn train_only(&self, select: &Select) -> Result<()> {
        train_only(self.params.iter().map(|(n, p)| (n.clone(), p)), select)
    }

    /// The trainable parameters in the names' order.
    pub fn trainable(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.iter().filter(|(_, p)| p.trainable()).map(|(n, p)| (n, &p.tensor))
    }

    /// Overwrites every selected parameter with the tensor of the same name.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with every missing, unexpected or misshapen name; where names come twice
    /// or values are infinite or not a number, with all of them. Then nothing has been changed.
    pub fn load<'a>(
        &self,
        source: &str,
        tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
        select: &Select,
    ) -> Result<()> {
        let found = self.check(source, tensors, select)?;
        no_grad(|| {
            for (name, tensor) in self.select(select) {
                tensor.clone().fill_from(found[name]).at(name)?;
            }
            Ok(())
        })
    }

    /// Refuses what [`ParamStore::load`] refuses, and gives the tensors by name.
    pub(crate) fn check<'a>(
        &self,
        source: &str,
        tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
        select: &Select,
    ) -> Result<BTreeMap<&'a str, &'a Tensor>> {
        let (mut found, mut twice) = (BTreeMap::new(), Vec::new());
        for (name, tensor) in tensors {
            if found.insert(name, tensor).is_some() {
                twice.push(name);
            }
        }
        if !twice.is_empty() {
            return Err(Error::invalid(
                source,
                format!("has more than once: {}", twice.join(", ")),
            ));
        }
        let wanted: BTreeMap<&str, &Tensor> = self.select(select).collect();
        fit(source, &wanted, &found)?;
        check_finite(source, &found)?;
        Ok(found)
    }
}

/// Makes exactly the selected parameters trainable, or changes nothing.
pub(crate) fn train_only<'a>(
    all: impl Iterator<Item = (String, &'a Param)>,
    select: &Select,
) -> Result<()> {
    let mut done: Vec<(&Param, bool)> = Vec::new();
    for (name, p) in all {
        let before = p.trainable();
        let set = p.tensor.set_requires_grad(!p.buffer && select.matches(&name)).at(&name);
        done.push((p, before));
        if let Err(e) = set {
            done.iter()
                .try_for_each(|(p, before)| p.tensor.set_requires_grad(*before).map(drop))?;
            return Err(e);
        }
    }
    Ok(())
}

/// Refuses tensors with values that are infinite or not a number: nothing can be computed with them.
fn check_finite(source: &str, found: &BTreeMap<&str, &Tensor>) -> Result<()> {
    let mut broken = Vec::new();
    for (name, t) in found {
        if t.detach()?.is_finite()?.all()?.item()? == 0.0 {
            broken.push(*name);
        }
    }
    match broken.is_empty() {
        true => Ok(()),
        false => Err(Error::invalid(
            source,
            format!("has values that are infinite or not a number: {}", broken.join(", ")),
        )),
    }
}

/// Checks that `found` has exactly the names and shapes of `wanted`.
///
/// # Errors
/// [`Error::Mismatch`] with all that does not fit.
pub(crate) fn fit(
    source: &str,
    wanted: &BTreeMap<&str, &Tensor>,
    found: &BTreeMap<&str, &Tensor>,
) -> Result<()> {
    let near = |name: &str, others: &BTreeMap<&str, &Tensor>, own: &BTreeMap<&str, &Tensor>| {
        let free = others.keys().copied().filter(|n| !own.contains_key(n));
        crate::nearest(name, free).map(str::to_owned)
    };
    let mut m = Mismatch { source: source.to_owned(), ..Mismatch::default() };
    for (name, tensor) in wanted {
        match found.get(name) {
            None => m.missing.push((name.to_string(), near(name, found, wanted))),
            Some(t) if t.size() != tensor.size() => {
                m.misshapen.push((name.to_string(), tensor.size(), t.size()));
            }
            Some(_) => {}
        }
    }
    for name in found.keys().filter(|n| !wanted.contains_key(*n)) {
        m.unexpected.push((name.to_string(), near(name, wanted, found)));
    }
    if m.is_empty() { Ok(()) } else { Err(m.into()) }
}

/// Names taken by pattern, where `*` stands for any characters: `modules.tweets.*`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Select(Vec<String>);

impl Select {
    /// Takes names that fit any of the patterns.
    pub fn any<S: Into<String>>(patterns: impl IntoIterator<Item = S>) -> Self {
        Select(patterns.into_iter().map(Into::into).collect())
    }

    /// Takes names that fit one pattern.
    pub fn new(pattern: impl Into<String>) -> Self {
        Select(vec![pattern.into()])
    }

    /// Takes every name.
    pub fn all() -> Self {
        Self::new("*")
    }

    /// Takes no name.
    pub fn none() -> Self {
        Select(Vec::new())
    }

    /// The patterns.
    pub fn patterns(&self) -> &[String] {
        &self.0
    }

    /// Whether `name` is taken.
    pub fn matches(&self, name: &str) -> bool {
        self.0.iter().any(|p| glob(p, name))
    }
}

/// Whether `name` fits `pattern`, in which `*` stands for any characters, also none.
fn glob(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name.strip_prefix(head).is_some_and(|tail| {
            let mut ends = tail.char_indices().map(|(i, _)| i).chain([tail.len()]);
            rest.is_empty() || ends.any(|i| glob(rest, &tail[i..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Init, Kind, Scope, Seed};

    #[test]
    fn selectors_are_globs() {
        assert!(Select::new("modules.tweets.*").matches("modules.tweets.a.b"));
        assert!(!Select::new("modules.tweets.*").matches("modules.nyt.a"));
        assert!(Select::new("*.lora_A.*").matches("x.lora_A.weight"));
        assert!(Select::new("a*b*c").matches("aXbYbZc"));
        assert!(!Select::new("a*b*c").matches("aXbYbZ"));
        assert!(!Select::none().matches("a"));
    }

    #[test]
    fn a_parameter_does_not_depend_on_what_was_made_before_it() {
        let mut first = ParamStore::new();
        let mut scope = Scope::new(&mut first, Seed(1));
        scope.sub("a").param("w", &[3, 2], Init::Kaiming).unwrap();
        let b = scope.sub("b").param("w", &[3, 2], Init::Kaiming).unwrap();
        let mut second = ParamStore::new();
        let alone =
            Scope::new(&mut second, Seed(1)).sub("b").param("w", &[3, 2], Init::Kaiming).unwrap();
        assert!(b.bit_equal(&alone).unwrap());
        assert!(!b.bit_equal(first.get("a.w").unwrap()).unwrap());
    }

    #[test]
    fn a_prefix_takes_what_starts_with_it_and_no_neighbour() {
        let mut store = ParamStore::new();
        for name in ["m.a", "m.a.x", "m.a.y", "m.a/", "m.a-b.x", "m.b.x"] {
            let zero = Tensor::zeros(&[1], Kind::Float, Device::Cpu).unwrap();
            store.insert(name, zero).unwrap();
        }
        let below = store.below("m.a.");
        assert_eq!(below.iter().map(|(n, _)| n).collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(store.remove_below("m.a."), 2);
        let left: Vec<&str> = store.iter().map(|(n, _)| n).collect();
        assert_eq!(left, ["m.a", "m.a-b.x", "m.a/", "m.b.x"]);
    }

    #[test]
    fn loading_names_every_offender_and_changes_nothing() {
        let mut store = ParamStore::new();
        let mut scope = Scope::new(&mut store, Seed(1));
        scope.param("lora_A", &[2, 2], Init::Zeros).unwrap();
        scope.param("lora_B", &[2, 2], Init::Zeros).unwrap();
        scope.param("scale", &[2], Init::Zeros).unwrap();
        let ones = Tensor::ones(&[2, 2], Kind::Float, Device::Cpu).unwrap();
        let e = store
            .load(
                "x.safetensors",
                [("lora_a", &ones), ("lora_B", &ones), ("scale", &ones)],
                &Select::all(),
            )
            .unwrap_err();
        let Error::Mismatch(m) = &e else { panic!("{e}") };
        assert_eq!(m.missing, [("lora_A".to_owned(), Some("lora_a".to_owned()))]);
        assert_eq!(m.unexpected, [("lora_a".to_owned(), Some("lora_A".to_owned()))]);
        assert_eq!(m.misshapen, [("scale".to_owned(), vec![2], vec![2, 2])]);
        assert_eq!(store.get("lora_B").unwrap().sum().unwrap().item().unwrap(), 0.0);
    }

    #[test]
    fn duplicates_are_refused_and_sharing_is_by_name() {
        let mut store = ParamStore::new();
        let mut scope = Scope::new(&mut store, Seed(1));
        scope.param("w", &[2], Init::Ones).unwrap();
        assert!(matches!(scope.param("w", &[2], Init::Ones), Err(Error::Duplicate { .. })));
        assert!(scope.shared("w", &[2], Init::Ones).is_ok());
        assert!(scope.shared("w", &[3], Init::Ones).is_err());
    }
}

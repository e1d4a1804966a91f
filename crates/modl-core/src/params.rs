//! Named parameters: ordered, without duplicates, frozen by selector.

use std::collections::BTreeMap;

pub use crate::random::Init;
use crate::{Device, Error, Kind, Mismatch, Result, ResultExt, Seed, Tensor, no_grad};

/// A parameter of a [`ParamStore`].
#[derive(Debug, Clone)]
pub struct Param {
    tensor: Tensor,
    buffer: bool,
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
    params: BTreeMap<String, Param>,
}

impl ParamStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a parameter.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) -> Result<()> {
        self.add(name.into(), Param { tensor, buffer: false })
    }

    fn add(&mut self, name: String, param: Param) -> Result<()> {
        if self.params.contains_key(&name) {
            return Err(Error::Duplicate { kind: "parameter", name });
        }
        self.params.insert(name, param);
        Ok(())
    }

    /// The parameters whose names start with `prefix`, without it. They share their tensors with
    /// this store.
    pub fn below(&self, prefix: &str) -> ParamStore {
        self.renamed(|name| name.strip_prefix(prefix).map(str::to_owned))
    }

    /// The parameters that `own` gives a name, under it. They share their tensors with this store.
    pub fn renamed(&self, own: impl Fn(&str) -> Option<String>) -> ParamStore {
        let entry = |(n, p): (&String, &Param)| Some((own(n)?, p.clone()));
        ParamStore { params: self.params.iter().filter_map(entry).collect() }
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

    /// Removes all parameters that `select` takes, and says how many.
    pub fn remove(&mut self, select: &Select) -> usize {
        let before = self.params.len();
        self.params.retain(|name, _| !select.matches(name));
        before - self.params.len()
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
    pub fn train_only(&self, select: &Select) -> Result<()> {
        for (name, p) in &self.params {
            p.tensor.set_requires_grad(!p.buffer && select.matches(name)).at(name)?;
        }
        Ok(())
    }

    /// The trainable parameters in the names' order.
    pub fn trainable(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.iter().filter(|(_, p)| p.trainable()).map(|(n, p)| (n, &p.tensor))
    }

    /// Overwrites every selected parameter with the tensor of the same name.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with every missing, unexpected or misshapen name; then nothing has been
    /// changed.
    pub fn load<'a>(
        &self,
        source: &str,
        tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
        select: &Select,
    ) -> Result<()> {
        let found: BTreeMap<&str, &Tensor> = tensors.into_iter().collect();
        let wanted: BTreeMap<&str, &Tensor> = self.select(select).collect();
        fit(source, &wanted, &found)?;
        no_grad(|| {
            for (name, tensor) in &wanted {
                (*tensor).clone().copy_from(found[name]).at(name)?;
            }
            Ok(())
        })
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

/// A place in a [`ParamStore`] where a module makes its parameters.
///
/// The full name of a parameter is the scope's path, a dot, and its own name; its initial value
/// depends on the seed and the full name alone.
#[derive(Debug)]
pub struct Scope<'a> {
    store: &'a mut ParamStore,
    path: String,
    /// The path at which [`Scope::common`] is.
    top: String,
    seed: Seed,
    kind: Kind,
    device: Device,
}

impl<'a> Scope<'a> {
    /// The top of `store`; parameters are 32-bit floats on the CPU.
    pub fn new(store: &'a mut ParamStore, seed: Seed) -> Self {
        Self::at(store, "", seed)
    }

    /// A place in `store`.
    pub fn at(store: &'a mut ParamStore, path: &str, seed: Seed) -> Self {
        let (path, top) = (path.to_owned(), path.to_owned());
        Scope { store, path, top, seed, kind: Kind::Float, device: Device::Cpu }
    }

    /// New parameters are of this kind and on this device.
    pub fn on(self, kind: Kind, device: Device) -> Self {
        Scope { kind, device, ..self }
    }

    /// A place below this one.
    pub fn sub(&mut self, name: &str) -> Scope<'_> {
        let (path, top) = (self.full(name), self.top.clone());
        let (seed, kind, device) = (self.seed, self.kind, self.device);
        Scope { store: self.store, path, top, seed, kind, device }
    }

    /// The top of what one attached module, router or aggregator owns, for parameters that its
    /// sites share.
    pub fn common(&mut self) -> Scope<'_> {
        let (path, top) = (self.top.clone(), self.top.clone());
        let (seed, kind, device) = (self.seed, self.kind, self.device);
        Scope { store: self.store, path, top, seed, kind, device }
    }

    /// A place below this one for a part with a top of its own: what the part's sites share is at
    /// `name` below this top.
    pub fn part(&mut self, name: &str) -> Scope<'_> {
        let top =
            if self.top.is_empty() { name.to_owned() } else { format!("{}.{name}", self.top) };
        Scope { top, ..self.sub(name) }
    }

    /// The path of this place.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The seed for draws of one's own, fixed by this place.
    pub fn seed(&self) -> Seed {
        self.seed.child(&self.path)
    }

    /// The kind of new parameters.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The device of new parameters.
    pub fn device(&self) -> Device {
        self.device
    }

    fn full(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Makes a trainable parameter.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken.
    pub fn param(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let full = self.full(name);
        let value = init.tensor(shape, self.seed.child(&full), self.kind, self.device).at(&full)?;
        self.keep(full, value)
    }

    /// Makes a trainable parameter with a given start, which is copied.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken.
    pub fn param_from(&mut self, name: &str, value: &Tensor) -> Result<Tensor> {
        let full = self.full(name);
        let own = value.detach()?.to_device(self.device)?.to_kind(self.kind)?.copy().at(&full)?;
        self.keep(full, own)
    }

    /// Another tensor under the name of a parameter that is there, trainable as that one was: for a
    /// router that grows. What held the old tensor is to take the new one.
    ///
    /// # Errors
    /// [`Error::Unknown`] where there is no such parameter.
    pub fn replace(&mut self, name: &str, value: &Tensor) -> Result<Tensor> {
        let full = self.full(name);
        let trainable = self.store.get(&full)?.requires_grad();
        self.store.params.remove(&full);
        let own = self.param_from(name, value)?;
        own.set_requires_grad(trainable)?;
        Ok(own)
    }

    /// Keeps a copy of a tensor that is saved and loaded with the parameters, but never trained: a
    /// mask, a frozen projection, running averages.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken.
    pub fn buffer(&mut self, name: &str, value: &Tensor) -> Result<Tensor> {
        let full = self.full(name);
        let own = value.detach()?.to_device(self.device)?.copy().at(&full)?;
        self.store.add(full, Param { tensor: own.clone(), buffer: true })?;
        Ok(own)
    }

    /// The buffer of that name, made by `value` on the first call and shared by all later ones.
    ///
    /// # Errors
    /// What `value` gives.
    pub fn shared_buffer(
        &mut self,
        name: &str,
        value: impl FnOnce(Seed) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let full = self.full(name);
        match self.store.params.get(&full) {
            Some(p) => Ok(p.tensor.clone()),
            None => self.buffer(name, &value(self.seed.child(&full))?),
        }
    }

    /// The parameter of that name, made on the first call and shared by all later ones.
    ///
    /// # Errors
    /// Where it exists with another shape.
    pub fn shared(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let full = self.full(name);
        match self.store.params.get(&full) {
            None => self.param(name, shape, init),
            Some(p) if p.tensor.size() == shape => Ok(p.tensor.clone()),
            Some(p) => Err(Error::invalid(
                full,
                format!("is shared with shape {:?}, not {shape:?}", p.tensor.size()),
            )),
        }
    }

    fn keep(&mut self, full: String, value: Tensor) -> Result<Tensor> {
        value.set_requires_grad(true).at(&full)?;
        self.store.insert(full, value.clone())?;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

//! Where a module makes its parameters.

use crate::params::Param;
use crate::{Device, Error, Init, Kind, ParamStore, Result, ResultExt, Seed, Tensor};

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
        let value = self.drawn(&full, shape, init)?;
        self.keep(full, value)
    }

    fn drawn(&self, full: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        match self.store.shapes_only {
            true => Tensor::unfilled(shape, self.kind, self.device),
            false => init.tensor(shape, self.seed.child(full), self.kind, self.device),
        }
        .at(full)
    }

    /// Makes a trainable parameter of `shape` whose start `draw` makes, which is not asked where
    /// only the shape is wanted.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken, and what `draw` gives.
    pub fn param_drawn(
        &mut self,
        name: &str,
        shape: &[i64],
        draw: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self.store.shapes_only {
            true => self.param(name, shape, Init::Zeros),
            false => self.param_from(name, &draw()?),
        }
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

    /// Another tensor under the name of a parameter that is there, trainable as that one was, or of a
    /// buffer: for a router that grows. What held the old tensor is to take the new one.
    ///
    /// # Errors
    /// [`Error::Unknown`] where there is no such parameter.
    pub fn replace(&mut self, name: &str, value: &Tensor) -> Result<Tensor> {
        let full = self.full(name);
        let old = self.store.get(&full)?;
        let (trainable, kind) = (old.requires_grad(), old.kind());
        let buffer = self.store.params.get(&full).is_some_and(Param::is_buffer);
        let own = value.detach()?.to_device(self.device)?.to_kind(kind)?.copy().at(&full)?;
        own.set_requires_grad(trainable)?;
        self.store.params.insert(full, Param { tensor: own.clone(), buffer });
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

    /// [`Scope::buffer`] of `shape` whose values `draw` makes, which is not asked where only the shape
    /// is wanted.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken, and what `draw` gives.
    pub fn buffer_drawn(
        &mut self,
        name: &str,
        shape: &[i64],
        draw: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let full = self.full(name);
        let value = match self.store.shapes_only {
            true => Tensor::unfilled(shape, self.kind, self.device).at(&full)?,
            false => return self.buffer(name, &draw()?),
        };
        self.store.add(full, Param { tensor: value.clone(), buffer: true })?;
        Ok(value)
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

    /// The buffer of that name, drawn on the first call and shared by all later ones.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn shared_frozen(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let full = self.full(name);
        if let Some(p) = self.store.params.get(&full) {
            return Ok(p.tensor.clone());
        }
        let tensor = self.drawn(&full, shape, init)?;
        self.store.add(full, Param { tensor: tensor.clone(), buffer: true })?;
        Ok(tensor)
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

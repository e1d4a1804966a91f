//! Modules that come and go: more of them than fit into memory at once.
//!
//! A limit in bytes is kept by taking out those modules that have not been needed for the longest
//! time (least recently used). Files are mapped, so that a module that comes back costs little
//! more than its copy.

use crate::attach::Removed;
use crate::{Error, Modular, ParamStore, Result, Select};

/// The modules of a model that are kept within a limit. Modules that were attached without it are
/// not counted and never taken out.
#[derive(Debug)]
pub struct Residents {
    limit: usize,
    /// Names and sizes, the one needed last at the end.
    order: Vec<(String, usize)>,
}

impl Residents {
    /// At most `limit` bytes of parameters.
    pub fn new(limit: usize) -> Self {
        Residents { limit, order: Vec::new() }
    }

    /// The modules that are there, the one needed last at the end.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(|(n, _)| n.as_str())
    }

    /// The bytes of their parameters.
    pub fn bytes(&self) -> usize {
        self.order.iter().map(|(_, b)| b).sum()
    }

    /// Makes sure that the named modules are attached: `load` attaches one that is missing under
    /// its name. The model's router and aggregator are as before, over the modules that are there.
    /// While modules are loaded, they are there beside those that leave for them.
    ///
    /// # Errors
    /// Where `load` fails or does not attach what it is asked for, the named ones alone are over
    /// the limit, the router cannot be made over the modules that would be there, or routers have
    /// learned something, which taking modules out would lose; then all is as before.
    pub fn need(
        &mut self,
        model: &mut Modular,
        names: &[&str],
        load: impl Fn(&mut Modular, &str) -> Result<()>,
    ) -> Result<()> {
        let missing = |n: &&&str| !self.order.iter().any(|(m, _)| m == *n);
        if names.iter().filter(missing).count() == 0 {
            names.iter().for_each(|n| self.touch(n));
            return Ok(());
        }
        if model.params().select(&Select::new("routers.*")).next().is_some() {
            return Err(Error::unsupported(
                "modules that come and go under a router with parameters of its own",
                "use a router that looks modules up by name, such as `fixed`",
            ));
        }
        let before: Vec<String> = model.modules().into_iter().map(str::to_owned).collect();
        let order = self.order.clone();
        // Without a router a bank may grow; its layers keep theirs until it is known that new ones
        // can be made.
        let router = model.router.take();
        let mut removed = Vec::new();
        let result = self.bring(model, names, load, &mut removed).and_then(|()| match &router {
            Some((config, global)) if !model.modules().is_empty() => {
                model.made_routers(config.as_ref(), *global, ParamStore::new()).map(Some)
            }
            _ => Ok(None),
        });
        match result {
            Ok(made) => {
                if let (Some((config, global)), Some(made)) = (router, made) {
                    model.put_routers(config, global, made);
                }
                Ok(())
            }
            Err(e) => {
                let new = model.modules().into_iter().map(str::to_owned);
                let new: Vec<String> = new.filter(|n| !before.contains(n)).collect();
                // In this order, so that no layer becomes empty and is lost.
                removed.into_iter().rev().try_for_each(|r| model.put_back(r))?;
                new.iter().try_for_each(|n| model.take_out(n).map(drop))?;
                model.router = router;
                self.order = order;
                Err(e)
            }
        }
    }

    fn touch(&mut self, name: &str) {
        if let Some(at) = self.order.iter().position(|(n, _)| n == name) {
            let entry = self.order.remove(at);
            self.order.push(entry);
        }
    }

    fn bring(
        &mut self,
        model: &mut Modular,
        names: &[&str],
        load: impl Fn(&mut Modular, &str) -> Result<()>,
        removed: &mut Vec<Removed>,
    ) -> Result<()> {
        names.iter().try_for_each(|name| self.load_one(model, name, &load))?;
        let wanted = self.order.iter().filter(|(n, _)| names.contains(&n.as_str()));
        let wanted: usize = wanted.map(|(_, b)| b).sum();
        if wanted > self.limit {
            let (names, limit) = (names.join(", "), self.limit);
            let problem = format!("{wanted} bytes for {names}, the limit is {limit}");
            return Err(Error::invalid("modules", problem));
        }
        names.iter().for_each(|n| self.touch(n));
        while self.bytes() > self.limit {
            // The named ones are at the end, and fit.
            let (oldest, _) = self.order.remove(0);
            removed.push(model.take_out(&oldest)?);
        }
        Ok(())
    }

    fn load_one(
        &mut self,
        model: &mut Modular,
        name: &str,
        load: &impl Fn(&mut Modular, &str) -> Result<()>,
    ) -> Result<()> {
        if self.order.iter().any(|(n, _)| n == name) {
            return Ok(());
        }
        load(model, name)?;
        if !model.modules().contains(&name) {
            return Err(Error::invalid(name, "was not attached by the function that loads it"));
        }
        self.order.push((name.to_owned(), bytes_of(model, name)));
        Ok(())
    }
}

fn bytes_of(model: &Modular, name: &str) -> usize {
    let select = Select::new(format!("modules.{name}.*"));
    let own = model.params().select(&select);
    own.map(|(_, t)| t.numel() * t.kind().elt_size_in_bytes()).sum()
}

//! Merging a module into the backbone, and taking it out again.

use crate::{Error, Modular, Result, ResultExt, Site, Tensor, no_grad};

impl Modular {
    /// Writes θ ⊕ φ of one module into the backbone, which then computes with the module at no
    /// cost. The backbone keeps a copy of θ for [`Modular::unmerge`].
    ///
    /// # Errors
    /// Where something is merged already, the module is not a change of parameters, or it would
    /// change a parameter that another site has, too (a tied output layer); then nothing has been
    /// changed.
    pub fn merge(&mut self, name: &str) -> Result<()> {
        if !self.unmerged.is_empty() {
            return Err(Error::invalid("merge", "a module is merged already; unmerge it first"));
        }
        let mut changes: Vec<(Tensor, Tensor)> = Vec::new();
        let attached = self.attachment(name)?;
        let mut before = Vec::new();
        for index in &attached.sites {
            let Some(site) = self.backbone().sites().get(*index) else { continue };
            let Some(layer) = self.layers.at(site) else { continue };
            let theta = self.backbone().theta(site)?;
            let module = layer.bank.position(name).map(|j| layer.bank.module(j))?;
            let merged = module.map(|m| no_grad(|| m.compose(&theta))).transpose().at(&site.path)?;
            let Some(Some(merged)) = merged else {
                return Err(Error::unsupported(
                    format!("merging module `{name}` at `{}`", site.path),
                    "it does not change parameters; keep it attached",
                ));
            };
            for (short, new) in merged.iter() {
                let old = theta.need(short)?;
                if old.size() != new.size() {
                    let (found, wanted) = (new.size(), old.size());
                    let problem = format!("`{short}` would be {found:?} and no longer {wanted:?}");
                    return Err(Error::invalid(&site.path, problem));
                }
                if !old.bit_equal(new)? {
                    self.refuse_shared(site, old)?;
                    before.push((*index, short.to_owned(), old.copy()?));
                    changes.push((old.clone(), new.detach()?));
                }
            }
        }
        no_grad(|| changes.iter_mut().try_for_each(|(old, new)| old.copy_from(new)))?;
        self.unmerged = before;
        Ok(())
    }

    /// Refuses a change at `site` of a parameter that another site computes with.
    fn refuse_shared(&self, site: &Site, t: &Tensor) -> Result<()> {
        // What stands within another site is a part of it, and no second use of the parameter.
        let apart = |s: &&Site| s.index != site.index && !s.is_within(site) && !site.is_within(s);
        for other in self.backbone().sites().iter().filter(apart) {
            if self.backbone().theta(other)?.iter().any(|(_, o)| o.shares(t)) {
                return Err(Error::unsupported(
                    format!("merging at `{}`, whose weight `{}` shares", site.path, other.path),
                    "keep the module attached, or leave the site out of its targets",
                ));
            }
        }
        Ok(())
    }

    /// Puts back θ as it was before [`Modular::merge`], bit for bit.
    pub fn unmerge(&mut self) -> Result<()> {
        for (index, short, old) in std::mem::take(&mut self.unmerged) {
            let Some(site) = self.backbone().sites().get(index) else { continue };
            // θ may be a view of how the backbone stores it.
            let mut t = self.backbone().theta(site)?.need(&short)?.clone();
            no_grad(|| t.copy_from(&old))?;
        }
        Ok(())
    }
}

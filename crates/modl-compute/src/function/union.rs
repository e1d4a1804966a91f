//! A union: one module made of parts of different methods at different sites, which is attached,
//! routed to and saved as one.
//!
//! At each site stands the part whose targets take it; where none does, nothing is changed. PEFT's
//! `modules_to_save` beside LoRA is one, and so are [MAM and UniPELT](super::unified).
//!
//! Survey §3.5, the unifying view; AdapterHub's `ConfigUnion`.

use modl_core::{
    Attachment, Error, Module, ModuleConfig, ParamStore, Result, Scope, Site, Step, Targets,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Nested;
use crate::absent::Absent;

/// A method and where it stands.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The sites, among those that the union is attached to.
    pub targets: Targets,
    /// The method.
    pub config: Nested,
}

impl Part {
    /// That method at those sites.
    pub fn new(targets: Targets, config: impl ModuleConfig + 'static) -> Self {
        Part { targets, config: Nested::new(config) }
    }
}

/// Configuration of a union. No two parts may take the same site.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Union {
    /// The parts; one at least.
    pub parts: Vec<Part>,
}

impl Union {
    /// A union of parts.
    pub fn new(parts: impl IntoIterator<Item = Part>) -> Self {
        Union { parts: parts.into_iter().collect() }
    }

    /// The sites among `sites` that a part takes, by their paths.
    ///
    /// # Errors
    /// Where the targets of a part fit no site.
    pub fn targets(&self, sites: &[Site]) -> Result<Targets> {
        let mut found = Vec::new();
        for part in &self.parts {
            found.extend(part.targets.select(sites)?.into_iter().map(|s| s.path.clone()));
        }
        // A pattern, since names in a list take whatever ends with them.
        let names: Vec<String> = found.iter().map(|path| regex::escape(path)).collect();
        Ok(Targets::pattern(names.join("|")))
    }
}

/// The place of part `i` below a site, and below the top for what its sites share.
fn place(i: usize) -> String {
    format!("part{i}")
}

/// What the parameter `name` of a union is to its part `i`, if it is that part's: `SITE.part0.PARAM`
/// and `part0.PARAM` are `SITE.PARAM` and `PARAM`.
pub(crate) fn of_part(i: usize, name: &str) -> Option<String> {
    let place = place(i);
    match name.strip_prefix(&format!("{place}.")) {
        Some(shared) => Some(shared.to_owned()),
        None => {
            let (site, param) = name.split_once(&format!(".{place}."))?;
            Some(format!("{site}.{param}"))
        }
    }
}

impl ModuleConfig for Union {
    fn kind(&self) -> &'static str {
        "union"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    /// Those of its parts, so that routers and aggregators stand nowhere else.
    fn usual_targets(&self) -> Targets {
        Targets::any(self.parts.iter().map(|part| part.targets.clone()))
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if self.parts.is_empty() {
            return Err(Error::invalid("union.parts", "there is none; give one at least"));
        }
        let mut found: Option<Box<dyn Module>> = None;
        for (i, part) in self.parts.iter().enumerate() {
            let sites: Vec<Site> = part.targets.select(at.sites)?.into_iter().cloned().collect();
            if !sites.iter().any(|s| s.index == at.site.index) {
                continue;
            }
            if found.is_some() {
                return Err(Error::invalid(
                    format!("union.parts[{i}]"),
                    "takes this site, and so does a part before it; let one exclude it",
                ));
            }
            let at = Attachment { site: at.site, theta: at.theta, sites: &sites };
            found = Some(part.config.build(&at, &mut scope.part(&place(i)))?);
        }
        Ok(found.unwrap_or_else(|| Box::new(Absent)))
    }

    fn check_built(&self, params: &ParamStore) -> Result<()> {
        let mut parts = self.parts.iter().enumerate();
        parts.try_for_each(|(i, part)| part.config.check_built(&params.renamed(|n| of_part(i, n))))
    }

    fn after_step(&self, params: &ParamStore, step: &Step) -> Result<()> {
        for (i, part) in self.parts.iter().enumerate() {
            let gradients = step.gradients.iter();
            let gradients = gradients.filter_map(|(n, g)| Some((of_part(i, n)?, g.clone())));
            let own = Step::new(step.done, step.total, gradients.collect());
            part.config.after_step(&params.renamed(|n| of_part(i, n)), &own)?;
            let restarted = own.restarted();
            for (name, _) in params.iter() {
                if of_part(i, name).is_some_and(|n| restarted.contains(&n)) {
                    step.restart(name);
                }
            }
        }
        Ok(())
    }
}

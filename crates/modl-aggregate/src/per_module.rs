//! Parameters that an aggregator has of each module, by its name: places in α move when modules come
//! and go, and what a module starts with does not depend on the others.

use modl_core::{Bank, Error, Init, Outputs, Result, Scope, Tensor};

#[derive(Debug)]
pub(crate) struct PerModule {
    kind: &'static str,
    all: Vec<(String, Tensor)>,
}

impl PerModule {
    /// One of `shape` for each module, called `NAME.MODULE` in `scope`.
    pub(crate) fn build(
        kind: &'static str,
        name: &str,
        bank: &Bank,
        shape: &[i64],
        init: Init,
        scope: &mut Scope,
    ) -> Result<Self> {
        let mut own = scope.sub(name);
        let one = |module: &String| Ok((module.clone(), own.param(module, shape, init)?));
        Ok(PerModule { kind, all: bank.names().iter().map(one).collect::<Result<_>>()? })
    }

    /// Those of the active modules, in their order, `[k, …]`.
    ///
    /// # Errors
    /// Where a module was attached after the aggregator was made.
    pub(crate) fn active(&self, h: &Outputs) -> Result<Tensor> {
        let mut rows = Vec::with_capacity(h.active().len());
        for (_, name, _) in h.active().modules() {
            let own = self.all.iter().find(|(n, _)| n == name);
            let (_, t) = own.ok_or_else(|| {
                Error::unsupported(
                    format!("`{}` without parameters of module `{name}`", self.kind),
                    "it was made before the module was attached; call Modular::aggregate again",
                )
            })?;
            rows.push(t.clone());
        }
        Tensor::stack(&rows, 0)
    }
}

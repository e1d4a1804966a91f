//! What reading an adapter's folder is, whoever wrote it: a module is made, its parameters are
//! taken from a file under the file's own keys, and it is attached.

use modl_core::checkpoint::TensorFile;
use modl_core::{
    Backbone, Modular, ModuleConfig, ParamStore, Result, ResultExt, Select, Targets, Tensors,
};

/// How a file keeps the parameters of a module.
pub(crate) struct Keys<'a> {
    /// The key of a parameter that modl calls `SITE.PARAM`.
    pub(crate) key: &'a dyn Fn(&str) -> Result<String>,
    /// A key of the file as it is for this backbone, with or without a head.
    pub(crate) canonical: &'a dyn Fn(&dyn Backbone, &str) -> String,
    /// From the tensors of the file to those that `key` names for the given parameters.
    pub(crate) unpack: &'a dyn Fn(Tensors, &ParamStore) -> Result<Tensors>,
}

impl Keys<'_> {
    /// Attaches a module as `name` with the parameters in `file`.
    ///
    /// # Errors
    /// With all tensors that are missing, unexpected or misshapen, under the file's own keys, so
    /// that the user sees what is named. Then the model is as it was.
    pub(crate) fn attach(
        &self,
        model: &mut Modular,
        name: &str,
        module: Box<dyn ModuleConfig>,
        targets: &Targets,
        file: &dyn TensorFile,
    ) -> Result<()> {
        let source = file.path().display().to_string();
        let params = model.parameters_of(module.as_ref(), targets)?;
        let mut by_key = ParamStore::new();
        for (param, p) in params.iter() {
            by_key.insert((self.key)(param)?, p.tensor().clone())?;
        }
        let found = file.tensors(model.device())?.into_iter();
        // Two keys may be one site's under two names.
        let found = found.map(|(key, t)| ((self.canonical)(model.backbone(), &key), t));
        let found = Tensors::distinct(found).at(&source)?;
        let found = (self.unpack)(found, &by_key).at(&source)?;
        by_key.load(&source, found.iter(), &Select::all())?;
        model.attach_with(name, module, targets, &params)
    }
}

//! Names to methods.

use modl_core::{Error, Result, ResultExt};

use super::{Base, Group, MergeMethod, Settings, Spec};

/// The methods of merging, in the order in which they were added. [`MergeMethods::default`] has all
/// of this crate.
#[derive(Debug)]
pub struct MergeMethods(Vec<Box<dyn MergeMethod>>);

impl Default for MergeMethods {
    fn default() -> Self {
        MergeMethods(crate::parameters::all())
    }
}

impl MergeMethods {
    /// Adds a method.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where the name is taken.
    pub fn add(&mut self, method: impl MergeMethod + 'static) -> Result<()> {
        let name = method.spec().name;
        if self.iter().any(|m| m.spec().name == name) {
            return Err(Error::Duplicate { kind: "merge method", name: name.to_owned() });
        }
        self.0.push(Box::new(method));
        Ok(())
    }

    /// The methods.
    pub fn iter(&self) -> impl Iterator<Item = &dyn MergeMethod> {
        self.0.iter().map(AsRef::as_ref)
    }

    /// The method of this name.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest one.
    pub fn find(&self, name: &str) -> Result<&dyn MergeMethod> {
        let known = || Error::unknown("merge method", name, self.iter().map(|m| m.spec().name));
        self.iter().find(|m| m.spec().name == name).ok_or_else(known)
    }
}

impl Spec {
    /// Whether the method takes so many models, with the base among them or not.
    ///
    /// # Errors
    /// Where it does not, and what it takes.
    pub fn check(&self, models: usize, has_base: bool) -> Result<()> {
        let wrong =
            |problem: String| Err(Error::invalid(format!("merge_method {}", self.name), problem));
        let others = match self.base {
            Base::Required if !has_base => {
                return wrong("needs a base model; name it as `base_model`".into());
            }
            Base::Required | Base::Optional if has_base => models.saturating_sub(1),
            _ => models,
        };
        let (least, most) = self.models;
        if (least..=most).contains(&others) {
            return Ok(());
        }
        let beside = if self.base == Base::Input { "" } else { " beside the base" };
        let wanted = if least == most {
            format!("{least} models")
        } else if most == usize::MAX {
            format!("at least {least}")
        } else {
            format!("{least} to {most} models")
        };
        wrong(format!("takes {wanted}{beside}, and there are {others}"))
    }
}

/// Merges tensors in memory: what the engine does, for one group and without files.
///
/// # Errors
/// Where the method does not take so many tensors, or its settings do not fit.
pub fn merge_group(method: &dyn MergeMethod, group: Group, settings: Settings) -> Result<Vec<f32>> {
    let spec = method.spec();
    spec.check(group.inputs.len(), group.base.is_some())?;
    let group = group.cut_for(&spec);
    let each = if spec.base == Base::Input { group.inputs.len() } else { group.others().len() };
    let settings = settings.complete(&spec, each)?;
    let blend = method.prepare(&group, &settings).at(group.name)?;
    let parts = group.each(|chunk| {
        let mut out = vec![0.0; chunk.len()];
        blend(chunk, &mut out);
        Ok(out)
    })?;
    Ok(parts.concat())
}

//! What a hypernetwork generates for one task, as a module of its own.

use modl_core::{Context, Error, Modular, Result, ResultExt, Tensors, no_grad};
use serde_json::Value;

use crate::Nested;

/// Attaches under the name `into` what the hypernetwork `name` generates in the context `cx`: an
/// ordinary LoRA or bottleneck adapter, which can be merged, averaged and saved as such. `cx` is
/// the context of one row, or of rows with the same module.
///
/// # Errors
/// Where there is no such module, it is no hypernetwork, the rows of `cx` have different modules, or
/// the parameters of the generated kind cannot be set; then nothing has been attached.
pub fn bake(model: &mut Modular, name: &str, cx: &Context, into: &str) -> Result<()> {
    let (config, targets) = model.recipe(name)?;
    let targets = targets.clone();
    let recipe = config.to_json()?;
    let kind = config.kind();
    let mut made: Vec<(usize, Tensors)> = Vec::new();
    for site in model.modular_sites() {
        let Some(layer) = model.layer(&site) else { continue };
        let Ok(j) = layer.bank.position(name) else { continue };
        let settled = layer.bank.module(j).map(|m| no_grad(|| m.settled(cx))).transpose();
        let Some(Some(module)) = settled.at(&site.path)? else {
            return Err(Error::unsupported(
                format!("baking module `{name}`"),
                "it is no hypernetwork, and has parameters of its own already",
            ));
        };
        made.push((site.index, module.phi()));
    }
    let inner = recipe.get("config").cloned().unwrap_or(Value::Null);
    let inner = modl_core::from_json::<Nested>(kind, inner)?.into_config();
    model.attach(into, inner, &targets)?;
    let set = set_all(model, into, &made);
    if set.is_err() {
        model.detach(into)?;
    }
    set
}

/// Gives the module `into` those parameters at the sites with these indices.
fn set_all(model: &Modular, into: &str, made: &[(usize, Tensors)]) -> Result<()> {
    let sites = model.modular_sites();
    let phi = |index: usize| -> Result<Tensors> {
        let layer = sites.iter().find(|s| s.index == index).and_then(|s| model.layer(s));
        let module = layer.and_then(|l| l.bank.module(l.bank.position(into).ok()?));
        module.map(|m| m.phi()).ok_or_else(|| Error::invalid(into, "is not at all of its sites"))
    };
    for (index, values) in made {
        for (name, own) in phi(*index)?.iter() {
            no_grad(|| own.clone().copy_from(values.need(name)?))?;
        }
    }
    // Some kinds show what they make of their parameters, or share them among sites.
    for (index, values) in made {
        for (name, own) in phi(*index)?.iter() {
            if !own.bit_equal(&values.need(name)?.detach()?)? {
                return Err(Error::unsupported(
                    format!("setting `{name}` of module `{into}`"),
                    "keep the hypernetwork attached instead",
                ));
            }
        }
    }
    Ok(())
}

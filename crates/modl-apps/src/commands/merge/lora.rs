//! `MODEL+ADAPTER` in a merge: a LoRA or a DoRA that is merged into the model's tensors as they are read.

use std::path::Path;
use std::sync::Arc;

use modl_aggregate::merge::{Adapted, AddedBias, AddedProduct, Source};
use modl_compute::peft::{Folder, LoraForm, LoraSite};
use modl_core::{Error, Kind, Result, ResultExt, Tensor};

/// Merges the adapter of a folder into a model.
pub(super) fn adapt(adapter: &Path, model: &mut Source) -> Result<()> {
    let folder = Folder::open(adapter)?;
    let fan_in_fan_out = folder.fields().get("fan_in_fan_out").and_then(|v| v.as_bool());
    let mut changes: Vec<(String, Arc<dyn Adapted>)> = Vec::new();
    for site in folder.lora()? {
        let name = tensor(model, &site.path, "weight").at(adapter.display().to_string())?;
        let change = change(model, &name, &site, fan_in_fan_out == Some(true)).at(&name)?;
        changes.push((name, Arc::new(change)));
        if let Some(bias) = &site.bias {
            let name = tensor(model, &site.path, "bias").at(adapter.display().to_string())?;
            changes.push((name, Arc::new(AddedBias(numbers(bias)?))));
        }
    }
    model.adapt(adapter, changes)
}

/// The tensor of a site. An adapter may have been made for the model with a head and the files be of the
/// model without, or the other way round: then one name ends with the other.
fn tensor(model: &Source, site: &str, part: &str) -> Result<String> {
    let wanted = format!("{site}.{part}");
    if model.tensors().contains_key(&wanted) {
        return Ok(wanted);
    }
    let ends = |long: &str, short: &str| {
        long.strip_suffix(short).is_some_and(|before| before.ends_with('.'))
    };
    let mut alike = model.tensors().keys().filter(|n| ends(n, &wanted) || ends(&wanted, n));
    match (alike.next(), alike.next()) {
        (Some(one), None) => Ok(one.clone()),
        (Some(one), Some(other)) => {
            let problem = format!("could be `{one}` or `{other}`");
            Err(Error::invalid(wanted, problem))
        }
        (None, _) => model.place(&wanted).map(|_| wanted.clone()),
    }
}

fn change(
    model: &Source,
    name: &str,
    site: &LoraSite,
    fan_in_fan_out: bool,
) -> Result<AddedProduct> {
    let (a, b) = (&site.factors.down, &site.factors.up);
    let rank = a.len_of(0) as usize;
    let transposed = fan_in_fan_out || site.form == LoraForm::Embedding;
    let made = AddedProduct::new(&numbers(b)?, &numbers(a)?, rank, site.factors.scale, transposed)?;
    let shape = &model.place(name)?.shape;
    // Kernels count as inputs.
    let matrix = [shape.first().copied().unwrap_or(1), shape.iter().skip(1).product()];
    if made.shape() != matrix {
        let problem = format!("is {shape:?}, and the adapter changes {:?}", made.shape());
        return Err(Error::invalid(name, problem));
    }
    match &site.magnitude {
        Some(m) => made.with_magnitude(&numbers(m)?, &model.elements(name, None)?),
        None => Ok(made),
    }
}

fn numbers(t: &Tensor) -> Result<Vec<f32>> {
    t.detach()?.to_kind(Kind::Float)?.contiguous()?.reshape(&[-1])?.to_vec()
}

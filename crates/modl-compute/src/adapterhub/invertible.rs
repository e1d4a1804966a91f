//! `BnConfig` with `inv_adapter`: an invertible adapter behind the embeddings, in the settings of
//! the bottlenecks beside it.
//!
//! `glow` is refused: adapters 1.3.0 itself cannot make one (its two networks have the widths of
//! each other's inputs), so that there is no file of it.

use modl_core::{Error, Result, Targets};
use serde_json::{Map, Value, json};

use super::bottleneck::{self, activation, has_places};
use super::places::EMBEDDINGS;
use super::{Fields, Header, Method, Read, Standing};
use crate::peft::{number, object};
use crate::{Invertible, InvertibleBlock};

pub(super) const INVERTIBLE: Method = Method {
    architecture: None,
    asked: |settings| !matches!(settings.get(BLOCK), None | Some(Value::Null)),
    kind: "invertible",
    read,
    write,
    key: |p| {
        let model = p.site.strip_suffix(EMBEDDINGS).unwrap_or(p.model);
        format!("{model}invertible_adapters.{}.{}", p.adapter, p.own)
    },
    unpack: None,
    pack: None,
};

const BLOCK: &str = "inv_adapter";
const FACTOR: &str = "inv_adapter_reduction_factor";
const NON_LINEARITY: &str = "non_linearity";

fn read(fields: &mut Fields, header: &Header) -> Result<Read> {
    let block: Value = fields.required(BLOCK)?;
    if block != "nice" {
        fields.refuse(BLOCK, &block);
    }
    let sigma = fields.peek(NON_LINEARITY).cloned().unwrap_or_default();
    let alone =
        ["mh_adapter", "output_adapter"].iter().all(|n| fields.peek(n) == Some(&json!(false)));
    let config = json!({
        "block": "nice",
        "reduction_factor": fields.required::<f64>(FACTOR)?,
        "non_linearity": activation(sigma, header),
        "init_weights": "bert",
    });
    if alone {
        // The rest is about bottlenecks that there are not.
        bottleneck::usual().keys().for_each(|name| fields.ignore(name));
    }
    let config = modl_core::from_json::<Invertible>("invertible", config)?;
    Ok((Box::new(config), Targets::pattern("all-tokens")))
}

fn write(config: Value, _: &Standing) -> Result<Map<String, Value>> {
    let config: Invertible = modl_core::from_json("invertible", config)?;
    if config.block == InvertibleBlock::Glow {
        return Err(Error::unsupported(
            "an invertible adapter with GLOW in an AdapterHub folder",
            "adapters 1.3.0 cannot make one; use NICE, or Modular::save_module",
        ));
    }
    let mut fields = bottleneck::usual();
    fields.extend(object(json!({
        "inv_adapter": "nice",
        "inv_adapter_reduction_factor": number(config.reduction_factor),
        "non_linearity": config.non_linearity,
    })));
    Ok(fields)
}

/// Puts an invertible adapter into the settings of a bottleneck, where there is one.
pub(super) fn join(mut parts: Vec<Map<String, Value>>) -> Result<Vec<Map<String, Value>>> {
    let of_layers = |p: &Map<String, Value>| !p.contains_key("architecture");
    let alone = |p: &Map<String, Value>| of_layers(p) && !has_places(p);
    let beside = |p: &Map<String, Value>| of_layers(p) && has_places(p);
    if !parts.iter().any(beside) {
        return Ok(parts);
    }
    let Some(own) = parts.iter().position(alone).map(|at| parts.remove(at)) else {
        return Ok(parts);
    };
    if let Some(bottleneck) = parts.iter_mut().find(|p| beside(p)) {
        if bottleneck.get(NON_LINEARITY) != own.get(NON_LINEARITY) {
            return Err(Error::unsupported(
                "an invertible adapter with another non-linearity than the bottlenecks beside it \
                 in an AdapterHub folder",
                "AdapterHub has one for both; use Modular::save_module",
            ));
        }
        for name in [BLOCK, FACTOR] {
            bottleneck.insert(name.to_owned(), own.get(name).cloned().unwrap_or_default());
        }
    }
    Ok(parts)
}

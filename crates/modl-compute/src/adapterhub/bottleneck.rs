//! `BnConfig`: bottleneck adapters behind or beside the sub-layers of BERT and its kin, and what
//! else stands in these settings.

use modl_core::{Error, Result, Targets};
use serde_json::{Map, Value, json};

use super::{Fields, Header, Method, Param, Places, Read, Standing};
use crate::peft::{number, object};
use crate::{Bottleneck, Patterns};

pub(super) const BOTTLENECK: Method = Method {
    architecture: None,
    asked: |settings| has_places(settings) && !has_phm(settings),
    kind: "bottleneck",
    read,
    write,
    key,
    unpack: None,
    pack: None,
};

/// Whether there is an adapter in the layers.
pub(super) fn has_places(settings: &Map<String, Value>) -> bool {
    // What is not a truth value is refused by name where it is read.
    ["mh_adapter", "output_adapter"].iter().any(|name| settings.get(*name) != Some(&json!(false)))
}

/// Whether its matrices are sums of Kronecker products.
pub(super) fn has_phm(settings: &Map<String, Value>) -> bool {
    settings.get("phm_layer") == Some(&json!(true))
}

/// The key of a parameter in a layer.
pub(super) fn key(p: &Param) -> String {
    format!("{}.adapters.{}.{}", p.site, p.adapter, p.own)
}

/// The part of a layer that `mh_adapter` means.
const ATTENTION: &str = "attention.output";
/// The part of a layer that `output_adapter` means.
const OUTPUT: &str = "output";

/// Settings of Compacter, which are written but mean nothing without `phm_layer`, and of starts.
pub(super) const WITHOUT_TRACE: &[&str] = &[
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights_seed",
    // An invertible adapter has taken it.
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
];

fn read(fields: &mut Fields, header: &Header) -> Result<Read> {
    WITHOUT_TRACE.iter().for_each(|name| fields.ignore(name));
    let targets = read_places(fields)?;
    let factor: Value = fields.required("reduction_factor")?;
    let (reduction_factor, reduction_pattern) = reduction(&factor)?;
    let non_linearity = activation(fields.required("non_linearity")?, header);
    let standard = Bottleneck::default();
    let config = json!({
        "reduction_factor": reduction_factor,
        "non_linearity": non_linearity,
        "original_ln_before": fields.optional::<bool>("original_ln_before")?.unwrap_or(false),
        "original_ln_after": fields.optional::<bool>("original_ln_after")?.unwrap_or(true),
        "residual_before_ln": fields.optional::<Value>("residual_before_ln")?.unwrap_or(json!(true)),
        "is_parallel": fields.optional::<bool>("is_parallel")?.unwrap_or(false),
        "scaling": fields.optional::<Value>("scaling")?.unwrap_or(json!(1.0)),
        "dropout": fields.optional::<f64>("dropout")?.unwrap_or(0.0),
        "init_weights": fields.optional::<Value>("init_weights")?.unwrap_or(json!(standard.init_weights)),
    });
    let config = modl_core::from_json::<Bottleneck>("bottleneck", config)?;
    let config = Bottleneck { reduction_pattern, ..config };
    Ok((Box::new(config), targets))
}

/// The sites in the layers.
pub(super) fn read_places(fields: &mut Fields) -> Result<Targets> {
    let mut parts = Vec::new();
    for (name, end) in [("mh_adapter", ATTENTION), ("output_adapter", OUTPUT)] {
        if fields.required::<bool>(name)? {
            parts.push(end);
        }
    }
    let leave_out: Vec<i64> = fields.optional("leave_out")?.unwrap_or_default();
    Ok(Places::targets(&parts, &leave_out))
}

/// The name of a non-linearity. The predecessor called the approximation `gelu` and the exact one
/// `gelu_orig`.
pub(super) fn activation(name: Value, header: &Header) -> Value {
    match name.as_str() {
        Some("gelu") if header.version.is_none() => json!("gelu_new"),
        Some("gelu_orig") if header.version.is_none() => json!("gelu"),
        _ => name,
    }
}

/// One factor, or a table of them by layer with a `default`.
fn reduction(factor: &Value) -> Result<(f64, Patterns<f64>)> {
    let wrong = || {
        let problem = format!("is {factor}, wants a number or a table by layer with `default`");
        Error::invalid("reduction_factor", problem)
    };
    let Some(table) = factor.as_object() else {
        return Ok((factor.as_f64().ok_or_else(wrong)?, Patterns::default()));
    };
    let default = table.get("default").and_then(Value::as_f64).ok_or_else(wrong)?;
    let mut patterns = Vec::new();
    for (layer, factor) in table.iter().filter(|(layer, _)| *layer != "default") {
        let layer: u32 = layer.parse().map_err(|_| wrong())?;
        patterns.push((by_layer(layer), factor.as_f64().ok_or_else(wrong)?));
    }
    Ok((default, patterns.into_iter().collect()))
}

/// The pattern of a layer's sites.
fn by_layer(layer: u32) -> String {
    format!(r"{layer}\.[^0-9]*")
}

fn write(config: Value, standing: &Standing) -> Result<Map<String, Value>> {
    let config: Bottleneck = modl_core::from_json("bottleneck", config)?;
    if config.ln_after {
        return Err(Error::unsupported(
            "an adapter with a norm of its own (`ln_after`) in an AdapterHub folder",
            "use Modular::save_module",
        ));
    }
    let mut reduction_factor = number(config.reduction_factor);
    if !config.reduction_pattern.is_empty() {
        let mut table = Map::from_iter([("default".to_owned(), reduction_factor)]);
        for (pattern, factor) in config.reduction_pattern.iter() {
            let layer = pattern.split('\\').next().and_then(|n| n.parse().ok());
            match layer {
                Some(n) if by_layer(n) == pattern => table.insert(n.to_string(), number(*factor)),
                _ => {
                    return Err(Error::unsupported(
                        format!("the reduction pattern `{pattern}` in an AdapterHub folder"),
                        "AdapterHub has one factor for a layer; use Modular::save_module",
                    ));
                }
            };
        }
        reduction_factor = Value::Object(table);
    }
    let mut fields = usual();
    fields.extend(write_places(standing)?);
    fields.extend(object(json!({
        "dropout": config.dropout,
        "init_weights": config.init_weights,
        "is_parallel": config.is_parallel,
        "non_linearity": config.non_linearity,
        "original_ln_after": config.original_ln_after,
        "original_ln_before": config.original_ln_before,
        "reduction_factor": reduction_factor,
        "residual_before_ln": config.residual_before_ln,
        "scaling": config.scaling,
    })));
    Ok(fields)
}

/// The settings that say which sites.
///
/// # Errors
/// Where AdapterHub has no bottleneck there.
pub(super) fn write_places(standing: &Standing) -> Result<Map<String, Value>> {
    let places = standing.places()?;
    let known = [ATTENTION, OUTPUT];
    if let Some(other) = places.ends.iter().find(|e| !known.contains(&e.as_str())) {
        return Err(Error::unsupported(
            format!("a bottleneck at `{other}` in an AdapterHub folder"),
            "AdapterHub has them at `attention.output` and `output`; use Modular::save_module",
        ));
    }
    Ok(object(json!({
        "leave_out": places.leave_out,
        "mh_adapter": places.ends.contains(ATTENTION),
        "output_adapter": places.ends.contains(OUTPUT),
    })))
}

/// All settings, as the library writes them where nothing was said.
pub(super) fn usual() -> Map<String, Value> {
    object(json!({
        "adapter_residual_before_ln": false,
        "cross_adapter": false,
        "dropout": 0.0,
        "factorized_phm_W": true,
        "factorized_phm_rule": false,
        "hypercomplex_nonlinearity": "glorot-uniform",
        "init_weights": "bert",
        "init_weights_seed": null,
        "inv_adapter": null,
        "inv_adapter_reduction_factor": null,
        "is_parallel": false,
        "learn_phm": true,
        "leave_out": [],
        "ln_after": false,
        "ln_before": false,
        "mh_adapter": false,
        "non_linearity": "relu",
        "original_ln_after": true,
        "original_ln_before": false,
        "output_adapter": false,
        "phm_bias": true,
        "phm_c_init": "normal",
        "phm_dim": 4,
        "phm_init_range": 0.0001,
        "phm_layer": false,
        "phm_rank": 1,
        "reduction_factor": 16,
        "residual_before_ln": true,
        "scaling": 1.0,
        "shared_W_phm": false,
        "shared_phm_rule": true,
        "stochastic_depth": 0.0,
        "use_gating": false,
    }))
}

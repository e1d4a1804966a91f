//! `BnConfig` with `phm_layer`: Compacter, and Compacter++ behind the norm of the output layer.

use modl_core::Result;
use serde_json::{Map, Value, json};

use super::bottleneck::{self, BOTTLENECK, activation, has_phm, has_places};
use super::{Fields, Header, Method, Read, Standing};
use crate::Compacter;
use crate::peft::{number, object};

pub(super) const COMPACTER: Method = Method {
    asked: |settings| has_places(settings) && has_phm(settings),
    kind: "compacter",
    read,
    write,
    key: |p| match p.site {
        "" => format!("{}shared_parameters.{}.{}", p.model, p.adapter, p.own),
        _ => bottleneck::key(p),
    },
    ..BOTTLENECK
};

/// Settings that Compacter has in one way only.
const FIXED: [(&str, Value); 9] = [
    ("factorized_phm_W", Value::Bool(true)),
    ("factorized_phm_rule", Value::Bool(false)),
    ("is_parallel", Value::Bool(false)),
    ("original_ln_after", Value::Bool(true)),
    ("phm_bias", Value::Bool(true)),
    ("phm_layer", Value::Bool(true)),
    ("residual_before_ln", Value::Bool(true)),
    ("shared_W_phm", Value::Bool(false)),
    ("shared_phm_rule", Value::Bool(true)),
];

/// Settings of how parameters start, and one of an invertible adapter, which has taken it.
const WITHOUT_TRACE: [&str; 5] = [
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "phm_c_init",
];

fn read(fields: &mut Fields, header: &Header) -> Result<Read> {
    WITHOUT_TRACE.iter().for_each(|name| fields.ignore(name));
    // Whether A is trained on.
    fields.ignore("learn_phm");
    for (name, wanted) in FIXED {
        if let Some(said) = fields.optional::<Value>(name)?
            && said != wanted
        {
            fields.refuse(name, &said);
        }
    }
    if let Some(scaling) = fields.optional::<Value>("scaling")?
        && scaling.as_f64() != Some(1.0)
    {
        fields.refuse("scaling", &scaling);
    }
    let standard = Compacter::default();
    let targets = bottleneck::read_places(fields)?;
    let config = json!({
        "reduction_factor": fields.required::<f64>("reduction_factor")?,
        "non_linearity": activation(fields.required("non_linearity")?, header),
        "original_ln_before": fields.optional::<bool>("original_ln_before")?.unwrap_or(false),
        "phm_dim": fields.optional::<i64>("phm_dim")?.unwrap_or(standard.phm_dim),
        "phm_rank": fields.optional::<i64>("phm_rank")?.unwrap_or(standard.phm_rank),
        "phm_init_range": fields.optional::<f64>("phm_init_range")?.unwrap_or(standard.phm_init_range),
        "dropout": fields.optional::<f64>("dropout")?.unwrap_or(0.0),
    });
    Ok((Box::new(modl_core::from_json::<Compacter>("compacter", config)?), targets))
}

fn write(config: Value, standing: &Standing) -> Result<Map<String, Value>> {
    let config: Compacter = modl_core::from_json("compacter", config)?;
    let mut fields = bottleneck::usual();
    fields.extend(bottleneck::write_places(standing)?);
    fields.extend(FIXED.map(|(name, value)| (name.to_owned(), value)));
    fields.extend(object(json!({
        "dropout": config.dropout,
        "non_linearity": config.non_linearity,
        "original_ln_before": config.original_ln_before,
        "phm_dim": config.phm_dim,
        "phm_init_range": config.phm_init_range,
        "phm_rank": config.phm_rank,
        "reduction_factor": number(config.reduction_factor),
    })));
    Ok(fields)
}

//! `PrefixTuningConfig`: prefix tuning, with a projection or flat. Positions stay what they are,
//! other than in PEFT.
//!
//! A file holds the prefix once for the model and once more for each layer that could have one.

use modl_core::{Error, Result, SiteKind, Tensors};
use serde_json::{Map, Value, json};

use super::{Fields, Header, Method, Places, Read, Standing};
use crate::PrefixTuning;
use crate::peft::object;

pub(super) const PREFIX_TUNING: Method = Method {
    architecture: Some("prefix_tuning"),
    asked: |_| true,
    kind: "prefix_tuning",
    read,
    write,
    key: |p| format!("{}{}", stem(p.model, p.adapter), stored(p.own)),
    unpack: Some(unpack),
    pack: Some(pack),
};

/// The part of a layer that has prefixes.
const ATTENTION: &str = "attention.self";

fn stem(model: &str, adapter: &str) -> String {
    format!("{model}prefix_tuning.prefix_tunings.{adapter}.self_prefix.")
}

/// What a file calls a parameter.
fn stored(own: &str) -> String {
    match own.strip_prefix("transform.") {
        Some(rest) => format!("control_trans.{rest}"),
        None if own == "embedding.weight" => "wte.weight".to_owned(),
        None => FLAT.to_owned(),
    }
}

/// A prefix without a projection, in one dimension.
const FLAT: &str = "control_trans";

/// The sites in the layers.
fn layers(standing: &Standing) -> impl Iterator<Item = &modl_core::Site> {
    standing.sites.iter().filter(|s| s.kind == SiteKind::Attention)
}

fn unpack(tensors: Tensors, _: &Value, standing: &Standing) -> Result<Tensors> {
    let copy = format!(".prefix_tuning.pool.prefix_tunings.{}.", standing.name);
    let flat = format!("{}{FLAT}", stem(&standing.model, &standing.name));
    let columns: i64 = layers(standing).map(|s| 2 * s.input).sum();
    let own = tensors.iter().filter(|(key, _)| !key.contains(&copy)).map(|(key, t)| {
        let whole = key == flat && columns > 0 && t.numel() as i64 % columns == 0;
        let t = if whole { t.reshape(&[-1, columns])? } else { t.clone() };
        Ok((key.to_owned(), t))
    });
    own.collect()
}

fn pack(tensors: Tensors, _: &Value, standing: &Standing) -> Result<Tensors> {
    let stem = stem(&standing.model, &standing.name);
    let flat = format!("{stem}{FLAT}");
    let mut all =
        tensors.map(|key, t| if key == flat { t.reshape(&[-1]) } else { Ok(t.clone()) })?;
    let place = format!("prefix_tuning.pool.prefix_tunings.{}.self_prefix", standing.name);
    for site in standing.all.iter().filter(|s| s.kind == SiteKind::Attention) {
        for (key, t) in all.clone().iter() {
            if let Some(own) = key.strip_prefix(&stem) {
                all.set(format!("{}.{place}.{own}", site.path), t.clone());
            }
        }
    }
    Ok(all)
}

fn read(fields: &mut Fields, _: &Header) -> Result<Read> {
    // Of encoders with decoders, of gates, and of starts.
    for name in ["encoder_prefix", "cross_prefix", "shared_gating", "init_weights_seed"] {
        fields.ignore(name);
    }
    let flat = fields.optional::<bool>("flat")?.unwrap_or(false);
    match flat {
        true => fields.ignore("non_linearity"),
        false => fields.refuse_unless("non_linearity", "tanh")?,
    }
    let leave_out: Vec<i64> = fields.optional("leave_out")?.unwrap_or_default();
    let prefix = PrefixTuning {
        num_virtual_tokens: fields.required("prefix_length")?,
        prefix_projection: !flat,
        encoder_hidden_size: fields.optional("bottleneck_size")?.unwrap_or(512),
        ..PrefixTuning::default()
    };
    Ok((Box::new(prefix), Places::targets(&[ATTENTION], &leave_out)))
}

fn write(config: Value, standing: &Standing) -> Result<Map<String, Value>> {
    let prefix: PrefixTuning = modl_core::from_json("prefix_tuning", config)?;
    if let Some(site) = standing.sites.iter().find(|s| s.kind != SiteKind::Attention) {
        return Err(Error::unsupported(
            format!("a prefix that moves the positions at `{}` in an AdapterHub folder", site.path),
            "AdapterHub leaves positions as they are, PEFT counts the prefix; keep PEFT's format, \
             or train the prefix at `all-attention` alone",
        ));
    }
    Ok(object(json!({
        "architecture": "prefix_tuning",
        "bottleneck_size": prefix.encoder_hidden_size,
        "cross_prefix": true,
        "dropout": 0.0,
        "encoder_prefix": true,
        "flat": !prefix.prefix_projection || prefix.projected,
        "init_weights_seed": null,
        "leave_out": standing.places()?.leave_out,
        "non_linearity": "tanh",
        "prefix_length": prefix.num_virtual_tokens,
        "shared_gating": true,
        "use_gating": false,
    })))
}

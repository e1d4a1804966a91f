//! `ReftConfig`: LoReFT and NoReFT at whole layers.
//!
//! DiReFT cannot be said: adapters 1.3.0 does not write `subtract_projection`, and reads its own
//! file of DiReFT as NoReFT. So does modl, and refuses to write one.

use modl_core::{Error, Result, SiteKind, Targets, Tensor, Tensors};
use serde_json::{Map, Value, json};

use super::places::split;
use super::{Fields, Header, Method, Read, Standing};
use crate::function::{BASE, ORIGINAL};
use crate::peft::object;
use crate::{Orthonormal, Reft};

pub(super) const REFT: Method = Method {
    architecture: Some("reft"),
    asked: |_| true,
    kind: "reft",
    read,
    write,
    key: |p| format!("{}.{}{}", p.site, stem(p.adapter), p.own),
    unpack: Some(unpack),
    pack: Some(pack),
};

fn stem(adapter: &str) -> String {
    format!("reft_layer.refts.{adapter}.")
}

/// Untied weights are always those of first and of last positions in a file: which of the two is
/// not used, if any.
fn idle(reft: &Reft) -> Option<usize> {
    match (reft.tied_weights, reft.prefix_positions, reft.suffix_positions) {
        (false, 0, _) => Some(0),
        (false, _, 0) => Some(1),
        _ => None,
    }
}

/// The key without the unit's number, and the number.
fn unit<'a>(key: &'a str, stem: &str) -> Option<(String, usize, &'a str)> {
    let (site, rest) = key.split_once(&format!("{stem}units."))?;
    let (n, own) = rest.split_once('.')?;
    Some((format!("{site}{stem}units."), n.parse().ok()?, own))
}

fn unpack(tensors: Tensors, config: &Value, standing: &Standing) -> Result<Tensors> {
    let Some(idle) = idle(&modl_core::from_json("reft", config.clone())?) else {
        return Ok(tensors);
    };
    let stem = stem(&standing.name);
    let used = tensors.iter().filter_map(|(key, t)| match unit(key, &stem) {
        Some((_, n, _)) if n == idle => None,
        Some((head, n, own)) if n + idle == 1 => Some((format!("{head}0.{own}"), t.clone())),
        _ => Some((key.to_owned(), t.clone())),
    });
    Ok(used.collect())
}

fn pack(tensors: Tensors, config: &Value, standing: &Standing) -> Result<Tensors> {
    let reft: Reft = modl_core::from_json("reft", config.clone())?;
    let (stem, idle) = (stem(&standing.name), idle(&reft));
    let free = reft.orthogonality && reft.parametrization == Orthonormal::Qr;
    let mut all = Tensors::new();
    for (key, t) in tensors.iter() {
        let Some((head, n, own)) = unit(key, &stem) else {
            all.set(key.to_owned(), t.clone());
            continue;
        };
        // What is not used is there as well, and has the other's numbers.
        let units = if idle.is_some() { vec![0, 1] } else { vec![n] };
        for n in units {
            if free && own == "projection.weight" {
                let (original, base) = reflected(t)?;
                all.set(format!("{head}{n}.{ORIGINAL}"), original);
                all.set(format!("{head}{n}.{BASE}"), base);
            } else {
                all.set(format!("{head}{n}.{own}"), t.clone());
            }
        }
    }
    Ok(all)
}

/// R of a QR decomposition as PyTorch has it: no reflections yet of an orthogonal matrix that
/// starts with Rᵀ.
fn reflected(free: &Tensor) -> Result<(Tensor, Tensor)> {
    let (r, width) = (free.len_of(0), free.len_of(1));
    let rows = free.t()?.qr()?.0;
    let eye = Tensor::eye(width, free.kind(), free.device())?;
    let rest = Tensor::cat(&[rows.clone(), eye.clone()], 1)?.qr()?.0;
    let base = Tensor::cat(&[rows, rest.narrow(1, r, width - r)?], 1)?;
    Ok((eye.narrow(0, 0, r)?.neg()?, base))
}

fn read(fields: &mut Fields, _: &Header) -> Result<Read> {
    // Where the module is made, and how it starts.
    fields.ignore("dtype");
    fields.ignore("init_weights_seed");
    if fields.optional::<bool>("output_reft")? == Some(false) {
        fields.refuse("output_reft", &json!(false));
    }
    let targets = match fields.required::<Value>("layers")? {
        Value::String(all) if all == "all" => Targets::pattern("all-block"),
        layers => {
            let layers: Vec<i64> = serde_json::from_value(layers.clone()).map_err(|e| {
                Error::invalid("layers", format!("is {layers}, wants \"all\" or numbers: {e}"))
            })?;
            let numbers: Vec<String> = layers.iter().map(i64::to_string).collect();
            Targets::pattern(format!(r"([^.]*\.)*layer\.({})", numbers.join("|")))
        }
    };
    let reft = Reft {
        prefix_positions: fields.required("prefix_positions")?,
        suffix_positions: fields.required("suffix_positions")?,
        r: fields.required("r")?,
        orthogonality: fields.required("orthogonality")?,
        parametrization: Orthonormal::Householder,
        tied_weights: fields.optional("tied_weights")?.unwrap_or(false),
        subtract_projection: fields.optional("subtract_projection")?.unwrap_or(true),
        non_linearity: fields.optional("non_linearity")?,
        dropout: fields.optional("dropout")?.unwrap_or(0.0),
    };
    Ok((Box::new(reft), targets))
}

fn write(config: Value, standing: &Standing) -> Result<Map<String, Value>> {
    let reft: Reft = modl_core::from_json("reft", config)?;
    if !reft.subtract_projection {
        return Err(Error::unsupported(
            "DiReFT in an AdapterHub folder",
            "adapters 1.3.0 would read it as NoReFT; use Modular::save_module",
        ));
    }
    let number = |s: &modl_core::Site| split(&format!("{}.", s.path)).map(|(n, _)| json!(n));
    let all = standing.all.iter().filter(|s| s.kind == SiteKind::Block).count();
    let layers: Vec<Value> = standing.sites.iter().filter_map(number).collect();
    let layers = if standing.sites.len() == all { json!("all") } else { json!(layers) };
    Ok(object(json!({
        "architecture": "reft",
        "dropout": reft.dropout,
        "dtype": null,
        "init_weights_seed": null,
        "layers": layers,
        "non_linearity": reft.non_linearity,
        "orthogonality": reft.orthogonality,
        "output_reft": true,
        "prefix_positions": reft.prefix_positions,
        "r": reft.r,
        "suffix_positions": reft.suffix_positions,
        "tied_weights": reft.tied_weights,
    })))
}

//! `LoRAConfig` with `use_dora`: DoRA in the library's own way, see [`AdapterHubDora`].

use modl_core::{Result, Tensors};
use serde_json::{Map, Value, json};

use super::lora::{LORA, has_dora, read_common, read_factors, write_common, write_factors};
use super::{Fields, Header, Method, Read, Standing};
use crate::low_rank::MAGNITUDE;
use crate::{AdapterHubDora, Lora};

pub(super) const DORA: Method = Method {
    asked: has_dora,
    kind: "adapterhub_dora",
    read,
    write,
    key: |p| match p.own {
        MAGNITUDE => format!("{}.loras.{}.{WEIGHT}", p.site, p.adapter),
        _ => (LORA.key)(p),
    },
    unpack: Some(|tensors, _, _| reshaped(tensors, &[-1])),
    pack: Some(|tensors, _, _| reshaped(tensors, &[-1, 1])),
    ..LORA
};

/// The magnitude is the weight `[out, 1]` of a layer.
const WEIGHT: &str = "m.weight";

fn reshaped(tensors: Tensors, shape: &[i64]) -> Result<Tensors> {
    let is_own = |key: &str| key.contains(".loras.") && key.ends_with(WEIGHT);
    tensors.map(|key, t| if is_own(key) { t.reshape(shape) } else { Ok(t.clone()) })
}

fn read(fields: &mut Fields, header: &Header) -> Result<Read> {
    fields.ignore("use_dora");
    let targets = read_common(fields, "add", "lora")?;
    Ok((Box::new(AdapterHubDora(read_factors(fields, header)?)), targets))
}

fn write(config: Value, standing: &Standing) -> Result<Map<String, Value>> {
    let lora: Lora = modl_core::from_json("adapterhub_dora", config)?;
    let mut own = write_factors(&lora)?;
    own.insert("use_dora".to_owned(), json!(true));
    write_common(standing, own)
}

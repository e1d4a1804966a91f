//! `LoRAConfig` with `composition_mode` "scale": (IA)³. At the feed-forward layer the library scales
//! what comes out of the first linear layer, before the non-linearity, and not what goes into the
//! second one.

use modl_core::{Error, Names, Result};
use serde_json::{Map, Value, json};

use super::lora::{LORA, read_common, scales, write_common};
use super::{Fields, Header, Method, Read, Standing};
use crate::peft::object;
use crate::{Ia3, Ia3Init};

pub(super) const IA3: Method = Method {
    asked: scales,
    kind: "ia3",
    read,
    write,
    key: |p| format!("{}.loras.{}.lora_B", p.site, p.adapter),
    ..LORA
};

fn read(fields: &mut Fields, _: &Header) -> Result<Read> {
    let targets = read_common(fields, "scale", "ia3")?;
    for name in ["r", "alpha"] {
        let said: Value = fields.required(name)?;
        if said.as_f64() != Some(1.0) {
            fields.refuse(name, &said);
        }
    }
    let ia3 =
        Ia3 { feedforward_modules: Names::List(Vec::new()), init: Ia3Init::Ones, ..Ia3::default() };
    Ok((Box::new(ia3), targets))
}

fn write(config: Value, standing: &Standing) -> Result<Map<String, Value>> {
    let ia3: Ia3 = modl_core::from_json("ia3", config)?;
    for site in &standing.sites {
        if ia3.scales_input(site)? {
            return Err(Error::unsupported(
                format!("(IA)³ on the input of `{}` in an AdapterHub folder", site.path),
                "AdapterHub scales outputs only; keep PEFT's format, or use Modular::save_module",
            ));
        }
    }
    let own = object(json!({
        "alpha": 1,
        "composition_mode": "scale",
        "init_weights": "ia3",
        "r": 1,
    }));
    write_common(standing, own)
}

//! Routing over modules that were trained each on its own (survey §4.2.3, §7): from the modules
//! themselves, from gates that are trained one by one, or by a small network over hidden states.

mod arrow;
mod phatgoose;
mod x_lora;

pub use arrow::Arrow;
pub use phatgoose::{Phase, Phatgoose};
pub use x_lora::XLora;

use modl_core::{Registry, Result};

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<Arrow>("Arrow: singular vectors of LoRAs", "Ostapenko et al. 2024", "4.2.3")?;
    r.register::<Phatgoose>("PHATGOOSE: gates made prototypes", "Muqeeth et al. 2024", "4.2.3")?;
    r.register::<XLora>("X-LoRA: scalings by hidden states", "Buehler & Buehler 2024", "4.2.3")?;
    Ok(())
}

//! `modl forward`: tensors through a model, to compare modl with any other runtime.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Context, Modular, Seed, Tensors, no_grad};
use modl_route::{Choice, Fixed};
use modl_train::Methods;

use super::adapter::AdapterArg;
use crate::cli::Compute;

/// Arguments of `modl forward`.
#[derive(Debug, Args)]
pub(crate) struct ForwardArgs {
    /// Folder of the model: config.json and model.safetensors.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// An adapter, as often as there are; all are active, and their changes add up.
    #[arg(long, value_name = "[NAME=]PATH")]
    adapter: Vec<AdapterArg>,
    /// Merge the adapter into the weights first.
    #[arg(long, requires = "adapter")]
    merged: bool,
    /// Named inputs: input_ids, attention_mask, …
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// Where all outputs go, under the names that transformers gives them.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    compute: Compute,
}

pub(crate) fn run(args: &ForwardArgs, methods: &Methods) -> Result<()> {
    let options = args.compute.options()?;
    let mut model = Modular::from_box(modl_models::open(&args.model, &options)?, Seed(0))?;
    let inputs = Checkpoint::open(&args.inputs)?;
    let inputs: Tensors = inputs.tensors(options.device)?.into_iter().collect();
    let mut names = Vec::new();
    for adapter in &args.adapter {
        names.push(adapter.attach(&mut model, &methods.registry)?);
    }
    let outputs = no_grad(|| -> Result<Tensors> {
        match names.as_slice() {
            [] => Ok(model.forward(&inputs, &Context::eval())?),
            [name] if args.merged => {
                model.merge(name)?;
                Ok(model.forward_base(&inputs, &Context::eval())?)
            }
            _ if args.merged => anyhow::bail!(
                "--merged takes one adapter, {} are given; merge them into one first",
                names.len()
            ),
            _ => {
                let weights = names.iter().map(|n| (n.clone(), 1.0)).collect();
                let active = Fixed {
                    modules: Some(Choice::Weighted(weights)),
                    skip_absent: true,
                    ..Fixed::default()
                };
                model.route(Box::new(active), false)?;
                model.aggregate(Box::new(modl_aggregate::WeightedSum::default()))?;
                Ok(model.forward(&inputs, &Context::eval())?)
            }
        }
    })
    .with_context(|| format!("model {}", args.model.display()))?;
    checkpoint::save(&args.out, outputs.iter(), HashMap::from([("format".into(), "pt".into())]))?;
    for (name, t) in outputs.iter() {
        println!("{name} {t:?}");
    }
    println!("written to {}", args.out.display());
    Ok(())
}

//! `modl forward`: tensors through a model, to compare modl with any other runtime.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Context, Modular, Seed, Tensor, Tensors, no_grad};
use modl_models::Tokenizer;
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
    /// Which adapters each row of the batch gets: a text file with a line for each row, which names
    /// one adapter, several with commas between, or `__base__` for none.
    #[arg(long, value_name = "FILE", requires = "adapter", conflicts_with = "merged")]
    rows: Option<PathBuf>,
    /// Named inputs: input_ids, attention_mask, …
    #[arg(long, value_name = "FILE", required_unless_present = "text")]
    inputs: Option<PathBuf>,
    /// A text instead, for a model with a tokenizer.
    #[arg(long, conflicts_with = "inputs")]
    text: Option<String>,
    /// Where all outputs go, under the names that transformers gives them.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    compute: Compute,
}

pub(crate) fn run(args: &ForwardArgs, methods: &Methods) -> Result<()> {
    let options = args.compute.options()?;
    let mut model = Modular::from_box(modl_models::open(&args.model, &options)?, Seed(0))?;
    let inputs: Tensors = match (&args.inputs, &args.text) {
        (Some(file), _) => Checkpoint::open(file)?.tensors(options.device)?.into_iter().collect(),
        (None, text) => {
            let ids =
                Tokenizer::open(&args.model)?.encode_one(text.as_deref().unwrap_or_default())?;
            let ids = Tensor::from_slice(&ids, &[1, ids.len() as i64], options.device)?;
            let mask = ids.ones_like()?;
            Tensors::new().with("input_ids", ids).with("attention_mask", mask)
        }
    };
    let mut names = Vec::new();
    for adapter in &args.adapter {
        names.push(adapter.attach(&mut model, &methods.registry)?);
    }
    let outputs = no_grad(|| -> Result<Tensors> {
        if let Some(file) = &args.rows {
            return by_rows(&mut model, &inputs, &names, file);
        }
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
                let active = Fixed {
                    modules: Some(together(names.iter().map(String::as_str))),
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

/// Modules whose changes add up.
fn together<'a>(names: impl Iterator<Item = &'a str>) -> Choice {
    Choice::Weighted(names.map(|n| (n.to_owned(), 1.0)).collect())
}

/// One pass in which each row has the adapters that its line of `file` names.
fn by_rows(
    model: &mut Modular,
    inputs: &Tensors,
    names: &[String],
    file: &Path,
) -> Result<Tensors> {
    let text = fs::read_to_string(file).with_context(|| format!("--rows {}", file.display()))?;
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut table = BTreeMap::new();
    for (i, line) in lines.iter().enumerate() {
        let wanted: Vec<&str> = match *line {
            "__base__" => Vec::new(),
            line => line.split(',').map(str::trim).collect(),
        };
        if let Some(unknown) = wanted.iter().find(|w| !names.iter().any(|n| n == *w)) {
            anyhow::bail!(
                "--rows {}, line {}: no adapter is called `{unknown}`; there are {} and __base__",
                file.display(),
                i + 1,
                names.join(", ")
            );
        }
        table.insert((*line).to_owned(), together(wanted.into_iter()));
    }
    let rows = inputs.iter().next().map_or(0, |(_, t)| t.len_of(0));
    anyhow::ensure!(
        rows == lines.len() as i64,
        "--rows {}: has {} lines for a batch of {rows} rows",
        file.display(),
        lines.len()
    );
    let each = Fixed { table: Some(table), skip_absent: true, ..Fixed::default() };
    model.route(Box::new(each), false)?;
    model.aggregate(Box::new(modl_aggregate::WeightedSum::default()))?;
    Ok(model.forward(inputs, &Context::eval().with_tasks(lines))?)
}

//! `modl diff`: where two sets of tensors differ.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use modl_core::checkpoint::Checkpoint;
use modl_core::{Device, Kind, Tensor};

use crate::report::Table;

/// Arguments of `modl diff`.
#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// A .safetensors file, or the folder of a model or an adapter.
    a: PathBuf,
    /// What to compare it with.
    b: PathBuf,
    /// Show that many tensors, those that differ most.
    #[arg(long, default_value_t = 20)]
    top: usize,
}

/// Where one tensor differs.
struct Difference {
    name: String,
    shape: Vec<i64>,
    /// max |a − b|; infinite where one of them is not finite and the other is.
    largest: f64,
    /// ‖a − b‖ ⁄ ‖a‖.
    relative: f64,
}

pub(crate) fn run(args: &DiffArgs) -> Result<()> {
    let (a, b) = (Files::open(&args.a)?, Files::open(&args.b)?);
    let mut differences = Vec::new();
    let (mut same, mut apart) = (0, 0);
    for name in a.places.keys() {
        let Some(other) = b.get(name)? else {
            println!("only in {}: {name}", args.a.display());
            apart += 1;
            continue;
        };
        let own = a.get(name)?.unwrap_or_else(|| other.clone());
        if own.size() != other.size() {
            println!("{name}: {:?} in one, {:?} in the other", own.size(), other.size());
            apart += 1;
        } else if own.kind() == other.kind() && own.bit_equal(&other)? {
            same += 1;
        } else {
            differences.push(compare(name, &own, &other)?);
        }
    }
    for name in b.places.keys().filter(|n| !a.places.contains_key(*n)) {
        println!("only in {}: {name}", args.b.display());
        apart += 1;
    }
    if differences.is_empty() && apart == 0 {
        println!("all {same} tensors are equal, bit for bit");
        return Ok(());
    }
    differences.sort_by(|x, y| y.largest.total_cmp(&x.largest).then(x.name.cmp(&y.name)));
    let mut table = Table::new(["tensor", "shape", "largest difference", "relative"]);
    for d in differences.iter().take(args.top) {
        table.row([
            d.name.clone(),
            format!("{:?}", d.shape),
            format!("{:.3e}", d.largest),
            format!("{:.3e}", d.relative),
        ]);
    }
    println!("{}", table.text());
    let hidden = differences.len().saturating_sub(args.top);
    if hidden > 0 {
        println!("{hidden} more differ by less; --top {} shows them", differences.len());
    }
    println!(
        "{} tensors differ, {same} are equal bit for bit, {apart} have no counterpart",
        differences.len()
    );
    Ok(())
}

fn compare(name: &str, a: &Tensor, b: &Tensor) -> Result<Difference> {
    let (a, b) = (a.to_kind(Kind::Double)?, b.to_kind(Kind::Double)?);
    let difference = a.sub(&b)?;
    let norm = |t: &Tensor| -> Result<f64> { Ok(t.square()?.sum()?.item()?.sqrt()) };
    let (apart, own) = (norm(&difference)?, norm(&a)?);
    let largest = if a.numel() == 0 { 0.0 } else { difference.abs()?.largest()?.item()? };
    let finite = |v: f64| if v.is_nan() { f64::INFINITY } else { v };
    let relative = if own > 0.0 { apart / own } else { f64::INFINITY };
    Ok(Difference {
        name: name.to_owned(),
        shape: a.size(),
        largest: finite(largest),
        relative: finite(relative),
    })
}

/// All tensors of a file or a folder.
struct Files {
    files: Vec<Checkpoint>,
    /// By name: the file.
    places: BTreeMap<String, usize>,
}

impl Files {
    fn open(path: &Path) -> Result<Self> {
        let mut paths = Vec::new();
        if path.is_dir() {
            for entry in std::fs::read_dir(path)? {
                let file = entry?.path();
                if file.extension().is_some_and(|e| e == "safetensors") {
                    paths.push(file);
                }
            }
            paths.sort();
            anyhow::ensure!(!paths.is_empty(), "{}: has no .safetensors file", path.display());
        } else {
            paths.push(path.to_owned());
        }
        let files: Vec<Checkpoint> =
            paths.iter().map(Checkpoint::open).collect::<modl_core::Result<_>>()?;
        let mut places = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.names() {
                if places.insert(name.clone(), i).is_some() {
                    anyhow::bail!("{}: holds `{name}` in two files", path.display());
                }
            }
        }
        Ok(Files { files, places })
    }

    fn get(&self, name: &str) -> Result<Option<Tensor>> {
        let file = self.places.get(name).and_then(|i| self.files.get(*i));
        Ok(file.map(|f| f.tensor(name, Device::Cpu)).transpose()?)
    }
}

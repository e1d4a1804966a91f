//! `modl merge` of adapters alone: one adapter of several, from their files, without the base model
//! where ΔW does not depend on it.

mod others;
mod tables;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use modl_aggregate::adapters::{Change, Delta, SiteChanges, Way, merge, report};
use modl_aggregate::merge::{MergeMethods, Settings};
use modl_compute::adapterhub;
use modl_compute::low_rank::changes;
use modl_compute::peft::{self, Folder, LoraForm, LoraSite, write_lora};
use modl_core::{Modular, Seed};
use modl_models::LoadOptions;

/// What is to be merged, and how.
#[derive(Debug)]
pub(crate) struct MergeAdapters<'a> {
    /// Folders of PEFT's, or all of AdapterHub's.
    pub(crate) folders: &'a [PathBuf],
    /// One for each; 1 where it is left out. Nothing divides by their sum.
    pub(crate) weights: Option<&'a [f64]>,
    /// `concat`, the exact sum, where it is left out; a merge method over the changes; for scalings
    /// also `product`, for prompts and bottlenecks `average`.
    pub(crate) method: Option<&'a str>,
    /// The settings of the method but the weights.
    pub(crate) settings: Settings,
    /// The rank to keep at most.
    pub(crate) rank: Option<i64>,
    /// `peft` for what PEFT computes under the name.
    pub(crate) convention: Option<&'a str>,
    /// The base model, which DoRA and other changes that depend on the weights need.
    pub(crate) model: Option<&'a Path>,
    /// The folder to write.
    pub(crate) out: &'a Path,
    /// Where random drops come from.
    pub(crate) seed: u64,
}

pub(crate) fn run(asked: &MergeAdapters, methods: &MergeMethods) -> Result<()> {
    anyhow::ensure!(
        !asked.out.exists(),
        "{}: is there already; name a new one",
        asked.out.display()
    );
    let n = asked.folders.len();
    let weights = asked.weights.map_or_else(|| vec![1.0; n], <[f64]>::to_vec);
    anyhow::ensure!(
        weights.len() == n,
        "there are {} weights for {n} adapters; give one for each, or none",
        weights.len()
    );
    let hubs = asked.folders.iter().filter(|f| adapterhub::is_folder(f)).count();
    if hubs > 0 {
        anyhow::ensure!(
            hubs == n,
            "{hubs} of {n} adapters are AdapterHub's and the others PEFT's; `modl convert` makes them alike"
        );
        return others::bottlenecks(asked, &weights);
    }
    let open = |path: &PathBuf| {
        Folder::open(path).with_context(|| format!("adapter {}", path.display()))
    };
    let folders: Vec<Folder> = asked.folders.iter().map(open).collect::<Result<_>>()?;
    one_base(&folders)?;
    let sum = matches!(asked.method, None | Some("concat" | "cat" | "svd" | "linear"));
    if let ([only], [1.0]) = (&folders[..], &weights[..])
        && sum
        && asked.rank.is_none()
    {
        // Whatever it is, it is itself.
        peft::write_folder(asked.out, only, only.fields().clone(), only.tensors())?;
        println!("one adapter of weight 1 is itself");
        return said(asked);
    }
    let kind = |f: &Folder| f.config().module.kind().to_owned();
    let kinds: Vec<String> = folders.iter().map(kind).collect();
    let all = |one_of: &[&str]| kinds.iter().all(|k| one_of.contains(&k.as_str()));
    if all(&["ia3"]) {
        others::scalings(asked, &folders, &weights)
    } else if all(&["prompt_tuning"]) || all(&["p_tuning"]) || all(&["prefix_tuning"]) {
        others::prompts(asked, &folders, &weights)
    } else {
        weight_changes(asked, methods, &folders, &weights)
    }
}

/// Refuses adapters that say of themselves that they are of different backbones.
fn one_base(folders: &[Folder]) -> Result<()> {
    let known: Vec<(&Folder, &str)> =
        folders.iter().filter_map(|f| Some((f, f.base()?))).collect();
    if let Some((first, base)) = known.first()
        && let Some((other, _)) = known.iter().find(|(_, b)| b != base)
    {
        anyhow::bail!(
            "{} and {} were made for different backbones",
            first.path().display(),
            other.path().display()
        );
    }
    Ok(())
}

/// The last parts of the paths, or the paths where two would be called the same.
fn names(folders: &[PathBuf]) -> Vec<String> {
    let short = |p: &PathBuf| p.file_name().map(|n| n.to_string_lossy().into_owned());
    let all: Vec<String> =
        folders.iter().map(|p| short(p).unwrap_or_else(|| p.display().to_string())).collect();
    let unique = all.iter().enumerate().all(|(i, n)| !all.iter().skip(i + 1).any(|m| m == n));
    if unique { all } else { folders.iter().map(|p| p.display().to_string()).collect() }
}

fn weight_changes(
    asked: &MergeAdapters,
    methods: &MergeMethods,
    folders: &[Folder],
    weights: &[f64],
) -> Result<()> {
    let names = names(asked.folders);
    let way = Way::named(
        asked.method.unwrap_or("concat"),
        asked.convention,
        methods,
        asked.settings.clone(),
        asked.rank,
    )?;
    let mut model = match asked.model {
        Some(path) => {
            let base = modl_models::open(path, &LoadOptions::default())
                .with_context(|| format!("model {}", path.display()))?;
            Some(Modular::from_box(base, Seed(0))?)
        }
        None => None,
    };
    let mut sites: BTreeMap<String, (LoraForm, Vec<Option<Change>>)> = BTreeMap::new();
    for (j, folder) in folders.iter().enumerate() {
        let own = changes_of(folder, model.as_mut())
            .with_context(|| format!("adapter {}", folder.path().display()))?;
        for (path, form, change) in own {
            let none = || (form.clone(), vec![None; folders.len()]);
            let (known, changes) = sites.entry(path.clone()).or_insert_with(none);
            anyhow::ensure!(
                *known == form,
                "`{path}` is {known:?} in one adapter and {form:?} in {}",
                folder.path().display()
            );
            if let Some(slot) = changes.get_mut(j) {
                *slot = Some(change);
            }
        }
    }
    let forms: BTreeMap<String, LoraForm> =
        sites.iter().map(|(path, (form, _))| (path.clone(), form.clone())).collect();
    let sites: Vec<SiteChanges> =
        sites.into_iter().map(|(path, (_, changes))| SiteChanges { path, changes }).collect();
    for (j, name) in names.iter().enumerate() {
        let shared = |s: &&SiteChanges| s.present().any(|(i, _)| i == j) && s.present().count() > 1;
        if names.len() > 1 && !sites.iter().any(|s| shared(&s)) {
            println!("note: `{name}` stands at no site of another adapter");
        }
    }
    let made = merge(sites.clone(), &names, weights, &way, Seed(asked.seed))?;
    let written: Vec<LoraSite> = made
        .iter()
        .map(|m| LoraSite {
            path: m.path.clone(),
            form: forms.get(&m.path).cloned().unwrap_or(LoraForm::Linear),
            factors: m.factors.clone(),
            bias: m.bias.clone(),
            magnitude: None,
        })
        .collect();
    write_lora(asked.out, folders, &written)?;
    let found = report(sites, weights, &made)?;
    println!("{}", tables::of_sites(&found).text());
    if names.len() > 1 {
        println!("{}", tables::of_adapters(&found, &names, weights).text());
    }
    said(asked)
}

/// What one adapter changes: by A and B where that is all, else by the weights of the base.
fn changes_of(
    folder: &Folder,
    model: Option<&mut Modular>,
) -> Result<Vec<(String, LoraForm, Change)>> {
    let kind = folder.config().module.kind();
    if kind == "lora" || model.is_none() {
        let sites = folder.lora()?;
        anyhow::ensure!(
            sites.iter().all(|s| s.magnitude.is_none()),
            "is a DoRA: what it changes depends on the weights of the base; name it with --model"
        );
        let canonical = |path: String| match &model {
            Some(m) => m.backbone().canonical(&path),
            None => path,
        };
        let change = |s: LoraSite| {
            let change = Change { weight: Delta::Product(s.factors), bias: s.bias };
            (canonical(s.path), s.form, change)
        };
        return Ok(sites.into_iter().map(change).collect());
    }
    let Some(model) = model else { return Ok(Vec::new()) };
    let name = peft::load(model, folder.path(), Some("merged"))?;
    let found = changes(model, &name)?;
    model.detach(&name)?;
    let change = |c: modl_compute::low_rank::WholeChange| {
        (c.path, LoraForm::Linear, Change { weight: Delta::Whole(c.weight), bias: c.bias })
    };
    Ok(found.into_iter().map(change).collect())
}

/// Copies what does not change.
fn copy(from: &Path, to: &Path, names: &[&str]) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for name in names {
        if from.join(name).is_file() {
            fs::copy(from.join(name), to.join(name)).with_context(|| to.display().to_string())?;
        }
    }
    Ok(())
}

fn said(asked: &MergeAdapters) -> Result<()> {
    println!("written to {}", asked.out.display());
    Ok(())
}

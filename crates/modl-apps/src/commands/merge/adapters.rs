//! `modl merge` of adapters alone: one adapter of several, from their files, without the base model
//! where ΔW does not depend on it.

mod others;
mod plan;
mod tables;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use modl_aggregate::adapters::{Change, Delta, SiteChanges, Way, merge, report};
use modl_aggregate::merge::{Diagnosis, MergeMethod, MergeMethods, Of, Settings};
use modl_compute::adapterhub;
use modl_compute::low_rank::changes;
use modl_compute::peft::{self, Folder, LoraForm, LoraSite, write_lora};
use modl_core::{Modular, Seed};
use modl_models::LoadOptions;

use super::report::{models, save};
use super::{MergeArgs, evaluate, one_each};
use crate::report::Page;

/// What is to be merged, and how.
#[derive(Debug)]
struct Asked<'a> {
    /// Folders of PEFT's, or all of AdapterHub's.
    folders: &'a [PathBuf],
    /// One for each. Nothing divides by their sum.
    weights: Vec<f64>,
    /// `concat`, the exact sum, where it is left out; a merge method over the changes; for scalings
    /// also `product`, for prompts and bottlenecks `average`.
    method: Option<&'a str>,
    /// The settings of the method but the weights.
    settings: Settings,
    rank: Option<i64>,
    convention: Option<&'a str>,
    model: Option<&'a Path>,
    out: &'a Path,
    seed: u64,
    /// Only to be shown.
    plan: bool,
    report: Option<&'a Path>,
    /// Whether nothing is told: it is a candidate among many.
    quiet: bool,
}

impl Asked<'_> {
    fn say(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            println!("{text}");
        }
    }

    /// Refuses a report where there are no changes of weights to compare.
    fn without_report(&self) -> Result<()> {
        anyhow::ensure!(
            self.report.is_none(),
            "--report: compares changes of weights, of which these adapters have none to compare"
        );
        Ok(())
    }

    /// Says what would be merged, where only that is asked for.
    fn planned(&self, what: &str) -> bool {
        if self.plan {
            let files: Vec<_> = self.folders.iter().map(|f| f.display().to_string()).collect();
            let out = self.out.display();
            println!("{what} of {} would be merged into {out}", files.join(", "));
        }
        self.plan
    }
}

pub(super) fn run(args: &MergeArgs, methods: &MergeMethods) -> Result<()> {
    for (name, given) in [("dtype", args.dtype.is_some()), ("allow-nan", args.allow_nan)] {
        anyhow::ensure!(!given, "--{name}: is of whole models, and these are adapters");
    }
    let n = args.inputs.len();
    let each = |name: &str, given: &Option<String>| {
        given.as_deref().map(|text| one_each(name, text, n, "adapters")).transpose()
    };
    let mut settings = Settings::default();
    if let Some(density) = each("density", &args.density)? {
        settings = settings.set_each("density", density);
    }
    let spec = args.method.as_deref().map(|m| m.strip_suffix("_svd").unwrap_or(m));
    let spec = spec.and_then(|m| methods.find(m).ok()).map(MergeMethod::spec);
    for setting in &args.settings {
        let (key, text) = setting
            .split_once('=')
            .with_context(|| format!("--set {setting}: is to be KEY=VALUE"))?;
        let known = spec.and_then(|s| s.settings.iter().find(|s| s.name == key));
        settings = if known.is_some_and(|s| s.of == Of::Each) {
            settings.set_each(key, one_each(key, text, n, "adapters")?)
        } else {
            let value: serde_json::Value =
                serde_norway::from_str(text).with_context(|| format!("--set {setting}"))?;
            settings.set(key, value)
        };
    }
    let asked = Asked {
        folders: &args.inputs,
        weights: each("weight", &args.weight)?.unwrap_or_else(|| vec![1.0; n]),
        method: args.method.as_deref(),
        settings,
        rank: args.rank,
        convention: args.convention.as_deref(),
        model: args.model.as_deref(),
        out: &args.out,
        seed: args.seed,
        plan: args.plan,
        report: args.report.as_deref(),
        quiet: args.quiet,
    };
    merge_adapters(&asked, methods)?;
    if let Some(command) = args.eval.as_deref().filter(|_| !args.plan && !args.quiet) {
        let names = names(&args.inputs);
        let folders = args.inputs.iter().map(|path| Some(path.as_path()));
        let all = names.iter().map(String::as_str).zip(folders);
        evaluate::run(command, all, &args.out)?;
    }
    Ok(())
}

fn merge_adapters(asked: &Asked, methods: &MergeMethods) -> Result<()> {
    anyhow::ensure!(
        asked.plan || !asked.out.exists(),
        "{}: is there already; name a new one",
        asked.out.display()
    );
    let n = asked.folders.len();
    let weights = &asked.weights[..];
    let hubs = asked.folders.iter().filter(|f| adapterhub::is_folder(f)).count();
    if hubs > 0 {
        anyhow::ensure!(
            hubs == n,
            "{hubs} of {n} adapters are AdapterHub's and the others PEFT's; `modl convert` makes them alike"
        );
        return others::bottlenecks(asked, weights);
    }
    let open =
        |path: &PathBuf| Folder::open(path).with_context(|| format!("adapter {}", path.display()));
    let folders: Vec<Folder> = asked.folders.iter().map(open).collect::<Result<_>>()?;
    one_base(&folders)?;
    let sum = matches!(asked.method, None | Some("concat" | "cat" | "svd" | "linear"));
    if let ([only], [1.0]) = (&folders[..], weights)
        && sum
        && asked.rank.is_none()
    {
        if asked.plan {
            println!("one adapter of weight 1 is itself and would be copied");
            return Ok(());
        }
        asked.without_report()?;
        // Whatever it is, it is itself.
        peft::write_folder(asked.out, only, only.fields().clone(), only.tensors())?;
        asked.say("one adapter of weight 1 is itself");
        return said(asked);
    }
    let kind = |f: &Folder| f.config().module.kind().to_owned();
    let kinds: Vec<String> = folders.iter().map(kind).collect();
    let all = |one_of: &[&str]| kinds.iter().all(|k| one_of.contains(&k.as_str()));
    if all(&["ia3"]) {
        others::scalings(asked, &folders, weights)
    } else if all(&["prompt_tuning"]) || all(&["p_tuning"]) || all(&["prefix_tuning"]) {
        others::prompts(asked, &folders, weights)
    } else {
        weight_changes(asked, methods, &folders, weights)
    }
}

/// Refuses adapters that say of themselves that they are of different backbones.
fn one_base(folders: &[Folder]) -> Result<()> {
    let known: Vec<(&Folder, &str)> = folders.iter().filter_map(|f| Some((f, f.base()?))).collect();
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
    asked: &Asked,
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
    let mut notes = plan::not_merged(&sites, &names, weights);
    for (j, name) in names.iter().enumerate() {
        let shared = |s: &&SiteChanges| s.present().any(|(i, _)| i == j) && s.present().count() > 1;
        if names.len() > 1 && !sites.iter().any(|s| shared(&s)) {
            let note = format!("`{name}` stands at no site of another adapter");
            asked.say(format_args!("note: {note}"));
            notes.push(note);
        }
    }
    if asked.plan {
        return plan::show(asked, folders, &sites, &names, &way, &notes);
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
    if asked.quiet {
        return Ok(());
    }
    let found = report(sites, weights, &made)?;
    let of_sites = tables::of_sites(&found);
    println!("{}", of_sites.text());
    let tensors = found.into_iter().map(|s| s.compared).collect();
    let compared = Diagnosis { models: names, tensors };
    if compared.models.len() > 1 {
        println!("{}", tables::of_adapters(&compared, weights).text());
    }
    said(asked)?;
    let Some(folder) = asked.report else { return Ok(()) };
    let method = asked.method.unwrap_or("concat");
    let mut page = Page::new(&format!("{method} of {} adapters", compared.models.len()));
    page.paragraph(
        "Differences are what each adapter changes of the weights, without its factor in the merge. What is \
         kept of an adapter is the length of the result along its change, over that change's own.",
    );
    page.table(&models(&compared));
    super::report::compared(&mut page, &compared)?;
    page.heading("The merged change, site by site");
    page.paragraph(
        "Energy kept and lost are of what the method gives, before it is cut to a rank; `from the sum` is \
         how far the result is from the exact weighted sum.",
    );
    page.table(&of_sites);
    save(page, &notes, folder)
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

fn said(asked: &Asked) -> Result<()> {
    asked.say(format_args!("written to {}", asked.out.display()));
    Ok(())
}

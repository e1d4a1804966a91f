//! `modl compare`: several routers on one recipe, with seeds, controls and paired differences.
//!
//! Each router takes the place of the recipe's and is trained with each seed as `modl train` would
//! train it, in a folder of its own, `OUT/ROUTER/seed-N`, which `modl eval` and `modl inspect`
//! understand. The held-out examples are the same for all seeds and routers.

mod contestants;
mod controls;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use modl_core::{Select, checkpoint};
use modl_train::{Methods, Metric};
use serde_json::Value;

use contestants::{Contestant, as_toml, contestants};

use super::run_folder::Loaded;
use super::study::Study as Trainings;
use crate::report::{Bar, Page, grouped_bars};
use crate::trials::{Columns, Measure, Results};

/// Arguments of `modl compare`.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The recipe, whose router is replaced.
    recipe: PathBuf,
    /// Routers by name, each with settings if wanted: top_k{"k":2},soft. Differences are to the
    /// first.
    #[arg(long, value_name = "LIST")]
    routers: String,
    /// How many seeds, from 0.
    #[arg(long, default_value_t = 3, value_name = "N")]
    seeds: u64,
    /// Where runs and the report go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Leaves out the controls: `uniform`, `random`, `hash`, `oracle`, which knows the task, and one
    /// dense module with as many parameters, and as many operations a token, as the modules together.
    #[arg(long)]
    no_controls: bool,
    /// Sets a value of the recipe, for instance phases.0.lr=1e-4; as often as wanted.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub(crate) fn run(args: &CompareArgs, methods: &Methods) -> Result<()> {
    anyhow::ensure!(args.seeds > 0, "--seeds is to be at least 1");
    let trainings = Trainings::open(&args.recipe, &args.out, methods)?;
    let named = contestants(&args.routers)?;
    let recipe = trainings.recipe(&args.set)?;
    anyhow::ensure!(recipe.router.is_some(), "the recipe has no [router] to be replaced");
    let mut study = Study { args, methods, trainings };
    // With all that is set for each; a wrong one is refused before anything is trained.
    let settled = |c: Contestant| study.settings(&c).map(|set| (c, set));
    let mut all = named.into_iter().map(settled).collect::<Result<Vec<_>>>()?;
    if let (false, Some((_, first))) = (args.no_controls, all.first()) {
        let loaded = Loaded::new(study.trainings.recipe(first)?, methods)?;
        let has = |c: &Contestant| all.iter().any(|(known, _)| known.config == c.config);
        let controls: Vec<Contestant> =
            controls::of(loaded, methods)?.into_iter().filter(|c| !has(c)).collect();
        for control in controls {
            // Not every control fits every recipe.
            match study.settings(&control) {
                Ok(set) => all.push((control, set)),
                Err(e) => println!("no control `{}`: {e:#}", control.label),
            }
        }
    }
    let mut runs = Vec::new();
    for (contestant, set) in &all {
        for seed in 0..args.seeds {
            runs.push(study.trainings.run(&contestant.label, set, seed)?);
        }
    }
    let contestants: Vec<Contestant> = all.into_iter().map(|(c, _)| c).collect();
    let of = |m: &Metric| Measure { key: m.key, title: m.title, digits: 4 };
    let measures: Vec<Measure> = recipe.last_head().metrics().iter().map(of).collect();
    report(args, &contestants, &measures, &Results::new(&runs))
}

struct Study<'a> {
    args: &'a CompareArgs,
    methods: &'a Methods,
    trainings: Trainings<'a>,
}

impl Study<'_> {
    /// What is set in the recipe for a router: itself, and the phases without those in which it
    /// leaves nothing to be trained, as where `routing` is trained and the router does not learn.
    fn settings(&self, contestant: &Contestant) -> Result<Vec<String>> {
        let label = || format!("router {}", contestant.label);
        let mut set = [self.args.set.as_slice(), &contestant.set].concat();
        let before = self.trainings.recipe(&set)?;
        let mut config = contestant.config.clone();
        // Its reach is not the router's own setting, and stays as the recipe has it.
        let reach = before.values().get("router").and_then(|r| r.get("scope"));
        if let (Some(reach), Some(own)) = (reach, config.as_object_mut()) {
            own.entry("scope").or_insert_with(|| reach.clone());
        }
        set.push(format!("router={}", as_toml(&config).with_context(label)?));
        let mut loaded =
            Loaded::new(self.trainings.recipe(&set).with_context(label)?, self.methods)?;
        loaded.prepare(self.methods).with_context(label)?;
        let trains = |patterns: &[String]| {
            let any = patterns.iter().map(|p| p.replace("{module}", "*"));
            let select = Select::any(any);
            let base = loaded.model.backbone().params().iter();
            let base = base.map(|(n, p)| (format!("base.{n}"), p));
            let own = loaded.model.params().iter().map(|(n, p)| (n.to_owned(), p));
            own.chain(base).any(|(n, p)| !p.is_buffer() && select.matches(&n))
        };
        let idle: Vec<bool> =
            loaded.recipe.phases.iter().map(|p| !trains(&p.train.train)).collect();
        if idle.contains(&true) {
            let phases = loaded.recipe.values().get("phases").and_then(Value::as_array);
            let left = phases.into_iter().flatten().zip(&idle).filter(|(_, idle)| !**idle);
            let left: Vec<Value> = left.map(|(p, _)| p.clone()).collect();
            for (phase, _) in loaded.recipe.phases.iter().zip(&idle).filter(|(_, idle)| **idle) {
                println!("{}: phase `{}` is left out: it would train nothing", label(), phase.name);
            }
            set.push(format!("phases={}", as_toml(&left.into())?));
        }
        Ok(set)
    }
}

fn report(
    args: &CompareArgs,
    contestants: &[Contestant],
    measures: &[Measure],
    results: &Results,
) -> Result<()> {
    let rows: Vec<(String, String)> =
        contestants.iter().map(|c| (c.label.clone(), c.label.clone())).collect();
    let Some((first, _)) = rows.first() else { return Ok(()) };
    let columns = Columns { head: "held out", rows: &rows, measures };
    let means = columns.means(results)?;
    let head = format!("less {first}");
    let reference = |label: &str| (label != first).then(|| first.clone());
    let differences = Columns { head: &head, ..columns }.differences(results, reference)?;
    let seeds = results.seeds().len();
    let note = format!(
        "{seeds} seed{}; in brackets the 95 % interval by the bootstrap over seeds, of differences \
         paired by seed.",
        if seeds == 1 { "" } else { "s" }
    );
    println!("{}\n\n{}\n\n{note}", means.text(), differences.text());

    let mut page = Page::new("modl compare");
    page.paragraph(&format!("Routers on {}. {note}", args.recipe.display()));
    page.table(&means);
    page.heading(&format!("Differences from {first}"));
    page.table(&differences);
    for m in measures {
        let svg = plot(m, &rows, results)?;
        page.figure(&svg, "Means over seeds; the lines are 95 % intervals by the bootstrap.");
        write(&args.out.join(format!("{}.svg", m.key)), &svg)?;
    }
    let path = args.out.join("report.html");
    write(&path, &page.html())?;
    println!("report: {}", path.display());
    Ok(())
}

fn plot(measure: &Measure, rows: &[(String, String)], results: &Results) -> Result<String> {
    let bar = |(label, _): &(String, String)| -> Result<Option<Bar>> {
        let (value, ends) = results.mean(label, measure.key)?;
        Ok((!value.is_nan()).then_some(Bar { value, ends }))
    };
    let values = vec![rows.iter().map(bar).collect::<Result<Vec<_>>>()?];
    let lowest = values.iter().flatten().flatten();
    let lowest = lowest.map(|b| b.ends.map_or(b.value, |(low, _)| low)).fold(0.0, f64::min);
    let series: Vec<String> = rows.iter().map(|(_, title)| title.clone()).collect();
    grouped_bars(measure.title, measure.title, &["held out".into()], &series, &values, lowest)
}

fn write(path: &Path, text: &str) -> Result<()> {
    Ok(checkpoint::write_whole(path, text.as_bytes())?)
}

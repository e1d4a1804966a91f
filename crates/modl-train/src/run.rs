//! A recipe's phases in a folder, one after the other, over stops and restarts.
//!
//! ```text
//! FOLDER/recipe.json                     what is run
//! FOLDER/classes.json                    the classes in the order of their indices, where there are any;
//!                                        those of a phase's own head in classes-NAME.json
//! FOLDER/phases/1-fit/state.json, …      the state of the phase while it runs
//! FOLDER/phases/1-fit/modules/NAME/      each module as a PEFT folder, or as NAME.safetensors
//!                                        where PEFT does not know the method
//! FOLDER/phases/1-fit/routing.safetensors, heads.safetensors
//! FOLDER/phases/1-fit/params.safetensors everything trained so far; written last: the phase is done
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use modl_core::checkpoint;
use modl_core::{Error, Modular, Result, ResultExt, Select};
use serde_json::Value;

use crate::recipe::routing::Routings;
use crate::state::differences;
use crate::{Dataset, Event, Job, Methods, Objective, Phase, Recipe, RunFolder, Sink, outcome};

/// The examples of a run.
#[derive(Debug, Clone, Copy)]
pub struct Examples<'a> {
    /// Those that are trained on.
    pub train: &'a Dataset,
    /// Those that are held out, for strategies that measure on their way; `None` leaves that out.
    pub test: Option<&'a Dataset>,
}

impl<'a> From<&'a Dataset> for Examples<'a> {
    fn from(train: &'a Dataset) -> Self {
        Examples { train, test: None }
    }
}

/// What is predicted by a head, and the examples with its targets.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// What is predicted.
    pub objective: &'a dyn Objective,
    /// From what.
    pub examples: Examples<'a>,
}

/// Runs the phases of a recipe with one head on a fresh model in `folder`. Phases that are done there are
/// taken over, one that was stopped goes on.
///
/// # Errors
/// Where the folder holds another recipe's run or is another run's at this moment, or a phase fails;
/// what was saved is kept.
pub fn run<'a>(
    recipe: &Recipe,
    methods: &Methods,
    model: &mut Modular,
    objective: &dyn Objective,
    data: impl Into<Examples<'a>>,
    folder: impl AsRef<Path>,
    sink: &mut dyn Sink,
) -> Result<()> {
    let work = [Work { objective, examples: data.into() }];
    run_in(&RunFolder::hold(folder)?, recipe, methods, model, &work, sink)
}

/// [`run`] in a folder that is held already, with what belongs to each of [`Recipe::heads`].
///
/// # Errors
/// As [`run`].
pub fn run_in(
    folder: &RunFolder,
    recipe: &Recipe,
    methods: &Methods,
    model: &mut Modular,
    work: &[Work],
    sink: &mut dyn Sink,
) -> Result<()> {
    let folder = folder.path();
    let objectives: Vec<&dyn Objective> = work.iter().map(|w| w.objective).collect();
    claim(recipe, &objectives, folder)?;
    recipe.attach(model, methods)?;
    objectives.iter().try_for_each(|o| o.setup(model))?;
    let mut routings = Routings::new(recipe);
    let mut paths = Vec::new();
    for (i, phase) in recipe.phases.iter().enumerate() {
        let own = phase_folder(folder, i, &phase.name);
        let done = own.join(PARAMS);
        if phase.next_task {
            paths.push(modl_route::winning_path(model).at(&phase.name)?);
        }
        routings.turn_to(recipe, phase, model, methods).at(&phase.name)?;
        if done.exists() {
            outcome::load(&done, model, methods)?;
            continue;
        }
        let strategy = methods.strategies.parse(&phase.strategy)?;
        let mut phase = phase.clone();
        if phase.next_task {
            let seed = recipe.seed().child(&phase.name).child("next_task");
            let free = modl_route::next_task_after(model, &paths, seed).at(&phase.name)?;
            phase.train.train = free_of(model, &phase.train.train, &free);
        }
        let Work { objective, examples } = work_of(recipe, &phase, work)?;
        let part = phase.tasks.as_ref().map(|tasks| examples.train.of_tasks(tasks)).transpose();
        let mut part = part.at(&phase.name)?;
        if let Some(n) = phase.limit {
            let few = part.as_ref().unwrap_or(examples.train).sample(n, recipe.data.split_seed);
            part = Some(few.at(&phase.name)?);
        }
        let mut job = Job {
            model,
            objective,
            data: part.as_ref().unwrap_or(examples.train),
            test: examples.test,
            phase: &phase,
            folder: &own,
            sink,
            recipe,
            methods,
            router: None,
        };
        strategy.run(&mut job)?;
        let router = job.router.take();
        save_results(model, router.as_ref(), &own)?;
        sink.event(&Event::PhaseFinished { name: phase.name.clone(), path: own })?;
    }
    Ok(())
}

/// What belongs to the head of a phase.
fn work_of<'a>(recipe: &Recipe, phase: &Phase, work: &[Work<'a>]) -> Result<Work<'a>> {
    let head = recipe.head_of(phase);
    let at = recipe.heads().iter().position(|h| *h == head);
    at.and_then(|at| work.get(at)).copied().ok_or_else(|| {
        let problem =
            format!("has {} heads, but an objective for {}", recipe.heads().len(), work.len());
        Error::invalid("recipe", format!("{problem}; give one for each"))
    })
}

/// Makes of a fresh model what the run of a recipe with one head in `folder` has come to by its last
/// finished phase.
///
/// # Errors
/// As [`restore_at`].
pub fn restore(
    recipe: &Recipe,
    methods: &Methods,
    model: &mut Modular,
    objective: &dyn Objective,
    folder: impl AsRef<Path>,
) -> Result<()> {
    restore_at(recipe, methods, model, &[objective], folder, None)
}

/// Makes of a fresh model what the run in `folder` has come to by its last finished phase, or by the
/// phase of a name, with the objectives of [`Recipe::heads`].
///
/// # Errors
/// Where the phase is not finished, or the folder holds another recipe's run.
pub fn restore_at(
    recipe: &Recipe,
    methods: &Methods,
    model: &mut Modular,
    objectives: &[&dyn Objective],
    folder: impl AsRef<Path>,
    phase: Option<&str>,
) -> Result<()> {
    let folder = folder.as_ref();
    claim(recipe, objectives, folder)?;
    let last = match phase {
        None => recipe.phases.len(),
        Some(name) => {
            let at = recipe.phases.iter().position(|p| p.name == name);
            let known = || Error::unknown("phase", name, recipe.phases.iter().map(|p| &p.name));
            at.ok_or_else(known)? + 1
        }
    };
    let phases = recipe.phases.iter().enumerate().take(last);
    let done: Vec<(&Phase, PathBuf)> = phases
        .map(|(i, p)| (p, phase_folder(folder, i, &p.name).join(PARAMS)))
        .filter(|(_, file)| file.exists())
        .collect();
    if done.is_empty() || phase.is_some_and(|name| done.iter().all(|(p, _)| p.name != name)) {
        let what = phase.map_or("finished phase".to_owned(), |name| format!("finished `{name}`"));
        return Err(Error::file(folder, format!("holds no {what}; train first")));
    }
    recipe.attach(model, methods)?;
    objectives.iter().try_for_each(|o| o.setup(model))?;
    let mut routings = Routings::new(recipe);
    // Each in turn: what a phase trained of the backbone is in its own file only.
    for (phase, file) in done {
        routings.turn_to(recipe, phase, model, methods).at(&phase.name)?;
        outcome::load(&file, model, methods)?;
    }
    Ok(())
}

/// The names of all parameters that `train` takes, of modules only those that `free` takes, too.
fn free_of(model: &Modular, train: &[String], free: &[String]) -> Vec<String> {
    let (train, free) = (Select::any(train.to_vec()), Select::any(free.to_vec()));
    let own = model.params().iter().filter(|(_, p)| !p.is_buffer()).map(|(n, _)| n.to_owned());
    let base = model.backbone().params().iter().map(|(n, _)| format!("base.{n}"));
    let wanted = |n: &String| train.matches(n) && (!n.starts_with("modules.") || free.matches(n));
    own.chain(base).filter(wanted).collect()
}

const PARAMS: &str = "params.safetensors";

fn phase_folder(folder: &Path, index: usize, name: &str) -> PathBuf {
    folder.join("phases").join(format!("{}-{name}", index + 1))
}

/// Writes down what is run in a folder, or refuses it where that is something else.
fn claim(recipe: &Recipe, objectives: &[&dyn Objective], folder: &Path) -> Result<()> {
    let path = folder.join(RunFolder::RECIPE);
    let own = serde_json::to_string_pretty(recipe.values()).map_err(|e| Error::file(&path, e))?;
    if let Some(old) = written(&path, &own)?
        && let Some(what) = differences(&old, &own)
    {
        let problem = format!("holds the run of another recipe ({what}); choose another folder");
        return Err(Error::file(folder, problem));
    }
    for (i, (objective, head)) in objectives.iter().zip(recipe.heads()).enumerate() {
        if objective.classes().is_empty() {
            continue;
        }
        let path = folder.join(match head.name() {
            Some(name) if i > 0 => format!("classes-{name}.json"),
            _ => "classes.json".to_owned(),
        });
        let own = serde_json::to_string(objective.classes()).map_err(|e| Error::file(&path, e))?;
        if let Some(old) = written(&path, &own)? {
            let problem = format!("the run has the classes {old}, the data now {own}");
            return Err(Error::file(&path, format!("{problem}; restore the data")));
        }
    }
    Ok(())
}

/// Writes a file where there is none; what stands there, where that is something else.
fn written(path: &Path, text: &str) -> Result<Option<String>> {
    if !path.exists() {
        checkpoint::write_whole(path, text.as_bytes())?;
        return Ok(None);
    }
    let old = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    Ok((old != text).then_some(old))
}

fn save_results(model: &Modular, router: Option<&Value>, folder: &Path) -> Result<()> {
    for name in model.modules() {
        let modules = folder.join("modules");
        match modl_compute::peft::save(model, name, modules.join(name)) {
            Err(Error::Unsupported { .. }) => {
                model.save_module(name, modules.join(format!("{name}.safetensors")))?;
            }
            other => other?,
        }
    }
    model.save_routing(folder.join("routing.safetensors"))?;
    let heads = Select::new("heads.*");
    checkpoint::save(
        folder.join("heads.safetensors"),
        model.params().select(&heads),
        HashMap::new(),
    )?;
    outcome::save(&folder.join(PARAMS), model, router, Vec::new())
}

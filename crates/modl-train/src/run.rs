//! A recipe's phases in a folder, one after the other, over stops and restarts.
//!
//! ```text
//! FOLDER/recipe.json                     what is run
//! FOLDER/classes.json                    the classes in the order of their indices, where there are any
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

use crate::state::differences;
use crate::{Dataset, Event, Job, Methods, Objective, Recipe, RunFolder, Sink, outcome};

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

/// Runs the recipe's phases on a fresh model in `folder`. Phases that are done there are taken
/// over, one that was stopped goes on.
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
    run_in(&RunFolder::hold(folder)?, recipe, methods, model, objective, data.into(), sink)
}

/// [`run`] in a folder that is held already.
///
/// # Errors
/// As [`run`].
pub fn run_in(
    folder: &RunFolder,
    recipe: &Recipe,
    methods: &Methods,
    model: &mut Modular,
    objective: &dyn Objective,
    data: Examples,
    sink: &mut dyn Sink,
) -> Result<()> {
    let (folder, Examples { train: data, test }) = (folder.path(), data);
    claim(recipe, objective, folder)?;
    recipe.attach(model, methods)?;
    objective.setup(model)?;
    let mut paths = Vec::new();
    for (i, phase) in recipe.phases.iter().enumerate() {
        let own = phase_folder(folder, i, &phase.name);
        let done = own.join(PARAMS);
        if phase.next_task {
            paths.push(modl_route::winning_path(model).at(&phase.name)?);
        }
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
        let part = phase.tasks.as_ref().map(|tasks| data.of_tasks(tasks)).transpose();
        let part = part.at(&phase.name)?;
        let mut job = Job {
            model,
            objective,
            data: part.as_ref().unwrap_or(data),
            test,
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

/// Makes of a fresh model what the run in `folder` has come to by its last finished phase.
///
/// # Errors
/// Where no phase is finished, or the folder holds another recipe's run.
pub fn restore(
    recipe: &Recipe,
    methods: &Methods,
    model: &mut Modular,
    objective: &dyn Objective,
    folder: impl AsRef<Path>,
) -> Result<()> {
    let folder = folder.as_ref();
    claim(recipe, objective, folder)?;
    let files = recipe.phases.iter().enumerate().map(|(i, p)| phase_folder(folder, i, &p.name));
    let done: Vec<PathBuf> = files.map(|f| f.join(PARAMS)).filter(|f| f.exists()).collect();
    if done.is_empty() {
        return Err(Error::file(folder, "holds no finished phase; train first"));
    }
    recipe.attach(model, methods)?;
    objective.setup(model)?;
    // Each in turn: what a phase trained of the backbone is in its own file only.
    done.iter().try_for_each(|file| outcome::load(file, model, methods).map(drop))
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
fn claim(recipe: &Recipe, objective: &dyn Objective, folder: &Path) -> Result<()> {
    let path = folder.join(RunFolder::RECIPE);
    let own = serde_json::to_string_pretty(recipe.values()).map_err(|e| Error::file(&path, e))?;
    if let Some(old) = written(&path, &own)?
        && let Some(what) = differences(&old, &own)
    {
        let problem = format!("holds the run of another recipe ({what}); choose another folder");
        return Err(Error::file(folder, problem));
    }
    if objective.classes().is_empty() {
        return Ok(());
    }
    let path = folder.join("classes.json");
    let own = serde_json::to_string(objective.classes()).map_err(|e| Error::file(&path, e))?;
    match written(&path, &own)? {
        None => Ok(()),
        Some(old) => Err(Error::file(
            &path,
            format!("the run has the classes {old}, the data now {own}; restore the data"),
        )),
    }
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

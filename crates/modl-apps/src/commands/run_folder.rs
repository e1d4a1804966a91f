//! A run's folder: the recipe that it follows, and what is set beside it.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use modl_core::{Modular, ResultExt, checkpoint};
use modl_models::{LoadOptions, Tokenizer, open};
use modl_train::recipe::Head;
use modl_train::{
    Dataset, Examples, Methods, Objective, Phase, Recipe, RunFolder, Sink, SpecialTokens, Work,
};
use serde::{Deserialize, Serialize};

/// What a folder keeps of how it was started.
#[derive(Debug, Serialize, Deserialize)]
struct Origin {
    /// The recipe's file; relative paths in it start at its folder.
    recipe: PathBuf,
    /// What `--set` said.
    set: Vec<String>,
}

/// A recipe with everything that it names, loaded.
pub(super) struct Loaded {
    pub(super) recipe: Recipe,
    pub(super) model: Modular,
    parts: Parts,
}

/// What belongs to each of the recipe's heads.
struct Parts {
    first: Part,
    others: Vec<Part>,
}

/// What belongs to a head.
pub(super) struct Part {
    pub(super) objective: Box<dyn Objective>,
    pub(super) train: Dataset,
    pub(super) test: Dataset,
}

/// Reads a recipe with its `--set`s.
pub(super) fn read(path: &Path, text: &str, set: &[String], methods: &Methods) -> Result<Recipe> {
    let mut recipe = Recipe::parse(text, path, methods)?;
    for assignment in set {
        recipe.set(assignment, methods)?;
    }
    Ok(recipe)
}

/// Writes down in `folder` which recipe is run there, as long as none has begun.
pub(super) fn note(folder: &Path, recipe: &Path, text: &str, set: &[String]) -> Result<()> {
    if RunFolder::has_run(folder) {
        return Ok(());
    }
    let recipe = std::path::absolute(recipe)?;
    let origin = Origin { recipe, set: set.to_vec() };
    checkpoint::write_whole(folder.join("origin.json"), &serde_json::to_vec_pretty(&origin)?)?;
    checkpoint::write_whole(folder.join("recipe.toml"), text.as_bytes())?;
    Ok(())
}

/// The recipe of a run.
pub(super) fn recipe_of(folder: &Path, methods: &Methods) -> Result<Recipe> {
    let read_file = |name: &str| {
        let path = folder.join(name);
        std::fs::read_to_string(&path).with_context(|| {
            format!("{}: is this the folder of a run? `modl train` makes one", path.display())
        })
    };
    let origin: Origin = serde_json::from_str(&read_file("origin.json")?)
        .with_context(|| format!("{}: is damaged", folder.join("origin.json").display()))?;
    read(&origin.recipe, &read_file("recipe.toml")?, &origin.set, methods)
}

impl Loaded {
    pub(super) fn new(recipe: Recipe, methods: &Methods) -> Result<Self> {
        let spec = &recipe.backbone;
        let device = crate::cli::available(spec.device.0)?;
        let backbone = match recipe.fresh_backbone(methods)? {
            Some(fresh) => fresh,
            None => {
                let folder = recipe.backbone_folder()?;
                let options = LoadOptions {
                    kind: Some(spec.dtype.into()),
                    device,
                    dropout: spec.dropout,
                    router_losses: spec.router_losses,
                };
                open(&folder, &options)
                    .with_context(|| format!("[backbone] {}", folder.display()))?
            }
        };
        let model = Modular::from_box(backbone, recipe.seed())?;
        // Opened for the first text: numbers need none.
        let opened = OnceCell::new();
        let tokenizer = || -> modl_core::Result<&Tokenizer> {
            if let Some(there) = opened.get() {
                return Ok(there);
            }
            let folder = recipe.backbone_folder()?;
            let own = Tokenizer::open(&folder).at(format!("[backbone] {}", folder.display()))?;
            Ok(opened.get_or_init(|| own))
        };
        let tokenise = |text: &str| match recipe.data.max_tokens {
            Some(n) => tokenizer()?.encode_up_to(text, n),
            None => tokenizer()?.encode_one(text),
        };
        // A head says what is right, and may read it of another column. What is read beside it, and the
        // features that are made of it, are held once.
        let features = |own: Dataset, known: Option<&Dataset>| match known
            .map(|known| own.with_inputs_of(known))
            .transpose()?
            .flatten()
        {
            Some(own) => Ok(own),
            None => recipe.add_features(&model, own),
        };
        let part = |head: &Head, first: Option<&Part>| -> Result<Part> {
            let special = match head {
                Head::MaskedTokens { .. } => {
                    let tokenizer = tokenizer()?;
                    SpecialTokens { mask: tokenizer.mask(), all: tokenizer.special() }
                }
                _ => SpecialTokens::default(),
            };
            let objective = recipe.objective_of(head, &model, &special)?;
            let (train, test) = recipe.load_data_of(head, &tokenise, 0)?;
            let train = features(train, first.map(|part| &part.train))?;
            let test = features(test, first.map(|part| &part.test))?;
            Ok(Part { objective, train, test })
        };
        let first = part(&recipe.head, None)?;
        let others = recipe.heads().into_iter().skip(1).map(|head| part(head, Some(&first)));
        let others = others.collect::<Result<_>>()?;
        Ok(Loaded { recipe, model, parts: Parts { first, others } })
    }

    /// Attaches the recipe's modules, and makes the parameters of all heads.
    pub(super) fn prepare(&mut self, methods: &Methods) -> Result<()> {
        self.recipe.attach(&mut self.model, methods)?;
        for part in self.parts.iter() {
            part.objective.setup(&mut self.model)?;
        }
        Ok(())
    }

    /// Gives the model the router and the aggregator of a phase, fresh.
    pub(super) fn route_in(&mut self, phase: &Phase, methods: &Methods) -> Result<()> {
        Ok(self.recipe.route_in(phase, &mut self.model, methods)?)
    }

    /// Runs the recipe in a folder.
    pub(super) fn run(
        &mut self,
        folder: &RunFolder,
        methods: &Methods,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let work: Vec<Work> = self.parts.iter().map(Part::work).collect();
        Ok(modl_train::run_in(folder, &self.recipe, methods, &mut self.model, &work, sink)?)
    }

    /// Makes of the model what the run in a folder has come to by its last phase, or by one of a name.
    pub(super) fn restore(
        &mut self,
        folder: &Path,
        phase: Option<&str>,
        methods: &Methods,
    ) -> Result<()> {
        let objectives: Vec<&dyn Objective> =
            self.parts.iter().map(|p| p.objective.as_ref()).collect();
        let (recipe, model) = (&self.recipe, &mut self.model);
        Ok(modl_train::restore_at(recipe, methods, model, &objectives, folder, phase)?)
    }

    /// What belongs to the head of a phase, or of the last one.
    pub(super) fn part(&self, phase: Option<&str>) -> &Part {
        let head = match phase_of(&self.recipe, phase) {
            Some(phase) => self.recipe.head_of(phase),
            None => self.recipe.last_head(),
        };
        let at = self.recipe.heads().iter().position(|h| *h == head);
        self.parts.iter().nth(at.unwrap_or(0)).unwrap_or(&self.parts.first)
    }
}

/// The phase of a name, or the last one.
pub(super) fn phase_of<'a>(recipe: &'a Recipe, name: Option<&str>) -> Option<&'a Phase> {
    match name {
        Some(name) => recipe.phases.iter().find(|phase| phase.name == name),
        None => recipe.phases.last(),
    }
}

impl Parts {
    fn iter(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.first).chain(&self.others)
    }
}

impl Part {
    fn work(&self) -> Work<'_> {
        let examples = Examples { train: &self.train, test: Some(&self.test) };
        Work { objective: self.objective.as_ref(), examples }
    }
}

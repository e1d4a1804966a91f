//! A run's folder: the recipe that it follows, and what is set beside it.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use modl_core::{Modular, ResultExt, checkpoint};
use modl_models::{LoadOptions, Tokenizer, open};
use modl_train::{Dataset, Methods, Objective, Recipe, RunFolder};
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
        let objective = recipe.objective(&model)?;
        // Opened for the first text: numbers need none.
        let tokenizer = OnceCell::new();
        let tokenise = |text: &str| {
            if tokenizer.get().is_none() {
                let folder = recipe.backbone_folder()?;
                let opened = Tokenizer::open(&folder);
                let _ = tokenizer.set(opened.at(format!("[backbone] {}", folder.display()))?);
            }
            tokenizer.get().map_or_else(|| Ok(Vec::new()), |t| t.encode_one(text))
        };
        let (train, test) = recipe.load_data(&tokenise, 0)?;
        let train = recipe.add_features(&model, train)?;
        let test = recipe.add_features(&model, test)?;
        Ok(Loaded { recipe, model, objective, train, test })
    }
}

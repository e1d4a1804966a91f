//! The recipes in `examples/`, and what pages say to put into them, are read as they stand.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use modl_train::{Methods, Recipe};

fn methods() -> Methods {
    Methods::new(modl_apps::builtin().unwrap()).unwrap()
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

#[test]
fn the_recipes_of_the_examples_are_read() {
    let methods = methods();
    let mut read = 0;
    for entry in std::fs::read_dir(root().join("examples/recipes")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "toml") {
            continue;
        }
        let recipe = Recipe::open(&path, &methods).unwrap_or_else(|e| panic!("{e}"));
        assert!(!recipe.phases.is_empty(), "{}", path.display());
        read += 1;
    }
    assert!(read >= 18, "{read}");
}

/// Each `strategy = …` that stands in a line of its own, and each `phases.0.strategy=…` of a command.
#[test]
fn the_strategies_of_the_pages_are_read() {
    let methods = methods();
    for (page, recipe, least) in [
        ("docs/continual.md", "continual.toml", 9),
        ("docs/meta.md", "meta.toml", 1),
        ("docs/multitask.md", "multitask.toml", 9),
    ] {
        let text = std::fs::read_to_string(root().join(page)).unwrap();
        let own = text.lines().filter_map(|line| line.strip_prefix("strategy = "));
        let own = own.map(|value| value.split('#').next().unwrap_or_default().trim());
        let set =
            text.split("phases.0.strategy=").skip(1).filter_map(|rest| rest.split('\'').next());
        let all: Vec<&str> = own.chain(set.filter(|value| !value.starts_with('…'))).collect();
        assert!(all.len() >= least, "{page}: {all:?}");
        for strategy in all {
            let mut recipe =
                Recipe::open(root().join("examples/recipes").join(recipe), &methods).unwrap();
            let set = recipe.set(&format!("phases.0.strategy={strategy}"), &methods);
            set.unwrap_or_else(|e| panic!("{page}: {strategy}: {e}"));
        }
    }
}

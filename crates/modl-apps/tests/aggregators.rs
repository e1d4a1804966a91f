//! What docs/aggregators.md shows: its recipes are trained, and its Rust code is the code of this file.

#![allow(clippy::unwrap_used)]

mod bench;

use std::fs;
use std::path::Path;

use bench::{BERT, Bench, RECIPE, succeed};
use modl_aggregate::{
    BayesianMixture, Compose, Composition, Ensemble, EnsembleOf, Prior, load_fusion, save_fusion,
};
use modl_compute::{Bottleneck, Lora, adapterhub};
use modl_core::checkpoint::Checkpoint;
use modl_core::{Context, Device, Init, Kind, Modular, Result, Seed, Targets, Tensors, no_grad};
use modl_models::{Bert, LoadOptions};
use modl_route::Fixed;

const DOCS: &str = "../../docs/aggregators.md";

/// The code blocks of a language.
fn blocks(language: &str) -> Vec<String> {
    let docs = fs::read_to_string(DOCS).unwrap();
    let start = format!("```{language}\n");
    docs.split(&start).skip(1).map(|b| b.split("```").next().unwrap().to_owned()).collect()
}

#[test]
fn its_recipes_are_trained() {
    let bench = Bench::new();
    let (head, rest) = RECIPE.split_once("[modules.a]").unwrap();
    let (modules, _) = rest.split_once("[router]").unwrap();
    let (_, tail) = rest.split_once("[head]").unwrap();
    let (sentiment, phases) = tail.split_once("[[phases]]").unwrap();
    let blocks = blocks("toml");
    assert_eq!(blocks.len(), 3);
    for (n, block) in blocks.iter().enumerate() {
        let mut recipe = head.to_owned();
        if !block.contains("[modules.") {
            recipe += &format!("[modules.a]{modules}");
        }
        recipe += &format!("[head]{sentiment}\n{block}");
        if !block.contains("[[phases]]") {
            recipe += &format!("[[phases]]{phases}");
        }
        let (file, out) = (format!("{n}.toml"), bench.arg(&format!("run-{n}")));
        fs::write(bench.path(&file), recipe).unwrap();
        succeed(&["train", &bench.arg(&file), "--out", &out]);
        assert!(succeed(&["eval", &out]).contains('a'));
    }
}

#[test]
fn its_code_stands_in_this_file() {
    let plain = |text: &str| text.lines().map(str::trim).collect::<Vec<_>>().join("\n");
    let own = plain(include_str!("aggregators.rs"));
    let blocks = blocks("rust");
    assert_eq!(blocks.len(), 4);
    for block in blocks {
        assert!(own.contains(plain(&block).trim()), "not in this file:\n{block}");
    }
}

fn bert() -> Modular {
    let bert = Bert::load(Path::new(BERT), &LoadOptions::default()).unwrap();
    Modular::new(bert, Seed(1)).unwrap()
}

fn inputs() -> Tensors {
    let file = Checkpoint::open(Path::new(BERT).join("inputs.safetensors")).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

/// As if the parameters had been trained.
fn disturb(model: &Modular) -> Result<()> {
    for (i, (name, p)) in (0..).zip(model.params().iter()) {
        let t = p.tensor();
        if !p.is_buffer() && !name.starts_with("heads.") {
            let noise = Init::Normal(0.1).tensor(&t.size(), Seed(i), Kind::Float, Device::Cpu)?;
            no_grad(|| t.clone().copy_from(&t.add(&noise)?))?;
        }
    }
    Ok(())
}

fn loras() -> Result<Modular> {
    let mut model = bert();
    for name in ["a", "b"] {
        model.attach(name, Box::<Lora>::default(), &Targets::names(["query"]))?;
    }
    Ok(model)
}

#[test]
fn parallel_parts_are_each_by_itself() -> Result<()> {
    let (mut model, inputs) = (loras()?, inputs());
    disturb(&model)?;
    let both = Composition::parallel(["a", "b"]);
    model.aggregate(Box::new(Compose { composition: both.clone() }))?;
    model.route(Box::new(Fixed::modules(["a", "b"])), false)?;
    let y = model.forward(&both.repeat(&inputs)?, &Context::eval())?; // rows of a, then those of b
    let y = y.need("last_hidden_state")?;
    let rows = y.len_of(0) / 2;
    for (part, name) in (0..).zip(["a", "b"]) {
        model.aggregate(Box::new(Compose { composition: name.into() }))?;
        model.route(Box::new(Fixed::modules([name])), false)?;
        let alone = model.forward(&inputs, &Context::eval())?;
        let own = y.narrow(0, part * rows, rows)?;
        assert!(own.max_abs_diff(alone.need("last_hidden_state")?)? < 1e-5, "{name}");
    }
    let (a, b) = (y.narrow(0, 0, rows)?, y.narrow(0, rows, rows)?);
    assert!(a.max_abs_diff(&b)? > 1e-3, "the two say the same");
    Ok(())
}

#[test]
fn a_fusion_comes_back_from_folders_to_the_same_bits() -> Result<()> {
    let (folder, mut model, mut other) = (tempfile::tempdir().unwrap(), bert(), bert());
    let dir = folder.path();
    for name in ["a", "b"] {
        model.attach(name, Box::new(Bottleneck::pfeiffer()), &Bottleneck::pfeiffer_sites())?;
    }
    model.aggregate(Box::<modl_aggregate::Fusion>::default())?;
    model.route(Box::new(Fixed::modules(["a", "b"])), false)?;
    disturb(&model)?;
    adapterhub::save(&model, "a", dir.join("a"))?;
    adapterhub::save(&model, "b", dir.join("b"))?;
    save_fusion(&model, &["a", "b"], dir.join("fusion"))?;

    adapterhub::load(&mut other, dir.join("a"), None)?;
    adapterhub::load(&mut other, dir.join("b"), None)?;
    let names = load_fusion(&mut other, dir.join("fusion"))?;
    other.route(Box::new(Fixed::modules(names)), false)?;
    let of = |m: &Modular| -> Result<modl_core::Tensor> {
        m.forward(&inputs(), &Context::eval())?.need("last_hidden_state").cloned()
    };
    let plain = of(&bert())?;
    assert!(of(&model)?.bit_equal(&of(&other)?)? && of(&model)?.max_abs_diff(&plain)? > 1e-3);
    Ok(())
}

#[test]
fn a_mixture_learns_the_domain_of_its_texts() -> Result<()> {
    // The first expert is right of all texts, the second is as good in the first one.
    let texts = [vec![[-1.0, -1.0]; 5], vec![[-1.0, -2.0]; 5], vec![[-1.0, -2.0]; 5]];
    let mut surprise = 0.0;
    let mut mixture = BayesianMixture::new(2, Prior::Updating(0.3))?;
    for text in &texts {
        for each in text {
            surprise -= mixture.observe(each)?; // [ln p(token | expert 1), ln p(token | expert 2)]
        }
        mixture.end_of_text();
    }
    let cached = BayesianMixture::new(2, mixture.cache())?;
    // By hand: p(text) = Σ π e^l, π moves by 0.3 to the posterior.
    let (mut prior, mut wanted) = (0.5f64, 0.0);
    for second in [-5.0f64, -10.0, -10.0] {
        let (a, b) = (prior * (-5.0f64).exp(), (1.0 - prior) * second.exp());
        wanted -= (a + b).ln();
        prior += 0.3 * (a / (a + b) - prior);
    }
    assert!((surprise - wanted).abs() < 1e-12 && (cached.prior()[0] - prior).abs() < 1e-12);
    Ok(())
}

#[test]
fn an_ensemble_is_the_mean_of_what_its_members_say() -> Result<()> {
    let (mut model, inputs) = (loras()?, inputs());
    disturb(&model)?;
    model.route(Box::<Fixed>::default(), false)?;
    model.aggregate(Box::<modl_aggregate::WeightedSum>::default())?;
    let ensemble = Ensemble::uniform(EnsembleOf::Probabilities, ["a", "b"]);
    let log_p = ensemble.log_probabilities(|module| {
        let y = model.forward(&inputs, &Context::eval().with_tasks([module; 3]))?;
        Ok(y.need("pooler_output")?.clone())
    })?;
    let p = |module: &str| -> Result<modl_core::Tensor> {
        let y = model.forward(&inputs, &Context::eval().with_tasks([module; 3]))?;
        y.need("pooler_output")?.softmax(-1)
    };
    let mean = p("a")?.add(&p("b")?)?.mul_scalar(0.5)?;
    assert!(log_p.exp()?.max_abs_diff(&mean)? < 1e-6);
    Ok(())
}

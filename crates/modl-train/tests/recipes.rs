//! Reading recipes: what is right, and what every kind of mistake is answered.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use modl_core::Error;
use modl_train::{OptimizerConfig, Recipe, Schedule, Warmup};
use toy::methods;

const GOOD: &str = r#"seed = 5

[backbone]
path = "model"
dtype = "bf16"

[data]
tasks = { tweets = "tweets.tsv", news = "../nyt.tsv" }
limit = 100

[modules.tweets]
type = "lora"
targets = ["query", "value"]
r = 4

[modules.news]
type = "lora"
targets = ".*query"
layers_pattern = []

[router]
type = "soft"
scope = "global"
temperature = 0.5

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "fit"
strategy = "per_task"
epochs = 3
lr = 3e-4
optimizer = { type = "adamw", weight_decay = 0.01 }

[phases.schedule]
type = "cosine"
warmup = 0.06

[[phases]]
name = "route"
strategy = { type = "routing" }
steps = 10
"#;

fn parse(text: &str) -> Result<Recipe, Error> {
    Recipe::parse(text, "recipes/recipe.toml", &methods())
}

#[test]
fn a_good_recipe_says_what_it_says() {
    let r = parse(GOOD).unwrap();
    let names: Vec<&str> = r.modules.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["tweets", "news"], "in the order of the file, which is that of α");
    assert_eq!((r.seed, r.data.limit, r.data.test), (5, Some(100), None));
    assert!(r.router.as_ref().unwrap().global);
    assert_eq!(r.resolve("../nyt.tsv").to_str(), Some("recipes/../nyt.tsv"));
    let [fit, route] = r.phases.as_slice() else { panic!() };
    assert_eq!(fit.train.train, ["modules.{module}.*"], "the strategy's own");
    assert_eq!(fit.train.lr, 3e-4);
    assert_eq!(fit.train.schedule.warmup, Warmup::Share(0.06));
    let OptimizerConfig::AdamW(adamw) = &fit.train.optimizer else { panic!() };
    assert_eq!(adamw.weight_decay, 0.01);
    assert_eq!(route.train.train, ["routers.*", "aggregators.*"]);
    assert_eq!((route.train.steps, &route.train.schedule), (Some(10), &Schedule::default()));
}

/// What losses count: a phase's own word, then that at the top.
#[test]
fn weights_of_losses_at_the_top_are_for_all_phases() {
    let top = GOOD.replace("[router]", "[loss_weights]\nbalance = 0.5\nz = 0.25\n\n[router]");
    let own = top.replace("steps = 10", "steps = 10\nloss_weights = { z = 0.0, load = 2.0 }");
    let r = parse(&own).unwrap();
    let of = |phase: usize| {
        let weights = &r.phases[phase].train.loss_weights;
        weights.iter().map(|(n, w)| (n.as_str(), *w)).collect::<Vec<_>>()
    };
    assert_eq!(of(0), [("balance", 0.5), ("z", 0.25)]);
    assert_eq!(of(1), [("balance", 0.5), ("load", 2.0), ("z", 0.0)]);
    let e = parse(&top.replace("0.25", "-1.0")).unwrap_err().to_string();
    assert!(e.contains("loss_weights.z") && e.contains("0 or more"), "{e}");
    assert!(e.starts_with("recipes/recipe.toml:2"), "{e}");
}

#[test]
fn a_composition_is_nested_as_deep_as_one_likes() {
    let composed = r#"[aggregator]
type = "compose"
composition = { stack = ["tweets", { fuse = { parts = ["tweets", "news"], value = "identity" } }] }"#;
    let r = parse(&GOOD.replace("[aggregator]\ntype = \"weighted_sum\"", composed)).unwrap();
    let stack = &r.aggregator.as_ref().unwrap()["composition"]["stack"];
    assert_eq!((&stack[0], &stack[1]["fuse"]["value"]), (&"tweets".into(), &"identity".into()));
    let e = parse(
        &GOOD.replace("[aggregator]\ntype = \"weighted_sum\"", &composed.replace("fuse", "fuze")),
    );
    assert!(e.unwrap_err().to_string().contains("did you mean `fuse`"));
}

/// Each mistake: what is right in the good recipe, what stands there instead, and words of the
/// answer, which begins with the line of it.
#[test]
fn every_mistake_is_answered_with_its_line_and_what_was_meant() {
    let table: &[(&str, &str, &[&str])] = &[
        (
            "epochs = 3",
            "epoch = 3",
            &["unknown key `epoch` in [[phases]]", "did you mean `epochs`?", "allowed:", "name"],
        ),
        ("seed = 5", "sede = 5", &["unknown key `sede` in the recipe", "`seed`?"]),
        ("[router]", "[ruoter]", &["unknown key `ruoter`", "`router`?"]),
        ("limit = 100", "limt = 100", &["unknown key `limt` in [data]", "`limit`?"]),
        (
            "r = 4",
            "rr = 4",
            &["unknown key `rr` in [modules.tweets]", "did you mean `r`?", "targets"],
        ),
        ("r = 4", "r = \"four\"", &["`r` in [modules.tweets]", "invalid type"]),
        (
            "layers_pattern = []",
            "layer_pattern = []",
            &["unknown key `layer_pattern` in [modules.news]", "`layers_pattern`?"],
        ),
        (
            "targets = \".*query\"",
            "target = \".*query\"",
            &["unknown key `target` in [modules.news]", "`targets`?"],
        ),
        (
            "temperature = 0.5",
            "temprature = 0.5",
            &["unknown key `temprature` in [router]", "`temperature`?"],
        ),
        (
            "scope = \"global\"",
            "scope = \"globl\"",
            &["unknown value `globl` of `scope` in [router]", "`global`?"],
        ),
        ("type = \"soft\"", "type = \"sotf\"", &["unknown router `sotf`", "`soft`?"]),
        ("type = \"weighted_sum\"", "type = \"weighted_sums\"", &["`weighted_sum`?"]),
        (
            "dtype = \"bf16\"",
            "dtype = \"bf61\"",
            &["unknown value `bf61` of `dtype` in [backbone]", "`bf16`?"],
        ),
        ("dtype = \"bf16\"", "device = \"gpu\"", &["`device` in [backbone]", "cuda:0"]),
        ("[backbone]\npath = \"model\"\n", "[backbone]\n", &["[backbone] needs `path`"]),
        (
            "strategy = \"per_task\"",
            "strategy = \"pertask\"",
            &["unknown strategy `pertask`", "`per_task`?"],
        ),
        (
            "weight_decay = 0.01",
            "weight_deacy = 0.01",
            &[
                "unknown key `weight_deacy` in [phases.optimizer]; did you mean `weight_decay`? allowed: betas, eps, weight_decay, no_decay",
            ],
        ),
        (
            "type = \"adamw\"",
            "type = \"adam\"",
            &["unknown value `adam` of `type` in [phases.optimizer]", "`adamw`?"],
        ),
        ("weight_decay = 0.01", "weight_decay = -1", &["adamw.weight_decay"]),
        (
            "warmup = 0.06",
            "warmpu = 0.06",
            &[
                "unknown key `warmpu` in [phases.schedule]; did you mean `warmup`? allowed: type, warmup, floor",
            ],
        ),
        (
            "type = \"cosine\"",
            "type = \"cosin\"",
            &["unknown value `cosin` of `type` in [phases.schedule]", "`cosine`?"],
        ),
        ("warmup = 0.06", "warmup = 6.0", &["schedule.warmup", "share"]),
        ("lr = 3e-4", "lr = \"3e-4\"", &["`lr` in [[phases]]", "invalid type"]),
        ("lr = 3e-4", "lr = nan", &["`phases.0.lr` is not a finite number"]),
        ("lr = 3e-4", "lr = = 3", &[]),
        ("epochs = 3", "epochs = 3\nsteps = 4", &["keep one of them"]),
        ("name = \"route\"", "name = \"fit\"", &["two phases are called `fit`"]),
        ("name = \"fit\"", "name = \"f/t\"", &["letters"]),
        ("type = \"regression\"", "type = \"regresion\"", &["`regression`?"]),
        ("limit = 100", "test = 1.5", &["share"]),
        (
            "epochs = 3",
            "lora_plus_ration = 16",
            &["unknown key `lora_plus_ration` in [[phases]]", "`lora_plus_ratio`?"],
        ),
        (
            "type = \"adamw\", weight_decay = 0.01",
            "type = \"adafactor\", relative_stp = true",
            &["unknown key `relative_stp` in [phases.optimizer]", "`relative_step`?"],
        ),
        (
            "type = \"adamw\", weight_decay = 0.01",
            "type = \"rmsprop\", alpha = 2.0",
            &["rmsprop.alpha"],
        ),
        ("type = \"adamw\", weight_decay", "type = \"loin\", weight_decay", &["`lion`?"]),
    ];
    let mut wrong = Vec::new();
    for (right, typo, words) in table {
        let line = 1 + GOOD.split_once(right).unwrap().0.matches('\n').count();
        let e = parse(&GOOD.replacen(right, typo, 1)).unwrap_err().to_string();
        let place = format!("recipes/recipe.toml:{line}: ");
        if !e.starts_with(&place) || !words.iter().all(|w| e.contains(w)) {
            wrong.push(format!("{typo:?} (line {line}, {words:?}): {e}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn values_are_set_from_outside_and_blamed_there() {
    let methods = methods();
    let mut r = parse(GOOD).unwrap();
    for set in
        ["phases.0.lr=1e-4", "seed = 9", "data.tasks.tweets=a b.tsv", "phases.1.batch_size=3"]
    {
        r.set(set, &methods).unwrap();
    }
    assert_eq!((r.phases[0].train.lr, r.seed, r.phases[1].train.batch_size), (1e-4, 9, 3));
    assert_eq!(r.data.tasks["tweets"].to_str(), Some("a b.tsv"));
    for (set, words) in [
        ("phases.0.epoch=1", "did you mean `epochs`?"),
        ("phases.2.lr=1", "there is no `phases.2.lr`"),
        ("phases.0.lr=fast", "`lr` in [[phases]]"),
        ("seed", "KEY=VALUE"),
        ("modules.tweets.rank=3", "unknown key `rank` in [modules.tweets]"),
    ] {
        let e = r.set(set, &methods).unwrap_err().to_string();
        assert!(e.starts_with(&format!("--set {set}: ")) && e.contains(words), "{e}");
    }
    assert_eq!((r.phases[0].train.lr, r.seed), (1e-4, 9), "a refused value changes nothing");
}

proptest::proptest! {
    /// Whatever one character of a recipe is replaced by, it is read or refused in words.
    #[test]
    fn damage_never_panics(at in 0..GOOD.len(), with in "[ -~\n]") {
        let mut text = GOOD.to_owned();
        text.replace_range(at..at + 1, &with);
        if let Err(e) = parse(&text) {
            proptest::prop_assert!(e.to_string().starts_with("recipes/recipe.toml:"), "{e}");
        }
    }
}

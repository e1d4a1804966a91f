//! Soups, searches over weights and barriers, with evaluations by a user's command: models of two
//! numbers, whose evaluation is a formula with a known optimum.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic)]

mod modl;
mod place;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Device, Tensor};

use modl::{refuse, succeed};
use place::Place;

impl Place {
    /// A model of the numbers x and y.
    fn model(&self, name: &str, values: [f32; 2]) -> String {
        let t = Tensor::from_slice(&values, &[2], Device::Cpu).unwrap();
        let path = self.path(name).join("model.safetensors");
        checkpoint::save(path, [("w", &t)], HashMap::new()).unwrap();
        self.arg(name)
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let file = Checkpoint::open(self.path(name).join("model.safetensors")).unwrap();
        file.tensor("w", Device::Cpu).unwrap().to_vec().unwrap()
    }

    /// A command that prints a formula of x and y, and counts how often it is run.
    fn eval(&self, formula: &str) -> String {
        let script = format!(
            "echo one >> {}\ntail -c 8 \"$MODEL/model.safetensors\" | od -An -tf4 | \
             awk '{{ x = $1; y = $2; print \"read\"; printf \"%.12g\\n\", {formula} }}'\n",
            self.arg("runs")
        );
        fs::write(self.path("eval.sh"), script).unwrap();
        format!("sh {}", self.arg("eval.sh"))
    }

    fn runs(&self) -> usize {
        fs::read_to_string(self.path("runs")).map_or(0, |text| text.lines().count())
    }

    fn lines(&self, out: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path(out).join("evaluations.jsonl")).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

fn close(found: &[f64], wanted: &[f64], off: f64) {
    assert_eq!(found.len(), wanted.len());
    let near = found.iter().zip(wanted).all(|(a, b)| (a - b).abs() <= off);
    assert!(near, "{found:?} {wanted:?}");
}

#[test]
fn a_greedy_soup_takes_those_with_which_the_average_is_better() {
    let at = Place::new();
    // To be near 0: the average of −1 and 2 is better than either, with 9 it is worse.
    let all = [at.model("a", [-1.0, 0.0]), at.model("b", [2.0, 0.0]), at.model("c", [9.0, 0.0])];
    let eval = at.eval("-(x < 0 ? -x : x)");
    let out = at.arg("soup");
    let mut args = vec!["merge", "--soup", "greedy", "--eval", &eval, "--out", &out];
    args.extend(all.iter().map(String::as_str));
    let text = succeed(&args);
    assert_eq!(at.numbers("soup"), [0.5, 0.0]);
    assert!(text.contains("-0.500000") && text.contains("no"), "{text}");
    // Three alone, then the soups of two and of three.
    assert_eq!((at.runs(), at.lines("soup").len()), (5, 6));
    assert!(!at.path("soup.trials").exists() && !at.path("soup.merging").exists());

    // As a loss the largest is best, and nothing goes with it.
    let out = at.arg("largest");
    args[6] = &out;
    args.insert(1, "--minimize");
    succeed(&args);
    assert_eq!(at.numbers("largest"), [9.0, 0.0]);

    let out = at.arg("uniform");
    let mut args = vec!["merge", "--soup", "uniform", "--out", &out];
    args.extend(all.iter().map(String::as_str));
    succeed(&args);
    close(&at.numbers("uniform"), &[10.0 / 3.0, 0.0], 1e-6);
}

#[test]
fn cma_es_finds_the_weights_of_task_vectors() {
    let at = Place::new();
    let models =
        [at.model("base", [1.0, 1.0]), at.model("a", [2.0, 1.0]), at.model("b", [1.0, 2.0])];
    // The least is at the weights 0.7 and −0.4.
    let eval = at.eval("(x - 1.7)^2 + 10 * (y - 0.6)^2");
    let out = at.arg("found");
    let mut args =
        vec!["merge", "--method", "task_arithmetic", "--search", "cma-es", "--eval", &eval];
    args.extend(["--minimize", "--budget", "150", "--seed", "3", "--out", &out]);
    args.extend(models.iter().map(String::as_str));
    let text = succeed(&args);
    close(&at.numbers("found"), &[1.7, 0.6], 0.02);
    assert!(text.contains("at the start") && text.contains("0.7"), "{text}");
    // A head, the start and whole generations of 6.
    assert_eq!(at.lines("found").len(), 1 + 1 + 150);
}

#[test]
fn a_search_that_was_stopped_measures_nothing_twice() {
    let at = Place::new();
    let models = [at.model("base", [0.0, 0.0]), at.model("a", [1.0, 0.0])];
    let eval = at.eval("(x - 0.3)^2");
    let args = |out: &str| -> Vec<String> {
        let fixed = ["merge", "--method", "task_arithmetic", "--search", "cma-es", "--eval", &eval];
        let more = ["--minimize", "--budget", "20", "--out", out];
        fixed.iter().chain(&more).map(|s| (*s).to_owned()).chain(models.clone()).collect()
    };
    let run = |out: &str, works: bool| {
        let args = args(&at.arg(out));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        if works { drop(succeed(&args)) } else { refuse(&args, "--eval") }
    };
    run("whole", true);
    let whole = at.runs();
    assert_eq!(whole, 21);
    // The evaluation breaks at the eighth time; what was known before is kept.
    let script = fs::read_to_string(at.path("eval.sh")).unwrap();
    let broken =
        format!("test $(wc -l < {}) -lt {} || exit 3\n{script}", at.arg("runs"), whole + 7);
    fs::write(at.path("eval.sh"), broken).unwrap();
    run("out", false);
    assert_eq!(at.runs(), whole + 7);
    let kept = fs::read_to_string(at.path("out.trials/evaluations.jsonl")).unwrap();
    assert_eq!(kept.lines().count(), 1 + 7);
    // As a kill in the middle of a line leaves it.
    fs::write(at.path("out.trials/evaluations.jsonl"), format!("{kept}{{\"point\":[0.1")).unwrap();
    fs::write(at.path("eval.sh"), script).unwrap();
    run("out", true);
    assert_eq!(at.runs(), 2 * whole);
    assert_eq!(at.lines("out"), at.lines("whole"));
    assert_eq!(at.numbers("out"), at.numbers("whole"));
    // Another search does not go on with these.
    fs::create_dir(at.path("other.trials")).unwrap();
    fs::write(at.path("other.trials/evaluations.jsonl"), kept).unwrap();
    let mut other = args(&at.arg("other"));
    other.extend(["--seed".to_owned(), "1".to_owned()]);
    let other: Vec<&str> = other.iter().map(String::as_str).collect();
    refuse(&other, "something else");
}

#[test]
fn lora_hub_pays_for_large_weights() {
    let at = Place::new();
    let models =
        [at.model("base", [0.0, 0.0]), at.model("a", [1.0, 0.0]), at.model("b", [0.0, 1.0])];
    let eval = at.eval("(x - 0.7)^2 + (y + 0.4)^2");
    let out = at.arg("found");
    let mut args = vec!["merge", "--method", "task_arithmetic", "--search", "lora-hub", "--eval"];
    args.extend([eval.as_str(), "--minimize", "--budget", "200", "--out", &out]);
    args.extend(models.iter().map(String::as_str));
    succeed(&args);
    // d ⁄ dw of (w − t)² + 0.05 · |w| ⁄ 2 is 0 where w is nearer to 0 than t by 0.0125.
    close(&at.numbers("found"), &[0.6875, -0.3875], 0.004);
}

#[test]
fn the_barrier_between_two_models_is_found() {
    let at = Place::new();
    let (a, b) = (at.model("a", [-1.0, 0.0]), at.model("b", [1.0, 0.0]));
    let (out, eval) = (at.arg("loss"), at.eval("3 * (1 - x * x) + x"));
    let args = ["barrier", &a, &b, "--points", "5", "--out", &out, "--eval", &eval];
    let text = succeed(&[&args[..], &["--minimize"]].concat());
    assert!(text.contains("barrier 3.000000 at λ = 0.5000"), "{text}");
    let page = fs::read_to_string(at.path("loss/barrier.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("barrier 3.000000"), "{page}");
    assert_eq!(at.lines("loss").len(), 6);
    assert!(!at.path("loss.trials").exists());
    // The same numbers as scores: the middle is better than the ends.
    let out = at.arg("score");
    let text = succeed(&["barrier", &a, &b, "--points", "5", "--out", &out, "--eval", &eval]);
    assert!(text.contains("no barrier"), "{text}");
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_evaluated() {
    let at = Place::new();
    let (a, b, eval) = (at.model("a", [0.0; 2]), at.model("b", [1.0; 2]), at.eval("x"));
    let out = at.arg("out");
    let merge = |more: &[&str], part: &str| {
        refuse(&[&["merge", &a, &b, "--out", &out], more].concat(), part);
    };
    merge(&["--soup", "greedy"], "--eval");
    merge(&["--search", "cma-es", "--eval", &eval], "of a --method");
    merge(&["--method", "slerp", "--search", "cma-es", "--eval", &eval], "has no weights");
    let bounds = ["--method", "linear", "--search", "cma-es", "--bounds", "2,3", "--eval", &eval];
    merge(&bounds, "bounds that the start lies in");
    assert_eq!(at.runs(), 0);
    fs::remove_dir_all(at.path("out.trials")).unwrap();
    merge(&["--soup", "greedy", "--eval", "echo good"], "is to be a number");
}

const ADAPTERS: &str = "../modl-compute/tests/fixtures/deterministic_llama";

/// Adapters are weighed as models are: by what their exact sum is worth.
#[test]
fn adapters_are_searched_too() {
    let at = Place::new();
    let [lora, other] = ["lora", "rslora"].map(|n| format!("{ADAPTERS}/{n}"));
    let tensors = "adapter_model.safetensors";
    let size = |path: &Path| fs::metadata(path.join(tensors)).unwrap().len();
    let eval = format!("wc -c < \"$MODEL/{tensors}\"");
    let out = at.arg("soup");
    // The smaller file is the better: both alone are equal, and their sum has twice the rank.
    let args = ["merge", "--soup", "greedy", "--minimize", "--eval", &eval, &lora, &lora];
    succeed(&[&args[..], &["--out", &out]].concat());
    assert!(size(Path::new(&out)) < size(Path::new(&lora)) * 3 / 2);

    // The last number of the file is one of the second adapter's times its weight, and is to be as with
    // the weight 1; the first adapter only costs. 0.025 for each |w| moves neither of the two.
    let last = |path: &Path| {
        let bytes = fs::read(path.join(tensors)).unwrap();
        f32::from_le_bytes(bytes[bytes.len() - 4..].try_into().unwrap())
    };
    let sum = at.arg("sum");
    succeed(&["merge", &lora, &other, "--out", &sum]);
    let wanted = last(Path::new(&sum));
    let eval = format!(
        "tail -c 4 \"$MODEL/{tensors}\" | od -An -tf4 | \
         awk '{{ d = 100 * ($1 - {wanted}); printf \"%.9g\\n\", d < 0 ? -d : d }}'"
    );
    let out = at.arg("found");
    let args = ["merge", "--search", "lora-hub", "--minimize", "--budget", "120", "--eval", &eval];
    let text = succeed(&[&args[..], &[&lora, &other, "--out", &out]].concat());
    assert!(text.contains("written to") && at.lines("found").len() == 1 + 1 + 120, "{text}");
    let found = last(Path::new(&out)) / wanted;
    assert!((found - 1.0).abs() < 0.02, "{found}");

    // Where nothing is better than none, that is said.
    let out = at.arg("none");
    let args =
        ["merge", "--search", "lora-hub", "--budget", "12", "--eval", "echo 1", &lora, &other];
    refuse(&[&args[..], &["--out", &out]].concat(), "no part of any adapter");
}

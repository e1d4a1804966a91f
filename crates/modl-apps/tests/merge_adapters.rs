//! `modl merge` of adapters: what PEFT gets wrong, what other tools refuse, and what is refused here.

#![allow(clippy::unwrap_used, clippy::panic)]

mod modl;
mod place;

use std::fs;
use std::path::Path;

use modl_core::checkpoint::Checkpoint;
use modl_core::{Device, Tensor};

use modl::{refuse, succeed};
use place::Place;

const FIXTURES: &str = "../modl-compute/tests/fixtures";
const LLAMA: &str = "../modl-compute/tests/fixtures/deterministic_llama";
const PEFT: &str = "tests/fixtures/peft_merges.safetensors";

fn adapter(name: &str) -> String {
    format!("{LLAMA}/{name}")
}

fn tensor(path: impl AsRef<Path>, key: &str) -> Tensor {
    Checkpoint::open(path).unwrap().tensor(key, Device::Cpu).unwrap()
}

/// ‖a − b‖ ⁄ ‖b‖.
fn off(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.norm().unwrap().item().unwrap();
    norm(&a.sub(b).unwrap()) / norm(b)
}

impl Place {
    /// Merges into the folder `name`.
    fn merge(&self, name: &str, args: &[&str]) -> String {
        let out = self.arg(name);
        succeed(&[&["merge", "--out", &out], args].concat())
    }

    /// What `modl forward` says with the adapter of that folder.
    fn outputs(&self, base: &str, adapters: &[&str], key: &str) -> Tensor {
        let out = self.arg("out.safetensors");
        let inputs = format!("{base}/inputs.safetensors");
        let mut args = vec!["forward", "--model", base, "--inputs", &inputs, "--out", &out];
        for adapter in adapters {
            args.extend(["--adapter", adapter]);
        }
        succeed(&args);
        tensor(self.path("out.safetensors"), key)
    }

    fn logits(&self, adapter: &str) -> Tensor {
        self.outputs(LLAMA, &[adapter], "logits")
    }
}

/// PEFT's merge of one adapter with the weight 1 is not the adapter where there is more to it than A,
/// B and α ⁄ r; here it is, bit for bit.
#[test]
fn one_adapter_of_weight_one_is_itself_where_pefts_is_not() {
    let place = Place::new();
    for (kind, wrong) in [("rslora", 0.1), ("dora", 0.05), ("lora_bias", 0.2)] {
        let own = tensor(Path::new(LLAMA).join(kind).join("outputs.safetensors"), "logits");
        for how in ["linear", "svd", "cat"] {
            let theirs = tensor(PEFT, &format!("peft.{kind}.{how}"));
            let theirs = off(&theirs, &own);
            assert!(theirs > wrong, "PEFT's {how} of {kind} is off by {theirs}");
        }
        place.merge(kind, &[&adapter(kind)]);
        let (ours, original) = (place.path(kind), Path::new(LLAMA).join(kind));
        for (name, t) in Checkpoint::open(original.join("adapter_model.safetensors"))
            .unwrap()
            .tensors(Device::Cpu)
            .unwrap()
        {
            let found = tensor(ours.join("adapter_model.safetensors"), &name);
            assert!(found.bit_equal(&t).unwrap(), "{kind}: {name}");
        }
        let ours = off(&place.logits(&place.arg(kind)), &own);
        assert!(ours < 1e-5, "{kind} is off by {ours}");
    }
}

/// 0.7 of one and −0.3 of a plain LoRA, against the change of the weights themselves.
#[test]
fn merges_with_rslora_dora_and_a_bias_are_right_where_pefts_are_not() {
    let place = Place::new();
    let lora = adapter("lora");
    for kind in ["rslora", "dora", "lora_bias"] {
        let right = tensor(PEFT, &format!("right.{kind}+lora"));
        let theirs = off(&tensor(PEFT, &format!("peft.{kind}+lora.cat")), &right);
        assert!(theirs > 0.04, "PEFT's {kind} is off by {theirs}");
        let mut args = vec!["--weight", "0.7,-0.3"];
        if kind == "dora" {
            args.extend(["--model", LLAMA]);
        }
        let own = adapter(kind);
        args.extend([own.as_str(), &lora]);
        let text = place.merge(kind, &args);
        assert!(text.contains("cos lora") && text.contains("100.00 %"), "{text}");
        let ours = off(&place.logits(&place.arg(kind)), &right);
        assert!(ours < 1e-5, "{kind} is off by {ours}, PEFT's by {theirs}");
    }
    refuse(
        &["merge", "--out", &place.arg("none"), &adapter("dora"), &lora],
        "depends on the weights of the base; name it with --model",
    );
    assert!(!place.path("none").exists());
}

/// BERT's adapters of different ranks, targets and scales, from the files alone.
#[test]
fn adapters_of_different_ranks_and_targets_are_added() {
    let place = Place::new();
    let bert = format!("{FIXTURES}/base_bert");
    let names = ["bert_lora", "bert_lora_rank_pattern", "bert_rslora"];
    let all: Vec<String> = names.iter().map(|n| format!("{FIXTURES}/{n}/adapter")).collect();
    let weights = ["1", "0.5", "-0.25"];
    let mut args = vec!["--weight", "1,0.5,-0.25"];
    args.extend(all.iter().map(String::as_str));
    // All are called `adapter`, and are told apart by their paths.
    let text = place.merge("sum", &args);
    assert!(text.contains("bert_rslora"), "{text}");

    // The same three, merged into the base one after the other.
    let mut base = bert.clone();
    for (n, (path, weight)) in all.iter().zip(weights).enumerate() {
        let (scaled, next) = (format!("scaled{n}"), place.arg(&format!("base{n}")));
        place.merge(&scaled, &["--weight", weight, path]);
        succeed(&[
            "convert",
            "--model",
            &base,
            &place.arg(&scaled),
            "--to",
            "model",
            "--out",
            &next,
        ]);
        let inputs = "inputs.safetensors";
        fs::copy(format!("{bert}/{inputs}"), format!("{next}/{inputs}")).unwrap();
        base = next;
    }
    let one_by_one = place.outputs(&base, &[], "last_hidden_state");
    let merged = place.outputs(&bert, &[&place.arg("sum")], "last_hidden_state");
    assert!(off(&merged, &one_by_one) < 1e-5, "{}", off(&merged, &one_by_one));

    // A smaller rank says what it loses; a large one loses nothing.
    args.extend(["--rank", "1"]);
    let text = place.merge("small", &args);
    let row = text.lines().find(|l| l.contains("│ all")).unwrap();
    assert_ne!(row.split('┆').nth(4).unwrap().trim(), "100.00 %", "{text}");
    let method = ["--method", "ties_svd", "--density", "0.5", "--convention", "peft"];
    place.merge("ties", &[&args[..], &method].concat());
    place.outputs(&bert, &[&place.arg("ties")], "last_hidden_state");
}

#[test]
fn scalings_prompts_and_bottlenecks_are_merged_in_their_own_ways() {
    let place = Place::new();
    let ia3 = adapter("ia3");
    let own = tensor(format!("{LLAMA}/ia3/outputs.safetensors"), "logits");
    // 1 + ½ (l − 1) + ½ (l − 1) = l.
    place.merge("half", &["--weight", "0.5", &ia3, &ia3]);
    assert!(off(&place.logits(&place.arg("half")), &own) < 1e-6);
    // Once more is another thing, by the product as by the sum.
    for extra in
        [&[][..], &["--method", "product"], &["--method", "linear", "--convention", "peft"]]
    {
        let out = format!("twice{}", extra.len());
        place.merge(&out, &[extra, &[&ia3, &ia3]].concat());
        assert!(off(&place.logits(&place.arg(&out)), &own) > 1e-3);
    }

    let prompt = adapter("prompt");
    place.merge("mean", &["--method", "average", &prompt, &prompt]);
    let file = |folder: &str| Path::new(folder).join("adapter_model.safetensors");
    let alone = tensor(file(&prompt), "prompt_embeddings");
    let mean = tensor(file(&place.arg("mean")), "prompt_embeddings");
    assert!(mean.bit_equal(&alone).unwrap());
    place.merge("both", &[&prompt, &prompt]);
    let both = tensor(file(&place.arg("both")), "prompt_embeddings");
    assert_eq!(both.len_of(0), 2 * alone.len_of(0));
    place.logits(&place.arg("both"));
    refuse(&["merge", "--out", &place.arg("x"), "--method", "ties", &prompt, &prompt], "`average`");

    let hub = format!("{FIXTURES}/adapterhub_double_seq_bn/adapter");
    place.merge("hub", &["--weight", "0.25,0.75", &hub, &hub]);
    succeed(&["inspect", &place.arg("hub")]);
    let file =
        |folder: &str| Checkpoint::open(Path::new(folder).join("adapter.safetensors")).unwrap();
    let (ours, theirs) = (file(&place.arg("hub")), file(&hub));
    assert_eq!(ours.names(), theirs.names());
    for name in ours.names() {
        let of = |f: &Checkpoint| f.tensor(&name, Device::Cpu).unwrap();
        assert!(of(&ours).all_close(&of(&theirs), 1e-7, 1e-6).unwrap(), "{name}");
    }
    let lora = format!("{FIXTURES}/adapterhub_lora/adapter");
    refuse(&["merge", "--out", &place.arg("x"), &lora, &lora], "convert");
}

#[test]
fn what_cannot_be_merged_is_refused_before_anything_is_written() {
    let place = Place::new();
    let (a, b) = (adapter("lora"), adapter("rslora"));
    let out = place.arg("out");
    let with = |args: &[&'static str]| -> Vec<String> {
        let all = ["merge", "--out", &out, &a, &b].into_iter().chain(args.iter().copied());
        all.map(str::to_owned).collect()
    };
    let no = |args: &[&'static str], part: &str| {
        let all = with(args);
        refuse(&all.iter().map(String::as_str).collect::<Vec<_>>(), part);
        assert!(!place.path("out").exists(), "{args:?}");
    };
    no(&["--weight", "1,2,3"], "3 values for 2 adapters");
    no(&["--weight", "0,0"], "all 0");
    no(&["--weight", "nan,1"], "no number");
    no(&["--method", "tise"], "did you mean `ties`");
    no(&["--method", "ties", "--convention", "pfet"], "peft");
    no(
        &["--method", "ties", "--density", "0.5", "--convention", "peft", "--rank", "2"],
        "ties_svd",
    );
    no(&["--method", "concat", "--density", "0.5"], "density");
    no(&["--rank", "0"], "at least 1");
    no(&["--allow-nan"], "--allow-nan");
    let model = ["merge", "--out", &out, LLAMA, &a];
    refuse(&model, "are adapters and the others are not");
    refuse(&["merge", "--out", &out, &adapter("ia3"), &a], "ia3");
    fs::create_dir(place.path("out")).unwrap();
    refuse(&["merge", "--out", &out, &a, &b], "is there already");

    // A factor is missing, and a target that is named stands nowhere.
    let broken = place.path("broken");
    fs::create_dir(&broken).unwrap();
    let config = fs::read_to_string(format!("{a}/adapter_config.json")).unwrap();
    fs::copy(format!("{a}/adapter_model.safetensors"), broken.join("adapter_model.safetensors"))
        .unwrap();
    let write = |text: String| fs::write(broken.join("adapter_config.json"), text).unwrap();
    let none = place.arg("none");
    let again = ["merge", "--out", &none, &place.arg("broken"), &a].map(str::to_owned);
    let again: Vec<&str> = again.iter().map(String::as_str).collect();
    write(config.replace("\"q_proj\"", "\"q_porj\""));
    refuse(&again, "q_porj");
    write(config.replace("\"r\": 4", "\"r\": 8"));
    refuse(&again, "rank 8");
    assert!(!place.path("none").exists());
}

/// A plan writes nothing; a report has the figures, and says what was left out; an evaluation is of each
/// adapter and of the result.
#[test]
fn adapters_have_plans_reports_and_evaluations() {
    let place = Place::new();
    let (lora, rslora) = (adapter("lora"), adapter("rslora"));
    let (out, pages) = (place.arg("m"), place.arg("pages"));
    let args = ["merge", &lora, &rslora, "--weight", "1,0", "--rank", "2", "--out", &out];
    let text = succeed(&[&args[..], &["--plan"]].concat());
    for part in ["model.layers.*.self_attn.q_proj", "`rslora` has the weight 0", "writes at most"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(fs::read_dir(place.path("")).unwrap().count(), 0);

    let command = "wc -c < $MODEL/adapter_config.json";
    let text = succeed(&[&args[..], &["--report", pages.as_str(), "--eval", command]].concat());
    assert!(text.contains("disagree on the sign of 0.0 %"), "{text}");
    let result = fs::metadata(place.path("m/adapter_config.json")).unwrap().len().to_string();
    assert!(text.lines().any(|l| l.contains("result") && l.contains(&result)), "{text}");
    let page = fs::read_to_string(place.path("pages/merge.html")).unwrap();
    for part in ["cosine of the differences", "layer 1", "energy kept", "has the weight 0"] {
        assert!(page.contains(part), "{part}");
    }
    let e = "compares changes of weights";
    refuse(&["merge", &lora, "--out", &place.arg("n"), "--report", pages.as_str()], e);
    assert!(!place.path("n").exists());
}

//! Methods made of methods on a BERT of three layers: MAM and UniPELT with a real prefix, and
//! AdapterDrop's files under another number of layers.
#![allow(clippy::unwrap_used)]

use modl_compute::function::{load_dropped, unified};
use modl_compute::{AdapterDrop, Bottleneck, Compacter, Nested, PrefixTuning, register};
use modl_core::testing::{Given, Sum, perturb};
use modl_core::{
    Context, Device, Kind, Modular, ModuleConfig, Registry, Seed, Select, Tensor, Tensors, no_grad,
};
use modl_models::Bert;
use serde_json::json;

fn bert() -> Modular {
    let config = json!({
        "model_type": "bert", "vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "intermediate_size": 32, "hidden_act": "gelu",
        "max_position_embeddings": 40, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0
    });
    let bert = Bert::untrained(config, Seed(3), Kind::Float, Device::Cpu).unwrap();
    Modular::new(bert, Seed(4)).unwrap()
}

fn attach(model: &mut Modular, name: &str, config: impl ModuleConfig + 'static) {
    let targets = config.usual_targets();
    model.attach(name, Box::new(config), &targets).unwrap();
}

fn all_active(model: &mut Modular) {
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
}

fn output(model: &Modular) -> Tensor {
    let tensor = |v: &[i64]| Tensor::from_slice(v, &[2, 4], Device::Cpu).unwrap();
    let inputs = Tensors::new()
        .with("input_ids", tensor(&[3, 7, 2, 9, 4, 4, 11, 0]))
        .with("attention_mask", tensor(&[1, 1, 1, 1, 1, 1, 1, 0]));
    let y = model.forward(&inputs, &Context::eval()).unwrap();
    y.need("last_hidden_state").unwrap().clone()
}

fn prefix() -> PrefixTuning {
    PrefixTuning::default()
}

/// Values for `to` of the parameters in `from` that are so called behind the module's name.
fn give(to: &Modular, from: &Modular, rename: impl Fn(&str) -> String) -> usize {
    let mut given = 0;
    for (name, p) in to.params().iter() {
        if let Ok(value) = from.params().get(&rename(name)) {
            no_grad(|| p.tensor().clone().copy_from(value)).unwrap();
            given += 1;
        }
    }
    given
}

#[test]
fn mam_is_a_prefix_of_thirty_and_parallel_adapters_of_width_512() {
    let mut mam = bert();
    attach(&mut mam, "mam", unified::mam(prefix(), 24));
    all_active(&mut mam);
    let p = mam.params();
    assert_eq!(p.get("modules.mam.part0.prompt_embeddings").unwrap().size(), [30, 3 * 2 * 24]);
    let down = "modules.mam.encoder.layer.2.output.part1.adapter_down.0.weight";
    assert_eq!(p.get(down).unwrap().size(), [512, 24]);
    let n: usize = p.iter().map(|(_, p)| p.tensor().numel()).sum();
    assert_eq!(n, 30 * 3 * 2 * 24 + 3 * (2 * 512 * 24 + 512 + 24));

    // Before training only the prefix counts.
    let mut alone = bert();
    attach(&mut alone, "p", prefix());
    all_active(&mut alone);
    assert_eq!(give(&alone, &mam, |n| n.replace("modules.p.", "modules.mam.part0.")), 1);
    assert!(output(&mam).bit_equal(&output(&alone)).unwrap());

    // Afterwards it is both methods side by side.
    perturb(&mam, &Select::new("modules.*"), 0.1, Seed(5)).unwrap();
    let adapter = Bottleneck { reduction_factor: 24.0 / 512.0, ..Bottleneck::parallel() };
    let mut both = bert();
    attach(&mut both, "a", adapter);
    attach(&mut both, "p", prefix());
    all_active(&mut both);
    let given = give(&both, &mam, |name| match name.strip_prefix("modules.a.") {
        Some(rest) => format!("modules.mam.{}", rest.replace("output.", "output.part1.")),
        None => name.replace("modules.p.", "modules.mam.part0."),
    });
    assert_eq!(given, 1 + 3 * 4);
    assert!(output(&mam).bit_equal(&output(&both)).unwrap());
    assert!(output(&mam).max_abs_diff(&output(&alone)).unwrap() > 1e-3);

    // Each part learns.
    mam.train_only(&Select::new("modules.*")).unwrap();
    let phi = mam.trainable();
    let leaves: Vec<&Tensor> = phi.iter().map(|(_, t)| t).collect();
    let loss = output(&mam).square().unwrap().mean_dims(&[0, 1, 2], false).unwrap();
    for ((name, _), g) in phi.iter().zip(loss.gradients(&leaves, false).unwrap()) {
        let size = g.unwrap().abs().unwrap().sum().unwrap().item().unwrap();
        assert!(size.is_finite(), "{name} {size}");
    }
}

#[test]
fn unipelt_gates_a_real_prefix_at_attention_and_nothing_at_the_tokens() {
    let mut model = bert();
    attach(&mut model, "u", unified::unipelt(prefix()));
    all_active(&mut model);
    let gates: Vec<String> = model
        .params()
        .iter()
        .map(|(n, _)| n.to_owned())
        .filter(|n| n.ends_with("gate.bias"))
        .collect();
    // In each layer: attention, query, value, the feed-forward layer.
    assert_eq!(gates.len(), 3 * 4, "{gates:?}");
    assert!(!gates.iter().any(|n| n.contains("embeddings")));
    // With its gates shut, all that is left of it are the positions.
    let mut shifted = bert();
    attach(&mut shifted, "p", prefix());
    all_active(&mut shifted);
    for name in &gates {
        let gate = model.params().get(name).unwrap().clone();
        let shut = Tensor::full(&gate.size(), -1e4, gate.kind(), Device::Cpu).unwrap();
        no_grad(|| gate.clone().copy_from(&shut)).unwrap();
    }
    let shut = output(&model);
    assert!(shut.max_abs_diff(&output(&shifted)).unwrap() > 1e-3);
    shifted.detach("p").unwrap();
    let targets = modl_core::Targets::pattern("all-tokens");
    shifted.attach("p", Box::new(prefix()), &targets).unwrap();
    all_active(&mut shifted);
    assert!(shut.all_close(&output(&shifted), 1e-6, 0.0).unwrap());
}

#[test]
fn a_file_is_taken_up_with_fewer_layers() {
    let registry = Registry::new().with(register).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    // Compacter's layers share a rule, which has to come along.
    let inner = || Compacter { phm_dim: 2, reduction_factor: 2.0, ..Compacter::default() };
    let dropped = |first| AdapterDrop { config: Nested::new(inner()), first, random: 2 };
    let trained = |config: Box<dyn ModuleConfig>| {
        let mut model = bert();
        let targets = config.usual_targets();
        model.attach("a", config, &targets).unwrap();
        perturb(&model, &Select::new("modules.*"), 0.3, Seed(5)).unwrap();
        all_active(&mut model);
        model.save_module("a", &path).unwrap();
        model
    };
    for saved in [Box::new(dropped(1)) as Box<dyn ModuleConfig>, Box::new(inner())] {
        let whole = trained(saved);
        let mut model = bert();
        assert_eq!(load_dropped(&mut model, &path, None, 2).unwrap(), "a");
        all_active(&mut model);
        let layers: Vec<&str> =
            model.params().iter().filter_map(|(n, _)| n.split("encoder.layer.").nth(1)).collect();
        assert!(!layers.is_empty() && layers.iter().all(|l| l.starts_with("2.")), "{layers:?}");
        // What is left is what was trained: the same as the whole with its lower modules at zero.
        for layer in [0, 1] {
            for (name, p) in whole.params().iter() {
                if name.contains(&format!("layer.{layer}.")) && name.contains("adapter_up") {
                    no_grad(|| p.tensor().clone().zero_in_place()).unwrap();
                }
            }
        }
        assert!(output(&model).all_close(&output(&whole), 1e-6, 0.0).unwrap());
        // And a file of its own.
        model.save_module("a", &path).unwrap();
        let mut again = bert();
        again.load_module(&path, None, &registry).unwrap();
        all_active(&mut again);
        assert!(output(&again).bit_equal(&output(&model)).unwrap());
        // Layers that were dropped do not come back.
        let mut fresh = bert();
        let e = load_dropped(&mut fresh, &path, None, 1).unwrap_err().to_string();
        assert!(e.contains("below layer 2") && fresh.modules().is_empty(), "{e}");
    }
}

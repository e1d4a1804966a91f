//! What cannot be is an error when the router is made, by the name of the setting.

use modl_core::{Kind, Site, SiteKind};
use serde_json::{Value, json};

use super::support::*;

fn refused(config: Value, modules: usize, words: &[&str]) {
    let e = Made::new(config.clone(), modules, 8).err().unwrap_or_else(|| panic!("{config}"));
    let e = e.to_string();
    assert!(words.iter().all(|w| e.contains(w)), "{config}: {e}");
}

#[test]
fn more_modules_than_there_are_cannot_be_chosen() {
    for kind in ["noisy_top_k", "deepseek", "product_key"] {
        refused(json!({"type": kind, "k": 4}), 3, &[&format!("{kind}.k"), "3 modules"]);
        refused(json!({"type": kind, "k": 0}), 3, &[&format!("{kind}.k")]);
    }
    refused(json!({"type": "gshard"}), 1, &["gshard", "two modules"]);
    refused(json!({"type": "st_moe"}), 1, &["st_moe", "two modules"]);
    refused(json!({"type": "hierarchical", "groups": 2, "k": 3}), 4, &["hierarchical.k"]);
    refused(json!({"type": "deepseek", "k": 3, "shared": ["m0"]}), 3, &["deepseek.k", "2 modules"]);
    refused(json!({"type": "expert_choice", "capacity_factor": 4.0}), 3, &["capacity_factor"]);
}

#[test]
fn settings_out_of_range_are_refused() {
    refused(json!({"type": "noisy_top_k", "noise_epsilon": -1.0}), 3, &["noise_epsilon"]);
    refused(json!({"type": "noisy_top_k", "noise": 0.0}), 3, &["noisy_top_k.noise"]);
    refused(json!({"type": "gshard", "threshold": -0.1}), 3, &["gshard.threshold"]);
    refused(json!({"type": "gshard", "capacity_factor": -1.0}), 3, &["gshard.capacity_factor"]);
    refused(json!({"type": "switch", "eval_capacity_factor": -1.0}), 3, &["eval_capacity_factor"]);
    refused(json!({"type": "switch", "jitter": -1.0}), 3, &["switch.jitter"]);
    refused(json!({"type": "switch", "init_scale": -1.0}), 3, &["switch.init_scale"]);
    refused(json!({"type": "deepseek", "bias_update": -1.0}), 3, &["deepseek.bias_update"]);
    refused(json!({"type": "deepseek", "n_group": 2}), 3, &["deepseek.n_group", "3 modules"]);
    refused(json!({"type": "deepseek", "topk_group": 2}), 4, &["deepseek.topk_group"]);
    let narrow = json!({"type": "deepseek", "n_group": 4, "topk_group": 1, "k": 2});
    refused(narrow, 4, &["deepseek.k", "hold 1"]);
    refused(json!({"type": "deepseek", "shared": ["m9"]}), 4, &["m9"]);
    refused(json!({"type": "deepseek", "shared": ["m0", "m0"]}), 4, &["twice"]);
    refused(json!({"type": "deepseek", "sequence_balance": true}), 4, &["tokens"]);
    refused(json!({"type": "product_key", "query": 3}), 4, &["product_key.query", "even"]);
    refused(json!({"type": "product_key", "heads": 0}), 4, &["product_key.heads"]);
    refused(json!({"type": "hierarchical", "groups": 3}), 4, &["hierarchical.groups"]);
    refused(json!({"type": "hierarchical", "groups": 2, "k_groups": 3}), 4, &["k_groups"]);
    refused(json!({"type": "soft_moe", "slots": 0}), 4, &["soft_moe.slots"]);
    let site = Site { kind: SiteKind::Attention, ..site(8) };
    let (config, bank) = (json!({"type": "soft_moe"}), bank(&numbered(4), 8));
    let at = Made::build(config, bank, &site, "router", Kind::Double);
    assert!(at.err().unwrap().to_string().contains("Attention"));
}

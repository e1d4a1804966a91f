//! Every method of `sparse` and (IA)³ against the contract of every module.
#![allow(clippy::unwrap_used)]

use modl_compute::sparse::Weights;
use modl_compute::{
    BitFit, DiffPruning, EdgePopup, FishMask, Form, Full, Ia3, LnTuning, LotteryTicket, LtSft,
    PackNet, Part, Piggyback, SupSup, TrainableTokens, Union, register,
};
use modl_core::testing::{Identity, ModuleClaims, TinyBackbone, check_module};
use modl_core::{Kind, Modular, ModuleConfig, Names, Registry, Seed, Targets};

/// Puts a method to the test at sites that exist in the tiny backbone (width 8).
fn check<C: ModuleConfig + Clone + 'static>(config: C, sites: &[&str], claims: ModuleClaims) {
    let registry = Registry::new().with(register).unwrap();
    let make = || Box::new(config.clone()) as Box<dyn ModuleConfig>;
    check_module(&make, &Targets::names(sites.iter().copied()), &claims, &registry);
}

fn smooth(parameters: usize) -> ModuleClaims {
    let identity = Identity::Exact;
    ModuleClaims { identity, parameters, merges: true, smooth: true, task_vector: 0 }
}

const WEIGHT: usize = 8 * 8;
const BIAS: usize = 8;

#[test]
fn ia3() {
    let feedforward = Names::List(vec!["output.dense".into()]);
    let ia3 = Ia3 { feedforward_modules: feedforward, ..Ia3::default() };
    check(ia3, &["key", "value", "output.dense"], smooth(3 * 8));
}

#[test]
fn full() {
    let sites = ["query", "output.norm", "conv", "embeddings.words"];
    let parameters = (WEIGHT + BIAS) + 2 * 8 + (8 * 8 * 3 + 8) + 16 * 8;
    for form in [Form::Delta, Form::Copy] {
        check(Full { form }, &sites, smooth(parameters));
    }
}

#[test]
fn trainable_tokens() {
    check(TrainableTokens::new([3, 15, 0, 8]), &["embeddings.words"], smooth(4 * 8));
}

#[test]
fn trainable_tokens_are_rows_of_a_table_each_once() {
    let mut model =
        Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(2)).unwrap();
    let mut refused = |ids: &[i64], site: &str| {
        let config = Box::new(TrainableTokens::new(ids.iter().copied()));
        model.attach("a", config, &Targets::names([site])).unwrap_err().to_string()
    };
    assert!(refused(&[], "words").contains("none"));
    assert!(refused(&[1, 16], "words").contains("16"));
    assert!(refused(&[-1], "words").contains("-1"));
    assert!(refused(&[2, 5, 2], "words").contains("2 twice"));
    assert!(refused(&[1], "query").contains("Linear"));
}

#[test]
fn bitfit() {
    check(BitFit {}, &["query", "output.norm", "head"], smooth(8 + 8 + 5));
    // Tables of words have no bias, and are left as they are.
    check(BitFit {}, &["words", "query"], smooth(8));
}

#[test]
fn ln_tuning() {
    check(LnTuning::default(), &["output.norm"], smooth(2 * 8));
}

#[test]
fn lottery_ticket() {
    check(LotteryTicket::default(), &["query", "conv"], smooth(WEIGHT + BIAS + 8 * 8 * 3 + 8));
}

#[test]
fn lt_sft_and_fish_mask() {
    let parameters = WEIGHT + BIAS + 2 * 8;
    let lt_sft = LtSft { l1: 0.1, ..LtSft::default() };
    check(lt_sft, &["query", "output.norm"], smooth(parameters));
    check(FishMask::default(), &["query", "output.norm"], smooth(parameters));
}

#[test]
fn diff_pruning() {
    // δ and α for each entry; structured, one more for each tensor. The start keeps gates open a
    // part of the way, where they have a gradient.
    let plain = DiffPruning { start: 0.4, structured: false, ..DiffPruning::default() };
    check(plain.clone(), &["query", "value"], smooth(2 * 2 * (WEIGHT + BIAS)));
    let structured = DiffPruning { structured: true, ..plain };
    check(structured, &["query", "value"], smooth(2 * 2 * (WEIGHT + BIAS) + 4));
}

fn straight_through(parameters: usize, identity: Identity) -> ModuleClaims {
    ModuleClaims { identity, smooth: false, ..smooth(parameters) }
}

#[test]
fn masks_with_straight_through_gradients() {
    let exact = straight_through(2 * WEIGHT, Identity::Exact);
    check(Piggyback::default(), &["query", "value"], exact);
    let changes = straight_through(2 * WEIGHT, Identity::No);
    check(EdgePopup::default(), &["query", "value"], changes.clone());
    let signs = EdgePopup { weights: Weights::SignedConstant, density: 0.25 };
    check(signs, &["query", "value"], changes.clone());
    check(SupSup::default(), &["query", "value"], changes);
}

#[test]
fn pack_net() {
    check(PackNet::default(), &["query", "conv"], smooth(WEIGHT + BIAS + 8 * 8 * 3 + 8));
    check(PackNet::default(), &["query", "output.norm"], smooth(WEIGHT + BIAS + 2 * 8));
}

#[test]
fn a_site_with_nothing_to_train_is_refused_and_nothing_is_attached() {
    let mut model =
        Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(2)).unwrap();
    for bitfit in [
        Box::new(BitFit {}) as Box<dyn ModuleConfig>,
        Box::new(Union::new([Part::new(Targets::names(["words"]), BitFit {})])),
    ] {
        let e = model.attach("a", bitfit, &Targets::names(["words"])).unwrap_err().to_string();
        assert!(e.contains("none of the sites has a bias"), "{e}");
    }
    let e = model.attach("a", Box::new(Full::default()), &Targets::names(["attention"]));
    assert!(e.unwrap_err().to_string().contains("layer.0.attention"));
    for wrong in [Box::new(LnTuning::default()) as Box<dyn ModuleConfig>, Box::new(Ia3::default())]
    {
        assert!(model.attach("a", wrong, &Targets::names(["words"])).is_err());
    }
    assert!(model.modules().is_empty() && model.params().iter().next().is_none());
}

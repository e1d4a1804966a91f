//! Stores, their search, and the two modules that look something up: the contract of every module,
//! and properties of the methods.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_compute::input::{Datastore, Search, neighbour_probabilities};
use modl_compute::{KnnLm, Retrieval, register};
use modl_core::testing::{Given, Identity, ModuleClaims, Sum, TinyBackbone, check_module};
use modl_core::{
    Context, Device, Init, Kind, Modular, ModuleConfig, Registry, Seed, Select, Targets, Tensor,
    Tensors,
};
use modl_models::{LoadOptions, open};

fn numbers(shape: &[i64], name: &str) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(5).child(name), Kind::Float, Device::Cpu).unwrap()
}

fn tokens(n: i64, vocabulary: i64) -> Tensor {
    let ids: Vec<i64> = (0..n).map(|i| (i * 7 + i * i) % vocabulary).collect();
    Tensor::from_slice(&ids, &[n], Device::Cpu).unwrap()
}

fn hnsw(seed: u64) -> Search {
    Search::Hnsw { seed, candidates: 100 }
}

fn stored(dir: &tempfile::TempDir, keys: &Tensor, values: &Tensor) -> PathBuf {
    let path = dir.path().join("store.safetensors");
    Datastore::new(keys, values, Search::Exact).unwrap().save(&path).unwrap();
    path
}

/// The k nearest in f64, by sorting all: distances and rows of each query.
fn brute_force(keys: &Tensor, queries: &Tensor, k: usize) -> Vec<Vec<(f64, i64)>> {
    let dim = keys.len_of(1) as usize;
    let (keys, queries) = (keys.to_vec::<f64>().unwrap(), queries.to_vec::<f64>().unwrap());
    let one = |query: &[f64]| {
        let mut all: Vec<(f64, i64)> = (0..)
            .zip(keys.chunks(dim))
            .map(|(row, key)| (key.iter().zip(query).map(|(a, b)| (a - b).powi(2)).sum(), row))
            .collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        all.truncate(k);
        all
    };
    queries.chunks(dim).map(one).collect()
}

#[test]
fn exact_search_finds_what_sorting_all_finds() {
    let (keys, queries) = (numbers(&[500, 12], "keys"), numbers(&[20, 12], "queries"));
    let store = Datastore::new(&keys, &tokens(500, 50), Search::Exact).unwrap();
    let found = store.nearest(&queries, 10).unwrap();
    let wanted = brute_force(&keys, &queries, 10).concat();
    let (rows, distances) = (found.rows.to_vec::<i64>(), found.distances.to_vec::<f64>());
    for ((row, distance), (d, r)) in rows.unwrap().iter().zip(distances.unwrap()).zip(wanted) {
        assert_eq!(*row, r);
        assert!((distance - d).abs() < 1e-5 * (1.0 + d), "{distance} {d}");
    }
    assert_eq!(store.nearest(&queries, 900).unwrap().rows.size(), [20, 500], "all that there are");
}

#[test]
fn a_graph_finds_nearly_all_of_them_and_is_the_same_for_a_seed() {
    let (keys, queries) = (numbers(&[2000, 16], "keys"), numbers(&[50, 16], "queries"));
    let rows = |search| {
        let store = Datastore::new(&keys, &tokens(2000, 50), search).unwrap();
        store.nearest(&queries, 10).unwrap().rows.to_vec::<i64>().unwrap()
    };
    let (exact, one) = (rows(Search::Exact), rows(hnsw(1)));
    let hits = exact.chunks(10).zip(one.chunks(10));
    let hits: usize = hits.map(|(e, o)| o.iter().filter(|r| e.contains(r)).count()).sum();
    let recall = hits as f64 / exact.len() as f64;
    assert!(recall >= 0.95, "{recall}");
    assert_eq!(rows(hnsw(1)), one);
    let narrow = |seed| rows(Search::Hnsw { seed, candidates: 10 });
    assert_eq!(narrow(1), narrow(1));
    assert_ne!(narrow(1), narrow(2), "another seed, another graph");
}

#[test]
fn a_store_comes_back_from_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let (keys, values) = (numbers(&[30, 4], "keys"), numbers(&[30, 2, 3], "values"));
    let path = stored(&dir, &keys, &values);
    let queries = numbers(&[5, 4], "queries");
    let held = Datastore::new(&keys, &values, hnsw(3)).unwrap();
    let mapped = Datastore::open(&path, hnsw(3)).unwrap();
    assert_eq!((mapped.len(), mapped.dim()), (30, 4));
    let (a, b) = (held.nearest(&queries, 3).unwrap(), mapped.nearest(&queries, 3).unwrap());
    assert!(a.rows.bit_equal(&b.rows).unwrap() && a.distances.bit_equal(&b.distances).unwrap());
    let found = mapped.values(&b.rows).unwrap();
    assert_eq!(found.size(), [5, 3, 2, 3]);
    assert!(found.bit_equal(&held.values(&a.rows).unwrap()).unwrap());
    let flat = a.rows.reshape(&[15]).unwrap();
    let wanted = values.index_select(0, &flat).unwrap().reshape(&[5, 3, 2, 3]).unwrap();
    assert!(found.bit_equal(&wanted).unwrap());
    let again = dir.path().join("again.safetensors");
    mapped.save(&again).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&again).unwrap());
}

#[test]
fn what_does_not_go_together_is_refused() {
    let keys = numbers(&[6, 4], "keys");
    let refused = |e: modl_core::Result<Datastore>, words: &str| {
        let e = e.unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    };
    refused(Datastore::new(&keys, &tokens(5, 9), Search::Exact), "do not go with values [5]");
    refused(Datastore::new(&keys.log().unwrap(), &tokens(6, 9), Search::Exact), "not all finite");
    let few = Search::Hnsw { seed: 1, candidates: 2 };
    let store = Datastore::new(&keys, &tokens(6, 9), few).unwrap();
    let e = store.nearest(&numbers(&[1, 4], "q"), 3).unwrap_err().to_string();
    assert!(e.contains("candidates") && e.contains("fewer than 3"), "{e}");
    assert!(store.nearest(&numbers(&[1, 5], "q"), 1).is_err());
    assert!(store.values(&tokens(2, 9).shift(6).unwrap()).is_err());
    let e = neighbour_probabilities(&store, &numbers(&[1, 4], "q"), 2, 1.0, 1).unwrap_err();
    assert!(e.to_string().contains("none of 1 tokens"), "{e}");
    for (config, words) in [
        (Box::new(KnnLm::default()) as Box<dyn ModuleConfig>, "knn_lm.store"),
        (Box::new(KnnLm { lambda: 1.0, ..KnnLm::default() }), "knn_lm.lambda"),
        (Box::new(KnnLm { temperature: 0.0, ..KnnLm::default() }), "knn_lm.temperature"),
        (Box::new(Retrieval::default()), "retrieval.store"),
    ] {
        let targets = match config.kind() {
            "knn_lm" => Targets::names(["head"]),
            _ => config.usual_targets(),
        };
        let tiny = TinyBackbone::new(Seed(1), Kind::Float).unwrap();
        let mut model = Modular::new(tiny, Seed(1)).unwrap();
        let e = model.attach("a", config, &targets).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
}

fn check(config: impl ModuleConfig + Clone + 'static, targets: &Targets, parameters: usize) {
    let registry = Registry::new().with(register).unwrap();
    let claims = ModuleClaims {
        identity: Identity::No,
        parameters,
        merges: false,
        smooth: true,
        task_vector: 4,
    };
    check_module(&|| Box::new(config.clone()), targets, &claims, &registry);
}

#[test]
fn retrieval_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let store = stored(&dir, &numbers(&[9, 4], "keys"), &numbers(&[9, 2, 3], "documents"));
    let query = "task_vector".to_owned();
    let config = Retrieval { store, query, neighbours: 2, ..Retrieval::default() };
    // The projection of documents 3 wide to embeddings 8 wide, whatever the size of the store.
    check(config.clone(), &config.usual_targets(), 8 * 3);
}

#[test]
fn knn_lm_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let store = stored(&dir, &numbers(&[40, 8], "keys"), &tokens(40, 5));
    let config = KnnLm { store, neighbours: 6, temperature: 5.0, ..KnnLm::default() };
    check(config, &Targets::names(["head"]), 1);
}

fn base(name: &str) -> Modular {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    Modular::from_box(open(dir, &LoadOptions::default()).unwrap(), Seed(1)).unwrap()
}

fn with_module(name: &str, config: Box<dyn ModuleConfig>) -> Modular {
    let mut model = base(name);
    let targets = config.usual_targets();
    model.attach("a", config, &targets).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model.train_only(&Select::none()).unwrap();
    model
}

fn text(ids: &[i64]) -> Tensors {
    let ids = Tensor::from_slice(ids, &[1, ids.len() as i64], Device::Cpu).unwrap();
    Tensors::new().with("input_ids", ids)
}

#[test]
fn documents_stand_before_the_text_as_their_words_would() {
    let dir = tempfile::tempdir().unwrap();
    let model = base("base_llama");
    let embedding = &model.backbone().sites()[0];
    let words = model.backbone().theta(embedding).unwrap().need("weight").unwrap().clone();
    // Three documents of two tokens; the keys are corners.
    let documents = Tensor::from_slice(&[3i64, 4, 5, 6, 7, 8], &[3, 2], Device::Cpu).unwrap();
    let store = stored(
        &dir,
        &Tensor::eye(3, Kind::Float, Device::Cpu).unwrap(),
        &words.embedding(&documents).unwrap(),
    );
    let config = Retrieval { store, neighbours: 2, ..Retrieval::default() };
    let model = with_module("base_llama", Box::new(config));
    let query = Tensor::from_slice(&[0.1f32, 0.7, 0.6], &[1, 3], Device::Cpu).unwrap();
    let cx = Context::eval().with_feature("query", query);
    let found = model.forward(&text(&[9, 10, 11]), &cx).unwrap();
    let wanted = model.forward_base(&text(&[5, 6, 7, 8, 9, 10, 11]), &Context::eval()).unwrap();
    let (found, wanted) = (found.need("logits").unwrap(), wanted.need("logits").unwrap());
    assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap());
    let e = model.forward(&text(&[9]), &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("query") && e.contains("with_feature"), "{e}");
}

/// Hidden states `[seq − 1, dim]` that go into the output layer, and the tokens that follow.
fn contexts(model: &Modular, ids: &[i64]) -> (Tensor, Tensor) {
    let out = model.forward_base(&text(ids), &Context::eval()).unwrap();
    let hidden = out.need("last_hidden_state").unwrap().select(0, 0).unwrap();
    let next = Tensor::from_slice(&ids[1..], &[ids.len() as i64 - 1], Device::Cpu).unwrap();
    (hidden.narrow(0, 0, ids.len() as i64 - 1).unwrap(), next)
}

/// A walk that comes back to its words.
fn walk(n: usize, start: i64) -> Vec<i64> {
    (0..n as i64).map(|i| 5 + (start + i * i % 7 + i % 3) % 20).collect()
}

/// The mean of −ln p of each token after the first.
fn loss(model: &Modular, ids: &[i64], modular: bool) -> f64 {
    let (inputs, cx) = (text(ids), Context::eval());
    let out = if modular { model.forward(&inputs, &cx) } else { model.forward_base(&inputs, &cx) };
    let logits = out.unwrap().need("logits").unwrap().select(0, 0).unwrap();
    let n = ids.len() as i64 - 1;
    let next = Tensor::from_slice(&ids[1..], &[n], Device::Cpu).unwrap();
    logits.narrow(0, 0, n).unwrap().cross_entropy(&next).unwrap().item().unwrap()
}

#[test]
fn without_weight_a_knn_lm_is_its_model_and_with_it_the_mixture() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["base_gpt2", "base_llama"] {
        let ids = walk(40, 0);
        let (keys, next) = contexts(&base(name), &ids);
        let store = stored(&dir, &keys, &next);
        let lambda =
            |lambda| KnnLm { store: store.clone(), lambda, neighbours: 5, ..KnnLm::default() };
        let none = with_module(name, Box::new(lambda(0.0)));
        let probe = walk(12, 3);
        let logits = |out: Tensors| out.need("logits").unwrap().clone();
        let cx = Context::eval();
        let own = logits(none.forward_base(&text(&probe), &cx).unwrap());
        assert!(logits(none.forward(&text(&probe), &cx).unwrap()).bit_equal(&own).unwrap());

        // λ p_kNN + (1 − λ) p_LM in f64 from the definition.
        let mixed = with_module(name, Box::new(lambda(0.3)));
        let found = logits(mixed.forward(&text(&probe), &cx).unwrap()).exp().unwrap();
        let hidden = none.forward_base(&text(&probe), &cx).unwrap();
        let queries = hidden.need("last_hidden_state").unwrap().select(0, 0).unwrap();
        let own = own.select(0, 0).unwrap().to_kind(Kind::Double).unwrap().softmax(-1).unwrap();
        let vocabulary = own.len_of(1) as usize;
        let (values, own) = (next.to_vec::<i64>().unwrap(), own.to_vec::<f64>().unwrap());
        let near = brute_force(&keys, &queries, 5);
        let found = found.to_vec::<f64>().unwrap();
        for ((near, own), found) in
            near.iter().zip(own.chunks(vocabulary)).zip(found.chunks(vocabulary))
        {
            let all: f64 = near.iter().map(|(d, _)| (near[0].0 - d).exp()).sum();
            let mut wanted: Vec<f64> = own.iter().map(|p| 0.7 * p).collect();
            for (d, row) in near {
                wanted[values[*row as usize] as usize] += 0.3 * (near[0].0 - d).exp() / all;
            }
            for (f, w) in found.iter().zip(&wanted) {
                assert!((f - w).abs() < 1e-5, "{name}: {f} {w}");
            }
            assert!((found.iter().sum::<f64>() - 1.0).abs() < 1e-5);
        }
    }
}

#[test]
fn a_store_with_the_point_itself_is_sure_as_it_gets_cold() {
    let (keys, values) = (numbers(&[60, 8], "keys"), tokens(60, 11));
    for search in [Search::Exact, hnsw(1)] {
        let store = Datastore::new(&keys, &values, search).unwrap();
        let right = |temperature: f64| -> Vec<f64> {
            let p = neighbour_probabilities(&store, &keys, 60, temperature, 11).unwrap();
            let sums = p.sum_dims(&[1], false).unwrap().to_vec::<f64>().unwrap();
            assert!(sums.iter().all(|s| (s - 1.0).abs() < 1e-5));
            let own = p.gather(1, &values.unsqueeze(1).unwrap()).unwrap();
            own.to_vec().unwrap()
        };
        let (warm, cold) = (right(10.0), right(0.01));
        assert!(warm.iter().all(|p| *p < 0.9));
        assert!(cold.iter().all(|p| *p > 1.0 - 1e-5), "{cold:?}");
    }
}

#[test]
fn text_like_the_store_is_less_surprising_with_it() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["base_gpt2", "base_llama"] {
        let (keys, next) = contexts(&base(name), &walk(40, 0));
        let store = stored(&dir, &keys, &next);
        let config = KnnLm { store, neighbours: 8, ..KnnLm::default() };
        let model = with_module(name, Box::new(config));
        // The same walk from another place on, so that contexts are near and not the same.
        let near = &walk(40, 0)[4..40];
        let (with, without) = (loss(&model, near, true), loss(&model, near, false));
        assert!(with < 0.9 * without, "{name}: {without} → {with}");
    }
}

/// Reviews of films as characters: a store of some lowers the perplexity of others.
#[test]
#[ignore = "needs: cargo xtask assets"]
fn real_text_is_less_surprising_with_a_store_of_other_text() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/sentiment/movies.tsv");
    let file = std::fs::read_to_string(path).unwrap();
    let reviews = file.lines().filter_map(|l| l.split('\t').nth(2)).filter(|r| r.len() >= 40);
    let reviews: Vec<Vec<i64>> = reviews
        .map(|r| r.bytes().filter(|b| (32..127).contains(b)).map(|b| i64::from(b) - 32))
        .map(|r| r.take(40).collect())
        .filter(|r: &Vec<i64>| r.len() == 40)
        .take(150)
        .collect();
    let (stored_reviews, others) = reviews.split_at(120);
    let dir = tempfile::tempdir().unwrap();
    for name in ["base_gpt2", "base_llama"] {
        let model = base(name);
        let (keys, next): (Vec<Tensor>, Vec<Tensor>) =
            stored_reviews.iter().map(|r| contexts(&model, r)).unzip();
        let (keys, next) = (Tensor::cat(&keys, 0).unwrap(), Tensor::cat(&next, 0).unwrap());
        let store = stored(&dir, &keys, &next);
        let mean = |config: KnnLm, modular| {
            let model = with_module(name, Box::new(config));
            others.iter().map(|r| loss(&model, r, modular)).sum::<f64>() / others.len() as f64
        };
        let knn =
            |search| KnnLm { store: store.clone(), neighbours: 64, search, ..KnnLm::default() };
        let without = mean(knn(Search::Exact), false).exp();
        for search in [Search::Exact, hnsw(1)] {
            let with = mean(knn(search), true).exp();
            eprintln!("{name}: perplexity {without:.1} → {with:.1} by {search:?}");
            assert!(with < 0.5 * without, "{name}: {without} → {with}");
        }
    }
}

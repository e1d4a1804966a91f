//! Files of routers that ask for more than they hold are refused by shape, before there is memory for
//! what they ask.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::{TinyBackbone, standins};
use modl_core::{Device, Error, Kind, Modular, Registry, Result, Seed, Targets};
use serde_json::{Value, json};

fn model() -> Result<Modular> {
    let mut model = Modular::new(TinyBackbone::new(Seed(1), Kind::Float)?, Seed(2))?;
    for name in ["a", "b", "c"] {
        model.attach(name, Box::new(standins::Thin), &Targets::names(["query"]))?;
    }
    Ok(model)
}

/// Writes other settings into the header of a routing file.
fn rewrite(path: &Path, settings: &Value) {
    let file = Checkpoint::open(path).unwrap();
    let tensors = file.tensors(Device::Cpu).unwrap();
    let mut metadata = file.metadata();
    let mut header: Value = serde_json::from_str(&metadata["modl"]).unwrap();
    for (key, value) in settings.as_object().unwrap() {
        header["router"][key] = value.clone();
    }
    metadata.insert("modl".to_owned(), header.to_string());
    checkpoint::save(path, tensors.iter().map(|(n, t)| (n.as_str(), t)), metadata).unwrap();
}

/// The most memory that this process has had, in bytes, where the system says it.
fn peak() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}

#[test]
fn settings_of_terabytes_are_refused_by_shape() -> Result<()> {
    modl_core::set_threads(1);
    let registry = Registry::new().with(modl_route::register)?;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("routing.safetensors");
    let huge = 1u64 << 38;
    for (config, settings) in [
        (json!({"type": "soft", "input": "feature:f", "width": 8}), json!({"width": huge})),
        (
            json!({"type": "top_k", "k": 2, "input": "feature:f", "width": 8}),
            json!({"width": huge}),
        ),
        (json!({"type": "base", "input": "feature:f", "width": 8}), json!({"width": huge})),
        (json!({"type": "sinkhorn", "input": "feature:f", "width": 8}), json!({"width": huge})),
        (
            json!({"type": "nearest_prototype", "input": "feature:f", "width": 8}),
            json!({"width": huge}),
        ),
        (json!({"type": "path_net"}), json!({"population": huge})),
        (json!({"type": "product_key", "k": 1}), json!({"query": huge})),
        (json!({"type": "soft_moe"}), json!({"slots": huge})),
        (json!({"type": "x_lora", "depth": 2, "size": 8}), json!({"size": huge})),
    ] {
        let mut model = model()?;
        model.route(registry.routers.parse(&config)?, false)?;
        model.save_routing(&path)?;
        model.load_routing(&path, &registry)?;
        rewrite(&path, &settings);
        let before = peak();
        match model.load_routing(&path, &registry) {
            Err(Error::Mismatch(m)) => assert!(!m.misshapen.is_empty(), "{config}: {m:?}"),
            other => panic!("{config}: {other:?}"),
        }
        if let Some((before, after)) = before.zip(peak()) {
            // Linux counts pages a few at a time, so that the later peak may be told as the lower one.
            let more = after.saturating_sub(before);
            assert!(more < 1 << 26, "{config}: {more} bytes more");
        }
    }
    Ok(())
}

#[test]
fn numbers_of_layers_and_products_that_no_memory_holds_are_refused() -> Result<()> {
    let registry = Registry::new().with(modl_route::register)?;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("routing.safetensors");
    for (config, settings) in [
        (json!({"type": "x_lora"}), json!({"depth": u64::MAX})),
        (json!({"type": "product_key", "k": 1}), json!({"query": 1u64 << 62, "heads": 1u64 << 40})),
        (json!({"type": "path_net"}), json!({"population": u64::MAX, "active": u64::MAX})),
    ] {
        let mut model = model()?;
        model.route(registry.routers.parse(&config)?, false)?;
        model.save_routing(&path)?;
        rewrite(&path, &settings);
        assert!(model.load_routing(&path, &registry).is_err(), "{config}");
    }
    Ok(())
}

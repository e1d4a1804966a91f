//! Adapters that PEFT made for convolutions: outputs, merged weights, and folders written again.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_compute::peft;
use modl_core::checkpoint::Checkpoint;
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Context, Device, Layers, Modular, ParamStore, Result, Seed, Signal, Site, SiteKind,
    Tensor, Tensors,
};
use serde_json::Value;

const ADAPTERS: [&str; 6] = [
    "convs_loha",
    "convs_loha_effective",
    "convs_lokr",
    "convs_lokr_both",
    "convs_lokr_effective",
    "convs_lokr_whole",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

/// 3 × 3 with a stride, 1 × 3, 1 × 1, and a linear layer on the mean: `Convs` of the script that
/// made the fixtures.
#[derive(Debug)]
struct Convs {
    sites: Vec<Site>,
    params: ParamStore,
}

impl Convs {
    fn new() -> Self {
        let mut params = ParamStore::new();
        for (name, t) in tensors(fixture("base_convs").join("model.safetensors")).iter() {
            params.insert(name, t.clone()).unwrap();
        }
        use SiteKind::{Conv, Linear};
        let table = [
            ("first", Conv, 4, 8),
            ("second", Conv, 8, 12),
            ("point", Conv, 12, 8),
            ("head", Linear, 8, 6),
        ];
        let site = |(index, (path, kind, input, output)): (usize, (&str, _, _, _))| Site {
            path: path.into(),
            kind,
            input,
            output,
            index,
        };
        Convs { sites: table.into_iter().enumerate().map(site).collect(), params }
    }
}

impl Backbone for Convs {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn theta(&self, site: &Site) -> Result<Tensors> {
        let own = self.params.below(&format!("{}.", site.path));
        Ok(own.iter().map(|(n, p)| (n.to_owned(), p.tensor().clone())).collect())
    }

    fn config(&self) -> &Value {
        &Value::Null
    }

    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let run = |i: usize, x: &Tensor| -> Result<Tensor> {
            let site = &self.sites[i];
            let (stride, padding) = ([[2, 2], [1, 1], [1, 1]], [[1, 1], [0, 1], [0, 0]]);
            let f = |theta: &Tensors, x: &Signal, _: &Context| {
                let (w, b) = (theta.need("weight")?, theta.get("bias"));
                Ok(x.replace(match site.kind {
                    SiteKind::Conv => x.x.conv2d(w, b, &stride[i], &padding[i], 1)?,
                    _ => x.x.linear(w, b)?,
                }))
            };
            Ok(layers.run(site, &self.theta(site)?, &x.clone().into(), cx, &f)?.x)
        };
        let mut x = inputs.need("x")?.clone();
        for i in 0..3 {
            x = run(i, &x)?.tanh()?;
        }
        Ok(Tensors::new().with("logits", run(3, &x.mean_dims(&[2, 3], false)?)?))
    }
}

fn with_adapter(name: &str) -> Modular {
    let mut model = Modular::new(Convs::new(), Seed(1)).unwrap();
    peft::load(&mut model, fixture(name).join("adapter"), Some("a")).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

#[test]
fn outputs_and_merged_weights_are_pefts() {
    let inputs = tensors(fixture("base_convs").join("inputs.safetensors"));
    for name in ADAPTERS {
        let golden = tensors(fixture(name).join("outputs.safetensors"));
        let same = |y: &Tensors, state: &str| {
            let wanted = golden.need(&format!("{state}.logits")).unwrap();
            let found = y.need("logits").unwrap();
            let apart = found.max_abs_diff(wanted).unwrap();
            assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{name}: {state}: {apart}");
        };
        let mut model = with_adapter(name);
        let cx = Context::eval();
        same(&model.forward(&inputs, &cx).unwrap(), "adapted");
        same(&model.forward_base(&inputs, &cx).unwrap(), "base");
        model.merge("a").unwrap();
        same(&model.forward_base(&inputs, &cx).unwrap(), "merged");
        let changed = tensors(fixture(name).join("merged_changed_weights.safetensors"));
        assert_eq!(changed.len(), 4, "{name}");
        for (weight, wanted) in changed.iter() {
            let now = model.backbone().params().get(weight).unwrap();
            assert!(now.all_close(wanted, 1e-6, 1e-6).unwrap(), "{name}: {weight}");
        }
        model.unmerge().unwrap();
        let before = tensors(fixture("base_convs").join("model.safetensors"));
        for (n, p) in model.backbone().params().iter() {
            assert!(p.tensor().bit_equal(before.need(n).unwrap()).unwrap(), "{name}: {n}");
        }
    }
}

#[test]
fn what_is_written_again_is_what_was_read() {
    let json = |dir: &Path| -> Value {
        let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    for name in ADAPTERS {
        let (dir, golden) = (tempfile::tempdir().unwrap(), fixture(name).join("adapter"));
        peft::save(&with_adapter(name), "a", dir.path()).unwrap();
        assert_eq!(json(dir.path()), json(&golden), "{name}");
        let ours = Checkpoint::open(dir.path().join("adapter_model.safetensors")).unwrap();
        let theirs = Checkpoint::open(golden.join("adapter_model.safetensors")).unwrap();
        assert_eq!(ours.names(), theirs.names(), "{name}");
        for key in theirs.names() {
            let (a, b) = (ours.tensor(&key, Device::Cpu), theirs.tensor(&key, Device::Cpu));
            assert!(a.unwrap().bit_equal(&b.unwrap()).unwrap(), "{name}: {key}");
        }
    }
}

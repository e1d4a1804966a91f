//! Hypernetworks against their formulas, number by number in f64, and the laws of what they make.
#![allow(clippy::unwrap_used)]

use modl_compute::{
    Bottleneck, BottleneckInit, Condition, Cpg, Form, Full, HyperFormer, HyperFormerPlusPlus,
    HyperLora, HyperNetwork, HyperX, Lora, LoraInit, MadG, Nested, Scaling,
};
use modl_core::{
    Attachment, Context, Device, Init, Kind, Module, ModuleConfig, ParamStore, Result, Scope, Seed,
    Site, SiteKind, Tensor, Tensors, no_grad,
};

fn numbers(shape: &[i64], name: &str) -> Tensor {
    Init::Normal(1.0).tensor(shape, Seed(5).child(name), Kind::Double, Device::Cpu).unwrap()
}

fn site(index: usize, path: &str, kind: SiteKind, input: i64, output: i64) -> Site {
    Site { path: path.to_owned(), kind, input, output, index }
}

fn theta(site: &Site) -> Tensors {
    let w = numbers(&[site.output, site.input], &site.path).mul_scalar(0.2).unwrap();
    Tensors::new().with("weight", w).with("bias", numbers(&[site.output], "b"))
}

/// Modules at some sites and the store that has their parameters.
struct Built {
    store: ParamStore,
    modules: Vec<Box<dyn Module>>,
}

impl Built {
    fn new(config: &dyn ModuleConfig, sites: &[Site], seed: u64) -> Result<Self> {
        let (mut store, mut modules) = (ParamStore::new(), Vec::new());
        for site in sites {
            let mut top = Scope::new(&mut store, Seed(seed)).on(Kind::Double, Device::Cpu);
            let theta = theta(site);
            let at = Attachment { site, theta: &theta, sites };
            modules.push(config.build(&at, &mut top.sub(&site.path))?);
        }
        Ok(Built { store, modules })
    }

    /// With every parameter away from its start.
    fn trained(config: &dyn ModuleConfig, sites: &[Site]) -> Self {
        let built = Self::new(config, sites, 3).unwrap();
        for (name, p) in built.store.iter() {
            let noise = numbers(&p.tensor().size(), name).mul_scalar(0.5).unwrap();
            no_grad(|| p.tensor().clone().add_in_place(&noise)).unwrap();
        }
        built
    }

    fn values(&self, name: &str) -> Vec<f64> {
        self.store.get(name).unwrap().to_vec().unwrap()
    }

    /// A row of a table.
    fn row(&self, name: &str, row: usize) -> Vec<f64> {
        let width = self.store.get(name).unwrap().len_of(1) as usize;
        self.values(name)[row * width..][..width].to_vec()
    }

    /// W x + b, or W x where there is no bias of that name.
    fn affine(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let w = self.values(&format!("{name}.weight"));
        let b = self.store.get(&format!("{name}.bias")).ok().map(|b| b.to_vec::<f64>().unwrap());
        let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        let y = w.chunks(x.len()).map(dot);
        match b {
            Some(b) => y.zip(b).map(|(y, b)| y + b).collect(),
            None => y.collect(),
        }
    }

    fn phi(&self, site: usize, cx: &Context) -> Tensors {
        self.modules[site].settled(cx).unwrap().unwrap().phi()
    }
}

fn relu(x: Vec<f64>) -> Vec<f64> {
    x.into_iter().map(|v| v.max(0.0)).collect()
}

#[track_caller]
fn same(found: &Tensor, expected: &[f64]) {
    let found = found.to_vec::<f64>().unwrap();
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= 1e-10 * (1.0 + e.abs()), "{f} where {e} is right");
    }
    assert!(expected.iter().any(|e| e.abs() > 1e-3), "the test can fail");
}

fn sublayers() -> Vec<Site> {
    let paths = ["layer.0.attention.output", "layer.0.output", "layer.1.output"];
    let site = |(i, p): (usize, &&str)| site(i, p, SiteKind::Sublayer, 6, 6);
    paths.iter().enumerate().map(site).collect()
}

fn linears() -> Vec<Site> {
    vec![
        site(0, "layer.0.query", SiteKind::Linear, 6, 6),
        site(1, "layer.0.value", SiteKind::Linear, 6, 4),
        site(2, "layer.1.query", SiteKind::Linear, 6, 6),
    ]
}

fn bottleneck() -> Bottleneck {
    let config = Bottleneck { init_weights: BottleneckInit::MamAdapter, ..Bottleneck::houlsby() };
    Bottleneck { reduction_factor: 2.0, scaling: Scaling::Learned, ..config }
}

fn tasks() -> Condition {
    Condition::names(["pos", "ner", "qa"])
}

fn hyperformer() -> HyperFormer {
    HyperFormer {
        config: Nested::new(bottleneck()),
        tasks: tasks(),
        task_dim: 5,
        hidden_dim: 7,
        projected_dim: 4,
    }
}

#[test]
fn hyperformer_is_its_formula() {
    let sites = sublayers();
    let built = Built::trained(&hyperformer(), &sites);
    for (row, task) in ["pos", "ner", "qa"].into_iter().enumerate() {
        let z = built.row("task_embedding", row);
        let i = built.affine("projector.2", &relu(built.affine("projector.0", &z)));
        for (s, site) in sites.iter().enumerate() {
            let phi = built.phi(s, &Context::eval().with_tasks([task]));
            assert_eq!(phi.need("adapter_down.0.weight").unwrap().size(), [3, 6]);
            for (name, found) in phi.iter() {
                let head = built.affine(&format!("{}.heads.{name}", site.path), &i);
                // The factor starts at 1, everything else that is constant at 0.
                let offset = if name == "scaling" { 1.0 } else { 0.0 };
                same(found, &head.iter().map(|v| v + offset).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn hyperformer_plus_plus_is_its_formula() {
    let config = HyperFormerPlusPlus {
        config: Nested::new(bottleneck()),
        tasks: tasks(),
        task_dim: 5,
        hidden_dim: 7,
        projected_dim: 4,
    };
    let built = Built::trained(&config, &sublayers());
    // Layer and position of each site.
    for (s, (layer, position)) in [(0, 0), (0, 1), (1, 1)].into_iter().enumerate() {
        let mut z = built.row("task_embedding", 1);
        z.extend(built.row("layer_embedding", layer));
        z.extend(built.row("position_embedding", position));
        let i = built.affine("projector.2", &relu(built.affine("projector.0", &z)));
        let mean = i.iter().sum::<f64>() / 4.0;
        let var = i.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 4.0;
        let (gain, shift) =
            (built.values("projector.norm.weight"), built.values("projector.norm.bias"));
        let normed = |k: usize| (i[k] - mean) / (var + 1e-6).sqrt() * gain[k] + shift[k];
        let i: Vec<f64> = (0..4).map(normed).collect();
        let phi = built.phi(s, &Context::eval().with_tasks(["ner"; 2]));
        let down = phi.need("adapter_down.0.weight").unwrap();
        same(down, &built.affine("heads.adapter_down.0.weight.3x6", &i));
        let up = phi.need("adapter_up.bias").unwrap();
        same(up, &built.affine("heads.adapter_up.bias.6", &i));
    }
}

fn hyper_x() -> HyperX {
    HyperX {
        config: Nested::new(bottleneck()),
        tasks: tasks(),
        languages: Condition::names(["en", "tr"]),
        source_dim: 5,
        hidden_dim: 7,
        projected_dim: 4,
    }
}

#[test]
fn hyper_x_is_its_formula_for_every_pair() {
    let built = Built::trained(&hyper_x(), &sublayers());
    let places = [(0, "attention.output"), (0, "output"), (1, "output")].into_iter().enumerate();
    for (s, (layer, position)) in places {
        for (t, task) in ["pos", "ner", "qa"].into_iter().enumerate() {
            for (l, language) in ["en", "tr"].into_iter().enumerate() {
                let mut z = built.row("task_embedding", t);
                z.extend(built.row("language_embedding", l));
                z.extend(built.row("layer_embedding", layer));
                let i = built.affine("projector.2", &relu(built.affine("projector.0", &z)));
                let cx = Context::eval().with_tasks([task]).with_labels("language", [language]);
                let phi = built.phi(s, &cx);
                let head = format!("{position}.heads.adapter_up.weight.6x3");
                same(phi.need("adapter_up.weight").unwrap(), &built.affine(&head, &i));
            }
        }
    }
}

#[test]
fn an_unseen_pair_has_a_module_of_its_own_after_training_on_others() {
    let sites = sublayers();
    let built = Built::new(&hyper_x(), &sites, 3).unwrap();
    let cx = |task: &str, language: &str| {
        Context::eval().with_tasks([task]).with_labels("language", [language])
    };
    let down =
        |t: &str, l: &str| built.phi(1, &cx(t, l)).need("adapter_down.0.weight").unwrap().clone();
    let target = numbers(&[3, 6], "target");
    let params: Vec<&Tensor> = built.store.iter().map(|(_, p)| p.tensor()).collect();
    let before = down("ner", "tr").detach().unwrap();
    // Trained are all of one task and all of one language, but not the pair.
    for (t, l) in [("ner", "en"), ("pos", "tr"), ("pos", "en")] {
        let loss = down(t, l).mse(&target).unwrap();
        for (p, g) in params.iter().zip(loss.gradients(&params, false).unwrap()) {
            let Some(g) = g else { continue };
            let step = g.mul_scalar(-0.1).unwrap();
            no_grad(|| (*p).clone().add_in_place(&step)).unwrap();
        }
    }
    let after = down("ner", "tr");
    let far = |t: &Tensor| t.mse(&target).unwrap().item().unwrap();
    assert!(far(&after) < far(&before), "{} {}", far(&after), far(&before));
    assert!(after.max_abs_diff(&down("ner", "en")).unwrap() > 1e-3);
    assert!(after.max_abs_diff(&down("pos", "tr")).unwrap() > 1e-3);
    let e = built.modules[1].settled(&cx("ner", "trr")).unwrap_err().to_string();
    assert!(e.contains("did you mean `tr`"), "{e}");
}

#[test]
fn mad_g_is_its_formula() {
    let config = MadG {
        config: Nested::new(bottleneck()),
        languages: Condition::feature("typology", 9),
        language_dim: 3,
        projected_dim: 4,
    };
    let sites = sublayers();
    let built = Built::trained(&config, &sites);
    let t = numbers(&[1, 9], "t");
    let lambda = built.affine("projector", &t.to_vec::<f64>().unwrap());
    let cx = Context::eval().with_feature("typology", t);
    for (s, site) in sites.iter().enumerate() {
        let phi = built.phi(s, &cx);
        for name in ["adapter_down.0.weight", "adapter_up.bias"] {
            let head = format!("{}.heads.{name}", site.path);
            same(phi.need(name).unwrap(), &built.affine(&head, &lambda));
        }
    }
    let wide = Context::eval().with_feature("typology", numbers(&[1, 8], "t"));
    let e = built.modules[0].settled(&wide).unwrap_err().to_string();
    assert!(e.contains("wants 9 numbers for each row"), "{e}");
}

#[test]
fn hyper_lora_is_its_formula() {
    let config = HyperLora { tasks: tasks(), skills: 5, ..HyperLora::default() };
    let sites = linears();
    let built = Built::trained(&config, &sites);
    let z = relu(built.affine("projector", &built.row("task_embedding", 2)));
    for (s, site) in sites.iter().enumerate() {
        let module =
            built.modules[s].settled(&Context::eval().with_tasks(["qa"])).unwrap().unwrap();
        let a = built.affine(&format!("{}.heads.lora_A.weight", site.path), &z);
        let b = built.affine(&format!("{}.heads.lora_B.weight", site.path), &z);
        let mut change = Vec::new();
        for o in 0..site.output as usize {
            for i in 0..6 {
                // s = 1/16
                change.push((0..16).map(|r| b[o * 16 + r] * a[r * 6 + i]).sum::<f64>() / 16.0);
            }
        }
        let low_rank = module.low_rank(&Context::eval()).unwrap();
        same(&low_rank.weight().unwrap(), &change);
    }
}

#[test]
fn the_contextual_parameter_generator_is_its_formula() {
    let sites = linears();
    let languages = Condition::names(["en", "de"]);
    let plain = Cpg { languages: languages.clone(), language_dim: 3, ..Cpg::default() };
    let cx = Context::eval().with_labels("language", ["de"]);
    let built = Built::trained(&plain, &sites);
    let l = built.row("language_embedding", 1);
    let made = built.modules[1].settled(&cx).unwrap().unwrap();
    let changed = made.compose(&theta(&sites[1])).unwrap().unwrap();
    for name in ["weight", "bias"] {
        same(
            changed.need(name).unwrap(),
            &built.affine(&format!("layer.0.value.heads.{name}"), &l),
        );
    }
    let config = Nested::new(Full { form: Form::Delta });
    let grouped = Cpg { config, languages, language_dim: 3, group_dim: Some(2) };
    let built = Built::trained(&grouped, &sites);
    let l = built.row("language_embedding", 1);
    let phi = built.phi(1, &cx);
    for name in ["weight", "bias"] {
        let head = format!("layer.0.value.heads.{name}");
        let told = built.affine(&format!("{head}.P"), &l);
        assert_eq!(told.len(), 2);
        same(phi.need(name).unwrap(), &built.affine(&format!("{head}.W"), &told));
    }
}

#[test]
fn the_static_hypernetwork_is_its_formula_tile_by_tile() {
    let (t, d) = (4usize, 3usize);
    let config =
        HyperNetwork { tile: t as i64, embedding_dim: d as i64, ..HyperNetwork::default() };
    // 6 × 6 and 4 × 6, both cut at the end of the second tile.
    let sites = linears();
    let built = Built::trained(&config, &sites);
    for (s, site) in sites.iter().enumerate() {
        let (out, inputs) = (site.output as usize, site.input as usize);
        let columns = inputs.div_ceil(t);
        let mut expected = vec![0.0; out * inputs];
        for o in 0..out {
            for i in 0..inputs {
                let tile = (o / t) * columns + i / t;
                let z = built.row(&format!("{}.z.weight", site.path), tile);
                let a = built.affine("weight.1.first", &z);
                let k = built.affine("weight.1.out", &a[(i % t) * d..][..d]);
                expected[o * inputs + i] = k[o % t];
            }
        }
        let phi = built.phi(s, &Context::eval());
        same(phi.need("weight").unwrap(), &expected);
        same(phi.need("bias").unwrap(), &built.values(&format!("{}.own.bias", site.path)));
    }
    // At first the bias is the site's own.
    let fresh = Built::new(&config, &sites, 3).unwrap();
    let bias = fresh.phi(0, &Context::eval()).need("bias").unwrap().clone();
    assert!(bias.bit_equal(theta(&sites[0]).need("bias").unwrap()).unwrap());
}

/// The mean square of `name` over tasks and draws, against that of the module's own start.
fn variance(make: &dyn Fn() -> Box<dyn ModuleConfig>, own: f64, name: &str, cx: &[Context]) {
    let site = [site(0, "layer.0.query", SiteKind::Linear, 48, 48)];
    let (mut sum, mut n) = (0.0, 0usize);
    for seed in 0..24 {
        let built = Built::new(make().as_ref(), &site, seed).unwrap();
        for cx in cx {
            let values = built.phi(0, cx).need(name).unwrap().to_vec::<f64>().unwrap();
            sum += values.iter().map(|v| v * v).sum::<f64>();
            n += values.len();
        }
    }
    let ratio = sum / n as f64 / own;
    assert!((ratio - 1.0).abs() < 0.1, "{}: {ratio}", make().kind());
}

#[test]
fn what_is_generated_starts_with_the_variance_of_what_it_stands_for() {
    let names: Vec<String> = (0..12).map(|i| format!("t{i}")).collect();
    let all = || Condition::names(names.clone());
    let by_task: Vec<Context> = names
        .iter()
        .map(|n| Context::eval().with_tasks([n]).with_labels("language", [n]))
        .collect();
    // LoRA's A is uniform in ±1/√48.
    let a = 1.0 / (3.0 * 48.0);
    let lora = || Nested::new(Lora { r: 4, ..Lora::default() });
    let check = |make: &dyn Fn() -> Box<dyn ModuleConfig>| {
        variance(make, a, "lora_A.weight", &by_task);
    };
    check(&|| Box::new(HyperFormer { config: lora(), tasks: all(), ..HyperFormer::default() }));
    check(&|| {
        let standard = HyperFormerPlusPlus::default();
        Box::new(HyperFormerPlusPlus { config: lora(), tasks: all(), ..standard })
    });
    check(&|| {
        let standard = HyperX::default();
        Box::new(HyperX { config: lora(), tasks: all(), languages: all(), ..standard })
    });
    check(&|| Box::new(MadG { config: lora(), languages: all(), ..MadG::default() }));
    check(&|| Box::new(HyperLora { config: lora(), tasks: all(), skills: 32 }));
    // The weight itself, whose standard deviation is 0.2.
    let w = theta(&site(0, "layer.0.query", SiteKind::Linear, 48, 48));
    let w = w.need("weight").unwrap().square().unwrap().mean().unwrap().item().unwrap();
    let cpg = |group_dim| Cpg { languages: all(), language_dim: 32, group_dim, ..Cpg::default() };
    variance(&|| Box::new(cpg(None)), w, "weight", &by_task);
    variance(&|| Box::new(cpg(Some(16))), w, "weight", &by_task);
    variance(&|| Box::new(HyperNetwork::default()), w, "weight", &[Context::eval()]);
}

#[test]
fn the_same_z_makes_the_same_parameters_and_the_gradient_reaches_it() {
    let built = Built::trained(&hyperformer(), &sublayers());
    let cx = |task| Context::eval().with_tasks([task]);
    let (first, again) = (built.phi(2, &cx("ner")), built.phi(2, &cx("ner")));
    let other = built.phi(2, &cx("qa"));
    for (name, t) in first.iter() {
        assert!(t.bit_equal(again.need(name).unwrap()).unwrap());
        assert!(t.max_abs_diff(other.need(name).unwrap()).unwrap() > 1e-3, "{name}");
    }
    // Two names with one embedding.
    let table = built.store.get("task_embedding").unwrap();
    let row = table.detach().unwrap().narrow(0, 1, 1).unwrap().copy().unwrap();
    no_grad(|| table.narrow(0, 2, 1).unwrap().copy_from(&row)).unwrap();
    for (name, t) in built.phi(2, &cx("qa")).iter() {
        assert!(t.bit_equal(first.need(name).unwrap()).unwrap(), "{name}");
    }
    let loss = first.need("adapter_up.weight").unwrap().square().unwrap().sum().unwrap();
    let grad = loss.gradients(&[table], false).unwrap().remove(0).unwrap();
    let rows = grad.abs().unwrap().sum_dims(&[1], false).unwrap().to_vec::<f64>().unwrap();
    assert!(rows[1] > 1e-6 && rows[0] == 0.0 && rows[2] == 0.0, "{rows:?}");
}

#[test]
fn between_two_languages_lie_those_between_them() {
    let config = MadG {
        config: Nested::new(Lora { r: 2, init: LoraInit::Random, ..Lora::default() }),
        languages: Condition::feature("typology", 9),
        ..MadG::default()
    };
    let mad_g = Built::trained(&config, &linears());
    let (from, to) = (numbers(&[1, 9], "from"), numbers(&[1, 9], "to"));
    let at = |built: &Built, share: f64| {
        let (a, b) = (from.mul_scalar(1.0 - share).unwrap(), to.mul_scalar(share).unwrap());
        let cx = Context::eval().with_feature("typology", a.add(&b).unwrap()).with_tasks(["pos"]);
        built.phi(0, &cx).need("lora_B.weight").unwrap().clone()
    };
    // A linear generator gives the mean; a generator with a ReLU comes as near as one likes.
    let (first, last) = (at(&mad_g, 0.0), at(&mad_g, 1.0));
    let middle = first.add(&last).unwrap().mul_scalar(0.5).unwrap();
    assert!(at(&mad_g, 0.5).all_close(&middle, 1e-12, 1e-12).unwrap());
    let config = HyperX {
        config: Nested::new(Lora { r: 2, init: LoraInit::Random, ..Lora::default() }),
        tasks: tasks(),
        languages: Condition::feature("typology", 9),
        ..HyperX::default()
    };
    let hyper_x = Built::trained(&config, &linears());
    let far = |step: f64| at(&hyper_x, 0.3).max_abs_diff(&at(&hyper_x, 0.3 + step)).unwrap();
    let (large, small) = (far(1e-2), far(1e-6));
    assert!(small > 0.0 && small < large * 1e-3, "{small} {large}");
}

#[test]
fn what_cannot_be_generated_is_refused_in_words() {
    let refused =
        |config: &dyn ModuleConfig| Built::new(config, &linears(), 1).err().unwrap().to_string();
    let nobody = HyperLora::default();
    assert!(refused(&nobody).contains("hyper_lora.tasks: there is none"));
    let twice = HyperLora { tasks: Condition::names(["a", "b", "a"]), ..HyperLora::default() };
    assert!(refused(&twice).contains("has `a` twice"));
    let of = |config: Nested| HyperLora { config, tasks: tasks(), skills: 3 };
    let pissa = Lora { r: 2, init: LoraInit::Pissa, ..Lora::default() };
    assert!(refused(&of(Nested::new(pissa))).contains("generating a module `lora`"));
    assert!(refused(&of(Nested::new(bottleneck()))).contains("site of kind Linear"));
    let narrow = HyperLora { tasks: tasks(), skills: 0, ..HyperLora::default() };
    assert!(refused(&narrow).contains("is 0, wants 1 or more"));
    let built = Built::new(&HyperLora { tasks: tasks(), ..HyperLora::default() }, &linears(), 1);
    let module = &built.unwrap().modules[0];
    let e = module.settled(&Context::eval()).unwrap_err().to_string();
    assert!(e.contains("Context::with_tasks"), "{e}");
    let e = module.settled(&Context::eval().with_tasks(["pos", "qa"])).unwrap_err().to_string();
    assert!(e.contains("the rows have different modules"), "{e}");
}

//! Fisher merging and RegMean against what they promise: the optimum of their own objectives, worked
//! out in f64 by other means; and the files that they read.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;

use modl_aggregate::merge::{
    Elements, Group, Input, MergeMethods, Settings, Source, Statistics, merge_group, run,
};
use modl_aggregate::mergekit::{Options, plan, read_documents};
use modl_aggregate::statistics::{diagonal_fisher, gram, normalized, save};
use modl_core::testing::TinyBackbone;
use modl_core::{
    Backbone, Context, Device, Init, Kind, Layers, Modular, Result, Seed, Targets, Tensor, Tensors,
    checkpoint,
};
use proptest::prelude::*;

/// Merges tensors of one shape with their statistics.
fn merged(
    method: &str,
    shape: &[usize],
    models: &[(Vec<f32>, Option<Vec<f32>>)],
    settings: Settings,
) -> Result<Vec<f32>> {
    let of = |(x, s): &'_ (Vec<f32>, Option<Vec<f32>>)| -> (Vec<f32>, Option<Vec<f32>>) {
        (x.clone(), s.clone())
    };
    let owned: Vec<_> = models.iter().map(of).collect();
    let inputs = owned
        .iter()
        .map(|(x, s)| Input::new("m", x).with_statistics(s.as_ref().map(|s| s as &dyn Elements)))
        .collect();
    let methods = MergeMethods::default();
    merge_group(methods.find(method).unwrap(), Group::new("t", shape, inputs, Seed(0)), settings)
}

fn numbers(n: usize, seed: u64, std: f64) -> Vec<f32> {
    let t = Init::Normal(std).tensor(&[n as i64], Seed(seed), Kind::Float, Device::Cpu).unwrap();
    t.to_vec::<f32>().unwrap()
}

fn near(a: &[f32], b: impl IntoIterator<Item = f64>, tolerance: f64) {
    for (n, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((f64::from(*a) - b).abs() <= tolerance * b.abs().max(1.0), "{n}: {a} {b}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn fisher_is_the_optimum_of_quadratic_losses_and_lies_between_the_models(
        (n, k) in (1usize..60, 2usize..5), seed in 0u64..1000,
    ) {
        let models: Vec<(Vec<f32>, Option<Vec<f32>>)> = (0..k as u64)
            .map(|i| {
                let f = numbers(n, seed * 31 + i, 1.0).iter().map(|x| x * x + 0.01).collect();
                (numbers(n, seed * 17 + i, 1.0), Some(f))
            })
            .collect();
        let weights: Vec<f64> = (0..k).map(|i| 0.5 + i as f64).collect();
        let settings = Settings::default().set_each("weight", weights.clone());
        let out = merged("fisher", &[n], &models, settings).unwrap();
        for (j, o) in out.iter().enumerate() {
            let o = f64::from(*o);
            let each = models.iter().zip(&weights).map(|((x, f), w)| {
                (f64::from(x[j]), w * f64::from(f.as_ref().unwrap()[j]))
            });
            // The derivative of Σ wF(θ − θᵢ)² ⁄ 2, by the curvature: how far the optimum is.
            let slope: f64 = each.clone().map(|(x, f)| f * (o - x)).sum();
            let curvature: f64 = each.clone().map(|(_, f)| f).sum();
            prop_assert!((slope / curvature).abs() < 1e-6);
            let lo = each.clone().map(|(x, _)| x).fold(f64::INFINITY, f64::min);
            let hi = each.map(|(x, _)| x).fold(f64::NEG_INFINITY, f64::max);
            prop_assert!(lo - 1e-6 <= o && o <= hi + 1e-6);
        }
    }

    /// (Σ G̃ᵢ) W = Σ G̃ᵢWᵢ is what the gradient of Σ ‖XᵢW − XᵢWᵢ‖² is 0 for.
    #[test]
    fn reg_mean_leaves_no_gradient(
        (rows, columns) in (1usize..6, 1usize..6), seed in 0u64..1000, share in 0.0f64..1.0,
    ) {
        let samples = 40;
        let mut models = Vec::new();
        for i in 0..3u64 {
            let x = numbers(samples * columns, seed * 13 + i, 1.0 + i as f64);
            models.push((numbers(rows * columns, seed * 7 + i, 1.0), Some(products(&x, columns))));
        }
        let settings = Settings::default().set("nondiagonal", share).set("ridge", 0.0);
        let out = merged("reg_mean", &[rows, columns], &models, settings).unwrap();
        let (mut worst, mut size) = (0f64, 0f64);
        for r in 0..rows {
            for c in 0..columns {
                let (mut slope, mut each) = (0.0, 0.0);
                for (w, g) in &models {
                    let g = g.as_ref().unwrap();
                    for d in 0..columns {
                        let kept = if c == d { 1.0 } else { share };
                        let g = kept * f64::from(g[c * columns + d]);
                        let off = f64::from(out[r * columns + d]) - f64::from(w[r * columns + d]);
                        slope += g * off;
                        each += (g * f64::from(w[r * columns + d])).abs();
                    }
                }
                worst = worst.max(slope.abs());
                size = size.max(each);
            }
        }
        prop_assert!(worst <= 1e-4 * size, "{worst} of {size}");
    }
}

/// XᵀX in f64.
fn products(x: &[f32], columns: usize) -> Vec<f32> {
    let mut g = vec![0f64; columns * columns];
    for row in x.chunks(columns) {
        for (c, a) in row.iter().enumerate() {
            for (d, b) in row.iter().enumerate() {
                g[c * columns + d] += f64::from(*a) * f64::from(*b);
            }
        }
    }
    g.into_iter().map(|g| g as f32).collect()
}

#[test]
fn fisher_of_equal_and_of_no_information() -> Result<()> {
    let (a, b) = (numbers(50, 1, 1.0), numbers(50, 2, 1.0));
    let same: Vec<f32> = numbers(50, 3, 1.0).iter().map(|x| x.abs() + 0.1).collect();
    let pair = |f: Option<&Vec<f32>>, g: Option<&Vec<f32>>| {
        vec![(a.clone(), f.cloned()), (b.clone(), g.cloned())]
    };
    let thirds = || Settings::default().set_each("weight", [1.0, 2.0]);
    let mean = || a.iter().zip(&b).map(|(a, b)| f64::from(*a) / 3.0 + f64::from(*b) * 2.0 / 3.0);
    near(&merged("fisher", &[50], &pair(Some(&same), Some(&same)), thirds())?, mean(), 1e-6);
    // Of which nothing is known, and of which nobody knows anything.
    near(&merged("fisher", &[50], &pair(None, None), thirds())?, mean(), 1e-6);
    let zero = vec![0.0; 50];
    let exact = || thirds().set("floor", 0.0);
    near(&merged("fisher", &[50], &pair(Some(&zero), Some(&zero)), exact())?, mean(), 1e-6);
    assert_eq!(merged("fisher", &[50], &pair(Some(&same), Some(&zero)), exact())?, a);
    // Norms: one model's information a thousand times the other's is the same.
    let large: Vec<f32> = same.iter().map(|f| f * 1000.0).collect();
    let normed = thirds().set("normalize", true).set("floor", 0.0);
    near(&merged("fisher", &[50], &pair(Some(&large), Some(&same)), normed)?, mean(), 1e-5);

    let e = merged("fisher", &[50], &pair(Some(&same), None), thirds()).unwrap_err();
    assert!(e.to_string().contains("1 of 2"), "{e}");
    let broken: Vec<f32> = same.iter().map(|f| -f).collect();
    let e = merged("fisher", &[50], &pair(Some(&same), Some(&broken)), thirds()).unwrap_err();
    assert!(e.to_string().contains("below 0"), "{e}");
    let e = merged(
        "fisher",
        &[50],
        &pair(None, None),
        Settings::default().set_each("weight", [0.0, 0.0]),
    );
    assert!(e.unwrap_err().to_string().contains("weight"));
    Ok(())
}

#[test]
fn reg_mean_of_the_same_data_is_the_mean_and_without_products_it_goes_by_the_diagonal() -> Result<()>
{
    let (rows, columns) = (4, 7);
    let x = numbers(90 * columns, 5, 1.0);
    let (a, b) = (numbers(rows * columns, 6, 1.0), numbers(rows * columns, 7, 1.0));
    let (g, h) = (products(&x, columns), products(&numbers(60 * columns, 8, 2.0), columns));
    let both = |g: &Vec<f32>, h: &Vec<f32>| {
        vec![(a.clone(), Some(g.clone())), (b.clone(), Some(h.clone()))]
    };
    let shape = [rows, columns];
    let same = merged("reg_mean", &shape, &both(&g, &g), Settings::default())?;
    near(&same, a.iter().zip(&b).map(|(a, b)| (f64::from(*a) + f64::from(*b)) / 2.0), 1e-6);
    let settings = Settings::default().set("nondiagonal", 0.0).set("ridge", 0.0);
    let diagonal = merged("reg_mean", &shape, &both(&g, &h), settings)?;
    let expected = (0..rows * columns).map(|n| {
        let at = n % columns * (columns + 1);
        let (g, h) = (f64::from(g[at]), f64::from(h[at]));
        (g * f64::from(a[n]) + h * f64::from(b[n])) / (g + h)
    });
    near(&diagonal, expected, 1e-6);
    // Inputs that were never seen: the average, by the ridge; without it that is refused.
    let none = vec![0.0; columns * columns];
    let unseen = merged("reg_mean", &shape, &both(&none, &none), Settings::default())?;
    near(&unseen, a.iter().zip(&b).map(|(a, b)| (f64::from(*a) + f64::from(*b)) / 2.0), 1e-6);
    // Vectors are averaged.
    let plain = vec![(a.clone(), None), (b.clone(), None)];
    let mean = merged("reg_mean", &[rows * columns], &plain, Settings::default())?;
    near(&mean, a.iter().zip(&b).map(|(a, b)| (f64::from(*a) + f64::from(*b)) / 2.0), 1e-6);
    let e = merged("reg_mean", &shape, &both(&g, &h), Settings::default().set("nondiagonal", 2.0));
    assert!(e.unwrap_err().to_string().contains("0 to 1"));
    Ok(())
}

/// Logistic regression: F = E x xᵀ-diagonal p (1 − p) for each class against the others, by hand.
#[test]
fn the_diagonal_fisher_of_a_softmax_regression_is_the_closed_form() -> Result<()> {
    let (classes, width, examples) = (3, 4, 6);
    let draw = |shape: &[i64], seed| {
        Init::Normal(0.7).tensor(shape, Seed(seed), Kind::Double, Device::Cpu)
    };
    let (w, x) = (draw(&[classes, width], 1)?, draw(&[examples, width], 2)?);
    let unused = draw(&[2], 3)?;
    let theta = Tensors::new().with("w", w.clone()).with("unused", unused);
    let fisher = diagonal_fisher(&theta, examples as usize, |i| {
        w.matmul(&x.select(0, i as i64)?.unsqueeze(1)?)?.squeeze(1)?.log_softmax(0)
    })?;
    assert!(!w.requires_grad(), "the parameters are left as they were");
    let (ws, xs) = (w.to_vec::<f64>()?, x.to_vec::<f64>()?);
    let (c, d) = (classes as usize, width as usize);
    let mut expected = vec![0.0; c * d];
    for x in xs.chunks(d) {
        let logits: Vec<f64> =
            ws.chunks(d).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect();
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        for (k, l) in logits.iter().enumerate() {
            let p = l.exp() / total;
            for (j, x) in x.iter().enumerate() {
                // E over labels of ((y = k) − p)² is the variance p (1 − p).
                expected[k * d + j] += p * (1.0 - p) * x * x / examples as f64;
            }
        }
    }
    for (f, e) in fisher.need("w")?.to_vec::<f64>()?.iter().zip(&expected) {
        assert!((f - e).abs() < 1e-12, "{f} {e}");
    }
    assert_eq!(fisher.need("unused")?.to_vec::<f64>()?, [0.0, 0.0]);
    let normed = normalized(&fisher)?;
    assert!((normed.need("w")?.square()?.sum()?.item()? - 1.0).abs() < 1e-12);
    Ok(())
}

#[test]
fn products_of_inputs_are_those_of_real_tokens_at_each_linear_layer() -> Result<()> {
    let mut model = Modular::new(TinyBackbone::new(Seed(1), Kind::Double)?, Seed(2))?;
    let batches: Vec<Tensors> =
        (0..2).map(|n| TinyBackbone::inputs(3, 6, Seed(10 + n))).collect::<Result<_>>()?;
    let targets = Targets::names(["query", "head"]);
    let found = gram(&mut model, &targets, batches.clone())?;
    assert!(model.modules().is_empty());
    let mut names: Vec<&str> = found.names().collect();
    names.sort_unstable();
    assert_eq!(names, ["head.weight", "layer.0.query.weight"]);
    // Of the head's inputs, which the backbone gives out as its last hidden states.
    let backbone = TinyBackbone::new(Seed(1), Kind::Double)?;
    let mut expected = Tensor::zeros(&[8, 8], Kind::Double, Device::Cpu)?;
    for batch in &batches {
        let none = Layers::none(backbone.sites().len());
        let hidden = backbone.forward(batch, &none, &Context::eval())?;
        let real = batch.need("attention_mask")?.to_kind(Kind::Double)?.unsqueeze(-1)?;
        let x = hidden.need("last_hidden_state")?.mul(&real)?.reshape(&[-1, 8])?;
        expected = expected.add(&x.t()?.matmul(&x)?)?;
    }
    let head = found.need("head.weight")?.to_kind(Kind::Double)?;
    assert!(head.all_close(&expected, 1e-5, 1e-5)?);
    let e = gram(&mut model, &Targets::names(["layer.0"]), batches).unwrap_err();
    assert!(e.to_string().contains("no linear layer"), "{e}");
    Ok(())
}

fn write(folder: &Path, tensors: &Tensors) {
    checkpoint::save(folder.join("model.safetensors"), tensors.iter(), Default::default()).unwrap();
}

#[test]
fn a_configuration_finds_the_files_and_says_what_is_missing() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let weight = |v: &[f32]| Tensor::from_slice(v, &[1, 2], Device::Cpu);
    let bias = |v: f32| Tensor::from_slice(&[v], &[1], Device::Cpu);
    for (name, w, b, f) in [("a", [1.0, 2.0], 1.0, [1.0, 3.0]), ("b", [5.0, 6.0], 3.0, [3.0, 1.0])]
    {
        let folder = dir.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        write(&folder, &Tensors::new().with("l.weight", weight(&w)?).with("l.bias", bias(b)?));
        save(Statistics::Fisher, &folder, &Tensors::new().with("l.weight", weight(&f)?))?;
    }
    let yaml = "merge_method: fisher\nmodels:\n  - model: a\n  - model: b\n";
    let options = Options { folder: dir.path().to_owned(), ..Options::default() };
    let methods = MergeMethods::default();
    let merge = |yaml: &str, out: &str| -> Result<Source> {
        let plan = plan(&read_documents(yaml)?[0], &methods, &options)?;
        assert!(plan.cost(&methods, 1)?.read > 0);
        run(&plan, &methods, &dir.path().join(out), |_| {})?;
        Source::open(out, &dir.path().join(out))
    };
    let read = |source: &Source, name: &str, n: usize| {
        let mut values = vec![0.0; n];
        source.elements(name, None).unwrap().read(0, &mut values).unwrap();
        values
    };
    let out = merge(yaml, "out")?;
    near(&read(&out, "l.weight", 2), [4.0, 3.0], 1e-6);
    assert_eq!(read(&out, "l.bias", 1), [2.0]);

    // A file of another name, whose information is all of b's.
    let other = Tensors::new().with("l.weight", weight(&[0.0, 0.0])?);
    checkpoint::save(dir.path().join("other.safetensors"), other.iter(), Default::default())?;
    let named = yaml.replace("model: a\n", "model: a\n    statistics: other.safetensors\n");
    let out = merge(&(named + "parameters: {floor: 0}\n"), "named")?;
    assert_eq!(read(&out, "l.weight", 2), [5.0, 6.0]);

    let refused = |yaml: &str| merge(yaml, "never").unwrap_err().to_string();
    let e = refused(&yaml.replace("fisher", "reg_mean"));
    assert!(e.contains("gram.safetensors") && e.contains("reg_mean"), "{e}");
    let wrong = Tensors::new().with("l.weight", bias(1.0)?);
    save(Statistics::Fisher, dir.path().join("b"), &wrong)?;
    let e = refused(yaml);
    assert!(e.contains("l.weight") && e.contains("[1, 2]"), "{e}");
    let more = Tensors::new().with("l.weight", weight(&[1.0, 1.0])?).with("l.bias", bias(1.0)?);
    save(Statistics::Fisher, dir.path().join("b"), &more)?;
    let e = refused(yaml);
    assert!(e.contains("l.bias") && e.contains("not in the files of a"), "{e}");
    Ok(())
}

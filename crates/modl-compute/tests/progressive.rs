//! Progressive networks against their formula in f64, and what a task can and cannot change.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use modl_compute::Progressive;
use modl_core::testing::{Given, Sum, perturb};
use modl_core::{Context, Device, Kind, Modular, Seed, Select, Targets, Tensor, Tensors, no_grad};
use modl_models::{LoadOptions, Mlp, MlpConfig};

const TASKS: [&str; 3] = ["a", "b", "c"];
const INPUTS: i64 = 4;
const WIDTHS: [i64; 3] = [5, 6, 2];
const LATERAL: i64 = 3;

fn config() -> Progressive {
    let tasks = TASKS.map(str::to_owned).to_vec();
    Progressive { tasks, width: LATERAL, ..Progressive::default() }
}

fn bare(bias: bool) -> Modular {
    let settings =
        MlpConfig { inputs: INPUTS, hidden: WIDTHS.to_vec(), bias, ..MlpConfig::default() };
    let options = LoadOptions { kind: Some(Kind::Double), ..LoadOptions::default() };
    Modular::new(Mlp::new(settings, Seed(1), &options).unwrap(), Seed(2)).unwrap()
}

fn model(bias: bool) -> Modular {
    let mut model = bare(bias);
    model.attach("net", Box::new(config()), &Targets::names(["linear"])).unwrap();
    model.route(Given::only(0), false).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    perturb(&model, &Select::new("modules.*"), 0.5, Seed(3)).unwrap();
    model
}

fn rows(n: i64) -> Vec<f64> {
    (0..n * INPUTS).map(|i| (i as f64 * 0.7).sin()).collect()
}

fn inputs(n: i64) -> Tensors {
    let x = Tensor::from_slice(&rows(n), &[n, INPUTS], Device::Cpu).unwrap();
    Tensors::new().with("input_values", x)
}

fn hidden(model: &Modular, tasks: &[&str]) -> Tensor {
    let cx = Context::eval().with_tasks(tasks);
    let outputs = model.forward(&inputs(tasks.len() as i64), &cx).unwrap();
    let y = outputs.need("last_hidden_state").unwrap().clone();
    assert_eq!(y.size(), [tasks.len() as i64, 1, WIDTHS[2]]);
    y
}

fn numbers(model: &Modular, layer: usize, task: &str, part: &str) -> Option<Vec<f64>> {
    let name = format!("modules.net.layers.{layer}.linear.{task}.{part}");
    model.params().find(&name).map(|t| t.to_vec().unwrap())
}

/// Row `o` of a matrix times h.
fn dot(matrix: &[f64], o: usize, h: &[f64]) -> f64 {
    h.iter().enumerate().map(|(i, x)| matrix[o * h.len() + i] * x).sum()
}

/// The formula, one number at a time: what column `of` says of a row.
fn by_hand(model: &Modular, row: &[f64], of: usize) -> Vec<f64> {
    let mut h: Vec<Vec<f64>> = vec![row.to_vec(); of + 1];
    for (layer, width) in WIDTHS.iter().enumerate() {
        let get = |k: usize, part: &str| numbers(model, layer, TASKS[k], part);
        let column = |k: usize| -> Vec<f64> {
            let (w, b) = (get(k, "weight").unwrap(), get(k, "bias"));
            let mut y: Vec<f64> = (0..*width as usize)
                .map(|o| dot(&w, o, &h[k]) + b.as_ref().map_or(0.0, |b| b[o]))
                .collect();
            let earlier = if layer == 0 { 0 } else { k };
            for j in 0..earlier {
                let parts = ["alpha", "down", "up"].map(|part| get(k, part).unwrap());
                let [alpha, v, u] = &parts;
                let n = LATERAL as usize;
                let scaled: Vec<f64> = h[j].iter().map(|x| alpha[j] * x).collect();
                let v = &v[j * n * scaled.len()..];
                let inner: Vec<f64> = (0..n).map(|r| dot(v, r, &scaled).max(0.0)).collect();
                let u = &u[j * n * y.len()..];
                for (o, y) in y.iter_mut().enumerate() {
                    *y += dot(u, o, &inner);
                }
            }
            y.into_iter().map(|x| x.max(0.0)).collect()
        };
        h = (0..=of).map(column).collect();
    }
    h[of].clone()
}

#[test]
fn a_column_is_the_formula_and_each_row_has_its_own() {
    for bias in [true, false] {
        let model = model(bias);
        let of = ["c", "a", "b", "c", "a", "b", "c", "c"];
        let found: Vec<f64> = hidden(&model, &of).to_vec().unwrap();
        let mut above = 0;
        for (r, row) in rows(8).chunks(INPUTS as usize).enumerate() {
            let k = TASKS.iter().position(|t| *t == of[r]).unwrap();
            for (o, wanted) in by_hand(&model, row, k).into_iter().enumerate() {
                let found = found[r * WIDTHS[2] as usize + o];
                assert!((found - wanted).abs() < 1e-13, "row {r}: {found} {wanted}");
                above += usize::from(wanted > 0.0);
            }
        }
        assert!(above > 3, "not all is cut off");
    }
}

#[test]
fn a_column_moves_no_earlier_one_and_learns_from_all_of_them() {
    let model = model(true);
    let two = ["a", "a", "a", "b", "b", "b"];
    let before = no_grad(|| hidden(&model, &two));
    // The third task's loss.
    model.train_only(&Select::new("modules.net.*.c.*")).unwrap();
    let trained = model.trainable();
    let loss = hidden(&model, &["c"; 6]).square().unwrap().sum().unwrap();
    let tensors: Vec<&Tensor> = trained.iter().map(|(_, t)| t).collect();
    let gradients = loss.gradients(&tensors, true).unwrap();
    for ((name, _), gradient) in trained.iter().zip(&gradients) {
        let gradient = gradient.as_ref().unwrap_or_else(|| panic!("{name}"));
        let size = gradient.abs().unwrap().sum().unwrap().item().unwrap();
        assert!(size > 0.0, "{name} learns");
    }
    let lateral = trained.iter().filter(|(n, _)| n.ends_with("alpha") || n.ends_with("up"));
    assert_eq!(lateral.count(), 4, "at the second and the third layer");
    // Whatever becomes of it, the earlier two say what they said, alone and in any batch.
    perturb(&model, &Select::new("modules.net.*.c.*"), 5.0, Seed(9)).unwrap();
    assert!(hidden(&model, &two).bit_equal(&before).unwrap());
    let own = hidden(&model, &["c"; 6]);
    perturb(&model, &Select::new("modules.net.*.b.*"), 0.1, Seed(9)).unwrap();
    assert!(!hidden(&model, &["c"; 6]).bit_equal(&own).unwrap(), "it sees the second");
}

#[test]
fn parameters_grow_with_the_square_of_the_number_of_tasks() {
    for (tasks, bias) in [(1, true), (2, true), (3, false), (5, true)] {
        let mut model = bare(bias);
        let names = (0..tasks).map(|t| format!("t{t}")).collect();
        let config = Progressive { tasks: names, ..config() };
        model.attach("net", Box::new(config), &Targets::names(["linear"])).unwrap();
        let found: usize = model.params().iter().map(|(_, p)| p.tensor().numel()).sum();
        let reads = [INPUTS, WIDTHS[0], WIDTHS[1]];
        let own: i64 = reads.iter().zip(WIDTHS).map(|(i, o)| i * o + i64::from(bias) * o).sum();
        let lateral: i64 =
            reads.iter().zip(WIDTHS).skip(1).map(|(i, o)| LATERAL * (i + o) + 1).sum();
        assert_eq!(found as i64, tasks * own + tasks * (tasks - 1) / 2 * lateral);
    }
}

#[test]
fn lateral_connections_start_small() {
    let mut model = bare(true);
    model.attach("net", Box::new(config()), &Targets::names(["linear"])).unwrap();
    for task in ["b", "c"] {
        let alpha = numbers(&model, 1, task, "alpha").unwrap();
        assert_eq!(alpha.len(), TASKS.iter().position(|t| *t == task).unwrap());
        assert!(alpha.iter().all(|a| a.abs() <= 0.1 && *a != 0.0), "{alpha:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let refused = |config: Progressive, targets: &[&str]| {
        let targets = Targets::names(targets.to_vec());
        bare(true).attach("net", Box::new(config), &targets).unwrap_err().to_string()
    };
    let e = refused(config(), &["layers.0.linear", "layers.2.linear"]);
    assert!(e.contains("which reads the one before"), "{e}");
    let named = |name: &str| Progressive { tasks: vec![name.to_owned()], ..config() };
    assert!(refused(named("linear"), &["linear"]).contains("a part of the name of the site"));
    assert!(refused(Progressive { tasks: vec![], ..config() }, &["linear"]).contains("1 at least"));
    assert!(refused(Progressive { width: 0, ..config() }, &["linear"]).contains("width"));
    let model = model(true);
    let e = model.forward(&inputs(2), &Context::eval()).unwrap_err().to_string();
    assert!(e.contains("with_tasks"), "{e}");
    let cx = Context::eval().with_tasks(["a", "d"]);
    assert!(model.forward(&inputs(2), &cx).unwrap_err().to_string().contains("`d`"));
}

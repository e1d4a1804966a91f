//! What mergekit made of three tiny Llamas by each of its methods, against what is made here of the
//! same files. The fixtures come from `tests/python/make_merge_golden.py`.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use modl_aggregate::merge::{Elements, MergeMethods, Source, run};
use modl_aggregate::mergekit::{Options, plan, read_documents};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mergekit")
}

fn options() -> Options {
    Options { folder: fixtures().join("models"), ..Options::default() }
}

/// All numbers of a file.
fn numbers(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let source = Source::open("result", path).unwrap();
    let one = |(name, place): (&String, &modl_aggregate::merge::Place)| {
        let mut values = vec![0.0; place.shape.iter().product()];
        source.elements(name, None).unwrap().read(0, &mut values).unwrap();
        (name.clone(), values)
    };
    source.tensors().iter().map(one).collect()
}

fn merged(yaml: &str, out: &Path) -> BTreeMap<String, Vec<f32>> {
    let configs = read_documents(yaml).unwrap();
    let methods = MergeMethods::default();
    let plan = plan(&configs[0], &methods, &options()).unwrap();
    run(&plan, &methods, out, |_| {}).unwrap();
    numbers(out)
}

/// Methods that draw: mergekit's generator is not ours.
const DRAWN: [&str; 4] = ["dare_linear", "dare_ties", "della", "della_linear"];

#[test]
fn every_method_gives_what_mergekit_gives() {
    let mut done = Vec::new();
    for entry in fs::read_dir(fixtures()).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        if name == "models" || DRAWN.contains(&name.as_str()) {
            continue;
        }
        let made = tempfile::tempdir().unwrap();
        let ours =
            merged(&fs::read_to_string(dir.join("config.yml")).unwrap(), &made.path().join("m"));
        let theirs = numbers(&dir.join("merged.safetensors"));
        assert!(ours.keys().eq(theirs.keys()), "{name}: {:?}", ours.keys());
        let mut worst = (0f32, "");
        for (key, theirs) in &theirs {
            for (a, b) in ours[key].iter().zip(theirs) {
                // 1e-6, also of large numbers.
                let off = (a - b).abs() / b.abs().max(1.0);
                if off.is_nan() || off > worst.0 {
                    worst = (off, key);
                }
            }
        }
        assert!(worst.0 <= 1e-6, "{name}: {worst:?}");
        if dir.join("config.json").is_file() {
            let layers = |path: &Path| {
                let text = fs::read_to_string(path).unwrap();
                let json: serde_json::Value = serde_json::from_str(&text).unwrap();
                json["num_hidden_layers"].clone()
            };
            let made = layers(&made.path().join("m/config.json"));
            assert_eq!(made, layers(&dir.join("config.json")), "{name}");
        }
        done.push(name);
    }
    assert!(done.len() >= 32, "{done:?}");
}

/// TIES as the paper has it (trimmed over the whole model, signs of the plain sums, means), number by
/// number in f64 from sorted task vectors. Changes on a grid, so that many magnitudes are equal: those
/// that come first are kept.
#[test]
fn ties_of_the_paper_trims_over_the_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    let shapes = [("a", vec![40_000usize]), ("b", vec![3, 7]), ("c", vec![50, 700])];
    let model = |name: &str, change: &dyn Fn(usize) -> f32| -> Vec<Vec<f32>> {
        let mut place = 0;
        let mut tensors = Vec::new();
        for (_, shape) in &shapes {
            let n = shape.iter().product();
            let of = |i: usize| (i % 8) as f32 + change(place + i);
            tensors.push((0..n).map(of).collect::<Vec<f32>>());
            place += n;
        }
        let views = shapes.iter().zip(&tensors).map(|((name, shape), values)| {
            let bytes = bytemuck::cast_slice(values);
            let dtype = safetensors::Dtype::F32;
            (*name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        fs::create_dir(dir.path().join(name)).unwrap();
        let file = dir.path().join(name).join("model.safetensors");
        safetensors::serialize_to_file(views, None, &file).unwrap();
        tensors
    };
    let base = model("base", &|_| 0.0);
    // The second half of each model changes more, so that no tensor keeps its own share.
    let size = |i: usize| if i > 37_000 { 2.0 } else { 1.0 };
    let grid = |i: usize, by: usize| ((i * by) % 17) as f32 / 8.0 - 1.0;
    let models = [13, 7, 5]
        .map(|by| model(&format!("ft{by}"), &|i| (grid(i, by) * size(i) * 8.0).round() / 8.0));
    let yaml = "merge_method: ties\nbase_model: base\nparameters: {convention: paper, lambda: 0.5}\n\
                models:\n\
                - {model: ft13, parameters: {weight: 1.0, density: 0.2}}\n\
                - {model: ft7, parameters: {weight: 1.0, density: 0.3}}\n\
                - {model: ft5, parameters: {weight: 1.0, density: 1.0}}\n";
    let methods = MergeMethods::default();
    let options = Options { folder: dir.path().to_path_buf(), ..Options::default() };
    let plan = plan(&read_documents(yaml).unwrap()[0], &methods, &options).unwrap();
    run(&plan, &methods, &dir.path().join("out"), |_| {}).unwrap();
    let ours: Vec<f32> = numbers(&dir.path().join("out")).into_values().flatten().collect();

    let base: Vec<f64> = base.concat().into_iter().map(f64::from).collect();
    let kept: Vec<Vec<f64>> = models
        .iter()
        .zip([0.2, 0.3, 1.0])
        .map(|(model, density)| {
            let all = model.concat();
            let tau: Vec<f64> = all.iter().zip(&base).map(|(m, b)| f64::from(*m) - b).collect();
            let mut order: Vec<usize> = (0..tau.len()).collect();
            order.sort_by(|a, b| tau[*b].abs().total_cmp(&tau[*a].abs()));
            let mut kept = vec![0.0; tau.len()];
            let k = (density * tau.len() as f64) as usize;
            order[..k].iter().for_each(|i| kept[*i] = tau[*i]);
            kept
        })
        .collect();
    for (i, (found, base)) in ours.iter().zip(&base).enumerate() {
        let taus = [kept[0][i], kept[1][i], kept[2][i]];
        let sign = if taus.iter().sum::<f64>() >= 0.0 { 1.0 } else { -1.0 };
        let agree: Vec<f64> = taus.into_iter().filter(|t| t * sign > 0.0).collect();
        let mean = agree.iter().sum::<f64>() / agree.len().max(1) as f64;
        let wanted = base + 0.5 * mean;
        assert!((f64::from(*found) - wanted).abs() < 1e-6, "{i}: {found} is not {wanted}");
    }

    // Shares that differ between tensors have no meaning then.
    let yaml = yaml.replace("density: 0.2", "density: [{filter: a, value: 0.5}, {value: 0.2}]");
    let plan =
        modl_aggregate::mergekit::plan(&read_documents(&yaml).unwrap()[0], &methods, &options);
    let e = run(&plan.unwrap(), &methods, &dir.path().join("other"), |_| {}).unwrap_err();
    assert!(e.to_string().contains("same for all tensors"), "{e}");
}

//! Broken adapters of every type of PEFT's, of AdapterHub's methods and in modl's own files: each
//! is refused in words that name what is wrong, nothing has changed, and nothing was allocated that
//! the file does not hold.
#![allow(clippy::unwrap_used, clippy::panic)]

mod first;

use std::fs;
use std::path::{Path, PathBuf};

use first::{Everywhere, First};
use modl_compute::{adapterhub, peft, register};
use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::{Sum, TinyBackbone, perturb};
use modl_core::{
    Context, Device, Error, Kind, Modular, ModuleConfig, Registry, Result, Seed, Select, Targets,
    Tensor, Tensors,
};
use modl_models::{LoadOptions, open};
use serde_json::{Map, Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

type Load<'a> = Box<dyn Fn(&mut Modular, &Path) -> Result<()> + 'a>;

/// A way to load something, and a model that has a module at every site, under a router that lets
/// others come.
struct Loader<'a> {
    model: Modular,
    inputs: Tensors,
    load: Load<'a>,
    before: Vec<(String, Vec<u8>)>,
}

impl<'a> Loader<'a> {
    fn new(
        mut model: Modular,
        inputs: Tensors,
        load: impl Fn(&mut Modular, &Path) -> Result<()> + 'a,
    ) -> Self {
        model.attach("own", Box::new(Everywhere), &Targets::pattern(".*")).unwrap();
        perturb(&model, &Select::all(), 0.3, Seed(4)).unwrap();
        model.aggregate(Box::new(Sum::default())).unwrap();
        model.route(Box::new(First), false).unwrap();
        let mut loader = Loader { model, inputs, load: Box::new(load), before: Vec::new() };
        loader.before = loader.state();
        loader
    }

    fn of_fixtures(base: &str, load: impl Fn(&mut Modular, &Path) -> Result<()> + 'a) -> Self {
        let dir = fixtures().join(format!("base_{base}"));
        let inputs = tensors(dir.join("inputs.safetensors"));
        let backbone = open(dir, &LoadOptions::default()).unwrap();
        Self::new(Modular::from_box(backbone, Seed(1)).unwrap(), inputs, load)
    }

    /// Outputs and parameters.
    fn state(&self) -> Vec<(String, Vec<u8>)> {
        let y = self.model.forward(&self.inputs, &Context::eval()).unwrap();
        let y = y.iter().map(|(n, t)| (n.to_owned(), t.to_bytes().unwrap()));
        let all = self.model.backbone().params().iter().chain(self.model.params().iter());
        y.chain(all.map(|(n, p)| (n.to_owned(), p.tensor().to_bytes().unwrap()))).collect()
    }

    /// Why the file is refused, after checking that nothing has changed; `None` where it is not,
    /// and then it is taken out again.
    fn refusal(&mut self, path: &Path, what: &str) -> Option<Error> {
        let refusal = self.quick_refusal(path);
        self.same(what);
        refusal
    }

    /// The same without looking for changes of values.
    fn quick_refusal(&mut self, path: &Path) -> Option<Error> {
        let result = (self.load)(&mut self.model, path);
        if result.is_ok() {
            self.model.detach("new").unwrap();
            self.model.route(Box::new(First), false).unwrap();
        }
        assert_eq!(self.model.modules(), ["own"]);
        result.err()
    }

    #[track_caller]
    fn same(&self, what: &str) {
        assert!(self.state() == self.before, "{what}: something has changed");
    }

    #[track_caller]
    fn good(&mut self, path: &Path) {
        let e = self.refusal(path, "good");
        assert!(e.is_none(), "{} is good: {e:?}", path.display());
    }

    #[track_caller]
    fn refused<S: AsRef<str>>(&mut self, path: &Path, named: impl IntoIterator<Item = S>) {
        let named: Vec<String> = named.into_iter().map(|s| s.as_ref().to_owned()).collect();
        let what = format!("{} with {named:?}", path.display());
        let Some(e) = self.refusal(path, &what) else { panic!("{what} is let through") };
        let text = e.to_string();
        assert!(named.iter().all(|n| text.contains(n)), "wanted {named:?}: {text}");
    }
}

/// What is broken in a file of tensors, and what the refusal has to name.
type Break = fn(&mut Vec<(String, Tensor)>) -> Vec<String>;

fn renamed(all: &mut [(String, Tensor)]) -> Vec<String> {
    let old = all[0].0.clone();
    all[0].0 = format!("{old}x");
    vec![old.clone(), format!("{old}x")]
}

fn halved(all: &mut Vec<(String, Tensor)>) -> Vec<String> {
    all.split_off(all.len() / 2).into_iter().map(|(n, _)| n).collect()
}

fn reshaped(all: &mut [(String, Tensor)]) -> Vec<String> {
    let mut changed = Vec::new();
    // A rank of 0 stays one.
    for (name, t) in all.iter_mut().filter(|(_, t)| t.len_of(0) > 0) {
        *t = Tensor::cat(&[t.clone(), t.clone()], 0).unwrap();
        changed.push(name.clone());
    }
    changed
}

/// Two of them have a value that is no number.
fn poisoned(all: &mut [(String, Tensor)], value: f64) -> Vec<String> {
    let of_floats = |t: &Tensor| matches!(t.kind(), Kind::Float | Kind::Double);
    let mut found = Vec::new();
    for (name, t) in all.iter_mut().rev().filter(|(_, t)| of_floats(t)).take(2) {
        let mut values = t.to_vec::<f64>().unwrap();
        *values.last_mut().unwrap() = value;
        let broken = Tensor::from_slice(&values, &t.size(), Device::Cpu).unwrap();
        *t = broken.to_kind(t.kind()).unwrap();
        found.push(name.clone());
    }
    found
}

fn more(all: &mut Vec<(String, Tensor)>) -> Vec<String> {
    let strange = ["../../etc/passwd", "/abs", "a\0b", "", "base_model.model...", "é\n"];
    all.extend(strange.map(|n| (n.to_owned(), all[0].1.clone())));
    strange.map(str::to_owned).to_vec()
}

const BREAKS: [Break; 6] = [
    |all| renamed(all),
    halved,
    |all| reshaped(all),
    |all| poisoned(all, f64::NAN),
    |all| poisoned(all, f64::NEG_INFINITY),
    more,
];

/// Puts every way to break a file of tensors to the test, and restores it.
fn broken_tensors(loader: &mut Loader, path: &Path, file: &Path) {
    let whole = fs::read(file).unwrap();
    let read = Checkpoint::open(file).unwrap();
    for breaks in BREAKS {
        let mut all = read.tensors(Device::Cpu).unwrap();
        let named = breaks(&mut all);
        let all = all.iter().map(|(n, t)| (n.as_str(), t));
        checkpoint::save(file, all, read.metadata()).unwrap();
        loader.refused(path, named);
    }
    let n = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&whole[8..8 + n]).unwrap();
    let name = file.file_name().unwrap().to_str().unwrap();
    let mut try_bytes = |bytes: &[u8]| {
        fs::write(file, bytes).unwrap();
        loader.refused(path, [name]);
    };
    for cut in [0, 7, 8, 8 + n / 2, 8 + n, (8 + n + whole.len()) / 2, whole.len() - 1] {
        try_bytes(&whole[..cut]);
    }
    for length in [u64::MAX, u64::MAX / 2, 1 << 42, whole.len() as u64, 0, 1] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        try_bytes(&bytes);
    }
    let with = |header: String| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(&whole[8 + n..]);
        bytes
    };
    let (key, _) = header.iter().find(|(k, _)| *k != "__metadata__").unwrap();
    for (shape, end) in [(json!([1u64 << 40]), 1u64 << 42), (json!([u64::MAX, 2]), u64::MAX)] {
        let mut huge = header.clone();
        huge[key] = json!({"dtype": "F32", "shape": shape, "data_offsets": [0, end]});
        try_bytes(&with(Value::Object(huge).to_string()));
    }
    let text = Value::Object(header.clone()).to_string();
    let other = json!({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]});
    try_bytes(&with(text.replacen('{', &format!("{{{}:{other},", json!(key)), 1)));
    try_bytes(&with(text.replacen('{', &format!("{{\"x\":{}", "[".repeat(1 << 20)), 1)));
    try_bytes(&with(text.replacen('{', "{\"\u{1}", 1)));
    fs::write(file, whole).unwrap();
}

/// What no setting is meant to be.
fn absurd() -> Vec<Value> {
    let deep = (0..100).fold(json!(1), |v, _| json!([v]));
    vec![
        json!(i64::MAX),
        json!(u64::MAX),
        json!(50_000_000),
        json!(0),
        json!(-1),
        json!(1e308),
        json!("../../x("),
        json!(true),
        json!({"a": {"b": null}}),
        deep,
    ]
}

/// Puts absurd values for each setting to the test. A setting may take some of them; what it does
/// not take is refused, and whatever it says, nothing breaks.
fn broken_settings(
    loader: &mut Loader,
    path: &Path,
    settings: &Map<String, Value>,
    write: &dyn Fn(&Map<String, Value>),
) -> usize {
    let mut refused = 0;
    for key in settings.keys() {
        for value in absurd() {
            let mut broken = settings.clone();
            broken[key] = value.clone();
            write(&broken);
            refused += usize::from(loader.quick_refusal(path).is_some());
        }
        loader.same(key);
    }
    write(settings);
    refused
}

/// The most memory that this process has asked for, in bytes.
fn most_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmPeak:"));
    let kilobytes = line.and_then(|l| l.split_whitespace().next()?.parse::<usize>().ok());
    kilobytes.unwrap_or(0) * 1024
}

/// A setting that asks for 50 million rows would take more.
const LITTLE: usize = 500_000_000;

fn copy(from: &Path, to: &Path) {
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

fn json_of(path: &Path) -> Map<String, Value> {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Texts that are no JSON, or say a key twice.
fn broken_texts(loader: &mut Loader, dir: &Path, file: &Path) {
    let whole = fs::read_to_string(file).unwrap();
    let key = json_of(file).keys().next().unwrap().clone();
    let twice = whole.replacen('{', &format!("{{\"{key}\": null, \"r\": 1, \"r\": 2,"), 1);
    let deep = whole.replacen('{', &format!("{{\"x\": {}", "{\"a\":".repeat(1 << 20)), 1);
    let cases = [
        (String::new(), ""),
        (whole[..whole.len() / 2].to_owned(), "is not JSON"),
        (whole.replacen('{', "{\"x\": 1e999,", 1), "number out of range"),
        (whole.replacen('{', "{\"x\": NaN,", 1), "is not JSON"),
        (deep, "recursion limit"),
        (twice, &format!("more than once: `r`, `{key}`")),
        ("[1]".to_owned(), ""),
        ("null".to_owned(), ""),
    ];
    let name = file.file_name().unwrap().to_str().unwrap();
    for (text, words) in cases {
        fs::write(file, text).unwrap();
        loader.refused(dir, [name, words]);
    }
    fs::write(file, [0xff, 0xfe]).unwrap();
    loader.refused(dir, [name]);
    fs::write(file, whole).unwrap();
}

/// Of each type one, with all that may stand in its file.
const PEFT: [&str; 18] = [
    "bert_adalora",
    "bert_adalora_pruned",
    "bert_dora",
    "bert_ia3",
    "bert_ln_tuning",
    "bert_loha",
    "bert_lokr",
    "bert_lora",
    "bert_lora_bias",
    "bert_lora_embedding",
    "bert_oft",
    "bert_p_tuning",
    "bert_prefix_tuning",
    "bert_prefix_tuning_proj",
    "bert_prompt_tuning",
    "bert_vera",
    "bert_boft_factors",
    "bert_fourierft",
];

#[test]
fn pefts_folders() {
    let mut loader =
        Loader::of_fixtures("bert", |m, dir| peft::load(m, dir, Some("new")).map(drop));
    for name in PEFT {
        let dir = tempfile::Builder::new().prefix(name).tempdir().unwrap();
        let dir = dir.path();
        copy(&fixtures().join(name).join("adapter"), dir);
        loader.good(dir);
        broken_tensors(&mut loader, dir, &dir.join("adapter_model.safetensors"));
        let file = dir.join("adapter_config.json");
        broken_texts(&mut loader, dir, &file);
        let before = most_memory();
        let write = |s: &Map<String, Value>| fs::write(&file, json!(s).to_string()).unwrap();
        let settings = json_of(&file);
        let refused = broken_settings(&mut loader, dir, &settings, &write);
        assert!(refused > 2 * settings.len(), "{name}: {refused} refusals are few");
        assert!(most_memory() - before < LITTLE, "{name}: {} bytes", most_memory() - before);
        // AdaLoRA has another name for it, and OFT counts blocks with it.
        if settings.contains_key("r") && !name.contains("adalora") && !name.contains("oft") {
            write(&Map::from_iter(settings.clone().into_iter().chain([("r".into(), json!(0))])));
            loader.refused(dir, ["r"]);
        }
        write(&settings);
        loader.good(dir);
    }
}

#[test]
fn a_key_under_two_names_is_refused() {
    let mut loader =
        Loader::of_fixtures("bert", |m, dir| peft::load(m, dir, Some("new")).map(drop));
    let dir = tempfile::tempdir().unwrap();
    copy(&fixtures().join("bert_lora/adapter"), dir.path());
    let file = dir.path().join("adapter_model.safetensors");
    let mut all = Checkpoint::open(&file).unwrap().tensors(Device::Cpu).unwrap();
    // As it is called in a model with a head.
    let key = all[0].0.clone();
    let other = key.replace("base_model.model.", "base_model.model.bert.");
    all.push((other, all[0].1.zeros_like().unwrap()));
    checkpoint::save(&file, all.iter().map(|(n, t)| (n.as_str(), t)), Default::default()).unwrap();
    loader.refused(dir.path(), [key.as_str()]);
}

#[test]
fn adapterhubs_folders() {
    let mut loader =
        Loader::of_fixtures("bert", |m, dir| adapterhub::load(m, dir, Some("new")).map(drop));
    for name in ["lora", "lora_qkv", "seq_bn", "double_seq_bn", "par_bn", "par_bn_learned"] {
        let dir = tempfile::Builder::new().prefix(name).tempdir().unwrap();
        let dir = dir.path();
        copy(&fixtures().join(format!("adapterhub_{name}")).join("adapter"), dir);
        loader.good(dir);
        broken_tensors(&mut loader, dir, &dir.join("adapter.safetensors"));
        let file = dir.join("adapter_config.json");
        broken_texts(&mut loader, dir, &file);
        let before = most_memory();
        let whole = json_of(&file);
        let write = |s: &Map<String, Value>| fs::write(&file, json!(s).to_string()).unwrap();
        broken_settings(&mut loader, dir, &whole, &write);
        let write = |s: &Map<String, Value>| {
            let mut all = whole.clone();
            all["config"] = json!(s);
            fs::write(&file, json!(all).to_string()).unwrap();
        };
        let settings = whole["config"].as_object().unwrap();
        let refused = broken_settings(&mut loader, dir, settings, &write);
        assert!(refused > 2 * settings.len(), "{name}: {refused} refusals are few");
        assert!(most_memory() - before < LITTLE, "{name}: {} bytes", most_memory() - before);
    }
    // The name in the file is the module's, where none is given.
    let mut own = Loader::of_fixtures("bert", |m, dir| adapterhub::load(m, dir, None).map(drop));
    let dir = tempfile::tempdir().unwrap();
    copy(&fixtures().join("adapterhub_lora/adapter"), dir.path());
    let tensors = dir.path().join("adapter.safetensors");
    for bad in ["../../x", "", "a.b", "a/b", "a\0"] {
        let file = dir.path().join("adapter_config.json");
        let mut config = json_of(&fixtures().join("adapterhub_lora/adapter/adapter_config.json"));
        config["name"] = json!(bad);
        fs::write(&file, json!(config).to_string()).unwrap();
        let of_own =
            Checkpoint::open(fixtures().join("adapterhub_lora/adapter/adapter.safetensors"));
        let all = of_own.unwrap().tensors(Device::Cpu).unwrap();
        let all: Vec<_> =
            all.into_iter().map(|(n, t)| (n.replace(".own.", &format!(".{bad}.")), t)).collect();
        let all = all.iter().map(|(n, t)| (n.as_str(), t));
        checkpoint::save(&tensors, all, Default::default()).unwrap();
        own.refused(dir.path(), ["name"]);
    }
}

/// Settings with which a method stands in the tiny backbone, of width 8, where its own do not fit.
fn fitting(method: &str) -> Value {
    match method {
        "lora" | "dora" | "loha" | "lokr" | "vera" => json!({"r": 2}),
        "adalora" => json!({"init_r": 3, "target_r": 2}),
        "fourierft" => json!({"n_frequency": 10}),
        "oft" => json!({"oft_block_size": 4}),
        "intrinsic" => json!({"dimension": 40}),
        _ => json!({}),
    }
}

/// The places where a method is tried.
const PLACES: [&str; 9] = [
    "all-linear",
    "all-sublayer",
    "all-tokens",
    "all-tokens|all-attention",
    "all-attention",
    "all-block",
    "all-norm",
    "all-conv",
    "all-embedding",
];

fn tiny() -> Modular {
    Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(2)).unwrap()
}

/// A method and where it stands, if it does with its default settings or the ones above.
fn attached(registry: &Registry, method: &str) -> Option<Modular> {
    for settings in [json!({}), fitting(method)] {
        let mut config = json!({"type": method});
        config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        let Ok(parsed) = registry.modules.parse(&config) else { continue };
        let usual = parsed.usual_targets();
        for targets in std::iter::once(usual).chain(PLACES.map(Targets::pattern)) {
            let mut model = tiny();
            let config: Box<dyn ModuleConfig> = registry.modules.parse(&config).unwrap();
            if model.attach("new", config, &targets).is_ok() {
                perturb(&model, &Select::all(), 0.3, Seed(5)).unwrap();
                return Some(model);
            }
        }
    }
    None
}

#[test]
fn module_files_of_every_method() {
    let registry = Registry::new().with(register).unwrap();
    let inputs = TinyBackbone::inputs(2, 5, Seed(6)).unwrap();
    let load = |m: &mut Modular, path: &Path| m.load_module(path, None, &registry).map(drop);
    let mut loader = Loader::new(tiny(), inputs, load);
    let dir = tempfile::tempdir().unwrap();
    let (mut tried, mut left) = (0, Vec::new());
    for entry in registry.modules.entries() {
        let method = entry.name;
        let Some(model) = attached(&registry, method) else {
            left.push(method);
            continue;
        };
        let path = dir.path().join(format!("{method}.safetensors"));
        model.save_module("new", &path).unwrap();
        let read = Checkpoint::open(&path).unwrap();
        let (all, metadata) = (read.tensors(Device::Cpu).unwrap(), read.metadata());
        loader.good(&path);
        if all.is_empty() {
            left.push(method);
            continue;
        }
        tried += 1;
        broken_tensors(&mut loader, &path, &path);
        let before = most_memory();
        let header: Map<String, Value> = serde_json::from_str(&metadata["modl"]).unwrap();
        let save = |header: &Map<String, Value>| {
            let mut metadata = metadata.clone();
            metadata.insert("modl".to_owned(), json!(header).to_string());
            let all = all.iter().map(|(n, t)| (n.as_str(), t));
            checkpoint::save(&path, all, metadata).unwrap();
        };
        // A name is as good as another, unless it is none.
        let with_name = |h: &Map<String, Value>| {
            let mut h = h.clone();
            if h["name"].is_string() && h["name"] != "../../x(" {
                h["name"] = json!("new");
            }
            save(&h);
        };
        broken_settings(&mut loader, &path, &header, &with_name);
        let settings = header["config"].as_object().unwrap();
        let write = |settings: &Map<String, Value>| {
            let mut header = header.clone();
            header["config"] = json!(settings);
            save(&header);
        };
        broken_settings(&mut loader, &path, settings, &write);
        for bad in ["../../x", "", "a.b", "/x"] {
            let mut header = header.clone();
            header["name"] = json!(bad);
            save(&header);
            loader.refused(&path, ["name"]);
        }
        assert!(most_memory() - before < LITTLE, "{method}: {} bytes", most_memory() - before);
    }
    assert!(tried >= 30, "{tried} methods, without {left:?}");
}

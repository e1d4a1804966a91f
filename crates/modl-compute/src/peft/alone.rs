//! PEFT folders without their backbone: what a merge of adapters reads and writes.
//!
//! Which sites there are is said by the tensors' keys. What a backbone would tell, whether a site
//! exists and has the right width, is left to whoever loads the result.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use modl_core::checkpoint;
use modl_core::{Device, Error, LowRank, Names, Result, Tensor};
use serde_json::{Map, Value, json};

use super::config::{CONFIG_FILE, parse, read_fields, render};
use super::folder::{BASE_KEY, PICKLE_FILE, WEIGHTS_FILE, card};
use super::lora::lora_fields;
use super::{AdapterConfig, PREFIX, Provenance, number};
use crate::Lora;

/// An adapter as its folder holds it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    config: AdapterConfig,
    fields: Map<String, Value>,
    tensors: Vec<(String, Tensor)>,
    base: Option<String>,
}

/// What a LoRA changes at one site.
#[derive(Debug, Clone)]
pub struct LoraSite {
    /// The site's path, as in the file.
    pub path: String,
    /// What kind of weight it is.
    pub form: LoraForm,
    /// A `[r, in]` and B `[out, r]`; at a table of embeddings A `[r, rows]` and B `[width, r]`.
    pub factors: LowRank,
    /// `[out]`, with the factor of A and B in it.
    pub bias: Option<Tensor>,
    /// DoRA's m `[out]`: with it ΔW is not s · B A, and depends on W.
    pub magnitude: Option<Tensor>,
}

/// How A and B lie in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoraForm {
    /// As matrices.
    Linear,
    /// A with further dimensions, here in one with `in`.
    Conv(Vec<i64>),
    /// Under the names of embeddings.
    Embedding,
}

impl Folder {
    /// Reads a folder, strictly.
    ///
    /// # Errors
    /// As [`read_config`](super::read_config), where there is no file of tensors, or one is not finite.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().to_owned();
        let fields = read_fields(&path.join(CONFIG_FILE))?;
        let config = parse(&path.join(CONFIG_FILE), fields.clone())?;
        let file = checkpoint::open_first(&path, &[WEIGHTS_FILE, PICKLE_FILE])?;
        let base = file.metadata().get(BASE_KEY).cloned();
        let tensors = file.tensors(Device::Cpu)?;
        for (key, t) in &tensors {
            t.check_finite(&format!("{key} in {}", path.display()))?;
        }
        Ok(Folder { path, config, fields, tensors, base })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its configuration says.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// All fields of its configuration.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// Its tensors, by their keys in the file.
    pub fn tensors(&self) -> &[(String, Tensor)] {
        &self.tensors
    }

    /// The fingerprint of the backbone that it was made for, where modl has written it.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// Tensors `SITE.PARAM` of one parameter, by the site.
    ///
    /// # Errors
    /// Where the file holds anything else.
    pub fn by_site(&self, param: &str) -> Result<BTreeMap<String, Tensor>> {
        let mut found = BTreeMap::new();
        for (key, t) in &self.tensors {
            let site =
                key.strip_prefix(PREFIX).and_then(|k| k.strip_suffix(param)?.strip_suffix('.'));
            let site = site.ok_or_else(|| self.stray(&[key.as_str()]))?;
            found.insert(site.to_owned(), t.clone());
        }
        Ok(found)
    }

    /// The sites of a LoRA or a DoRA.
    ///
    /// # Errors
    /// Where it is none, the file lacks a factor, has anything else, or ranks are not those of the
    /// configuration; every tensor is named.
    pub fn lora(&self) -> Result<Vec<LoraSite>> {
        let kind = self.config.module.kind();
        if !["lora", "dora"].contains(&kind) {
            let advice = match kind {
                "union" => {
                    "it has `modules_to_save`, `trainable_token_indices` or `target_parameters`, \
                            which cannot be merged"
                }
                _ => "name the base model, with which its change of weights can be computed",
            };
            let what = format!("the adapter {}, a `{kind}`, as a LoRA", self.path.display());
            return Err(Error::unsupported(what, advice));
        }
        let lora: Lora = modl_core::from_json(kind, self.config.module.to_json()?)?;
        let mut parts: BTreeMap<&str, Parts> = BTreeMap::new();
        let mut stray = Vec::new();
        for (key, t) in &self.tensors {
            let split = key.strip_prefix(PREFIX).and_then(|key| {
                PARTS.iter().find_map(|(end, n)| Some((key.strip_suffix(end)?, *n)))
            });
            match split {
                Some((site, n)) => parts.entry(site).or_default()[n] = Some(t.clone()),
                None => stray.push(key.as_str()),
            }
        }
        // The frozen table that PEFT writes beside a LoRA of embeddings.
        let tables: Vec<String> =
            parts.iter().filter(|(_, p)| p[3].is_some()).map(|(s, _)| (*s).to_owned()).collect();
        let is_table = |key: &str| {
            tables.iter().any(|site| key == format!("{PREFIX}{site}.base_layer.weight"))
        };
        stray.retain(|key| !is_table(key));
        if !stray.is_empty() {
            return Err(self.stray(&stray));
        }
        let sites: Result<Vec<LoraSite>> =
            parts.into_iter().map(|(path, parts)| self.site(path, parts, &lora)).collect();
        let sites = sites?;
        self.check_targets(sites.iter().map(|s| s.path.as_str()))?;
        Ok(sites)
    }

    fn site(&self, path: &str, parts: Parts, lora: &Lora) -> Result<LoraSite> {
        let wrong = |problem: String| Error::file(&self.path, format!("`{path}`: {problem}"));
        let [a, b, bias, table_a, table_b, magnitude] = parts;
        let (form, down, up) = match (a, b, table_a, table_b) {
            (Some(a), Some(b), None, None) if a.dim() > 2 => {
                let (r, kernel) = (a.len_of(0), a.size().split_off(1));
                (LoraForm::Conv(kernel), a.reshape(&[r, -1])?, b.reshape(&[-1, b.len_of(1)])?)
            }
            (Some(a), Some(b), None, None) => (LoraForm::Linear, a, b),
            (None, None, Some(a), Some(b)) => (LoraForm::Embedding, a, b),
            _ => return Err(wrong("of A and B one is missing, or there are two".into())),
        };
        let (r, scale) = lora.rank_and_scale(path)?;
        let (own, other) = (down.len_of(0), up.len_of(-1));
        if down.dim() != 2 || up.dim() != 2 || own != r || other != r {
            return Err(wrong(format!(
                "A {:?} and B {:?} are not of the rank {r} that the configuration says",
                down.size(),
                up.size()
            )));
        }
        if lora.lora_bias != bias.is_some() {
            return Err(wrong("has a bias, or none, other than `lora_bias` says".into()));
        }
        let bias = bias.map(|b| b.mul_scalar(scale)).transpose()?;
        let factors = LowRank { down, up, scale };
        Ok(LoraSite { path: path.to_owned(), form, factors, bias, magnitude })
    }

    /// Every name that the configuration lists has a site: one that is missing would be an adapter
    /// that is not all there.
    fn check_targets<'a>(&self, sites: impl Iterator<Item = &'a str>) -> Result<()> {
        let sites: Vec<&str> = sites.collect();
        let Names::List(names) = &self.config.targets.names else { return Ok(()) };
        let stands = |name: &str| {
            sites
                .iter()
                .any(|s| s.strip_suffix(name).is_some_and(|p| p.is_empty() || p.ends_with('.')))
        };
        let missing: Vec<&str> = names.iter().map(String::as_str).filter(|n| !stands(n)).collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Error::file(
                &self.path,
                format!("`target_modules` names {missing:?}, of which the file holds nothing"),
            )),
        }
    }

    fn stray(&self, keys: &[&str]) -> Error {
        let problem = format!("holds {keys:?} beside the adapter, which cannot be merged");
        Error::file(&self.path, problem)
    }
}

/// A, B, its bias, A and B of embeddings, DoRA's m.
type Parts = [Option<Tensor>; 6];

const PARTS: &[(&str, usize)] = &[
    (".lora_A.weight", 0),
    (".lora_B.weight", 1),
    (".lora_B.bias", 2),
    (".lora_embedding_A", 3),
    (".lora_embedding_B", 4),
    (".lora_magnitude_vector", 5),
];

/// Writes a folder with these fields and tensors, by their keys in the file, for the backbone of
/// `like`.
///
/// # Errors
/// Where the disk refuses.
pub fn write_folder(
    dir: impl AsRef<Path>,
    like: &Folder,
    mut fields: Map<String, Value>,
    tensors: &[(String, Tensor)],
) -> Result<()> {
    let dir = dir.as_ref();
    fields.insert("inference_mode".into(), json!(true));
    let mut metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    metadata.extend(like.base.iter().map(|b| (BASE_KEY.to_owned(), b.clone())));
    checkpoint::save(
        dir.join(WEIGHTS_FILE),
        tensors.iter().map(|(key, t)| (key.as_str(), t)),
        metadata,
    )?;
    let text = |name: &str| like.fields.get(name).and_then(Value::as_str).map(str::to_owned);
    let provenance = Provenance {
        base_model_name_or_path: text("base_model_name_or_path"),
        ..Provenance::default()
    };
    let readme = card(like.config.layout.of, &provenance);
    checkpoint::write_whole(dir.join("README.md"), readme.as_bytes())?;
    // Last: a folder without it is no adapter yet.
    checkpoint::write_whole(dir.join(CONFIG_FILE), render(fields)?.as_bytes())
}

/// Writes a LoRA of these sites, with ranks and factors of their own where they differ. What was
/// made of the adapters `of` is for their backbone.
///
/// # Errors
/// Where there are no sites or adapters, or the disk refuses.
pub fn write_lora(dir: impl AsRef<Path>, of: &[Folder], sites: &[LoraSite]) -> Result<()> {
    let first = of.first().ok_or_else(|| Error::invalid("adapters", "there are none"))?;
    let rank = |s: &LoraSite| s.factors.down.len_of(0);
    let largest = sites.iter().max_by_key(|s| rank(s));
    let usual = largest.ok_or_else(|| Error::invalid("adapters", "stand nowhere"))?;
    let alpha = |s: &LoraSite| s.factors.scale * rank(s) as f64;
    let (r, usual_alpha) = (rank(usual), alpha(usual));
    let has_bias = sites.iter().any(|s| s.bias.is_some());
    let (mut ranks, mut alphas, mut tensors) = (Map::new(), Map::new(), Vec::new());
    for s in sites {
        let key = regex::escape(&s.path);
        if rank(s) != r {
            ranks.insert(key.clone(), json!(rank(s)));
        }
        if alpha(s) != usual_alpha {
            alphas.insert(key, number(alpha(s)));
        }
        let LowRank { down, up, scale } = &s.factors;
        let mut put =
            |name: &str, t: Tensor| tensors.push((format!("{PREFIX}{}.{name}", s.path), t));
        match &s.form {
            LoraForm::Linear => {
                put("lora_A.weight", down.clone());
                put("lora_B.weight", up.clone());
            }
            LoraForm::Embedding => {
                put("lora_embedding_A", down.clone());
                put("lora_embedding_B", up.clone());
                continue;
            }
            LoraForm::Conv(kernel) => {
                let shape: Vec<i64> = std::iter::once(rank(s)).chain(kernel.clone()).collect();
                put("lora_A.weight", down.reshape(&shape)?);
                let ones = std::iter::repeat_n(1, kernel.len().saturating_sub(1));
                let shape: Vec<i64> = [up.len_of(0), rank(s)].into_iter().chain(ones).collect();
                put("lora_B.weight", up.reshape(&shape)?);
            }
        }
        if has_bias {
            let bias = match &s.bias {
                Some(bias) => bias.mul_scalar(1.0 / scale)?,
                None => Tensor::zeros(&[up.len_of(0)], up.kind(), Device::Cpu)?,
            };
            put("lora_B.bias", bias);
        }
    }
    let mut fields = lora_fields();
    for name in COMMON {
        fields.insert((*name).into(), first.fields.get(*name).cloned().unwrap_or(Value::Null));
    }
    fields.insert("peft_type".into(), json!("LORA"));
    let fan_in_fan_out = first.fields.get("fan_in_fan_out").cloned().unwrap_or(json!(false));
    let own = [
        ("alpha_pattern", Value::Object(alphas)),
        ("fan_in_fan_out", fan_in_fan_out),
        ("lora_alpha", number(usual_alpha)),
        ("lora_bias", json!(has_bias)),
        ("r", json!(r)),
        ("rank_pattern", Value::Object(ranks)),
    ];
    fields.extend(own.map(|(name, value)| (name.to_owned(), value)));
    let paths: Vec<&str> = sites.iter().map(|s| s.path.as_str()).collect();
    fields.extend(where_they_stand(of, &paths));
    write_folder(dir, first, fields, &tensors)
}

/// What every adapter says of its backbone.
const COMMON: &[&str] =
    &["auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"];

/// The fields that say where an adapter stands: as all say, where they say the same, else by paths.
pub fn where_they_stand(of: &[Folder], paths: &[&str]) -> Map<String, Value> {
    let said = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"];
    let known = |f: &Folder, name: &str| f.fields.get(name).cloned().unwrap_or(Value::Null);
    let sites = |f: &Folder| f.sites();
    let alike = of.windows(2).all(|pair| match pair {
        [a, b] => said.iter().all(|n| known(a, n) == known(b, n)) && sites(a) == sites(b),
        _ => true,
    });
    let mut fields = Map::new();
    match of.first().filter(|f| alike && f.sites().iter().eq(sorted(paths).iter())) {
        Some(first) => {
            fields.extend(said.iter().map(|n| ((*n).to_owned(), known(first, n))));
        }
        None => {
            fields.insert("target_modules".into(), json!(paths));
            fields.extend(said.iter().skip(1).map(|n| ((*n).to_owned(), Value::Null)));
        }
    }
    fields
}

fn sorted(paths: &[&str]) -> Vec<String> {
    let mut all: Vec<String> = paths.iter().map(|p| (*p).to_owned()).collect();
    all.sort();
    all
}

impl Folder {
    /// The paths that the keys of a change of weights or a scaling are of, sorted.
    fn sites(&self) -> Vec<String> {
        let ends = PARTS.iter().map(|(end, _)| *end).chain([".ia3_l"]);
        let ends: Vec<&str> = ends.collect();
        let site = |key: &str| {
            let key = key.strip_prefix(PREFIX)?;
            ends.iter().find_map(|end| key.strip_suffix(end)).map(str::to_owned)
        };
        let mut all: Vec<String> = self.tensors.iter().filter_map(|(key, _)| site(key)).collect();
        all.sort();
        all.dedup();
        all
    }
}

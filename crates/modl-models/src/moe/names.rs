//! How mixtures lie on disk: one tensor for each expert and matrix, where transformers has one for
//! all experts in memory.
//!
//! | in memory | on disk, Mixtral | on disk, OLMoE |
//! |---|---|---|
//! | `mlp.gate.weight` | `block_sparse_moe.gate.weight` | the same |
//! | `mlp.experts.gate_up_proj[E]` | `block_sparse_moe.experts.E.w1.weight` above `….w3.weight` | `mlp.experts.E.gate_proj.weight` above `….up_proj.weight` |
//! | `mlp.experts.down_proj[E]` | `block_sparse_moe.experts.E.w2.weight` | `mlp.experts.E.down_proj.weight` |
//!
//! | Switch's `mlp.experts.{wi,wo}[E]` | `mlp.experts.expert_E.{wi,wo}.weight` | |
//!
//! Qwen2-MoE and DeepSeek-V3 are as OLMoE. Files that have what is in memory are read, too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use modl_core::checkpoint::TensorFile;
use modl_core::{Device, Error, Kind, ParamStore, Result, Tensor, Tensors};

use super::{DOWN, GATE_UP, WI, WO};

/// The name in memory of what is called `name` on disk, but for the experts' own tensors.
pub(crate) fn in_memory(name: &str) -> String {
    name.replace(".block_sparse_moe.", ".mlp.")
}

/// A matrix in memory and which part of its rows one is: 0 above 1.
type Part = (&'static str, usize);

/// Which matrix of an expert a name on disk is.
fn matrix(name: &str) -> Option<Part> {
    Some(match name {
        "w1" | "gate_proj" => (GATE_UP, 0),
        "w3" | "up_proj" => (GATE_UP, 1),
        "w2" | "down_proj" => (DOWN, 0),
        "wi" => (WI, 0),
        "wo" => (WO, 0),
        _ => return None,
    })
}

/// What an expert has: it is gated or not.
const GATED: [Part; 3] = [(DOWN, 0), (GATE_UP, 0), (GATE_UP, 1)];
const PLAIN: [Part; 2] = [(WI, 0), (WO, 0)];

/// `PATH.experts.E.NAME.weight` as (PATH.experts, E, matrix).
fn expert(name: &str) -> Option<(&str, usize, Part)> {
    let (rest, last) = name.strip_suffix(".weight")?.rsplit_once('.')?;
    let (path, e) = rest.rsplit_once('.')?;
    path.ends_with(".experts").then_some(())?;
    Some((path, e.strip_prefix("expert_").unwrap_or(e).parse().ok()?, matrix(last)?))
}

/// θ of the site `PATH.experts.E.NAME` of one matrix of an expert: its part of the stacked one.
pub(crate) fn of_expert(params: &ParamStore, path: &str) -> Result<Option<Tensors>> {
    let name = format!("{path}.weight");
    let Some((experts, e, (matrix, _))) = expert(&name) else { return Ok(None) };
    let Some(stack) = params.find(&format!("{experts}.{matrix}")) else { return Ok(None) };
    Ok(Some(Tensors::new().with("weight", stack.select(0, e as i64)?)))
}

/// Where a tensor lies: the file and its name there.
type Found = (usize, String);

/// Files in which the matrices of all experts are one tensor.
#[derive(Debug)]
pub(crate) struct Fused {
    dir: PathBuf,
    files: Vec<Box<dyn TensorFile>>,
    /// By name: the parts of a tensor, for each expert those that lie above each other. What is no
    /// expert's is one part.
    tensors: BTreeMap<String, Vec<Vec<Found>>>,
}

impl Fused {
    /// Takes the files of a folder together.
    ///
    /// # Errors
    /// Where a tensor is in two files.
    pub(crate) fn new(dir: &Path, files: Vec<Box<dyn TensorFile>>) -> Result<Self> {
        let mut all: BTreeMap<String, Found> = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.names() {
                if all.insert(name.clone(), (i, name.clone())).is_some() {
                    return Err(Error::file(file.path(), format!("has `{name}`, as another has")));
                }
            }
        }
        let mut layers: BTreeMap<&str, BTreeMap<usize, BTreeMap<Part, &Found>>> = BTreeMap::new();
        for (name, found) in &all {
            let Some((path, e, part)) = expert(name) else { continue };
            layers.entry(path).or_default().entry(e).or_default().insert(part, found);
        }
        let (mut tensors, mut taken) = (BTreeMap::new(), BTreeSet::new());
        for (path, experts) in layers {
            // Where one is missing all stay as they are, so that the error names what is there.
            let all = |parts: &[Part]| experts.values().all(|e| e.keys().eq(parts));
            let whole = experts.keys().copied().eq(0..experts.len());
            if !whole || !(all(&GATED) || all(&PLAIN)) {
                continue;
            }
            for own in experts.into_values() {
                let mut matrices: BTreeMap<&str, Vec<Found>> = BTreeMap::new();
                for ((name, _), found) in own {
                    taken.insert(found.1.clone());
                    matrices.entry(name).or_default().push(found.clone());
                }
                for (name, parts) in matrices {
                    let of_all: &mut Vec<_> = tensors.entry(format!("{path}.{name}")).or_default();
                    of_all.push(parts);
                }
            }
        }
        let others = all.into_iter().filter(|(name, _)| !taken.contains(name));
        tensors.extend(others.map(|(name, found)| (name, vec![vec![found]])));
        Ok(Fused { dir: dir.to_owned(), files, tensors })
    }

    fn parts(&self, name: &str) -> Result<&Vec<Vec<Found>>> {
        let known = || Error::unknown("tensor", name, self.tensors.keys());
        self.tensors.get(name).ok_or_else(known)
    }

    fn file(&self, (i, name): &Found) -> Result<&dyn TensorFile> {
        let lost = || Error::file(&self.dir, format!("has lost the file with `{name}`"));
        self.files.get(*i).map(AsRef::as_ref).ok_or_else(lost)
    }
}

/// Whether a tensor is made of parts at all.
fn single(parts: &[Vec<Found>]) -> Option<&Found> {
    match parts {
        [one] => match one.as_slice() {
            [found] if expert(&found.1).is_none() => Some(found),
            _ => None,
        },
        _ => None,
    }
}

impl TensorFile for Fused {
    fn path(&self) -> &Path {
        &self.dir
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        let parts = self.parts(name)?;
        if let Some(found) = single(parts) {
            return self.file(found)?.info(&found.1);
        }
        let mut of_one: Option<(Vec<i64>, Kind)> = None;
        for expert in parts {
            let mut size = [0, 0];
            let mut kind = Kind::Float;
            for found in expert {
                let (shape, own) = self.file(found)?.info(&found.1)?;
                let &[rows, cols] = shape.as_slice() else {
                    let problem = format!("`{}` is {shape:?}, and no matrix", found.1);
                    return Err(Error::file(&self.dir, problem));
                };
                (size, kind) = ([size[0] + rows, cols], own);
            }
            match &of_one {
                Some((first, _)) if *first != size => {
                    let problem = format!("`{name}` has experts of {first:?} and of {size:?}");
                    return Err(Error::file(&self.dir, problem));
                }
                _ => of_one = Some((size.to_vec(), kind)),
            }
        }
        let (size, kind) = of_one.unwrap_or((vec![0, 0], Kind::Float));
        Ok(([vec![parts.len() as i64], size].concat(), kind))
    }

    fn tensor(&self, name: &str, device: Device) -> Result<Tensor> {
        let parts = self.parts(name)?;
        let read = |found: &Found| self.file(found)?.tensor(&found.1, device);
        if let Some(found) = single(parts) {
            return read(found);
        }
        let matrix = |expert: &Vec<Found>| {
            let rows: Vec<Tensor> = expert.iter().map(read).collect::<Result<_>>()?;
            Tensor::cat(&rows, 0)
        };
        let all: Vec<Tensor> = parts.iter().map(matrix).collect::<Result<_>>()?;
        Tensor::stack(&all, 0)
    }
}

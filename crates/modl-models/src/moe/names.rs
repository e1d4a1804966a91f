//! How mixtures lie on disk: one tensor for each expert and matrix, where transformers has one for
//! all experts in memory.
//!
//! | in memory | on disk, Mixtral | on disk, OLMoE |
//! |---|---|---|
//! | `mlp.gate.weight` | `block_sparse_moe.gate.weight` | the same |
//! | `mlp.experts.gate_up_proj[E]` | `block_sparse_moe.experts.E.w1.weight` above `….w3.weight` | `mlp.experts.E.gate_proj.weight` above `….up_proj.weight` |
//! | `mlp.experts.down_proj[E]` | `block_sparse_moe.experts.E.w2.weight` | `mlp.experts.E.down_proj.weight` |
//!
//! Files that have what is in memory are read, too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use modl_core::checkpoint::TensorFile;
use modl_core::{Device, Error, Kind, Result, Tensor};

use super::{DOWN, GATE_UP};

/// The name in memory of what is called `name` on disk, but for the experts' own tensors.
pub(crate) fn in_memory(name: &str) -> String {
    name.replace(".block_sparse_moe.", ".mlp.")
}

/// Which matrix of an expert a name on disk is: that of gates, of what they gate, or the last.
fn matrix(name: &str) -> Option<usize> {
    Some(match name {
        "w1" | "gate_proj" => 0,
        "w3" | "up_proj" => 1,
        "w2" | "down_proj" => 2,
        _ => return None,
    })
}

/// `PATH.experts.E.NAME.weight` as (PATH.experts, E, matrix).
fn expert(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, last) = name.strip_suffix(".weight")?.rsplit_once('.')?;
    let (path, e) = rest.rsplit_once('.')?;
    path.ends_with(".experts").then_some(())?;
    Some((path, e.parse().ok()?, matrix(last)?))
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
        let mut layers: BTreeMap<&str, BTreeMap<usize, [Option<&Found>; 3]>> = BTreeMap::new();
        for (name, found) in &all {
            let Some((path, e, m)) = expert(name) else { continue };
            let own = layers.entry(path).or_default().entry(e).or_default();
            if let Some(place) = own.get_mut(m) {
                *place = Some(found);
            }
        }
        let (mut tensors, mut taken) = (BTreeMap::new(), BTreeSet::new());
        for (path, experts) in layers {
            // Where one is missing all stay as they are, so that the error names what is there.
            let whole = experts.keys().copied().eq(0..experts.len());
            let Some(all) = experts.into_values().map(complete).collect::<Option<Vec<_>>>() else {
                continue;
            };
            if !whole {
                continue;
            }
            let parts = |of: fn([Found; 3]) -> Vec<Found>| all.iter().cloned().map(of).collect();
            taken.extend(all.iter().flatten().map(|(_, name)| name.clone()));
            tensors.insert(format!("{path}.{GATE_UP}"), parts(|[gate, up, _]| vec![gate, up]));
            tensors.insert(format!("{path}.{DOWN}"), parts(|[_, _, down]| vec![down]));
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

fn complete(expert: [Option<&Found>; 3]) -> Option<[Found; 3]> {
    let [a, b, c] = expert;
    Some([a?.clone(), b?.clone(), c?.clone()])
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

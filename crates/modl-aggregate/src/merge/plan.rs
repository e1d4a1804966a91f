//! What a merge is going to do, known in full before anything is read or written.

use std::path::PathBuf;
use std::sync::Arc;

use modl_core::shards::{self, ShardSize};
use modl_core::{Error, Result, ResultExt, Seed};
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use super::elements::{Stored, width};
use super::vocabulary::Reordered;
use super::{Group, Input, MergeMethods, Settings, Source, Statistics, Vocabulary, largest};

/// How the files with tensors are called.
pub(super) const STEM: &str = "model";

/// A merge: which tensors come of which, and how.
#[derive(Debug)]
pub struct Plan {
    /// The method.
    pub method: String,
    /// The models that are read.
    pub sources: Vec<Source>,
    /// The tensors that are written, sorted by name.
    pub outputs: Vec<Output>,
    /// What is written beside them: name and contents.
    pub texts: Vec<(String, String)>,
    /// What is copied beside them.
    pub copies: Vec<PathBuf>,
    /// Where random choices come from.
    pub seed: Seed,
    /// The size of a file at most.
    pub shard: ShardSize,
    /// Whether numbers that are not finite may be in an input.
    pub allow_nan: bool,
    /// What a reader should know: tensors that were left out or taken from one model, and why.
    pub notes: Vec<String>,
}

/// A tensor that is written.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Of what its elements will be.
    pub dtype: Dtype,
    /// What inputs are rounded to first.
    pub rounded: Option<Dtype>,
    /// The source and the name there of each tensor that it comes of.
    pub inputs: Vec<(usize, String)>,
    /// Which of the inputs is the base.
    pub base: Option<usize>,
    /// For a tensor with a row for each token: where rows come from. Its rows name the inputs.
    pub vocabulary: Option<Arc<Vocabulary>>,
    /// The method's settings; `None` for a copy of the first input.
    pub settings: Option<Settings>,
}

impl Output {
    /// Its bytes in the file.
    pub fn bytes(&self) -> u64 {
        let n: u64 = self.shape.iter().map(|n| *n as u64).product();
        n * self.dtype.bitsize() as u64 / 8
    }

    /// Its tensors in the order of its vocabulary; none where it has none.
    pub(crate) fn reordered<'a>(&'a self, stored: &'a [Stored<'a>]) -> Vec<Reordered<'a>> {
        let width = self.shape.iter().skip(1).product();
        let rows = self.vocabulary.iter().flat_map(|v| &v.rows);
        rows.map(|rows| Reordered::new(stored, rows, width)).collect()
    }
}

/// A file of the result.
#[derive(Debug, Clone)]
pub struct Shard {
    /// Its name.
    pub file: String,
    /// Its tensors: places in [`Plan::outputs`].
    pub outputs: std::ops::Range<usize>,
}

/// What a plan costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that are read, once.
    pub read: u64,
    /// Bytes that are written.
    pub written: u64,
    /// Bytes of memory at most, beside what the program itself takes.
    pub memory: u64,
}

impl Plan {
    /// The files of the result, in which tensors stand in their order.
    pub fn shards(&self) -> Vec<Shard> {
        let cut = shards::divide(self.outputs.iter().map(Output::bytes), self.shard);
        let of = cut.len();
        let name = |(n, outputs)| Shard { file: shards::file_name(STEM, n, of), outputs };
        cut.into_iter().enumerate().map(name).collect()
    }

    /// Bytes read and written, and the bound of memory for so many threads.
    ///
    /// # Errors
    /// Where the plan names what is not there.
    pub fn cost(&self, methods: &MergeMethods, threads: usize) -> Result<Cost> {
        let spec = methods.find(&self.method)?.spec();
        let (mut read, mut memory) = (0, 0);
        for output in &self.outputs {
            for (source, name) in &output.inputs {
                read += self.source(*source)?.place(name)?.bytes;
            }
            let Some(_) = output.settings else { continue };
            let inputs = output.inputs.iter().map(|_| Input::new("", &NONE)).collect();
            let group = Group::new(&output.name, &output.shape, inputs, self.seed).cut_for(&spec);
            // A thread holds a piece of each input, as much again for what a method makes of them,
            // and the bytes that go out.
            let pieces = threads as u64 * 3 * group.chunk_bytes() as u64;
            let selection = if spec.selects {
                largest::bytes(group.len(), output.inputs.len() + 1, threads)
            } else {
                0
            };
            let (more, whole) = self.statistics_cost(output, spec.statistics)?;
            read += more;
            memory = memory.max(pieces + selection + whole);
        }
        let written = self.outputs.iter().map(Output::bytes).sum();
        let held: u64 = self.sources.iter().map(Source::held).sum();
        Ok(Cost { read, written, memory: memory + held })
    }

    /// Bytes of the statistics of a tensor that are read, and bytes of memory for those that have to
    /// be there as a whole.
    fn statistics_cost(&self, output: &Output, kind: Option<Statistics>) -> Result<(u64, u64)> {
        let Some(kind) = kind else { return Ok((0, 0)) };
        let mut read = 0;
        for (source, name) in &output.inputs {
            read += self.source(*source)?.statistics(name).map_or(0, |s| s.bytes);
        }
        let whole = match (kind, output.shape.as_slice()) {
            (Statistics::Gram, [rows, columns]) if read > 0 => {
                // In f64: three square matrices, and three of the weight's shape.
                let (rows, columns) = (*rows as u64, *columns as u64);
                8 * (3 * columns * columns + 3 * rows * columns)
            }
            _ => 0,
        };
        Ok((read, whole))
    }

    /// What tells this plan from others: a resumed merge has to have the same.
    pub(crate) fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |text: String| hash.update((text + "\n").as_bytes());
        add(format!("{} {:?} {} {}", self.method, self.seed, self.shard, self.allow_nan));
        self.sources.iter().flat_map(Source::identity).for_each(&mut add);
        self.outputs.iter().for_each(|o| add(format!("{o:?}")));
        self.texts.iter().for_each(|t| add(format!("{t:?}")));
        let digest = hash.finalize();
        digest.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The tensors that one comes of, as they are stored.
    pub(crate) fn stored(&self, output: &Output) -> Result<Vec<Stored<'_>>> {
        let one =
            |(source, name): &(usize, String)| self.source(*source)?.elements(name, output.rounded);
        output.inputs.iter().map(one).collect()
    }

    /// The statistics of each input of a tensor, where there are any.
    pub(crate) fn statistics(&self, output: &Output) -> Result<Vec<Option<Stored<'_>>>> {
        let one = |(source, name): &(usize, String)| {
            let beside = self.source(*source)?.beside.as_deref();
            let there = beside.filter(|s| s.tensors().contains_key(name));
            there.map(|s| s.elements(name, None)).transpose()
        };
        output.inputs.iter().map(one).collect()
    }

    /// One of the sources.
    pub(crate) fn source(&self, i: usize) -> Result<&Source> {
        self.sources.get(i).ok_or_else(|| Error::invalid("plan", format!("there is no model {i}")))
    }

    /// Checks shapes, kinds and settings of all tensors, so that a merge that starts can end.
    ///
    /// # Errors
    /// The first that does not fit.
    pub fn check(&self, methods: &MergeMethods) -> Result<()> {
        let spec = methods.find(&self.method)?.spec();
        if self.outputs.is_empty() {
            return Err(Error::invalid("merge", "there is no tensor to write"));
        }
        for output in self.outputs.iter().filter(|o| o.settings.is_some()) {
            spec.check(output.inputs.len(), output.base.is_some()).at(&output.name)?;
            if let Some(kind) = spec.statistics {
                self.check_statistics(output, kind)?;
            }
            for (source, name) in &output.inputs {
                let place = self.source(*source)?.place(name)?;
                let rows = usize::from(output.vocabulary.is_some());
                let alike = place.shape.len() == output.shape.len()
                    && place.shape.get(rows..) == output.shape.get(rows..);
                if !alike || width(place.dtype).is_none() {
                    return Err(Error::invalid(
                        &output.name,
                        format!(
                            "is {:?} {:?} in {} and not {:?}",
                            place.dtype,
                            place.shape,
                            self.source(*source)?.name,
                            output.shape
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Plan {
    /// Checks that either all or none of a tensor's models have statistics of it, in its shape.
    fn check_statistics(&self, output: &Output, kind: Statistics) -> Result<()> {
        let mut lacking = Vec::new();
        for (source, name) in &output.inputs {
            let source = self.source(*source)?;
            let Some(found) = source.statistics(name) else {
                lacking.push(source.name.as_str());
                continue;
            };
            if output.vocabulary.is_some() {
                let problem = "are of rows that the tokenizers' union puts elsewhere; take the tensor \
                               out of the file";
                return Err(Error::invalid(format!("statistics of `{}`", output.name), problem));
            }
            let wanted = kind.shape(&output.shape);
            if wanted.as_ref() != Some(&found.shape) {
                let problem = match wanted {
                    Some(shape) => {
                        format!("are {:?} in {} and not {shape:?}", found.shape, source.name)
                    }
                    None => {
                        format!("are in {}, where there are none of such a tensor", source.name)
                    }
                };
                return Err(Error::invalid(format!("statistics of `{}`", output.name), problem));
            }
        }
        if lacking.is_empty() || lacking.len() == output.inputs.len() {
            return Ok(());
        }
        let problem = format!("are not in the files of {}, but in others", lacking.join(", "));
        Err(Error::invalid(format!("statistics of `{}`", output.name), problem))
    }
}

static NONE: Vec<f32> = Vec::new();

//! One tensor of all models: what a method sees.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use modl_core::{Error, Result, Seed};
use rayon::prelude::*;

use super::gram::{Gram, inner};
use super::{Elements, Largest, Spec, Statistics};

/// Numbers that are worked on together. Few enough that those of some models stay in a core's cache;
/// the same for any number of threads, so that sums are rounded alike.
const CHUNK: usize = 1 << 15;

/// The tensors that become one.
#[derive(Debug)]
pub struct Group<'a> {
    /// Its name in the output, for errors.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    /// The models' tensors, in the order of the configuration.
    pub inputs: Vec<Input<'a>>,
    /// Which of them is the base, if there is one.
    pub base: Option<usize>,
    /// Where random choices in this tensor come from.
    pub seed: Seed,
    /// For each input that is not the base: which of its numbers are among the largest of the whole
    /// model. Known where the method has asked for it.
    pub among: Option<Vec<Largest>>,
    /// Whether chunks hold whole rows.
    by_rows: bool,
    /// Whether chunks hold the inputs' statistics.
    with_statistics: bool,
}

/// One model's tensor.
#[derive(Debug)]
pub struct Input<'a> {
    /// The model's name.
    pub model: &'a str,
    /// Its numbers.
    pub elements: &'a dyn Elements,
    /// What else is known of it, for methods that ask for it.
    pub statistics: Option<&'a dyn Elements>,
}

impl<'a> Input<'a> {
    /// A tensor of which nothing else is known.
    pub fn new(model: &'a str, elements: &'a dyn Elements) -> Self {
        Input { model, elements, statistics: None }
    }

    /// With these statistics.
    pub fn with_statistics(self, statistics: Option<&'a dyn Elements>) -> Self {
        Input { statistics, ..self }
    }
}

/// What a thread reads pieces into.
struct Buffers {
    tensors: Vec<Vec<f32>>,
    statistics: Vec<Vec<f32>>,
}

/// A piece of all tensors of a group.
#[derive(Debug)]
pub struct Chunk<'a> {
    /// The number of the piece.
    pub index: usize,
    /// The place of its first number in the tensor.
    pub start: usize,
    /// Numbers in a row (the last dimension); all of a chunk where it does not hold whole rows.
    pub row: usize,
    tensors: &'a [Vec<f32>],
    statistics: &'a [Vec<f32>],
    /// The numbers of `tensors` that belong to it.
    window: Range<usize>,
}

impl Chunk<'_> {
    /// The numbers of one model.
    pub fn of(&self, input: usize) -> &[f32] {
        let all = self.tensors.get(input).and_then(|t| t.get(self.window.clone()));
        all.unwrap_or_default()
    }

    /// The statistics of one model's numbers; empty where it has none, or the method asked for
    /// none of this shape.
    pub fn statistics(&self, input: usize) -> &[f32] {
        let all = self.statistics.get(input).and_then(|s| s.get(self.window.clone()));
        all.unwrap_or_default()
    }

    /// How many numbers each model has here.
    pub fn len(&self) -> usize {
        self.window.len()
    }

    /// `len` of its numbers from `from` on.
    pub(crate) fn part(&self, from: usize, len: usize) -> Chunk<'_> {
        let start = self.window.start + from;
        Chunk {
            start: self.start + from,
            row: self.row.min(len),
            window: start..start + len,
            ..*self
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> Group<'a> {
    /// Tensors without a base, whose chunks need not hold whole rows.
    pub fn new(name: &'a str, shape: &'a [usize], inputs: Vec<Input<'a>>, seed: Seed) -> Self {
        let (by_rows, with_statistics) = (false, false);
        Group { name, shape, inputs, base: None, seed, among: None, by_rows, with_statistics }
    }

    /// Names one of the inputs, or none, as the base.
    pub fn with_base(self, base: impl Into<Option<usize>>) -> Self {
        Group { base: base.into(), ..self }
    }

    /// With chunks as a method wants them: of whole rows, with statistics.
    pub fn cut_for(self, spec: &Spec) -> Self {
        let with_statistics = spec.statistics == Some(Statistics::Fisher);
        Group { by_rows: spec.by_rows, with_statistics, ..self }
    }

    /// Numbers in the tensor.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The inputs that are not the base.
    pub fn others(&self) -> Vec<usize> {
        (0..self.inputs.len()).filter(|i| Some(*i) != self.base).collect()
    }

    /// The base.
    ///
    /// # Errors
    /// Where there is none.
    pub fn need_base(&self) -> Result<usize> {
        self.base.ok_or_else(|| Error::invalid(self.name, "has no base; name a `base_model`"))
    }

    /// The seed of random choices for one input: it depends on the tensor's name and on the model's
    /// place among those that are not the base, and not on where the models lie.
    pub fn seed_of(&self, input: usize) -> Seed {
        let place = self.others().iter().position(|i| *i == input).unwrap_or_default();
        self.seed.child(self.name).nth(place as u64)
    }

    fn row(&self) -> usize {
        self.shape.last().copied().unwrap_or(1).max(1)
    }

    fn chunk_len(&self) -> usize {
        if self.by_rows { (CHUNK / self.row()).max(1) * self.row() } else { CHUNK }
    }

    /// The pieces of the tensor.
    pub fn chunks(&self) -> usize {
        self.len().div_ceil(self.chunk_len())
    }

    fn range(&self, index: usize) -> Range<usize> {
        let n = self.chunk_len();
        index * n..((index + 1) * n).min(self.len())
    }

    /// Bytes of memory for one piece of all inputs.
    pub(crate) fn chunk_bytes(&self) -> usize {
        let each = if self.with_statistics { 2 } else { 1 };
        self.chunk_len().min(self.len()) * 4 * (each * self.inputs.len() + 1)
    }

    /// Calls `work` with each piece, on all threads; what it gives comes in the order of the pieces.
    ///
    /// # Errors
    /// Where a tensor cannot be read, or what `work` gives.
    pub fn each<T: Send>(
        &self,
        work: impl Fn(&Chunk) -> Result<T> + Send + Sync,
    ) -> Result<Vec<T>> {
        let chunks = self.chunks();
        let workers = rayon::current_num_threads().min(chunks);
        if workers <= 1 {
            let mut buffers = self.buffers();
            return (0..chunks)
                .map(|i| self.read(self.range(i), i, &mut buffers, &work)?)
                .collect();
        }
        // Each worker has one set of buffers and takes the next piece: memory is bounded, and none
        // waits for another.
        let next = AtomicUsize::new(0);
        let worker = |_| -> Result<Vec<(usize, T)>> {
            let mut buffers = self.buffers();
            let mut done = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= chunks {
                    return Ok(done);
                }
                done.push((i, self.read(self.range(i), i, &mut buffers, &work)??));
            }
        };
        let parts: Result<Vec<_>> = (0..workers).into_par_iter().map(worker).collect();
        let mut all: Vec<(usize, T)> = parts?.into_iter().flatten().collect();
        all.sort_unstable_by_key(|(i, _)| *i);
        Ok(all.into_iter().map(|(_, t)| t).collect())
    }

    /// Calls `work` with the start of each piece, at least `n` numbers and whole rows.
    pub(crate) fn sample<T: Send>(
        &self,
        n: usize,
        work: impl Fn(&Chunk) -> T + Send + Sync,
    ) -> Result<Vec<T>> {
        let n = if self.by_rows { n.next_multiple_of(self.row()) } else { n };
        let one = |i: usize| {
            let Range { start, end } = self.range(i);
            self.read(start..(start + n).min(end), i, &mut self.buffers(), &work)
        };
        spread(self.chunks(), one).into_iter().collect()
    }

    fn buffers(&self) -> Buffers {
        let none = || vec![Vec::new(); self.inputs.len()];
        Buffers { tensors: none(), statistics: none() }
    }

    /// Reads one piece of all inputs.
    fn read<T>(
        &self,
        range: Range<usize>,
        index: usize,
        buffers: &mut Buffers,
        work: impl FnOnce(&Chunk) -> T,
    ) -> Result<T> {
        let fill = |elements: &dyn Elements, buffer: &mut Vec<f32>| {
            buffer.resize(range.len(), 0.0);
            elements.read(range.start, buffer)
        };
        for (input, buffer) in self.inputs.iter().zip(&mut buffers.tensors) {
            fill(input.elements, buffer)?;
        }
        for (input, buffer) in self.inputs.iter().zip(&mut buffers.statistics) {
            if let Some(statistics) = input.statistics.filter(|_| self.with_statistics) {
                fill(statistics, buffer)?;
            }
        }
        let row = if self.by_rows { self.row() } else { range.len() };
        let (tensors, statistics) = (&buffers.tensors, &buffers.statistics);
        let window = 0..range.len();
        Ok(work(&Chunk { index, start: range.start, row, tensors, statistics, window }))
    }

    /// Sums of what `work` adds to `n` numbers for each piece, in the order of the pieces and so the
    /// same for any number of threads.
    ///
    /// # Errors
    /// What [`Group::each`] gives.
    pub fn sums(
        &self,
        n: usize,
        work: impl Fn(&Chunk, &mut [f64]) + Send + Sync,
    ) -> Result<Vec<f64>> {
        let parts = self.each(|chunk| {
            let mut sums = vec![0.0; n];
            work(chunk, &mut sums);
            Ok(sums)
        })?;
        let mut total = vec![0.0; n];
        for part in parts {
            total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
        }
        Ok(total)
    }

    /// Sums of whole numbers, which come out the same in any order.
    ///
    /// # Errors
    /// What [`Group::each`] gives.
    pub(crate) fn counts(
        &self,
        n: usize,
        work: impl Fn(&Chunk, &mut [u64], &mut Vec<f32>) + Send + Sync,
    ) -> Result<Vec<u64>> {
        // One table for each thread and not for each piece: they are large.
        let parts = rayon::current_num_threads().clamp(1, self.chunks().max(1));
        let share = self.chunks().div_ceil(parts);
        let add = |mut a: Vec<u64>, b: Vec<u64>| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        };
        let part = |part: usize| {
            let (mut counts, mut scratch) = (vec![0; n], Vec::new());
            let mut buffers = self.buffers();
            for index in part * share..((part + 1) * share).min(self.chunks()) {
                self.read(self.range(index), index, &mut buffers, |chunk| {
                    work(chunk, &mut counts, &mut scratch)
                })?;
            }
            Ok(counts)
        };
        let all: Result<Vec<Vec<u64>>> = spread(parts, part).into_iter().collect();
        Ok(all?.into_iter().reduce(add).unwrap_or_else(|| vec![0; n]))
    }

    /// The inner products of all inputs, less the base where `from_base` (whose own row is then 0):
    /// all that a combination of whole tensors needs to know.
    ///
    /// # Errors
    /// What [`Group::each`] gives.
    pub fn gram(&self, from_base: bool) -> Result<Gram> {
        let k = self.inputs.len();
        let base = self.base.filter(|_| from_base);
        let sums = self.sums(k * k, |chunk, sums| {
            let less = base.map(|b| chunk.of(b));
            for i in 0..k {
                for j in 0..=i {
                    let product = inner(chunk.of(i), chunk.of(j), less);
                    if let Some(s) = sums.get_mut(i * k + j) {
                        *s += product;
                    }
                }
            }
        })?;
        Ok(Gram { k, sums })
    }
}

/// The results of 0 to n, in their order; on all threads where there are several. To wake them for one
/// would cost more than a small tensor does.
pub(super) fn spread<T: Send>(n: usize, work: impl Fn(usize) -> T + Send + Sync) -> Vec<T> {
    match n {
        0 | 1 => (0..n).map(work).collect(),
        _ => (0..n).into_par_iter().map(work).collect(),
    }
}

/// A number in [0, 1) that depends on a seed and a place alone, whatever was drawn before.
pub fn uniform(seed: Seed, place: u64) -> f32 {
    // 24 bits are what an f32 holds.
    (seed.nth(place).0 >> 40) as f32 * (1.0 / (1u32 << 24) as f32)
}

//! Rows or tokens sorted by the module that each goes to.

use crate::{Device, Error, Result, Signal, Tensor};

/// Choices of k modules for each of many units (rows, tokens), sorted by module: one gather brings
/// the units into this order, each module works on a part of it that lies in one piece, and one
/// scatter brings back what they say. A *slot* is one of the k places of one unit.
#[derive(Debug)]
pub struct Grouping {
    k: i64,
    units: i64,
    /// The slots with a module, by module; those of one module in their order.
    slots: Vec<i64>,
    counts: Vec<i64>,
}

impl Grouping {
    /// Of the choices `index` `[…, k]` i64 among `modules`, where −1 stands for none.
    ///
    /// # Errors
    /// Where a choice is none of them.
    pub fn new(index: &Tensor, modules: usize) -> Result<Self> {
        let chosen = index.to_vec::<i64>()?;
        let mut counts = vec![0i64; modules];
        for j in chosen.iter().filter(|j| **j != -1) {
            match usize::try_from(*j).ok().and_then(|j| counts.get_mut(j)) {
                Some(n) => *n += 1,
                None => {
                    let problem = format!("module {j} is chosen where there are {modules}");
                    return Err(Error::invalid("routing", problem));
                }
            }
        }
        let mut next = Vec::with_capacity(modules);
        let mut total = 0;
        for n in &counts {
            next.push(total as usize);
            total += n;
        }
        let mut slots = vec![0i64; total as usize];
        for (slot, j) in (0..).zip(&chosen) {
            let Some(at) = usize::try_from(*j).ok().and_then(|j| next.get_mut(j)) else { continue };
            if let Some(place) = slots.get_mut(*at) {
                *place = slot;
            }
            *at += 1;
        }
        let units = index.size().iter().rev().skip(1).product();
        Ok(Grouping { k: index.len_of(-1).max(1), units, slots, counts })
    }

    /// How many slots each module has.
    pub fn counts(&self) -> &[i64] {
        &self.counts
    }

    /// The number of slots with a module.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether no unit has a module.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The number of units, those without a module among them.
    pub(crate) fn all_units(&self) -> i64 {
        self.units
    }

    /// Whether every slot has a module.
    pub(crate) fn complete(&self) -> bool {
        self.slots.len() as i64 == self.units * self.k
    }

    /// The slots with a module, sorted.
    pub(crate) fn slots(&self) -> &[i64] {
        &self.slots
    }

    /// The unit of a slot.
    pub(crate) fn unit(&self, slot: i64) -> i64 {
        slot / self.k
    }

    /// The unit of each sorted slot, `[n]`.
    pub fn units(&self, device: Device) -> Result<Tensor> {
        let units: Vec<i64> = self.slots.iter().map(|s| self.unit(*s)).collect();
        Tensor::from_slice(&units, &[units.len() as i64], device)
    }

    /// The weights `[…, k]` of the sorted slots, `[n]`.
    pub fn weights(&self, weight: &Tensor) -> Result<Tensor> {
        let at = Tensor::from_slice(&self.slots, &[self.slots.len() as i64], weight.device())?;
        weight.reshape(&[-1])?.index_select(0, &at)
    }

    /// What is sorted, `[n, …]`, as one part for each module, which may be empty.
    pub fn parts(&self, sorted: &Tensor) -> Result<Vec<Tensor>> {
        sorted.split(&self.counts, 0)
    }

    /// [`Grouping::parts`] of a signal.
    pub(crate) fn split(&self, sorted: &Signal) -> Result<Vec<Signal>> {
        let mut parts: Vec<Signal> = self.parts(&sorted.x)?.into_iter().map(Signal::from).collect();
        for (name, t) in sorted.with.iter() {
            for (part, t) in parts.iter_mut().zip(self.parts(t)?) {
                part.with.set(name.to_owned(), t);
            }
        }
        Ok(parts)
    }

    /// The sorted slots in blocks of `size`, each of one module: the modules of the blocks, and for
    /// each of their places the slot, or none behind the last one of a module.
    pub(crate) fn blocks(&self, size: usize) -> (Vec<usize>, Vec<Option<i64>>) {
        let (mut owners, mut places) = (Vec::new(), Vec::new());
        let mut rest = self.slots.as_slice();
        for (j, n) in self.counts.iter().enumerate() {
            let (own, others) = rest.split_at_checked(*n as usize).unwrap_or((rest, &[]));
            rest = others;
            for block in own.chunks(size.max(1)) {
                owners.push(j);
                places.extend(block.iter().copied().map(Some));
                places.extend(std::iter::repeat_n(None, size - block.len()));
            }
        }
        (owners, places)
    }

    /// For each unit the place of its last slot among the sorted ones.
    pub(crate) fn last_places(&self) -> Vec<Option<i64>> {
        let mut last = vec![None; self.units.max(0) as usize];
        for (place, slot) in (0..).zip(&self.slots) {
            if let Some(l) = last.get_mut(self.unit(*slot) as usize) {
                *l = Some(place);
            }
        }
        last
    }

    /// Σ over the slots of each unit of weight · y: sorted y `[n, …]` and weights `[n]` →
    /// `[units, …]`, zeros where a unit has no module.
    pub fn weighted_sum(&self, y: &Tensor, weights: &Tensor) -> Result<Tensor> {
        let mut shape = vec![1; y.dim()];
        if let Some(n) = shape.first_mut() {
            *n = -1;
        }
        let weighed = y.mul(&weights.reshape(&shape)?.to_kind(y.kind())?)?;
        let mut size = y.size();
        if let Some(n) = size.first_mut() {
            *n = self.units;
        }
        let units = self.units(y.device())?;
        Tensor::zeros(&size, y.kind(), y.device())?.index_add(0, &units, &weighed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn indices(values: &[i64], shape: &[i64]) -> Tensor {
        Tensor::from_slice(values, shape, Device::Cpu).unwrap()
    }

    #[test]
    fn slots_are_sorted_by_module_and_keep_their_order() {
        let index = indices(&[2, 0, -1, 2, 0, 3], &[3, 2]);
        let g = Grouping::new(&index, 5).unwrap();
        assert_eq!(g.counts(), [2, 0, 2, 1, 0]);
        assert_eq!(g.slots(), [1, 4, 0, 3, 5]);
        assert_eq!(g.units(Device::Cpu).unwrap().to_vec::<i64>().unwrap(), [0, 2, 0, 1, 2]);
        assert_eq!(g.last_places(), [Some(2), Some(3), Some(4)]);
        assert!(!g.complete() && g.all_units() == 3);
        let (owners, places) = g.blocks(2);
        assert_eq!(owners, [0, 2, 3]);
        assert_eq!(places, [Some(1), Some(4), Some(0), Some(3), Some(5), None]);
    }

    #[test]
    fn a_unit_gets_what_its_slots_say() {
        let index = indices(&[1, 0, -1, 1, -1, -1], &[3, 2]);
        let g = Grouping::new(&index, 2).unwrap();
        let weight =
            Tensor::from_slice(&[0.5f64, 2., 9., 3., 9., 9.], &[3, 2], Device::Cpu).unwrap();
        let weights = g.weights(&weight).unwrap();
        assert_eq!(weights.to_vec::<f64>().unwrap(), [2., 0.5, 3.]);
        let y = Tensor::from_slice(&[1f64, 10., 100.], &[3, 1], Device::Cpu).unwrap();
        let sum = g.weighted_sum(&y, &weights).unwrap();
        assert_eq!(sum.to_vec::<f64>().unwrap(), [7., 300., 0.]);
    }

    #[test]
    fn what_is_no_module_is_refused_and_nothing_is_nothing() {
        assert!(Grouping::new(&indices(&[0, 5], &[1, 2]), 5).is_err());
        assert!(Grouping::new(&indices(&[0, -2], &[1, 2]), 5).is_err());
        let g = Grouping::new(&indices(&[], &[0, 2]), 5).unwrap();
        assert!(g.is_empty() && g.complete() && g.all_units() == 0 && g.counts() == [0; 5]);
    }
}

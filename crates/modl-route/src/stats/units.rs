//! A routing unit by unit: what each row or token chose.

use modl_core::{Device, Error, Kind, Result, Routing, Tensor, Weights};

/// The choices of many units (rows, or real tokens), one after the other.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Units {
    /// The row of each unit.
    pub(super) rows: Vec<u32>,
    /// Where the choices of each unit end.
    pub(super) ends: Vec<usize>,
    /// Which modules, αⱼ ≠ 0, ascending within a unit where α is dense.
    pub(super) chosen: Vec<u32>,
    /// αⱼ of each.
    pub(super) weights: Vec<f64>,
    /// How many of each unit's choices full modules dropped.
    pub(super) dropped: Vec<f64>,
}

/// One row or token.
#[derive(Debug, Clone, Copy)]
pub struct Unit<'a> {
    /// Its row.
    pub row: usize,
    /// The modules with αⱼ ≠ 0.
    pub chosen: &'a [u32],
    /// Their αⱼ.
    pub weights: &'a [f64],
    /// How many of its choices full modules dropped.
    pub dropped: f64,
}

impl Units {
    /// The units of a routing over a batch of `rows` rows. An α for all counts once for each row. Of
    /// tokens those count whose `mask` `[batch, seq]` is not 0; a mask of other tokens than the
    /// routing's, as an encoder's is for its decoder, hides none.
    ///
    /// A sparse index of −1 is no choice. What full modules dropped a router notes as `overflow`: how
    /// many choices of each unit, or `[]` how many of all together, which are then shared out evenly.
    ///
    /// # Errors
    /// Where α is not finite, is of a module that there is not, or does not fit the rows.
    pub fn of(routing: &Routing, rows: usize, mask: Option<&Tensor>) -> Result<Self> {
        let m = routing.modules;
        let mut units = Units::default();
        // One unit for each line of `k` modules and weights.
        let (index, weight, k, shape) = match &routing.weights {
            Weights::Sparse { index, weight } => {
                let k = index.len_of(-1).max(0) as usize;
                (index.to_vec::<i64>()?, numbers(weight)?, k, units_of(&index.size()))
            }
            _ => {
                let alpha = routing.dense(Kind::Double, Device::Cpu)?.detach()?;
                let shape = units_of(&alpha.size());
                (Vec::new(), alpha.to_vec::<f64>()?, m, shape)
            }
        };
        let count: i64 = shape.iter().product();
        let lost = lost(routing, count as usize)?;
        let seen = match mask {
            Some(mask) if shape.len() == 2 && mask.size() == shape => Some(numbers(mask)?),
            _ => None,
        };
        if shape.first().is_some_and(|batch| *batch != rows as i64) {
            let problem = format!("is of {shape:?} units, the batch has {rows} rows");
            return Err(Error::invalid("α", problem));
        }
        let per_row = if shape.is_empty() { 1 } else { count as usize / rows.max(1) };
        let mut chosen: Vec<(u32, f64)> = Vec::new();
        for u in 0..count as usize {
            if seen.as_ref().is_some_and(|s| s.get(u) == Some(&0.0)) {
                continue;
            }
            chosen.clear();
            for (i, w) in weight.iter().skip(u * k).take(k).enumerate() {
                let j = if index.is_empty() { i as i64 } else { index[u * k + i] };
                if j >= m as i64 || !w.is_finite() {
                    let problem = format!("is {w} for module {j} of {m}");
                    return Err(Error::invalid("α", problem));
                }
                if index.is_empty() {
                    chosen.push((j as u32, *w));
                } else if let Some((_, sum)) = chosen.iter_mut().find(|(c, _)| i64::from(*c) == j) {
                    *sum += w;
                } else if j >= 0 {
                    chosen.push((j as u32, *w));
                }
            }
            chosen.retain(|(_, w)| *w != 0.0);
            // One α for all is that of each row.
            let own = if shape.is_empty() { 0..rows } else { u / per_row..u / per_row + 1 };
            for row in own {
                units.push(row, &chosen, lost.get(u).copied().unwrap_or(0.0));
            }
        }
        if let ([all], true) = (lost.as_slice(), count != 1) {
            let each = all / units.len().max(1) as f64;
            units.dropped.fill(each);
        }
        Ok(units)
    }

    fn push(&mut self, row: usize, chosen: &[(u32, f64)], dropped: f64) {
        self.rows.push(row as u32);
        self.chosen.extend(chosen.iter().map(|(j, _)| *j));
        self.weights.extend(chosen.iter().map(|(_, w)| *w));
        self.ends.push(self.chosen.len());
        self.dropped.push(dropped);
    }

    /// Adds the units of another batch, whose first row is `row` here.
    pub fn append(&mut self, other: &Units, row: usize) {
        let start = self.chosen.len();
        self.rows.extend(other.rows.iter().map(|r| r + row as u32));
        self.ends.extend(other.ends.iter().map(|e| e + start));
        self.chosen.extend(&other.chosen);
        self.weights.extend(&other.weights);
        self.dropped.extend(&other.dropped);
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Unit by unit.
    pub fn iter(&self) -> impl Iterator<Item = Unit<'_>> {
        let starts = std::iter::once(&0).chain(&self.ends);
        let ranges = starts.zip(&self.ends).map(|(a, b)| *a..*b);
        self.rows.iter().zip(ranges).zip(&self.dropped).map(|((row, range), dropped)| Unit {
            row: *row as usize,
            chosen: self.chosen.get(range.clone()).unwrap_or(&[]),
            weights: self.weights.get(range).unwrap_or(&[]),
            dropped: *dropped,
        })
    }
}

/// The shape of what has an α: without the last dimension.
fn units_of(shape: &[i64]) -> Vec<i64> {
    shape.split_last().map_or_else(Vec::new, |(_, units)| units.to_vec())
}

fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    t.detach()?.to_device(Device::Cpu)?.to_kind(Kind::Double)?.to_vec::<f64>()
}

/// The number of dropped choices of each unit, or of all together; empty where none is noted.
fn lost(routing: &Routing, count: usize) -> Result<Vec<f64>> {
    let Some(noted) = routing.noted.get("overflow") else { return Ok(Vec::new()) };
    let values = numbers(noted)?;
    let sound = values.iter().all(|v| *v >= 0.0 && v.is_finite());
    if sound && (values.len() == 1 || values.len() == count) {
        return Ok(values);
    }
    let problem = format!("is {noted:?} for {count} rows or tokens");
    Err(Error::invalid("what a router noted as `overflow`", problem))
}

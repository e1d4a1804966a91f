//! Features of examples, beside what a network reads of them.

use std::sync::OnceLock;

use modl_core::{Error, Result, Tensor, Tensors};

use crate::{Dataset, Example};

impl Dataset {
    /// A feature for each example: `rows` `[examples, …]`, for instance embeddings by a frozen
    /// model. A batch hands its rows to the forward pass under this name.
    ///
    /// # Errors
    /// Where there is not one row for each example.
    pub fn with_feature(mut self, name: impl Into<String>, rows: Tensor) -> Result<Self> {
        let name = name.into();
        if rows.dim() == 0 || rows.len_of(0) != self.len() as i64 {
            let problem = format!("has shape {:?} for {} examples", rows.size(), self.len());
            return Err(Error::invalid(format!("feature `{name}`"), problem));
        }
        self.origins.remove(&name);
        self.features.set(name, rows);
        self.fingerprint = OnceLock::new();
        Ok(self)
    }

    /// [`Dataset::with_feature`] of rows that are computed from the inputs of the examples, by what `origin`
    /// names. The fingerprint knows them by it, and not by their numbers, whose last bits differ between
    /// processors and numbers of threads.
    ///
    /// # Errors
    /// As [`Dataset::with_feature`].
    pub fn with_computed(
        self,
        name: impl Into<String>,
        rows: Tensor,
        origin: impl Into<String>,
    ) -> Result<Self> {
        let name = name.into();
        let mut data = self.with_feature(name.as_str(), rows)?;
        data.origins.insert(name, origin.into());
        Ok(data)
    }

    /// The targets of these examples, with the inputs and features of `known`, which are held once then;
    /// nothing where the two do not have the same examples with the same inputs.
    ///
    /// # Errors
    /// Where inputs cannot be read.
    pub fn with_inputs_of(&self, known: &Dataset) -> Result<Option<Dataset>> {
        let alike = |(own, other): (&Example, &Example)| {
            own.id == other.id && own.task == other.task && own.ids == other.ids
        };
        let same = self.pad == known.pad
            && self.len() == known.len()
            && self.inputs.keys().eq(known.inputs.keys())
            && self.examples.iter().zip(&known.examples).all(alike);
        if !same {
            return Ok(None);
        }
        for (own, other) in self.inputs.values().zip(known.inputs.values()) {
            if own.digest()? != other.digest()? {
                return Ok(None);
            }
        }
        let mut data = Dataset { fingerprint: OnceLock::new(), ..known.clone() };
        for (example, own) in data.examples.iter_mut().zip(&self.examples) {
            example.target = own.target;
        }
        Ok(Some(data))
    }

    pub(crate) fn feature_rows(&self, index: &[usize]) -> Result<Tensors> {
        let rows: Vec<i64> = index.iter().map(|i| *i as i64).collect();
        self.features.map(|_, t| {
            t.index_select(0, &Tensor::from_slice(&rows, &[rows.len() as i64], t.device())?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenIds;
    use modl_core::Device;

    fn data(target: f32, ids: [i64; 2]) -> Dataset {
        let example = |(i, ids): (usize, i64)| Example {
            id: i.to_string(),
            task: "t".into(),
            ids: TokenIds::from(vec![ids]),
            target,
        };
        Dataset::new(ids.into_iter().enumerate().map(example).collect()).unwrap()
    }

    fn rows(values: [f32; 2]) -> Tensor {
        Tensor::from_slice(&values, &[2, 1], Device::Cpu).unwrap()
    }

    #[test]
    fn the_fingerprint_knows_a_computed_feature_by_its_origin() {
        let print = |d: Dataset| d.fingerprint().unwrap();
        let computed = |v: [f32; 2], origin: &str| {
            data(0.0, [1, 2]).with_computed("query", rows(v), origin).unwrap()
        };
        let given = |v| data(0.0, [1, 2]).with_feature("query", rows(v)).unwrap();
        let (a, b) = ([0.5, 1.0], [0.5, 1.0 + f32::EPSILON]);
        assert_eq!(print(computed(a, "base")), print(computed(b, "base")));
        assert_ne!(print(computed(a, "base")), print(computed(a, "other base")));
        assert_ne!(print(given(a)), print(given(b)));
        // What runs of before have noted.
        assert_eq!(computed(a, "base").former_fingerprint().unwrap(), Some(print(given(a))));
        assert_eq!(given(a).former_fingerprint().unwrap(), None);
        // The origin follows the rows through every cut, and goes where others are given.
        let cut = |d: Dataset| d.rows(&[1, 0]).unwrap();
        assert_eq!(print(cut(computed(a, "base"))), print(cut(computed(b, "base"))));
        let joined = |d: Dataset, e: &Dataset| print(d.and(e).unwrap());
        let (one, two) = (computed(a, "base"), computed(b, "base"));
        assert_eq!(joined(one.clone(), &one), joined(two.clone(), &two));
        assert_ne!(joined(one.clone(), &given(a)), joined(two.clone(), &given(b)));
        let again = |d: Dataset, v| d.with_feature("query", rows(v)).unwrap();
        assert_ne!(print(again(one.clone(), a)), print(again(one, b)));
    }

    #[test]
    fn inputs_are_taken_over_where_they_are_the_same() {
        let known = data(1.0, [1, 2]).with_feature("query", rows([3.0, 4.0])).unwrap();
        let both = data(7.0, [1, 2]).with_inputs_of(&known).unwrap().unwrap();
        let batch = both.batch(&[1], Device::Cpu).unwrap();
        assert_eq!(batch.targets.to_vec::<f32>().unwrap(), [7.0]);
        assert_eq!(batch.features.need("query").unwrap().to_vec::<f32>().unwrap(), [4.0]);
        let own = data(7.0, [1, 2]).with_feature("query", rows([3.0, 4.0])).unwrap();
        assert_eq!(both.fingerprint().unwrap(), own.fingerprint().unwrap());
        assert!(data(7.0, [1, 3]).with_inputs_of(&known).unwrap().is_none());
        let dense = |v| data(1.0, [1, 2]).with_input("x", rows(v)).unwrap();
        assert!(dense([1.0, 2.0]).with_inputs_of(&known).unwrap().is_none());
        assert!(dense([1.0, 2.0]).with_inputs_of(&dense([1.0, 2.0])).unwrap().is_some());
        assert!(dense([1.0, 2.0]).with_inputs_of(&dense([1.0, 2.5])).unwrap().is_none());
    }
}

//! A few examples of each task, for few-shot phases.

use std::collections::BTreeSet;

use modl_core::Result;

use crate::Dataset;
use crate::formats::chosen;

impl Dataset {
    /// `n` examples of each task, chosen by seed and id and left in their order; all of a task that has no
    /// more.
    ///
    /// # Errors
    /// Where `n` is 0.
    pub fn sample(&self, n: usize, seed: u64) -> Result<Dataset> {
        let mut kept = BTreeSet::new();
        for task in self.tasks().into_keys() {
            let own = self.examples.iter().enumerate().filter(|(_, e)| e.task == task);
            let (places, ids): (Vec<usize>, Vec<&str>) =
                own.map(|(i, e)| (i, e.id.as_str())).unzip();
            let some = chosen(ids.into_iter(), n, seed);
            kept.extend(some.into_iter().filter_map(|i| places.get(i).copied()));
        }
        self.rows(&kept.into_iter().collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Example;

    #[test]
    fn a_few_are_of_each_task_and_the_same_ones_by_seed() {
        let of = |task: &str, n: usize| {
            let example = |i: usize| Example {
                id: i.to_string(),
                task: task.to_owned(),
                ids: vec![1].into(),
                target: i as f32,
            };
            (0..n).map(example).collect::<Vec<_>>()
        };
        let data = Dataset::new([of("a", 50), of("b", 3), of("c", 9)].concat()).unwrap();
        let few = data.sample(4, 1).unwrap();
        assert_eq!(few.tasks().into_iter().collect::<Vec<_>>(), [("a", 4), ("b", 3), ("c", 4)]);
        assert!(
            few.examples().windows(2).all(|w| w[0].task != w[1].task || w[0].target < w[1].target)
        );
        assert_eq!(few.examples(), data.sample(4, 1).unwrap().examples());
        assert_ne!(few.examples(), data.sample(4, 2).unwrap().examples());
        assert!(data.sample(0, 1).is_err());
    }
}

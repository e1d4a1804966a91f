//! Tensors with a row for each token, put into the order of another vocabulary.

use std::fmt::Debug;
use std::sync::OnceLock;

use modl_core::{Error, Result};

use super::{Elements, Stored};

/// Where the row of a token comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// A row of one of the tensors: its place among the inputs, and the row there.
    Of(usize, usize),
    /// The mean of some rows.
    Mean(Vec<(usize, usize)>),
    /// Zeros: no model knows the token.
    Zero,
    /// The mean of all rows of tokens: what a place without a token is filled with.
    Filler,
}

/// For each input, where the row of each token of the new vocabulary comes from.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Vocabulary {
    /// By input, then by token.
    pub rows: Vec<Vec<Row>>,
}

/// One model's tensor in the new order. It may have rows of other models, for tokens that it lacks.
#[derive(Debug)]
pub(crate) struct Reordered<'a> {
    tensors: &'a [Stored<'a>],
    rows: &'a [Row],
    width: usize,
    filler: OnceLock<Vec<f32>>,
}

impl<'a> Reordered<'a> {
    /// The tensor whose rows are `rows` of the tensors, each with `width` numbers.
    pub(crate) fn new(tensors: &'a [Stored<'a>], rows: &'a [Row], width: usize) -> Self {
        Reordered { tensors, rows, width, filler: OnceLock::new() }
    }

    fn row(&self, row: &Row, out: &mut [f32]) -> Result<()> {
        match row {
            Row::Of(input, at) => self.tensor(*input)?.read(at * self.width, out),
            Row::Zero => {
                out.fill(0.0);
                Ok(())
            }
            Row::Mean(all) => {
                let (mut sum, mut one) = (vec![0f64; out.len()], vec![0.0; out.len()]);
                for (input, at) in all {
                    self.tensor(*input)?.read(at * self.width, &mut one)?;
                    sum.iter_mut().zip(&one).for_each(|(s, x)| *s += f64::from(*x));
                }
                let n = all.len().max(1) as f64;
                out.iter_mut().zip(&sum).for_each(|(o, s)| *o = (s / n) as f32);
                Ok(())
            }
            Row::Filler => {
                let mean = match self.filler.get() {
                    Some(mean) => mean,
                    None => {
                        let mean = self.mean()?;
                        self.filler.get_or_init(|| mean)
                    }
                };
                out.copy_from_slice(mean);
                Ok(())
            }
        }
    }

    /// The mean of all rows of tokens.
    fn mean(&self) -> Result<Vec<f32>> {
        let (mut sum, mut one) = (vec![0f64; self.width], vec![0.0; self.width]);
        let tokens = self.rows.iter().filter(|r| **r != Row::Filler);
        let mut n = 0.0;
        for row in tokens {
            self.row(row, &mut one)?;
            sum.iter_mut().zip(&one).for_each(|(s, x)| *s += f64::from(*x));
            n += 1.0;
        }
        Ok(sum.into_iter().map(|s| (s / f64::max(n, 1.0)) as f32).collect())
    }

    fn tensor(&self, input: usize) -> Result<&Stored<'a>> {
        let missing = || Error::invalid("vocabulary", "names a model that is not there");
        self.tensors.get(input).ok_or_else(missing)
    }
}

impl Elements for Reordered<'_> {
    fn read(&self, at: usize, out: &mut [f32]) -> Result<()> {
        let width = self.width.max(1);
        let mut line = vec![0.0; width];
        let (mut at, mut rest) = (at, out);
        while !rest.is_empty() {
            let row = self.rows.get(at / width);
            let row =
                row.ok_or_else(|| Error::invalid("vocabulary", "has fewer tokens than asked"))?;
            let (from, n) = (at % width, (width - at % width).min(rest.len()));
            let (now, later) = rest.split_at_mut(n);
            if n == width {
                self.row(row, now)?;
            } else {
                self.row(row, &mut line)?;
                now.copy_from_slice(line.get(from..from + n).unwrap_or_default());
            }
            (at, rest) = (at + n, later);
        }
        Ok(())
    }
}

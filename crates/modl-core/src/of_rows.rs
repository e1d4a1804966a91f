//! What has an entry for each row of a batch, and is seldom asked for by parts of it.
//!
//! A mixture of 64 experts makes 64 parts of a batch of tokens in each layer, and few modules look
//! at what a context says about their rows. So the entries of a part are picked when somebody asks.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::{Error, Result, Routing, Tensor};

/// Something of which some rows can be taken.
pub(crate) trait Pick: Clone {
    /// The number of rows.
    fn rows(&self) -> i64;

    /// The rows at `index`, which are there.
    fn pick(&self, index: &[i64]) -> Result<Self>;
}

impl Pick for Tensor {
    fn rows(&self) -> i64 {
        self.len_of(0)
    }

    fn pick(&self, index: &[i64]) -> Result<Self> {
        let at = Tensor::from_slice(index, &[index.len() as i64], self.device())?;
        self.index_select(0, &at)
    }
}

impl Pick for Arc<[Arc<str>]> {
    fn rows(&self) -> i64 {
        self.len() as i64
    }

    fn pick(&self, index: &[i64]) -> Result<Self> {
        let at = |i: &i64| self.get(usize::try_from(*i).ok()?).cloned();
        let picked: Option<Self> = index.iter().map(at).collect();
        picked.ok_or_else(|| Error::invalid("rows", "are beyond the names"))
    }
}

/// An entry for each row of a batch or of a part of it.
#[derive(Debug, Clone)]
pub(crate) struct OfRows<T> {
    all: T,
    part: Option<Rc<[i64]>>,
    picked: OnceCell<T>,
}

impl<T: Pick> OfRows<T> {
    pub(crate) fn new(all: T) -> Self {
        OfRows { all, part: None, picked: OnceCell::new() }
    }

    /// The entries of these rows.
    pub(crate) fn get(&self) -> Result<&T> {
        let Some(part) = &self.part else { return Ok(&self.all) };
        if let Some(picked) = self.picked.get() {
            return Ok(picked);
        }
        let picked = self.all.pick(part)?;
        Ok(self.picked.get_or_init(|| picked))
    }

    /// Those of some of these rows.
    ///
    /// # Errors
    /// Where a row is not there; it says how many there are.
    pub(crate) fn select(&self, index: &Rc<[i64]>) -> Result<Self> {
        let all = self.get()?.clone();
        let rows = all.rows();
        if index.iter().any(|i| *i < 0 || *i >= rows) {
            return Err(Error::invalid("rows", format!("there are {rows}, of a larger batch")));
        }
        Ok(OfRows { all, part: Some(index.clone()), picked: OnceCell::new() })
    }
}

/// What routers that decide once in a forward pass have decided, by key.
#[derive(Debug, Default)]
pub(crate) struct Decisions {
    known: RefCell<BTreeMap<String, Routing>>,
    /// Those of the batch that this is a part of, and which rows of it.
    from: Option<(Rc<Decisions>, Rc<[i64]>)>,
}

impl Decisions {
    /// Those for a part of the rows.
    pub(crate) fn select(of: &Rc<Self>, index: &Rc<[i64]>) -> Self {
        Decisions { known: RefCell::default(), from: Some((of.clone(), index.clone())) }
    }

    pub(crate) fn find(&self, key: &str) -> Result<Option<Routing>> {
        if let Some(known) = self.known.borrow().get(key) {
            return Ok(Some(known.clone()));
        }
        let Some((whole, rows)) = &self.from else { return Ok(None) };
        let Some(routing) = whole.find(key)? else { return Ok(None) };
        let own = routing.select_rows(rows)?;
        self.set(key, own.clone());
        Ok(Some(own))
    }

    pub(crate) fn set(&self, key: &str, routing: Routing) {
        self.known.borrow_mut().insert(key.to_owned(), routing);
    }
}

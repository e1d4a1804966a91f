//! The token ids of an example.

use std::fmt;
use std::sync::Arc;

use modl_core::{Error, Result};

use crate::spill::Spill;

/// Token ids: a list of their own, or a place among those of a data set, which need not stand in memory.
///
/// ```
/// use modl_train::TokenIds;
/// let ids: TokenIds = vec![101, 7, 102].into();
/// assert_eq!((ids.len(), ids.to_vec()?), (3, vec![101, 7, 102]));
/// # Ok::<(), modl_core::Error>(())
/// ```
#[derive(Clone)]
pub struct TokenIds(Ids);

#[derive(Clone)]
enum Ids {
    Own(Vec<i64>),
    /// `len` of 32 bits each, from the byte `start` on.
    Stored {
        store: Arc<Spill>,
        start: u64,
        len: u32,
    },
}

impl TokenIds {
    /// The same ids at the end of a store.
    ///
    /// # Errors
    /// Where one does not have 32 bits, or the store cannot be written.
    pub(crate) fn stored(ids: &[i64], store: &Arc<Spill>) -> Result<Self> {
        let mut bytes = Vec::with_capacity(4 * ids.len());
        for id in ids {
            let short = i32::try_from(*id).map_err(|_| {
                Error::invalid("token ids", format!("{id} is no number of 32 bits with a sign"))
            })?;
            bytes.extend_from_slice(&short.to_le_bytes());
        }
        let len =
            u32::try_from(ids.len()).map_err(|e| Error::invalid("token ids", e.to_string()))?;
        Ok(TokenIds(Ids::Stored { store: store.clone(), start: store.append(&bytes)?, len }))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match &self.0 {
            Ids::Own(ids) => ids.len(),
            Ids::Stored { len, .. } => *len as usize,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ids themselves.
    ///
    /// # Errors
    /// Where they stand in a file that cannot be read.
    pub fn to_vec(&self) -> Result<Vec<i64>> {
        let mut ids = Vec::with_capacity(self.len());
        self.add_to(&mut ids)?;
        Ok(ids)
    }

    /// Adds the ids to others.
    ///
    /// # Errors
    /// As [`TokenIds::to_vec`].
    pub(crate) fn add_to(&self, all: &mut Vec<i64>) -> Result<()> {
        match &self.0 {
            Ids::Own(ids) => all.extend(ids),
            Ids::Stored { store, start, len } => {
                let mut bytes = vec![0; 4 * *len as usize];
                store.read(*start, &mut bytes)?;
                let (ids, _) = bytes.as_chunks();
                all.extend(ids.iter().map(|id| i64::from(i32::from_le_bytes(*id))));
            }
        }
        Ok(())
    }
}

impl Default for TokenIds {
    fn default() -> Self {
        TokenIds(Ids::Own(Vec::new()))
    }
}

impl From<Vec<i64>> for TokenIds {
    fn from(ids: Vec<i64>) -> Self {
        TokenIds(Ids::Own(ids))
    }
}

impl FromIterator<i64> for TokenIds {
    fn from_iter<I: IntoIterator<Item = i64>>(ids: I) -> Self {
        ids.into_iter().collect::<Vec<_>>().into()
    }
}

/// The same ids, wherever they stand; ids that cannot be read are like no others.
impl PartialEq for TokenIds {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len()
            && matches!((self.to_vec(), other.to_vec()), (Ok(a), Ok(b)) if a == b)
    }
}

impl fmt::Debug for TokenIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to_vec() {
            Ok(ids) => ids.fmt(f),
            Err(e) => write!(f, "{} token ids: {e}", self.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_the_same_wherever_they_stand() {
        let lists = [vec![], vec![5], vec![i64::from(i32::MAX), -1, i64::from(i32::MIN), 0]];
        for most in [0, 1 << 20] {
            let store = Arc::new(Spill::new(most));
            let stored: Vec<TokenIds> =
                lists.iter().map(|ids| TokenIds::stored(ids, &store).unwrap()).collect();
            for (ids, stored) in lists.iter().zip(&stored) {
                assert_eq!((&stored.to_vec().unwrap(), stored.len()), (ids, ids.len()));
                assert_eq!(*stored, TokenIds::from(ids.clone()));
                assert_eq!(format!("{stored:?}"), format!("{ids:?}"));
            }
            assert_ne!(stored[0], stored[1]);
            assert_ne!(stored[1], TokenIds::from(vec![6]));
            let e = TokenIds::stored(&[1 << 31], &store).unwrap_err().to_string();
            assert!(e.contains("2147483648"), "{e}");
        }
    }
}

//! The tasks that a module tells apart, and which one each row is of.

use modl_core::{Context, Error, Result};

/// Tasks in the order of a configuration.
#[derive(Debug, Clone)]
pub(super) struct Tasks {
    names: Vec<String>,
    default: Option<i64>,
}

impl Tasks {
    /// `method` is for errors; `default` is the task of all rows where the context names none.
    ///
    /// # Errors
    /// Where there are fewer than `least` names, one is there twice, or `default` is not among
    /// them.
    pub(super) fn new(
        method: &str,
        names: &[String],
        least: usize,
        default: Option<&str>,
    ) -> Result<Self> {
        let place = format!("{method}.tasks");
        if names.len() < least {
            let problem = format!("names {}, wants {least} at least", names.len());
            return Err(Error::invalid(place, problem));
        }
        let fits = |n: &str| !n.is_empty() && !n.contains('.');
        for (i, name) in names.iter().enumerate() {
            if !fits(name) || names.iter().take(i).any(|n| n == name) {
                let problem = format!("`{name}` is empty, has a dot, or is there twice");
                return Err(Error::invalid(place, problem));
            }
        }
        let mut tasks = Tasks { names: names.to_vec(), default: None };
        tasks.default = default.map(|name| tasks.position(name)).transpose()?;
        Ok(tasks)
    }

    /// The names in order.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// How many.
    pub(super) fn count(&self) -> i64 {
        self.names.len() as i64
    }

    /// The position of the task of each of `rows` rows.
    ///
    /// # Errors
    /// Where the context names no tasks and there is no default, or names another task.
    pub(super) fn of_rows(&self, rows: i64, cx: &Context) -> Result<Vec<i64>> {
        let named = match (cx.tasks(), self.default) {
            (Ok(named), _) => named,
            (Err(_), Some(default)) => return Ok(vec![default; rows as usize]),
            (Err(e), None) => return Err(e),
        };
        if named.len() as i64 != rows {
            let problem = format!("{} names for {rows} rows", named.len());
            return Err(Error::invalid("tasks", problem));
        }
        named.iter().map(|name| self.position(name)).collect()
    }

    fn position(&self, name: &str) -> Result<i64> {
        let at = self.names.iter().position(|n| n == name);
        at.map(|i| i as i64).ok_or_else(|| Error::unknown("task", name, &self.names))
    }
}

//! The tasks that a router knows.

use modl_core::{Context, Error, Result, Tensor};
use serde::{Deserialize, Serialize};

/// The tasks that a router knows, a part of every task-level router's configuration. In recipes its
/// keys stand beside `type`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskLabels {
    /// The names of the tasks, in the order of the router's rows. A task that is to be learned later
    /// from few examples can be named from the beginning.
    pub tasks: Vec<String>,
    /// The kind of label that names a row's task: `task`, `language`, `domain`. Default: `task`.
    pub label: String,
}

impl Default for TaskLabels {
    fn default() -> Self {
        TaskLabels { tasks: Vec::new(), label: "task".into() }
    }
}

impl TaskLabels {
    /// The number of tasks.
    ///
    /// # Errors
    /// Where there is none, or one twice.
    pub(crate) fn check(&self, method: &str) -> Result<i64> {
        let wrong = |problem: String| Err(Error::invalid(format!("{method}.tasks"), problem));
        if self.tasks.is_empty() {
            return wrong("are to be the names of all tasks".into());
        }
        let twice = self.tasks.iter().enumerate();
        let twice = twice.filter(|(i, t)| self.tasks.iter().take(*i).any(|other| other == *t));
        match twice.map(|(_, t)| t).next() {
            Some(task) => wrong(format!("name `{task}` twice")),
            None => Ok(self.tasks.len() as i64),
        }
    }

    /// The number of the task of each of the `rows` rows.
    ///
    /// # Errors
    /// Where a label is missing or names no task of the router.
    pub(crate) fn of_rows(&self, rows: i64, cx: &Context) -> Result<Vec<i64>> {
        let names = cx.labels(&self.label)?;
        if names.len() as i64 != rows {
            let problem = format!("{} names for {rows} rows", names.len());
            return Err(Error::invalid(format!("{}s", self.label), problem));
        }
        let number = |name: &std::sync::Arc<str>| {
            let at = self.tasks.iter().position(|task| **task == **name);
            let unknown = || Error::unknown("task of the router", name, &self.tasks);
            at.map(|at| at as i64).ok_or_else(unknown)
        };
        names.iter().map(number).collect()
    }
}

/// The rows of a table `[tasks, …]` for these tasks, on the device of the table.
pub(crate) fn look_up(table: &Tensor, tasks: &[i64]) -> Result<Tensor> {
    let index = Tensor::from_slice(tasks, &[tasks.len() as i64], table.device())?;
    table.index_select(0, &index)
}

//! A file for each task, in the order of the recipe.

use std::fmt;
use std::ops::Index;
use std::path::{Path, PathBuf};

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Files by task, in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskFiles(Vec<(String, PathBuf)>);

impl TaskFiles {
    /// How many tasks there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The file of a task.
    pub fn get(&self, task: &str) -> Option<&Path> {
        self.iter().find(|(t, _)| *t == task).map(|(_, file)| file)
    }

    /// Tasks and files in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.0.iter().map(|(task, file)| (task.as_str(), file.as_path()))
    }

    /// The tasks in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.iter().map(|(task, _)| task)
    }
}

impl Index<&str> for TaskFiles {
    type Output = Path;

    /// The file of a task; nothing, an empty path, where there is none.
    fn index(&self, task: &str) -> &Path {
        self.get(task).unwrap_or(Path::new(""))
    }
}

impl Serialize for TaskFiles {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for TaskFiles {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = TaskFiles;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a file for each task")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TaskFiles, A::Error> {
                let mut all = TaskFiles::default();
                while let Some(entry) = map.next_entry()? {
                    all.0.push(entry);
                }
                Ok(all)
            }
        }
        from.deserialize_map(InOrder)
    }
}

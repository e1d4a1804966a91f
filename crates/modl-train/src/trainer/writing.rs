//! A state that goes to the disk while training goes on: what blocks a step is a copy in memory, not
//! the disk.

use std::path::Path;
use std::thread::{self, JoinHandle};

use modl_core::{Error, Result};

use crate::state::{self, Parts, RunState};

/// A state on its way. It is whole on the disk, or refused, before this is dropped.
#[derive(Debug)]
pub(super) struct Writing {
    pub(super) step: u64,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Writing {
    /// Begins with copies of the tensors, which training changes.
    pub(super) fn begin(folder: &Path, state: RunState, parts: Parts) -> Result<Self> {
        let (step, parts, folder) = (state.step, parts.copied()?, folder.to_owned());
        let work = move || state::save(&folder, state, &parts);
        let thread = thread::Builder::new().name("modl state".to_owned()).spawn(work);
        let thread = thread.map_err(|e| Error::invalid("a thread to write with", e.to_string()))?;
        Ok(Writing { step, thread: Some(thread) })
    }

    /// Whether it need not be waited for.
    pub(super) fn is_done(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until it is written.
    pub(super) fn finish(mut self) -> Result<()> {
        let lost = || Error::invalid("the thread that writes", "has ended by a panic");
        self.thread.take().map_or(Ok(()), |thread| thread.join().map_err(|_| lost())?)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        // Who gives up training may begin it anew in the same folder.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

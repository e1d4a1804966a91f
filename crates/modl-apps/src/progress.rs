//! Progress bars from a run's events.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use modl_core::Result;
use modl_train::{Event, Sink};

/// A bar for each training, with steps per second, the time that is left, loss and learning rate. Where stderr is no terminal nothing is drawn.
#[derive(Debug, Default)]
pub(crate) struct Bars {
    prefix: String,
    current: Option<ProgressBar>,
}

impl Bars {
    /// Bars whose names start with `prefix`.
    pub(crate) fn new(prefix: impl Into<String>) -> Self {
        Bars { prefix: prefix.into(), current: None }
    }
}

impl Sink for Bars {
    fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Started { name, step, steps, .. } => {
                let b = bar(*steps, &format!("{}{name}", self.prefix));
                b.set_position(*step);
                // What was done before a stop says nothing of how fast it goes.
                b.reset_eta();
                self.current = Some(b);
            }
            Event::Step { step, loss, lr, .. } => {
                if let Some(b) = &self.current {
                    b.set_position(*step);
                    b.set_message(format!("loss {loss:.4}  lr {lr:.1e}"));
                }
            }
            Event::Finished { .. } => {
                if let Some(b) = self.current.take() {
                    b.finish_and_clear();
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A bar of `n` steps.
pub(crate) fn bar(n: u64, name: &str) -> ProgressBar {
    let b = ProgressBar::new(n).with_message("").with_prefix(name.to_owned());
    // The template is a constant; indicatif's default is as good should it ever be refused.
    if let Ok(style) = ProgressStyle::with_template(
        "{prefix:32} {bar:30} {pos:>5}/{len:5} {per_sec:>9} {elapsed:>4} left {eta:>4}  {msg}",
    ) {
        b.set_style(style);
    }
    b.enable_steady_tick(Duration::from_millis(500));
    b
}

//! The experiments that there are.

use super::experiment::Experiment;

/// All, in the order of the survey's sections.
pub(super) fn all() -> Vec<Box<dyn Experiment>> {
    vec![
        Box::new(super::mittal::Rules),
        Box::new(super::balance::Balance),
        Box::new(super::tuning::Tuning::default()),
        Box::new(super::dropping::Dropping::default()),
        Box::new(super::polytropon::Skills),
        Box::new(super::merging::Merging),
        Box::new(super::soups::Soups),
        Box::new(super::demix::Domains),
        Box::new(super::fusion::Fusing),
        Box::new(super::forgetting::Forgetting),
        Box::new(super::packing::Packing),
        Box::new(super::supsup::Superposition),
        Box::new(super::conflict::Conflict),
    ]
}

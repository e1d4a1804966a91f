//! The contract kit.

//! Aggregators for modl: weighted sums, parameter averages, exact low-rank concatenation.

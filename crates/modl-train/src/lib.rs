//! Training for modl: a readable loop, optimisers with saved state, resume.

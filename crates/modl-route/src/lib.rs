//! Routers for modl: fixed, uniform, soft, top-k.

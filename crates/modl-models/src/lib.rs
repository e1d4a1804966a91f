//! Pretrained backbones for modl, with every sub-layer a named site.

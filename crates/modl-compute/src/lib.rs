//! Modules for modl: LoRA, bottleneck adapters.

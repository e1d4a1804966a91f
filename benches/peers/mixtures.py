"""Rows of mixtures of experts: transformers' block of Mixtral, each way that it has to compute experts,
against a layer of modl. Width 512, 2 experts a token."""
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

# Work is `mixture:EXPERTS:INNER:TOKENS:train|infer`.
COARSE, MANY, FINE = "mixture:8:2048:1024", "mixture:64:2048:1024", "mixture:64:256:2048"
ROWS = {
    f"{name}, {how}, {dtype}": (f"{work}:{mode}", dtype == "bf16", 0.0, False, how)
    for name, work, mode in [
        ("mixture E=8, training", COARSE, "train"),
        ("mixture E=64, training", MANY, "train"),
        ("mixture E=64 fine, training", FINE, "train"),
        ("mixture E=64 fine, inference", FINE, "infer"),
    ]
    for how in ("eager", "grouped_mm")
    for dtype in ("f32", "bf16")
    # Eager, each expert's gradient is as large as all of them: a step takes minutes.
    if (work, how) != (MANY, "eager")
}
MEMORY = {
    "memory mixture E=64, f32": (MANY + ":train", False, 0.0, False, "grouped_mm"),
    "memory mixture E=64 fine, f32": (FINE + ":train", False, 0.0, False, "grouped_mm"),
}


def mixture(work, bf16, how):
    """One step of transformers' block of Mixtral: forward, and backward to x and all parameters."""
    _, experts, inner, tokens, mode = work.split(":")
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=512, intermediate_size=int(inner), num_local_experts=int(experts), num_experts_per_tok=2
    )
    config._experts_implementation = how
    block = MixtralSparseMoeBlock(config)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02)
    dtype = torch.bfloat16 if bf16 else torch.float32
    block.to(dtype)
    x = torch.randn(1, int(tokens), 512, dtype=dtype, requires_grad=mode == "train")
    probe = torch.randn(1, int(tokens), 512, dtype=dtype)
    if mode == "infer":

        def forward():
            with torch.no_grad():
                block(x)

        return forward
    leaves = [*block.parameters(), x]

    def step():
        torch.autograd.grad((block(x) * probe).sum(), leaves)

    return step

"""Makes adapter folders with PEFT for changes of a weight with a structure, and what they compute.

The tests of modl-compute compare with what this writes; it is run by hand when they need another
setting. It wants peft 0.21.2 and transformers 5.24.0 beside torch:

    python tests/python/make_structured_golden.py crates/modl-compute/tests/fixtures

`base_bert` and `base_llama` are to be in that folder. For each setting it writes a folder
`BASE_SETTING` with `adapter/` as `save_pretrained` wrote it, `outputs.safetensors` (of the base,
adapted, merged) for the base's `inputs.safetensors`, and `merged_changed_weights.safetensors`. The
base `convs` is made here: a chain of convolutions.
"""

import json
import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import peft.tuners.boft.layer as boft  # noqa: E402
from peft import (  # noqa: E402
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, BertModel  # noqa: E402



class BlockDiagonal:
    """What PEFT has a CUDA extension for. Without it PEFT takes one factor, whatever is asked for."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor.unbind()) for factor in blocks])


boft.get_fbd_cuda = lambda: True
boft.FastBlockDiag = BlockDiagonal

# One layer is enough, and square, wide and high weights.
BERT = {
    "target_modules": ["query", "intermediate.dense", "layer.1.output.dense"],
    "layers_to_transform": [1],
    "task_type": "FEATURE_EXTRACTION",
    "init_weights": False,
}
LLAMA = {
    "target_modules": ["k_proj", "down_proj"],
    "layers_to_transform": [0],
    "task_type": "CAUSAL_LM",
    "init_weights": False,
}
CONVS = {"target_modules": ["first", "second", "point", "head"], "init_weights": False}

SETTINGS = {
    "bert_boft": BOFTConfig(**BERT, boft_block_size=4),
    "bert_boft_factors": BOFTConfig(**BERT, boft_block_size=4, boft_n_butterfly_factor=3),
    "bert_boft_block_num": BOFTConfig(
        **BERT, boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2
    ),
    "llama_boft": BOFTConfig(
        **LLAMA, boft_block_size=8, boft_n_butterfly_factor=2, boft_dropout=0.1
    ),
    "bert_oft_exact": OFTConfig(**BERT, r=4, oft_block_size=0, use_cayley_neumann=False),
    "bert_oft_share": OFTConfig(
        **BERT, oft_block_size=8, block_share=True, num_cayley_neumann_terms=2
    ),
    "bert_oft_constrained": OFTConfig(
        **BERT, oft_block_size=8, coft=True, eps=0.5, use_cayley_neumann=False, module_dropout=0.1
    ),
    "llama_oft_constrained_share": OFTConfig(
        **LLAMA, oft_block_size=16, coft=True, eps=0.9, block_share=True, num_cayley_neumann_terms=3
    ),
    "bert_loha_pattern": LoHaConfig(
        **BERT,
        r=3,
        alpha=5,
        rank_pattern={"query": 2},
        alpha_pattern={"query": 3, "output.dense": 0.5},
        rank_dropout=0.1,
        module_dropout=0.1,
    ),
    "bert_lokr_factor": LoKrConfig(**BERT, r=2, alpha=3, decompose_factor=4, decompose_both=True),
    "bert_lokr_unbalanced": LoKrConfig(
        **BERT, r=2, alpha=3, decompose_factor=16, rank_dropout_scale=True
    ),
    "bert_lokr_indivisible": LoKrConfig(
        **BERT, r=1, alpha=3.5, decompose_factor=5, decompose_both=True
    ),
    "bert_lokr_whole": LoKrConfig(
        **BERT, r=32, alpha=16, alpha_pattern={"query": 3}, rank_pattern={"query": 1}
    ),
    "llama_lokr_lycoris": LoKrConfig(
        **{**LLAMA, "init_weights": "lycoris"}, r=2, alpha=4, decompose_factor=2
    ),
    "bert_fourierft": FourierFTConfig(**BERT, n_frequency=50, scaling=60.0),
    "bert_fourierft_seed": FourierFTConfig(
        **BERT, n_frequency=30, scaling=90.0, random_loc_seed=5, n_frequency_pattern={"query": 1024}
    ),
    "llama_fourierft": FourierFTConfig(
        **LLAMA, n_frequency=20, scaling=100.0, random_loc_seed=2**31 + 7
    ),
    "bert_vera_shapes": VeraConfig(
        **BERT, r=6, d_initial=0.5, projection_prng_key=3, vera_dropout=0.1
    ),
    "llama_vera_shapes": VeraConfig(**LLAMA, r=3),
    "llama_adalora_pruned": AdaLoraConfig(
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=2,
        lora_alpha=6,
        total_step=8,
        tinit=1,
        tfinal=2,
        deltaT=1,
    ),
    "convs_loha": LoHaConfig(**CONVS, r=2, alpha=5),
    "convs_loha_effective": LoHaConfig(**CONVS, r=2, alpha=5, use_effective_conv2d=True),
    "convs_lokr": LoKrConfig(**CONVS, r=1, alpha=3),
    "convs_lokr_both": LoKrConfig(**CONVS, r=1, alpha=3, decompose_both=True, decompose_factor=4),
    "convs_lokr_effective": LoKrConfig(
        **CONVS, r=1, alpha=3, use_effective_conv2d=True, decompose_both=True
    ),
    "convs_lokr_whole": LoKrConfig(**CONVS, r=16, alpha=3, use_effective_conv2d=True),
}


class Convs(torch.nn.Module):
    """3 × 3 with a stride, 1 × 3, 1 × 1, and a linear layer on the mean."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.second = torch.nn.Conv2d(8, 12, (1, 3), padding=(0, 1))
        self.point = torch.nn.Conv2d(12, 8, 1, bias=False)
        self.head = torch.nn.Linear(8, 6)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x))
        x = torch.tanh(self.point(x))
        return {"logits": self.head(x.mean((2, 3)))}


def open_base(out, base):
    folder = os.path.join(out, f"base_{base}")
    if base == "convs":
        model = Convs()
        model.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
        return model.eval()
    of = {"bert": BertModel, "llama": AutoModelForCausalLM}[base]
    return of.from_pretrained(folder, attn_implementation="eager").eval()


def make_convs(out):
    folder = os.path.join(out, "base_convs")
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(5)
    save_file(Convs().state_dict(), os.path.join(folder, "model.safetensors"))
    save_file({"x": torch.randn(2, 4, 7, 6)}, os.path.join(folder, "inputs.safetensors"))


def outputs(model, inputs, state):
    with torch.no_grad():
        found = model(**inputs)
    names = ("last_hidden_state", "logits", "pooler_output")
    there = [n for n in names if found.get(n) is not None]
    return {f"{state}.{n}": found[n].contiguous().clone() for n in there}


def noise(model, scale):
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=g) * scale)


def prune(model, inputs, steps):
    """A few steps as a user makes them, so that the budget falls."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, steps + 1):
        loss = model(**inputs).logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)


def make(out, name, config):
    base = name.split("_")[0]
    inputs = load_file(os.path.join(out, f"base_{base}", "inputs.safetensors"))
    model = open_base(out, base)
    recorded = outputs(model, inputs, "base")
    torch.manual_seed(99)
    model = get_peft_model(model, config).eval()
    noise(model, 0.15)
    if name.endswith("_pruned"):
        prune(model, inputs, config.total_step)
    folder = os.path.join(out, name)
    shutil.rmtree(folder, ignore_errors=True)
    # A pass before it is saved: COFT shortens its parameters in it.
    recorded |= outputs(model, inputs, "adapted")
    model.save_pretrained(os.path.join(folder, "adapter"))
    os.remove(os.path.join(folder, "adapter", "README.md"))
    strip(os.path.join(folder, "adapter", "adapter_config.json"))
    again = PeftModel.from_pretrained(open_base(out, base), os.path.join(folder, "adapter")).eval()
    for key, t in outputs(again, inputs, "adapted").items():
        apart = (recorded[key] - t).abs().max().item()
        assert apart < 1e-5, f"{name}: the folder alone gives another {key}: {apart}"
    merged = again.merge_and_unload().eval()
    recorded |= outputs(merged, inputs, "merged")
    before = open_base(out, base).state_dict()
    after = merged.state_dict()
    changed = {k: v.contiguous() for k, v in after.items() if not torch.equal(v, before[k])}
    save_file(changed, os.path.join(folder, "merged_changed_weights.safetensors"))
    save_file(recorded, os.path.join(folder, "outputs.safetensors"))
    main = next(k for k in recorded if k.startswith("adapted."))
    moved = (recorded[main] - recorded[main.replace("adapted", "base")]).abs().max().item()
    apart = (recorded[main] - recorded[main.replace("adapted", "merged")]).abs().max().item()
    print(f"{name}: moved {moved:.3f}, merged {apart:.1e} apart, {len(changed)} weights")
    assert moved > 1e-2


def strip(path):
    """Where the base lay is nobody's business, and a set has no order."""
    with open(path) as f:
        config = json.load(f)
    config["base_model_name_or_path"] = None
    config["target_modules"].sort()
    with open(path, "w") as f:
        json.dump(config, f, indent=2, sort_keys=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, only = sys.argv[1], sys.argv[2:]
    make_convs(target)
    for setting, config in SETTINGS.items():
        if not only or setting in only:
            make(target, setting, config)

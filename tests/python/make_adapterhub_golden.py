"""Makes adapter folders with AdapterHub's own library, and what they compute on a tiny BERT.

The tests of modl-compute compare with what this writes; it is run by hand when they need another
method. It wants adapters 1.3.0 with transformers 4.57.6, huggingface_hub 0.36.2 and tokenizers
0.22.2 beside torch:

    python tests/python/make_adapterhub_golden.py \
        crates/modl-models/tests/fixtures/base_bert crates/modl-compute/tests/fixtures [NAME ...]

For each method a folder `adapterhub_NAME` with `adapter/` as `save_adapter` wrote it and
`outputs.safetensors` with the last hidden state for the base's `inputs.safetensors`.
"""

import math
import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import adapters  # noqa: E402
import torch  # noqa: E402
from adapters import (  # noqa: E402
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    VeraConfig,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel, BertForSequenceClassification  # noqa: E402

METHODS = {
    "seq_bn": SeqBnConfig(reduction_factor=4),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor={"0": 4, "default": 8}),
    "par_bn": ParBnConfig(),
    "par_bn_learned": ParBnConfig(scaling="learned", leave_out=[0]),
    "post_add": SeqBnConfig(reduction_factor=4, residual_before_ln="post_add"),
    "seq_bn_inv": SeqBnInvConfig(reduction_factor=4),
    "compacter": CompacterConfig(reduction_factor=4, phm_dim=4),
    "compacter_pp": CompacterPlusPlusConfig(reduction_factor=4, phm_dim=4),
    "lora": LoRAConfig(r=4, alpha=6, intermediate_lora=True, output_lora=True, leave_out=[1]),
    "lora_qkv": LoRAConfig(r=2, alpha=3, attn_matrices=["q", "k", "v"]),
    "dora": LoRAConfig(r=4, alpha=6, use_dora=True),
    "ia3": IA3Config(),
    "vera": VeraConfig(r=4),
    "prompt": PromptTuningConfig(prompt_length=3),
    "loreft": LoReftConfig(r=3, prefix_positions=5, suffix_positions=3, dropout=0.0),
    "loreft_first": LoReftConfig(r=1, layers=[1]),
    "noreft_tied": NoReftConfig(r=2, suffix_positions=2, tied_weights=True, non_linearity="relu"),
    "prefix": PrefixTuningConfig(bottleneck_size=8, prefix_length=3, leave_out=[0]),
    "prefix_flat": PrefixTuningConfig(flat=True, prefix_length=3),
    "mam": MAMConfig(PrefixTuningConfig(bottleneck_size=8, prefix_length=3), ParBnConfig()),
}
# Tensors shared between layers, which safetensors does not take: these are pickled, and written
# again as safetensors with a copy for each layer.
PICKLED = {"prefix", "prefix_flat", "mam"}
# A bare model is saved without what its layers share.
WITH_HEAD = {"compacter", "compacter_pp", "vera"}


def fill(model, name):
    """Gives the adapter weights by a closed formula, so that nothing is zero."""
    own = [(n, p) for n, p in model.named_parameters() if name in n.split(".")]
    with torch.no_grad():
        for j, (n, p) in enumerate(sorted(own)):
            k = torch.arange(p.numel(), dtype=torch.float64)
            wave = torch.sin(0.7310585786 * k + 0.1 * j + 1).reshape(p.shape)
            if n.endswith(".m.weight"):
                p.mul_(1 + 0.1 * wave)
            elif "norm" in n.lower():
                p.copy_(1 + 0.1 * wave)
            elif n.endswith("parametrizations.weight.original"):
                # Its diagonal is made of signs.
                p.add_(0.2 * wave * (1 - torch.eye(*p.shape)))
            else:
                p.add_(0.2 * wave)


def make(base, out, name, config):
    torch.manual_seed(5)
    if name in WITH_HEAD:
        model = BertForSequenceClassification.from_pretrained(base, attn_implementation="eager")
    else:
        model = AutoModel.from_pretrained(base, attn_implementation="eager")
    adapters.init(model)
    model.add_adapter("own", config=config)
    fill(model, "own")
    model.set_active_adapters("own")
    model.eval()
    folder = os.path.join(out, f"adapterhub_{name}")
    shutil.rmtree(folder, ignore_errors=True)
    target = os.path.join(folder, "adapter")
    os.makedirs(target)
    head = {"with_head": False} if name in WITH_HEAD else {}
    model.save_adapter(target, "own", use_safetensors=name not in PICKLED, **head)
    if name in PICKLED:
        pickle = os.path.join(target, "pytorch_adapter.bin")
        own = torch.load(pickle, weights_only=True)
        own = {key: t.clone().contiguous() for key, t in own.items()}
        save_file(own, os.path.join(target, "adapter.safetensors"))
        os.remove(pickle)
    inputs = load_file(os.path.join(base, "inputs.safetensors"))
    encoder = model.bert if name in WITH_HEAD else model
    with torch.no_grad():
        hidden = encoder(**inputs).last_hidden_state
        model.set_active_adapters(None)
        plain = encoder(**inputs).last_hidden_state
    length = min(hidden.shape[1], plain.shape[1])
    moved = (hidden[:, -length:] - plain[:, -length:]).abs().max().item()
    outputs = {"adapted.last_hidden_state": hidden.contiguous(), "base.last_hidden_state": plain}
    save_file(outputs, os.path.join(folder, "outputs.safetensors"))
    print(f"{name}: moved {moved:.3f}", tuple(hidden.shape))
    assert math.isfinite(moved) and moved > 1e-2


if __name__ == "__main__":
    torch.set_num_threads(1)
    for method in sys.argv[3:] or METHODS:
        make(sys.argv[1], sys.argv[2], method, METHODS[method])

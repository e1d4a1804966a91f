"""Golden merges by DELLA with the masks that mergekit 0.1.5 has drawn.

usage: python make_merge_della_golden.py OUT   (needs torch, transformers 5, mergekit==0.1.5)

OUT is crates/modl-aggregate/tests/fixtures/mergekit, with its `models` and `della*/config.yml`. Writes
OUT/della and OUT/della_linear: merged.safetensors, and masks.safetensors with `MODEL.TENSOR`.
"""

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"

import mergekit.sparsify  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402

OUT = Path(sys.argv[1]).resolve()
MODELS = ["ft0", "ft1", "ft2"]


def absolute(value):
    """The configuration with the paths of the models here."""
    if isinstance(value, dict):
        names = ("model", "base_model")
        return {k: str(OUT / "models" / v) if k in names else absolute(v) for k, v in value.items()}
    return [absolute(v) for v in value] if isinstance(value, list) else value


drawn = []
original = mergekit.sparsify.rescaled_masked_tensor


def recorded(tensor, mask, norm, *args):
    drawn.append((tensor.clone(), mask.clone()))
    return original(tensor, mask, norm, *args)


mergekit.sparsify.rescaled_masked_tensor = recorded
base = load_file(OUT / "models" / "base" / "model.safetensors")
tuned = {m: load_file(OUT / "models" / m / "model.safetensors") for m in MODELS}

for name in ["della", "della_linear"]:
    drawn.clear()
    config = yaml.safe_load((OUT / name / "config.yml").read_text())
    with tempfile.TemporaryDirectory() as made:
        options = MergeOptions(random_seed=17, quiet=True, copy_tokenizer=False, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(absolute(config)), made, options)
        merged = {}
        for file in sorted(Path(made).glob("*.safetensors")):
            merged.update(load_file(file))
    masks = {}
    for tau, mask in drawn:
        for model, tensors in tuned.items():
            for key, value in tensors.items():
                if value.numel() == tau.numel() and torch.equal((value - base[key]).view_as(tau), tau):
                    masks[f"{model}.{key}"] = mask.to(torch.uint8).view_as(value).contiguous()
    assert len(masks) == len(drawn) == 3 * len(base), (len(masks), len(drawn))
    save_file({k: v.contiguous() for k, v in merged.items()}, OUT / name / "merged.safetensors")
    save_file(masks, OUT / name / "masks.safetensors")
    print(name, len(masks), flush=True)

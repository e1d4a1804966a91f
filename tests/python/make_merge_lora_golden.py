"""Golden merges of `MODEL+LORA`: adapters of the tiny Llama under OUT/models/base, made by PEFT and merged
by the real mergekit 0.1.5.

usage: python make_merge_lora_golden.py OUT   (needs torch, transformers 5, peft, mergekit==0.1.5)

OUT is crates/modl-aggregate/tests/fixtures/mergekit, with its `models`. Writes OUT/../mergekit_lora:
ADAPTER/{adapter_config.json, adapter_model.safetensors} and NAME/{config.yml, merged.safetensors}. Paths
in config.yml are relative to a folder that holds `base`, `ft1` and the adapters.
"""

import logging
import os
import shutil
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

from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

MODELS = Path(sys.argv[1]).resolve() / "models"
OUT = MODELS.parent.parent / "mergekit_lora"

ADAPTERS = {
    "lora": dict(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"layers.0.mlp.down_proj": 11},
    ),
    "rslora": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["v_proj", "gate_proj"]),
    "dora": dict(r=3, lora_alpha=6, use_dora=True, target_modules=["k_proj", "up_proj"]),
}

CONFIGS = {
    "linear": dict(
        merge_method="linear",
        models=[
            {"model": "base+lora", "parameters": {"weight": 0.5}},
            {"model": "base+rslora", "parameters": {"weight": 0.3}},
            {"model": "ft1", "parameters": {"weight": 0.4}},
        ],
    ),
    "ties": dict(
        merge_method="ties",
        base_model="base",
        models=[
            {"model": "base+lora", "parameters": {"weight": 0.5, "density": 0.6}},
            # The same in mergekit's other spelling.
            {
                "model": {"model": {"path": "base"}, "lora": {"path": "dora"}},
                "parameters": {"weight": 0.4, "density": 0.9},
            },
        ],
    ),
    "dora": dict(merge_method="passthrough", models=[{"model": "base+dora"}]),
}


def absolute(value, key=None):
    """The configuration with the paths of the models and adapters here."""
    if isinstance(value, dict):
        return {k: absolute(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [absolute(v) for v in value]
    if key in ("model", "base_model", "path"):
        places = [MODELS if (MODELS / part).exists() else OUT for part in value.split("+")]
        return "+".join(str(p / part) for p, part in zip(places, value.split("+")))
    return value


shutil.rmtree(OUT, ignore_errors=True)
for seed, (name, settings) in enumerate(ADAPTERS.items()):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(MODELS / "base")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for key, p in model.named_parameters():
        if "lora_" in key:
            # Also m: with ‖W‖ itself a DoRA of B = 0 changes nothing.
            noise = torch.randn_like(p) * 0.1
            p.data = p.data * (1 + noise) if "magnitude" in key else noise
    model.save_pretrained(OUT / name)
    (OUT / name / "README.md").unlink(missing_ok=True)
    config = (OUT / name / "adapter_config.json").read_text()
    (OUT / name / "adapter_config.json").write_text(config.replace(str(MODELS) + "/", ""))

for name, config in CONFIGS.items():
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as cache:
        run_merge(
            MergeConfiguration.model_validate(absolute(dict(config, dtype="float32"))),
            made,
            MergeOptions(
                random_seed=17,
                quiet=True,
                copy_tokenizer=False,
                write_model_card=False,
                lora_merge_cache=cache,
            ),
        )
        merged = {}
        for file in sorted(Path(made).glob("*.safetensors")):
            merged.update(load_file(file))
    folder = OUT / f"merged_{name}"
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in merged.items()}, folder / "merged.safetensors")
    (folder / "config.yml").write_text(yaml.safe_dump(dict(config, dtype="float32"), sort_keys=False))
    print(name, len(merged), flush=True)

"""Golden merges: the tiny Llamas under OUT/models (base, ft0, ft1, ft2) merged by the real mergekit
0.1.5 with each of its methods, and its masks of random drops.

usage: python make_merge_golden.py OUT   (needs torch, transformers 5, mergekit==0.1.5)

Writes OUT/NAME/{config.yml, merged.safetensors} and, for dare, masks.safetensors: `MODEL.TENSOR`; those
of della come from make_merge_della_golden.py.
Paths in config.yml are relative to OUT/models.
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

import mergekit.sparsify  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.merge_methods import generalized_task_arithmetic as gta  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402

OUT = Path(sys.argv[1]).resolve()
WEIGHT, DENSITY = [0.5, 0.3, 0.4], [0.5, 0.6, 0.7]


def models(*names, **settings):
    """Entries of `models` with one value of each setting for each model."""
    return [
        {"model": n, **({"parameters": {k: v[i] for k, v in settings.items()}} if settings else {})}
        for i, n in enumerate(names)
    ]


ALL = ["ft0", "ft1", "ft2"]
TASKS = dict(base_model="base", models=models(*ALL, weight=WEIGHT, density=DENSITY))
PAIR = dict(base_model="ft0", models=models("ft0", "ft1"))
LAYERS = {"layer_range": [0, 2]}

CONFIGS = {
    "linear": dict(merge_method="linear", models=models(*ALL, weight=WEIGHT)),
    "linear_unnormalized": dict(
        merge_method="linear", models=models(*ALL, weight=WEIGHT), parameters={"normalize": False}
    ),
    "slerp": dict(merge_method="slerp", parameters={"t": 0.3}, **PAIR),
    # A gradient over layers, a filter, and a value for everything else.
    "slerp_gradient": dict(
        merge_method="slerp",
        base_model="ft0",
        slices=[{"sources": [{"model": "ft0", **LAYERS}, {"model": "ft1", **LAYERS}]}],
        parameters={
            "t": [
                {"filter": "self_attn", "value": [0.1, 0.9]},
                {"filter": "mlp", "value": [0.8, 0.2]},
                {"value": 0.5},
            ]
        },
    ),
    "nuslerp": dict(merge_method="nuslerp", models=models("ft0", "ft1", weight=[0.7, 0.4])),
    "nuslerp_base": dict(
        merge_method="nuslerp", base_model="base", models=models("ft0", "ft1", weight=[0.7, 0.4])
    ),
    "nuslerp_rows": dict(
        merge_method="nuslerp",
        models=models("ft0", "ft1", weight=[0.7, 0.4]),
        parameters={"nuslerp_flatten": False},
    ),
    "nuslerp_columns": dict(
        merge_method="nuslerp",
        base_model="base",
        models=models("ft0", "ft1", weight=[0.7, 0.4]),
        parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "multislerp": dict(merge_method="multislerp", models=models(*ALL, weight=WEIGHT)),
    "multislerp_base": dict(
        merge_method="multislerp", base_model="base", models=models(*ALL, weight=WEIGHT)
    ),
    "karcher": dict(merge_method="karcher", models=models(*ALL)),
    "task_arithmetic": dict(
        merge_method="task_arithmetic", parameters={"lambda": 0.7}, **TASKS
    ),
    "task_arithmetic_plain": dict(
        merge_method="task_arithmetic", base_model="base", models=models(*ALL, weight=WEIGHT)
    ),
    "task_arithmetic_normalized": dict(
        merge_method="task_arithmetic", parameters={"normalize": True}, **TASKS
    ),
    "ties": dict(merge_method="ties", **TASKS),
    "ties_unnormalized": dict(
        merge_method="ties", parameters={"normalize": False, "lambda": 1.3}, **TASKS
    ),
    "ties_unnormalized_plain": dict(
        merge_method="ties", parameters={"normalize": False}, **TASKS
    ),
    "ties_rescaled": dict(merge_method="ties", parameters={"rescale": True}, **TASKS),
    "ties_negative": dict(
        merge_method="ties",
        base_model="base",
        models=models(*ALL, weight=[0.8, -0.5, 0.4], density=DENSITY),
    ),
    "dare_linear": dict(merge_method="dare_linear", **TASKS),
    "dare_ties": dict(merge_method="dare_ties", **TASKS),
    "breadcrumbs": dict(
        merge_method="breadcrumbs",
        base_model="base",
        models=models(*ALL, weight=WEIGHT, density=DENSITY, gamma=[0.02, 0.1, 0.6]),
    ),
    "breadcrumbs_alike": dict(merge_method="breadcrumbs", parameters={"gamma": 0.02}, **TASKS),
    "breadcrumbs_ties": dict(merge_method="breadcrumbs_ties", **TASKS),
    "della": dict(merge_method="della", parameters={"epsilon": 0.1}, **TASKS),
    "della_linear": dict(merge_method="della_linear", **TASKS),
    "model_stock": dict(merge_method="model_stock", base_model="base", models=models(*ALL)),
    "model_stock_rows": dict(
        merge_method="model_stock",
        base_model="base",
        models=models(*ALL),
        parameters={"filter_wise": True},
    ),
    "sce": dict(merge_method="sce", base_model="base", models=models(*ALL)),
    "sce_selected": dict(
        merge_method="sce",
        base_model="base",
        models=models(*ALL),
        parameters={"select_topk": 0.5},
    ),
    "nearswap": dict(merge_method="nearswap", parameters={"t": 0.02}, **PAIR),
    "arcee_fusion": dict(merge_method="arcee_fusion", **PAIR),
    "ram": dict(merge_method="ram", base_model="base", models=models(*ALL)),
    "ramplus_tl": dict(merge_method="ramplus_tl", base_model="base", models=models(*ALL)),
    # Layers of two models one after the other, one of them scaled in part.
    "passthrough": dict(
        merge_method="passthrough",
        slices=[
            {"sources": [{"model": "ft0", "layer_range": [0, 2]}]},
            {
                "sources": [
                    {
                        "model": "ft1",
                        "layer_range": [1, 2],
                        "parameters": {
                            "scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]
                        },
                    }
                ]
            },
        ],
    ),
    "modules": dict(
        merge_method="linear",
        modules={"default": {"models": models("ft0", "ft1", weight=[1.0, 3.0])}},
    ),
}


def absolute(value):
    """The configuration with the paths of the models here."""
    if isinstance(value, dict):
        names = ("model", "base_model")
        return {k: str(OUT / "models" / v) if k in names else absolute(v) for k, v in value.items()}
    return [absolute(v) for v in value] if isinstance(value, list) else value


drawn = {}


def recorded(tensor, density, rescale_norm=None):
    """mergekit's `bernoulli`, which also says what it kept."""
    ones = original(torch.ones_like(tensor), density, None)
    drawn.setdefault("now", []).append((tensor.clone(), ones.clone()))
    return mergekit.sparsify.rescaled_masked_tensor(tensor, ones, rescale_norm)


original = mergekit.sparsify.bernoulli
mergekit.sparsify.bernoulli = recorded

for name, config in CONFIGS.items():
    drawn.clear()
    with tempfile.TemporaryDirectory() as made:
        run_merge(
            MergeConfiguration.model_validate(absolute(dict(config, dtype="float32"))),
            made,
            MergeOptions(random_seed=17, quiet=True, copy_tokenizer=False, write_model_card=False),
        )
        merged = {}
        for file in sorted(Path(made).glob("*.safetensors")):
            merged.update(load_file(file))
        settings = (Path(made) / "config.json").read_text()
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in merged.items()}, folder / "merged.safetensors")
    (folder / "config.yml").write_text(yaml.safe_dump(dict(config, dtype="float32"), sort_keys=False))
    if "slices" in config:
        (folder / "config.json").write_text(settings)
    if "now" in drawn:
        base = load_file(OUT / "models" / "base" / "model.safetensors")
        tuned = {m: load_file(OUT / "models" / m / "model.safetensors") for m in ALL}
        masks = {}
        for tau, mask in drawn["now"]:
            for model, tensors in tuned.items():
                for key, value in tensors.items():
                    if value.shape == tau.shape and torch.equal(value - base[key], tau):
                        masks[f"{model}.{key}"] = mask.to(torch.uint8).contiguous()
        assert len(masks) == len(drawn["now"]), (len(masks), len(drawn["now"]))
        save_file(masks, folder / "masks.safetensors")
    print(name, len(merged), flush=True)

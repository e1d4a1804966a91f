"""Makes what the tests of modl-train compare its optimisers with.

Run by hand, with torch 2.13.0 and transformers 5.24.0:

    python tests/python/make_optimizer_golden.py crates/modl-train/tests/fixtures

Each of `SHAPES` has a start (`start.SHAPE`) and 25 fixed gradients (`grads.SHAPE`, `[25, …]`), whose
sizes differ by rows and by steps. For each setting the file has the parameter in f32 after each of
10 and 25 steps, `NAME.STEPS.SHAPE`, by `torch.optim.RMSprop` or by transformers' `Adafactor`. Its
metadata has the settings as JSON by `NAME`, in modl's words.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import Adafactor

STEPS = 25
LR = 0.02
SHAPES = {"vector": (7,), "matrix": (6, 9), "tall": (16, 3), "stack": (2, 5, 4)}

RMSPROP = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "alpha": 0.9, "eps": 1e-3},
    "momentum": {"momentum": 0.8, "weight_decay": 0.05},
    "centered": {"centered": True, "alpha": 0.95},
    "all": {"centered": True, "momentum": 0.7, "weight_decay": 0.1, "alpha": 0.9, "eps": 1e-4},
}
EXTERNAL = {"relative_step": False, "scale_parameter": False}
ADAFACTOR = {
    "plain": EXTERNAL,
    "decay": {**EXTERNAL, "weight_decay": 0.1, "clip_threshold": 0.5, "decay_rate": -0.6},
    "first": {**EXTERNAL, "beta1": 0.9, "weight_decay": 0.05},
    "scaled": {"relative_step": False, "scale_parameter": True, "weight_decay": 0.1},
    "relative": {"relative_step": True, "scale_parameter": True},
    "warm": {
        "relative_step": True,
        "scale_parameter": False,
        "warmup_init": True,
        "beta1": 0.5,
        "weight_decay": 0.1,
        "eps": (1e-12, 1e-2),
    },
}

torch.manual_seed(11)
torch.set_num_threads(1)
tensors, metadata = {}, {}
for shape, size in SHAPES.items():
    tensors[f"start.{shape}"] = torch.randn(size)
    rows = torch.logspace(-2, 1, size[0]).reshape(-1, *[1] * (len(size) - 1))
    steps = 1 + 0.5 * torch.sin(torch.arange(STEPS).float()).reshape(-1, *[1] * len(size))
    tensors[f"grads.{shape}"] = steps * rows * (torch.randn((STEPS, *size)) + 0.3)


def run(name, kind, make, settings, lr):
    metadata[name] = json.dumps({"type": kind, "lr": 1.0 if lr is None else lr, **settings})
    for shape in SHAPES:
        theta = torch.nn.Parameter(tensors[f"start.{shape}"].clone())
        optimizer = make([theta], lr=lr, **settings)
        for step in range(STEPS):
            theta.grad = tensors[f"grads.{shape}"][step].clone()
            optimizer.step()
            if step + 1 in (10, STEPS):
                tensors[f"{name}.{step + 1}.{shape}"] = theta.detach().clone()


for name, settings in RMSPROP.items():
    run(f"rmsprop_{name}", "rmsprop", torch.optim.RMSprop, settings, LR)
for name, settings in ADAFACTOR.items():
    lr = None if settings["relative_step"] else LR
    run(f"adafactor_{name}", "adafactor", Adafactor, settings, lr)
save_file(
    {name: t.contiguous() for name, t in tensors.items()},
    f"{sys.argv[1]}/optimizers.safetensors",
    metadata=metadata,
)

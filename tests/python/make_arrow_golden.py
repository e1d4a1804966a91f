"""Makes what the tests of modl-route compare Arrow with: numpy's singular vectors, and the outputs
of PEFT's layer.

Run by hand, with peft 0.21.2, torch and numpy:

    python tests/python/make_arrow_golden.py crates/modl-route/tests/fixtures

PEFT finds a prototype by 15 steps of a power iteration, so each product here has a first singular
value that stands out.
"""

import json
import sys

import numpy
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig

WIDTH, RANK, OUT, MODULES, TOKENS, TEMPERATURE = 6, 3, 5, 4, 7, 0.8

torch.manual_seed(5)
torch.set_num_threads(1)
names = [f"task_{j}" for j in range(MODULES)]
down = {name: torch.nn.Linear(WIDTH, RANK, bias=False) for name in names}
up = {name: torch.nn.Linear(RANK, OUT, bias=False) for name in names}
with torch.no_grad():
    for name in names:
        down[name].weight.normal_()[0].mul_(4)
        up[name].weight.normal_()[:, 0].mul_(4)
scale = {name: 0.5 + 0.25 * j for j, name in enumerate(names)}
x = torch.randn(1, TOKENS, WIDTH)

config = ArrowConfig(top_k=2, router_temperature=TEMPERATURE, rng_seed=0)
config.task_adapter_names, config.gks_adapter_names = names, []
layer = ArrowLoraLinearLayer(WIDTH, config)
with torch.no_grad():
    layer.build_prototypes(down, up)
    peft = layer(x, down, up, torch.nn.Identity(), scale)


def right(name):
    product = up[name].weight.detach().double().numpy() @ down[name].weight.detach().double().numpy()
    return numpy.linalg.svd(product)[2][0].tolist()


def flat(t):
    return t.detach().double().flatten().tolist()


golden = {
    "temperature": TEMPERATURE,
    "down": [flat(down[n].weight) for n in names],
    "up": [flat(up[n].weight) for n in names],
    "scale": [scale[n] for n in names],
    "x": flat(x),
    "numpy": [right(n) for n in names],
    "peft": flat(peft),
}
with open(f"{sys.argv[1]}/arrow.json", "w") as file:
    json.dump(golden, file, indent=1)
    file.write("\n")

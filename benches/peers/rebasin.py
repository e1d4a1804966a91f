"""The row of Git Re-Basin: two networks, matched by a plain program with scipy's assignment, and by modl. A
step takes seconds."""
import functools
import itertools
import os
import tempfile

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment

ROWS = {"Git Re-Basin, 4 x 1,024": ("rebasin", False, 0.0, False, "scipy")}


@functools.cache
def networks():
    """Two networks with four hidden layers of 1,024 units, trained a little on one task from starts of
    their own, each as [(weight, bias)]; and the file that modl reads them from."""
    widths = [256, 1024, 1024, 1024, 1024, 10]
    teacher = torch.randn(widths[0], widths[-1], generator=torch.Generator().manual_seed(0))
    both, file = {}, os.path.join(tempfile.mkdtemp(), "networks.safetensors")
    for seed, name in ((1, "a"), (2, "b")):
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        net = torch.nn.Sequential(*itertools.chain.from_iterable((l, torch.nn.ReLU()) for l in layers))[:-1]
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(60):
            x = torch.randn(64, widths[0])
            torch.nn.functional.cross_entropy(net(x), (x @ teacher).argmax(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        both[name] = [(l.weight.detach(), l.bias.detach()) for l in layers]
    save_file(
        {f"{m}.{i}.{p}": t.contiguous() for m in both for i, l in enumerate(both[m]) for p, t in zip(("weight", "bias"), l)},
        file,
    )
    return both["a"], both["b"], file


def rebasin():
    """Weight matching as the paper's algorithm 1 says it, in torch and scipy."""
    a, start, _ = networks()
    seeds = itertools.count(1)

    def step():
        b, gained = list(start), True
        order_of = np.random.default_rng(next(seeds)).permutation
        while gained:
            gained = False
            for k in order_of(len(a) - 1):
                (wa, ba), (wb, bb), (na, _), (nb, last) = a[k], b[k], a[k + 1], b[k + 1]
                alike = (wa @ wb.T + torch.outer(ba, bb) + na.T @ nb).numpy()
                _, order = linear_sum_assignment(alike, maximize=True)
                if alike[np.arange(len(order)), order].sum() > np.trace(alike) + 1e-6:
                    gained = True
                    order = torch.from_numpy(order)
                    b[k], b[k + 1] = (wb[order], bb[order]), (nb[:, order], last)

    return step

"""Whole models merged by mergekit and by the program `modl`, in turn, on this machine.

Four copies of MiniLM that differ and their base are merged from files to a file: by the command `modl
merge`, which syncs what it writes, and in this process by what `mergekit-pytorch` runs, which does not
(`mergekit-yaml` fails on BERT, whose tensors have aliases). The work of each is compared: modl's command
less what its start takes, and mergekit without its imports; then both as commands. Beside them stands
what reading the inputs once takes, and writing and syncing as much as the output.
Started by `cargo xtask bench --peers`, which makes the Python environment and builds the program.

usage: merging.py [--n 15 | --quick] [--rows TEXT] [--threads N]
environment: MODL_ROOT (the workspace), MODL (the built program)
"""
import argparse
import collections
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import yaml
from mergekit.graph import Executor
from mergekit.options import MergeOptions
from mergekit.scripts import merge_raw_pytorch as raw
from safetensors.torch import load_file, save_file

MODEL = os.path.join(os.environ["MODL_ROOT"], "assets", "all-MiniLM-L6-v2")
# name: (whether there is a base, how many further models, parameters of each, of all)
ROWS = {
    "ties": (True, 4, dict(weight=0.25, density=0.5), {}),
    "task_arithmetic": (True, 4, dict(weight=0.25), {}),
    "linear": (False, 5, dict(weight=0.2), {}),
    "slerp": (True, 1, {}, dict(t=0.5)),
}


def copies(folder):
    """The base and four copies of it with noise."""
    base = {k: v for k, v in load_file(os.path.join(MODEL, "model.safetensors")).items() if v.is_floating_point()}
    for i in range(5):
        g = torch.Generator().manual_seed(i)
        made = {k: v + 0.01 * torch.randn(v.shape, generator=g) if i else v for k, v in base.items()}
        os.mkdir(os.path.join(folder, f"m{i}"))
        save_file(made, os.path.join(folder, f"m{i}", "model.safetensors"), metadata={"format": "pt"})
        shutil.copy(os.path.join(MODEL, "config.json"), os.path.join(folder, f"m{i}"))


def configuration(method, path):
    has_base, models, each, parameters = ROWS[method]
    first = 1 if has_base else 0
    config = dict(merge_method=method, dtype="float32", parameters=parameters)
    config["models"] = [dict(model=path(i), parameters=each) for i in range(first, first + models)]
    if has_base:
        config["base_model"] = path(0)
    if method == "slerp":
        config["models"].insert(0, dict(model=path(0)))
    return config


def modl(folder, method):
    file, out = os.path.join(folder, "config.yml"), os.path.join(folder, "out")
    with open(file, "w", encoding="utf-8") as f:
        yaml.safe_dump(configuration(method, lambda i: os.path.join(folder, f"m{i}")), f)
    command = [os.environ["MODL"], "merge", file, "--out", out]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def mergekit(folder, method):
    config = configuration(method, lambda i: os.path.join(folder, f"m{i}", "model.safetensors"))
    config = raw.RawPyTorchMergeConfig.model_validate(config)

    def run():
        raw.SimpleLoaderCache._instance = None
        with contextlib.redirect_stderr(io.StringIO()):
            tasks = raw.plan_flat_merge(config, os.path.join(folder, "out"), False, False, MergeOptions())
        collections.deque(Executor(tasks, math_device="cpu", storage_device="cpu").run(quiet=True), maxlen=0)

    return run


def cat(folder, method):
    """Reads the inputs, and writes and syncs as much as the output."""
    has_base, models, _, _ = ROWS[method]
    first = 0 if has_base else 5 - models
    files = [os.path.join(folder, f"m{i}", "model.safetensors") for i in range(first, models + has_base)]
    out = os.path.join(folder, "out")
    script = f"mkdir {out} && cat {' '.join(files)} > /dev/null && cat {files[0]} > {out}/x && sync {out}/x"
    return lambda: subprocess.run(script, shell=True, check=True)


def timed(folder, work):
    shutil.rmtree(os.path.join(folder, "out"), ignore_errors=True)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=15, help="pairs in each row; a third of them here")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="2 pairs: a look, not a measurement")
    a, _ = parser.parse_known_args()
    rows = [method for method in ROWS if a.rows in f"merge of models, {method}"]
    if not rows:
        return
    torch.set_num_threads(a.threads)
    n = 2 if a.quick else max(3, a.n // 3)
    with tempfile.TemporaryDirectory(dir=os.environ["MODL_ROOT"], prefix=".merging-") as folder:
        copies(folder)
        version = [os.environ["MODL"], "--version"]
        imports = [sys.executable, "-c", "import mergekit.scripts.merge_raw_pytorch"]
        start, load = (
            statistics.median(
                timed(folder, lambda: subprocess.run(c, check=True, capture_output=True)) for _ in range(n)
            )
            for c in (version, imports)
        )
        print(f"\nstart of modl: {start:.2f} s, of mergekit: {load:.2f} s; the other columns are in seconds, too")
        print(
            f"{'row':34} {'mergekit':>10} {'modl':>8} {'cat':>8} {'times as fast':>14} {'as commands':>12}"
            f" {'modl of cat':>12}"
        )
        for method in rows:
            sides = [side(folder, method) for side in (mergekit, modl, cat)]
            rounds = [[timed(folder, side) for side in sides] for _ in range(n)]
            rounds = [(peer, ours - start, disk) for peer, ours, disk in rounds]
            peer, ours, disk = (statistics.median(side) for side in zip(*rounds))
            times = statistics.median(p / o for p, o, _ in rounds)
            commands = statistics.median((p + load) / (o + start) for p, o, _ in rounds)
            of_cat = statistics.median(o / c for _, o, c in rounds)
            name = f"merge of models, {method}"
            print(
                f"{name:34} {peer:10.2f} {ours:8.2f} {disk:8.2f} {times:14.1f} {commands:12.1f} {of_cat:12.2f}",
                flush=True,
            )


main()

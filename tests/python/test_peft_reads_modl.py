"""PEFT reads what modl writes, without a warning, and computes the same.

Run in an environment with torch 2.13, transformers 5.24 and peft 0.21.2:

    MODL_ROOT=path/to/modl python tests/python/test_peft_reads_modl.py

For each adapter that PEFT once made (all golden fixtures named BASE_METHOD), modl loads it and saves it; the real
PEFT then loads modl's folder with every warning turned into an error, and its outputs have to be
those that were recorded when the adapter was made.
"""

import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig

ROOT = pathlib.Path(os.environ.get("MODL_ROOT", pathlib.Path(__file__).parents[2])).resolve()
FIXTURES = ROOT / "crates" / "modl-compute" / "tests" / "fixtures"
BASES = ["bert", "gpt2", "llama", "t5", "vit"]
TOLERANCE = 1e-5


class Collect(logging.Handler):
    """Keeps every log record of level WARNING and above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(f"{record.name}: {record.getMessage()}")


def resave(base, adapter, out):
    """modl reads `adapter` onto its base model and writes it to `out`."""
    command = ["cargo", "run", "-q", "-p", "modl-compute", "--example", "resave_peft", "--"]
    subprocess.run([*command, str(FIXTURES / f"base_{base}"), str(adapter), str(out)], cwd=ROOT, check=True)


def watch_logs():
    """Hears the root logger and every logger that does not pass its records on to it."""
    collect = Collect()
    own = [l for l in logging.Logger.manager.loggerDict.values() if isinstance(l, logging.Logger)]
    for logger in [logging.getLogger(), *(l for l in own if not l.propagate)]:
        logger.addHandler(collect)
    return collect


def apart(found, expected):
    """The largest |found − expected| beyond TOLERANCE·(1 + |expected|), at most 0 where all is well."""
    return ((found - expected).abs() - TOLERANCE * (1 + expected.abs())).max().item()


def adapters():
    """The fixtures with an adapter on one of the tiny bases."""
    found = FIXTURES.glob("*/adapter/adapter_config.json")
    names = sorted(path.parent.parent.name for path in found)
    return [name for name in names if name.split("_")[0] in BASES]


def open_base(name):
    """The tiny base in the class that its configuration names."""
    folder = FIXTURES / f"base_{name}"
    [architecture] = AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager")


def check(name, folder):
    fixture, base_name = FIXTURES / name, name.split("_")[0]
    resave(base_name, fixture / "adapter", folder)
    inputs = load_file(FIXTURES / f"base_{base_name}" / "inputs.safetensors")
    golden = load_file(fixture / "outputs.safetensors")
    base = open_base(base_name)

    logs = watch_logs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT asks transformers under a name that is going away, whatever the adapter.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # What PEFT says of every layer that its LN_TUNING is made for.
        warnings.filterwarnings("ignore", message="Unsupported layer type .*(LayerNorm|RMSNorm)")
        model = PeftModel.from_pretrained(base, folder).eval()
        ours, theirs = PeftConfig.from_pretrained(folder), PeftConfig.from_pretrained(fixture / "adapter")
    assert not logs.messages, logs.messages
    assert ours.to_dict() == theirs.to_dict(), (ours, theirs)

    mergeable = any(key.startswith("merged.") for key in golden)
    with torch.no_grad():
        found = {"adapted": model(**inputs)}
        if mergeable:
            found["merged"] = model.merge_and_unload()(**inputs)
    for key, expected in golden.items():
        state, output = key.split(".")
        if state in found:
            excess = apart(found[state][output], expected)
            assert excess <= 0, f"{name} {key}: {excess} beyond the tolerance"
    print(f"{name}: PEFT reads modl's folder without a warning and gives the golden outputs")


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in adapters():
            check(name, pathlib.Path(folder) / name)


if __name__ == "__main__":
    sys.exit(main())

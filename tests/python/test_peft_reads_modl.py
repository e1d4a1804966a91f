"""PEFT reads what modl writes, without a warning of its own, and computes the same.

Run in an environment with torch 2.13, transformers 5.24 and peft 0.21.2:

    MODL_ROOT=path/to/modl python tests/python/test_peft_reads_modl.py

For each adapter that PEFT once made (all golden fixtures named BASE_METHOD, and those below
`deterministic_BASE`), modl loads it and saves it; the real
PEFT then loads modl's folder without a warning that it does not give of its own folder, too, and its
outputs, adapted and merged, have to be those of its own folder. That modl's outputs are those that PEFT
recorded when the adapter was made is tested in Rust.
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
TOLERANCE = 1e-6


class Collect(logging.Handler):
    """Keeps every log record of level WARNING and above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(f"{record.name}: {record.getMessage()}")


def resave(base, adapter, out):
    """modl reads `adapter` onto the model in `base` and writes it to `out`."""
    command = ["cargo", "run", "-q", "-p", "modl-compute", "--example", "resave_peft", "--"]
    subprocess.run([*command, str(base), str(adapter), str(out)], cwd=ROOT, check=True)


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
    """For each adapter on one of the tiny bases: base, adapter, and the folder with its outputs."""
    for path in sorted(FIXTURES.glob("*/adapter/adapter_config.json")):
        fixture = path.parent.parent
        base = fixture.name.split("_")[0]
        if base in BASES:
            yield FIXTURES / f"base_{base}", path.parent, fixture
    for path in sorted(FIXTURES.glob("deterministic_*/*/adapter_config.json")):
        yield path.parent.parent, path.parent, path.parent


def outputs(model, inputs, mergeable):
    """What the model says, and what it says once the adapter is merged, as `STATE.OUTPUT`."""
    with torch.no_grad():
        states = {"adapted": model(**inputs)}
        if mergeable:
            states["merged"] = model.merge_and_unload()(**inputs)
    names = ["last_hidden_state", "logits"]
    return {f"{s}.{n}": out[n] for s, out in states.items() for n in names if n in out}


def open_base(folder):
    """The tiny base in the class that its configuration names."""
    [architecture] = AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager").eval()


def load(base_folder, folder):
    """The adapted model, and what PEFT warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(open_base(base_folder), folder).eval()
    return model, {str(warning.message) for warning in caught}


def check(base_folder, adapter, fixture, folder):
    name = str(adapter.relative_to(FIXTURES))
    if PeftConfig.from_pretrained(adapter).to_dict().get("boft_n_butterfly_factor", 1) > 1:
        print(f"{name}: left out, PEFT computes several butterfly factors on GPUs only")
        return
    resave(base_folder, adapter, folder)
    inputs = load_file(base_folder / "inputs.safetensors")
    # First, since some things PEFT says only once.
    own, known = load(base_folder, adapter)
    logs = watch_logs()
    model, warned = load(base_folder, folder)
    assert warned <= known, warned - known
    ours, theirs = PeftConfig.from_pretrained(folder), PeftConfig.from_pretrained(adapter)
    assert not logs.messages, logs.messages
    ours, theirs = ours.to_dict(), theirs.to_dict()
    for config in [ours, theirs]:
        # PEFT writes no parameters as an empty list where transformers has renamed some of the base's.
        config["target_parameters"] = config.get("target_parameters") or None
        if isinstance(config.get("layers_pattern"), str):
            config["layers_pattern"] = [config["layers_pattern"]]
    assert ours == theirs, (ours, theirs)

    mergeable = any(key.startswith("merged") for key in load_file(fixture / "outputs.safetensors"))
    expected, found = outputs(own, inputs, mergeable), outputs(model, inputs, mergeable)
    assert expected and expected.keys() == found.keys(), (expected.keys(), found.keys())
    for key in expected:
        excess = apart(found[key], expected[key])
        assert excess <= 0, f"{name} {key}: {excess} beyond the tolerance"
    print(f"{name}: PEFT reads modl's folder without a warning and computes what it does of its own")


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for i, found in enumerate(adapters()):
            check(*found, pathlib.Path(folder) / str(i))


if __name__ == "__main__":
    sys.exit(main())

"""AdapterHub's own library reads what modl writes, misses no tensor, and computes the same.

Run by hand in the environment that make_adapterhub_golden.py wants:

    MODL_BIN=target/debug/modl python tests/python/adapterhub_reads_modl.py

For each adapter that AdapterHub once made, modl loads it and saves it; adapters 1.3.0 loads modl's
folder into a bare model and into one with a head, and its outputs have to be those that were
recorded when the adapter was made.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import adapters  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel, BertForSequenceClassification  # noqa: E402

ROOT = pathlib.Path(os.environ.get("MODL_ROOT", pathlib.Path(__file__).parents[2])).resolve()
FIXTURES = ROOT / "crates" / "modl-compute" / "tests" / "fixtures"
BASE = FIXTURES / "base_bert"


def resave(adapter, out):
    """modl reads `adapter` onto the base model and writes it to `out`."""
    command = [os.environ["MODL_BIN"], "convert", "--model", BASE, adapter]
    subprocess.run([*command, "--to", "adapterhub", "--out", out], check=True, capture_output=True)


def run(folder, make):
    """The hidden states of a model of class `make` with the adapter, and the keys it missed."""
    model = make.from_pretrained(BASE, attn_implementation="eager")
    adapters.init(model)
    info = {}
    name = model.load_adapter(str(folder), use_safetensors=True, loading_info=info)
    model.set_active_adapters(name)
    model.eval()
    inputs = load_file(BASE / "inputs.safetensors")
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
    return hidden, info["missing_keys"] + info["unexpected_keys"]


def main():
    torch.set_num_threads(1)
    failed = 0
    folders = sorted(FIXTURES.glob("adapterhub_*/outputs.safetensors"))
    assert folders, "no fixtures"
    for file in folders:
        name = file.parent.name.removeprefix("adapterhub_")
        wanted = load_file(file)["adapted.last_hidden_state"]
        with tempfile.TemporaryDirectory() as out:
            resave(file.parent / "adapter", f"{out}/again")
            for make in [AutoModel, BertForSequenceClassification]:
                found, left = run(f"{out}/again", make)
                good = not left and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
                failed += not good
                apart = (found - wanted).abs().max().item()
                print("ok  " if good else "FAIL", name, make.__name__, f"{apart:.1e}", *left)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes adapters and fusions with AdapterHub's own library, and what compositions of them compute on
a tiny BERT.

The tests of modl-aggregate compare with what this writes; it is run by hand in the environment that
make_adapterhub_golden.py wants:

    python tests/python/make_composition_golden.py \
        crates/modl-models/tests/fixtures/base_bert crates/modl-aggregate/tests/fixtures/adapterhub

For each adapter a folder of its name as `save_adapter` wrote it, for each fusion one as
`save_adapter_fusion` wrote it, `setups.json` with what the library makes of the compositions, and
`outputs.safetensors` with the last hidden states for the base's `inputs.safetensors` by their names.
"""

import json
import math
import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import adapters  # noqa: E402
import torch  # noqa: E402
from adapters import (  # noqa: E402
    DoubleSeqBnConfig,
    DynamicAdapterFusionConfig,
    SeqBnConfig,
    StaticAdapterFusionConfig,
)
from adapters.composition import (  # noqa: E402
    Average,
    BatchSplit,
    Fuse,
    Parallel,
    Split,
    Stack,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel  # noqa: E402

ADAPTERS = {
    "a": SeqBnConfig(reduction_factor=4),
    "b": SeqBnConfig(reduction_factor=8, non_linearity="gelu"),
    "c": SeqBnConfig(reduction_factor=4),
    "h1": DoubleSeqBnConfig(reduction_factor=4),
    "h2": DoubleSeqBnConfig(reduction_factor=8),
}

dynamic = DynamicAdapterFusionConfig
FUSIONS = {
    "fuse": (["a", "b"], dynamic()),
    "fuse_three": (["c", "a", "b"], dynamic(value_initialized=False, regularization=False)),
    "fuse_static": (["a", "b"], StaticAdapterFusionConfig()),
    "fuse_without_key": (["a", "b"], dynamic(key=False)),
    "fuse_query_before_ln": (["a", "b"], dynamic(query_before_ln=True)),
    "fuse_residual_before": (["a", "b"], dynamic(residual_before=True)),
    "fuse_value_after": (["a", "b"], dynamic(value_before_softmax=False)),
    "fuse_temperature": (["a", "b"], dynamic(temperature=True)),
    "fuse_houlsby": (["h1", "h2"], dynamic(dropout_prob=0.1)),
}

COMPOSITIONS = {
    "stack": Stack("a", "b"),
    "stack_houlsby": Stack("h1", "h2"),
    "average": Average("a", "b"),
    "average_weighted": Average("a", "b", "c", weights=[1.0, 2.0, 5.0]),
    "stack_fuse": Stack("c", Fuse("a", "b")),
    "batch_split": BatchSplit("a", "b", batch_sizes=[1, 2]),
    "batch_split_nested": BatchSplit(Stack("h1", "h2"), "h2", batch_sizes=[2, 1]),
    "parallel": Parallel("a", "b", "c"),
    "parallel_nested": Parallel(Stack("h1", "h2"), "h1"),
}


def wave(model, name, amplitude):
    """Adds a closed formula to the weights of an adapter or a fusion, so that nothing is zero."""
    own = [(n, p) for n, p in model.named_parameters() if name in n.split(".")]
    assert own, name
    with torch.no_grad():
        for j, (n, p) in enumerate(sorted(own)):
            k = torch.arange(p.numel(), dtype=torch.float64)
            p.add_(amplitude * torch.sin(0.7310585786 * k + 0.1 * j + len(name)).reshape(p.shape))


def state(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state.contiguous()


def main(base, out):
    torch.manual_seed(5)
    model = AutoModel.from_pretrained(base, attn_implementation="eager")
    adapters.init(model)
    model.eval()
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    inputs = load_file(os.path.join(base, "inputs.safetensors"))
    outputs, setups = {"base": state(model, inputs)}, {}
    for name, config in ADAPTERS.items():
        model.add_adapter(name, config=config)
        wave(model, name, 0.2 + 0.02 * len(outputs))
        model.save_adapter(os.path.join(out, name), name, use_safetensors=True)
        model.set_active_adapters(name)
        model.eval()
        outputs[name] = state(model, inputs)
    for name, (parts, config) in FUSIONS.items():
        fused = Fuse(*parts)
        model.add_adapter_fusion(fused, config)
        wave(model, ",".join(parts), 0.1)
        pickled = name == "fuse_without_key"
        model.save_adapter_fusion(os.path.join(out, name), fused, use_safetensors=not pickled)
        model.set_active_adapters(fused)
        model.eval()
        outputs[name] = state(model, inputs)
        if name == "fuse_temperature":
            # The temperature is another in each pass.
            for _ in range(2000):
                cold = state(model, inputs)
            outputs["fuse_temperature_cold"] = cold
        if name == "fuse":
            length = inputs["input_ids"].shape[1]
            more = {"split": Split("a", "b", splits=[3, length - 3])}
            for own, setup in (COMPOSITIONS | more).items():
                model.set_active_adapters(setup)
                model.eval()
                outputs[own] = state(model, inputs)
                setups[own] = setup.to_dict()
        model.delete_adapter_fusion(fused)
    # Which tensors are one matters to safetensors.
    outputs = {name: t.clone() for name, t in outputs.items()}
    for name, t in outputs.items():
        moved = (t[: len(outputs["base"])] - outputs["base"]).abs().max().item()
        print(f"{name}: {tuple(t.shape)}, moved {moved:.3f}")
        assert name == "base" or (math.isfinite(moved) and moved > 1e-2)
    save_file(outputs, os.path.join(out, "outputs.safetensors"))
    with open(os.path.join(out, "setups.json"), "w", encoding="utf-8") as file:
        json.dump(setups, file, indent=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2])

"""What PEFT's add_weighted_adapter makes of adapters that are more than A and B, and what is right.

Run in an environment with torch 2.13, transformers 5.24 and peft 0.21.2:

    python tests/python/make_adapter_merge_golden.py

On the tiny Llama of modl-compute's fixtures, writes crates/modl-apps/tests/fixtures/peft_merges.safetensors:

* `peft.KIND.TYPE`: logits of the merge of the one adapter KIND with the weight 1;
* `right.KIND+lora`: logits with 0.7 of what KIND changes and −0.3 of what `lora` changes, added to the
  weights themselves in f64 (and, for lora_bias, to the outputs);
* `peft.KIND+lora.cat`: what PEFT's `cat` of the two gives.
"""

import pathlib
import warnings

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

ROOT = pathlib.Path(__file__).parents[2]
LLAMA = ROOT / "crates/modl-compute/tests/fixtures/deterministic_llama"
OUT = ROOT / "crates/modl-apps/tests/fixtures/peft_merges.safetensors"
KINDS = ["rslora", "dora", "lora_bias"]
WEIGHTS = [0.7, -0.3]


def base():
    return LlamaForCausalLM.from_pretrained(LLAMA, attn_implementation="eager").eval()


def logits(model):
    with torch.no_grad():
        return model(**load_file(LLAMA / "inputs.safetensors"), use_cache=False).logits


def merged_by_peft(kinds, weights, how):
    model = PeftModel.from_pretrained(base(), LLAMA / kinds[0], adapter_name=kinds[0])
    for kind in kinds[1:]:
        model.load_adapter(LLAMA / kind, adapter_name=kind)
    model.add_weighted_adapter(kinds, weights, "merged", combination_type=how)
    model.set_adapter("merged")
    return logits(model.eval())


def changes(kind):
    """What an adapter adds to each weight and to each output, by its formula in f64."""
    file = {k.removeprefix("base_model.model."): t.double() for k, t in load_file(LLAMA / kind / "adapter_model.safetensors").items()}
    theta = {k: t.double() for k, t in base().state_dict().items()}
    scale = 8 / 4**0.5 if kind == "rslora" else 8 / 4
    found = {}
    for key, a in file.items():
        if not key.endswith(".lora_A.weight"):
            continue
        site = key.removesuffix(".lora_A.weight")
        delta = scale * file[f"{site}.lora_B.weight"] @ a
        if kind == "dora":
            w = theta[f"{site}.weight"]
            turned = w + delta
            m = file[f"{site}.lora_magnitude_vector"]
            delta = (m / turned.norm(dim=1))[:, None] * turned - w
        bias = file.get(f"{site}.lora_B.bias")
        found[site] = delta, None if bias is None else scale * bias
    return found


def right(kinds, weights):
    model = base().double()
    for kind, weight in zip(kinds, weights, strict=True):
        for site, (delta, bias) in changes(kind).items():
            layer = model.get_submodule(site)
            layer.weight.data += weight * delta
            if bias is not None:
                layer.register_forward_hook(lambda _, __, y, b=weight * bias: y + b)
    return logits(model).float()


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = {}
    for kind in KINDS:
        own = load_file(LLAMA / kind / "outputs.safetensors")["logits"]
        mine = right([kind], [1.0])
        assert (mine - own).abs().max() < 1e-5, (kind, (mine - own).abs().max())
        for how in ["linear", "svd", "cat"]:
            out[f"peft.{kind}.{how}"] = merged_by_peft([kind], [1.0], how)
            off = (out[f"peft.{kind}.{how}"] - own).norm() / own.norm()
            print(f"{kind} {how}: PEFT is off by {off:.3f}")
        out[f"right.{kind}+lora"] = right([kind, "lora"], WEIGHTS)
        out[f"peft.{kind}+lora.cat"] = merged_by_peft([kind, "lora"], WEIGHTS, "cat")
        off = out[f"peft.{kind}+lora.cat"] - out[f"right.{kind}+lora"]
        print(f"{kind}+lora cat: PEFT is off by {off.norm() / out[f'right.{kind}+lora'].norm():.3f}")
    OUT.parent.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in out.items()}, OUT)


if __name__ == "__main__":
    main()

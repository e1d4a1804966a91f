"""Makes mixtures with mergekit-moe whose tokens all have one expert, and what they compute.

The tests of modl-models compare what `modl upcycle` writes with what this writes; it is run by hand
when they need another setting. It wants mergekit 0.1.5 and transformers 5.24.0 beside torch:

    python tests/python/make_mergekit_golden.py crates/modl-models/tests/fixtures

`base_llama` and `upcycled_llama` are to be in the folder. For each architecture it writes
`mergekit_ARCHITECTURE` with the file that mergekit-moe read (whose models are EXPERT0 to EXPERT2:
`base_llama` with the matrices of its feed-forward networks times 1, 1.5 and 2), the `config.json` that
it wrote, the shapes of all tensors of its checkpoint, and `golden.safetensors`: the gates, the biases
and the logits of the checkpoint in f64. transformers has no class for `deepseek`: there this file's own
layer stands in a Llama.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

RECIPE = """base_model: EXPERT0
gate_mode: cheap_embed
dtype: float32
experts_per_token: 2
experts:
  - source_model: EXPERT0
    positive_prompts: ["w5 w6 w7", "w8 w9"]
    negative_prompts: ["w20 w21 w22 w23"]
  - source_model: EXPERT1
    positive_prompts: ["w30 w31 w32"]
    residual_scale: 0.5
  - source_model: EXPERT2
    positive_prompts: ["w40", "w41 w42"]
shared_experts:
  - source_model: EXPERT1
    residual_scale: 0.25
"""
RECIPES = {
    "deepseek": RECIPE,
    # Its shared expert has a gate.
    "qwen": RECIPE + '    positive_prompts: ["w50 w51"]\narchitecture: qwen\n',
}


def make_dense(out, folder, factor):
    shutil.copytree(os.path.join(out, "base_llama"), folder)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(os.path.join(out, "upcycled_llama", name), folder)
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    changed = {n: t * factor if ".mlp." in n else t for n, t in tensors.items()}
    save_file(changed, path, metadata={"format": "pt"})


class Mixture(torch.nn.Module):
    """softmax over all experts, the k largest divided by their sum, and the shared expert added."""

    def __init__(self, tensors, path, experts, k):
        super().__init__()
        self.k = k
        self.gate = tensors[f"{path}.gate.weight"]
        names = [f"experts.{e}" for e in range(experts)] + ["shared_experts"]
        matrices = ["gate_proj", "up_proj", "down_proj"]
        self.networks = [[tensors[f"{path}.{n}.{m}.weight"] for m in matrices] for n in names]

    def network(self, n, x):
        gate, up, down = self.networks[n]
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def forward(self, x):
        p = (x @ self.gate.T).softmax(-1)
        best, index = p.topk(self.k, -1)
        best = best / best.sum(-1, keepdim=True)
        weights = torch.zeros_like(p).scatter(-1, index, best)
        y = self.network(-1, x)
        for e in range(p.shape[-1]):
            y = y + weights[..., e : e + 1] * self.network(e, x)
        return y


def opened(architecture, folder):
    if architecture != "deepseek":
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    with open(os.path.join(folder, "config.json")) as f:
        settings = json.load(f)
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    tensors = {n: t.double() for n, t in tensors.items()}
    skip = ["model_type", "architectures", "auto_map"]
    config = LlamaConfig(**{n: v for n, v in settings.items() if n not in skip})
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).double()
    rest = {n: t for n, t in tensors.items() if ".mlp." not in n}
    missing, unexpected = model.load_state_dict(rest, strict=False)
    assert not unexpected and all(".mlp." in n for n in missing), (missing, unexpected)
    for n, layer in enumerate(model.model.layers):
        path = f"model.layers.{n}.mlp"
        k = settings["num_experts_per_tok"]
        layer.mlp = Mixture(tensors, path, settings["n_routed_experts"], k)
    return model


def make(out, architecture, work):
    folder = os.path.join(out, f"mergekit_{architecture}")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with open(os.path.join(folder, "mixture.yml"), "w") as f:
        f.write(RECIPES[architecture])
    text = RECIPES[architecture]
    for n in range(3):
        text = text.replace(f"EXPERT{n}", os.path.join(work, f"expert{n}"))
    recipe, made = os.path.join(work, "mixture.yml"), os.path.join(work, architecture)
    with open(recipe, "w") as f:
        f.write(text)
    command = [sys.executable, "-m", "mergekit.scripts.moe", recipe, made, "--clone-tensors"]
    subprocess.run(command, check=True)
    with open(os.path.join(made, "config.json")) as f:
        config = json.load(f)
    config.pop("_name_or_path", None)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2, sort_keys=True)
        f.write("\n")
    tensors = load_file(os.path.join(made, "model.safetensors"))
    with open(os.path.join(folder, "shapes.json"), "w") as f:
        json.dump({n: list(t.shape) for n, t in sorted(tensors.items())}, f, indent=1)
        f.write("\n")
    ends = (".gate.weight", "expert_gate.weight", ".bias")
    golden = {n: t for n, t in tensors.items() if n.endswith(ends)}
    ids = torch.arange(3, 63).reshape(3, 20)
    with torch.no_grad():
        golden["logits"] = opened(architecture, made).eval()(input_ids=ids).logits.contiguous()
    golden["input_ids"] = ids
    save_file(golden, os.path.join(folder, "golden.safetensors"))
    print(architecture, {n: tuple(t.shape) for n, t in golden.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for n in range(3):
            make_dense(sys.argv[1], os.path.join(place, f"expert{n}"), 1 + n / 2)
        for wanted in RECIPES:
            make(sys.argv[1], wanted, place)

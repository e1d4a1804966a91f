"""Makes tiny mixtures of experts with transformers, and what they compute.

The tests of modl-models and modl-compute compare with what this writes; it is run by hand when they
need another setting. It wants transformers 5.24.0 and peft 0.21.2 beside torch:

    python tests/python/make_mixture_golden.py crates/modl-models/tests/fixtures [NAME...]

For each model it writes a folder with `config.json` and `model.safetensors` as `save_pretrained`
wrote them, `inputs.safetensors` (the second row ends in padding) and `outputs.safetensors`: logits,
last hidden states, the logits of each router by its place among them, and auxiliary losses. For the
bases `deterministic_mixtral` and `deterministic_olmoe`, which are to be in the folder, it writes
`masked_BASE` with inputs and outputs alone. `MODEL/lora` is an adapter by PEFT.
`upcycled_llama` has a tokenizer for `base_llama`, a file as `mergekit-moe` reads it, and the gates
that its documentation describes: of prompts of unequal length, padded on the left.
"""

import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from make_structured_golden import strip  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "output_router_logits": True,
    "pad_token_id": None,
    "use_cache": False,
}
DEEPSEEK = {
    **SIZES,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
}
SWITCH = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 20,
    "num_heads": 4,
    "num_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "expert_capacity": 3,
    "decoder_start_token_id": 0,
}

MODELS = {
    "tiny_qwen2_moe": Qwen2MoeConfig(
        **SIZES,
        num_hidden_layers=3,
        num_key_value_heads=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=5,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "tiny_qwen2_moe_step": Qwen2MoeConfig(
        **SIZES,
        num_hidden_layers=2,
        num_key_value_heads=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        qkv_bias=False,
    ),
    "tiny_deepseek_v3": DeepseekV3Config(
        **DEEPSEEK,
        num_hidden_layers=2,
        q_lora_rank=10,
        n_shared_experts=2,
        first_k_dense_replace=1,
        rms_norm_eps=1e-3,
    ),
    "tiny_deepseek_v3_yarn": DeepseekV3Config(
        **DEEPSEEK,
        num_hidden_layers=1,
        q_lora_rank=None,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        routed_scaling_factor=1.5,
        rope_interleave=False,
        attention_bias=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 2.0,
            "beta_slow": 0.5,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
    ),
    "tiny_switch": SwitchTransformersConfig(**SWITCH, dropout_rate=0.1),
    "tiny_switch_untied": SwitchTransformersConfig(
        **{**SWITCH, "num_layers": 2, "num_sparse_encoder_layers": 0},
        router_bias=True,
        tie_word_embeddings=False,
    ),
}
CLASSES = {
    "qwen2_moe": Qwen2MoeForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
    "switch_transformers": SwitchTransformersForConditionalGeneration,
}
MASKED = ["deterministic_mixtral", "deterministic_olmoe"]


def inputs_of(model):
    g = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    inputs = {"input_ids": torch.randint(0, 64, (2, 9), generator=g), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(0, 64, (2, 7), generator=g)
    return inputs


def outputs_of(model, inputs):
    with torch.no_grad():
        found = model(**inputs, output_router_logits=True, output_hidden_states=True)
    single = ["logits", "encoder_last_hidden_state"]
    single += ["aux_loss", "encoder_aux_loss", "encoder_z_loss", "decoder_aux_loss", "decoder_z_loss"]
    recorded = {n: found.get(n) for n in single if isinstance(found.get(n), torch.Tensor)}
    if not model.config.is_encoder_decoder:
        recorded["last_hidden_state"] = found.hidden_states[-1]
    for stack in ["", "encoder_", "decoder_"]:
        for n, logits in enumerate(found.get(f"{stack}router_logits") or []):
            recorded[f"{stack}router_{n}"] = logits
    return {n: t.contiguous().clone() for n, t in recorded.items()}


def draw(model):
    """Weights that make all parts matter."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, t in sorted(model.state_dict().items()):
            if "norm" in name:
                t.copy_(1 + 0.2 * torch.randn(t.shape, generator=g))
            elif "shared.weight" in name or "embed_tokens" in name:
                t.copy_(torch.randn(t.shape, generator=g))
            else:
                scale = 0.1 if t.dim() == 1 else t.shape[-1] ** -0.5
                t.copy_(scale * torch.randn(t.shape, generator=g))
    model.tie_weights()


LORAS = {
    "tiny_qwen2_moe": {
        "target_modules": ["q_proj", "shared_expert.up_proj", "shared_expert_gate", "mlp.gate_proj"]
    },
    "tiny_deepseek_v3": {
        "target_modules": ["q_a_proj", "kv_b_proj", "shared_experts.down_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    # Experts are modules of their own here, `mlp.experts.expert_0.wi`.
    "tiny_switch": {
        "task_type": "SEQ_2_SEQ_LM",
        "target_modules": ["q", "wi", "wo"],
        "rank_pattern": {"expert_1.wi": 3},
        "alpha_pattern": {r"decoder\..*\.wo": 6},
    },
}


def make_lora(model, folder, inputs, targets):
    torch.manual_seed(5)
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **targets})
    tuned = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    tuned.save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    strip(os.path.join(folder, "adapter_config.json"))
    recorded = outputs_of(tuned.base_model.model, inputs)
    save_file({"logits": recorded["logits"]}, os.path.join(folder, "outputs.safetensors"))
    print(f"{folder}: {sum(1 for n, _ in tuned.named_modules() if n.endswith('lora_A'))} sites")


def make(out, name, config):
    folder = os.path.join(out, name)
    shutil.rmtree(folder, ignore_errors=True)
    config._attn_implementation = "eager"
    model = CLASSES[config.model_type](config).eval()
    draw(model)
    model.save_pretrained(folder)
    generation = os.path.join(folder, "generation_config.json")
    if os.path.exists(generation):
        os.remove(generation)
    inputs = inputs_of(model)
    recorded = outputs_of(model, inputs)
    save_file(inputs, os.path.join(folder, "inputs.safetensors"))
    save_file(recorded, os.path.join(folder, "outputs.safetensors"))
    print(name, {n: tuple(t.shape) for n, t in recorded.items()})
    if name in LORAS:
        make_lora(model, os.path.join(folder, "lora"), inputs, LORAS[name])


def make_masked(out, base):
    model = AutoModelForCausalLM.from_pretrained(
        os.path.join(out, base), attn_implementation="eager"
    ).eval()
    inputs = inputs_of(model)
    folder = os.path.join(out, base.replace("deterministic", "masked"))
    os.makedirs(folder, exist_ok=True)
    save_file(inputs, os.path.join(folder, "inputs.safetensors"))
    save_file(outputs_of(model, inputs), os.path.join(folder, "outputs.safetensors"))


EXPERTS = [
    (["w5 w6 w7", "w8 w9"], ["w20 w21 w22 w23"]),
    (["w30 w31 w32 w33 w34"], []),
    (["w40", "w41 w42", "w43 w44 w45"], ["w5 w6", "w50"]),
]


def make_upcycled(out):
    """Gates by torch: the states that go into each layer, and the vectors of words."""
    folder = os.path.join(out, "upcycled_llama")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    words = ["<unk>", "<s>", "</s>"] + [f"w{n}" for n in range(3, 96)]
    own = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Adds a token that gates are not to see twice.
    own.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = tokenizer.bos_token_id
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        os.path.join(out, "base_llama"), attn_implementation="eager"
    ).eval()

    def batch(prompts):
        return tokenizer(
            ["<s>" + p for p in prompts],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
            return_token_type_ids=False,
        )

    def hidden(prompts):
        with torch.no_grad():
            states = model(**batch(prompts), output_hidden_states=True).hidden_states
        return torch.stack([s[:, -1].mean(0) for s in states[:-1]])

    def cheap(prompts):
        given = batch(prompts)
        vectors = model.model.embed_tokens.weight[given["input_ids"]].detach()
        total = (vectors * given["attention_mask"][..., None]).sum((0, 1))
        return (total / total.norm()).repeat(model.config.num_hidden_layers, 1)

    gates = {}
    for name, vectors in [("hidden", hidden), ("cheap_embed", cheap)]:
        rows = []
        for positive, negative in EXPERTS:
            own = vectors(positive) - (vectors(negative) if negative else 0)
            rows.append(own / own.norm(dim=-1, keepdim=True))
        gates[name] = torch.stack(rows, 1).contiguous()
    save_file(gates, os.path.join(folder, "gates.safetensors"))
    lines = ["base_model: BASE", "gate_mode: hidden # one of them", "dtype: float32", "experts:"]
    for n, (positive, negative) in enumerate(EXPERTS):
        lines += [f"  - source_model: EXPERT{n}", "    positive_prompts:"]
        lines += [f'      - "{p}"' for p in positive]
        if negative:
            lines += ["    negative_prompts:"] + [f"      - {p}" for p in negative]
    with open(os.path.join(folder, "mixture.yml"), "w") as f:
        f.write("\n".join(lines) + "\n")
    print("upcycled_llama", {n: tuple(t.shape) for n, t in gates.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, only = sys.argv[1], sys.argv[2:]
    for base in MASKED:
        if not only or base in only:
            make_masked(target, base)
    if not only or "upcycled_llama" in only:
        make_upcycled(target)
    for setting, config in MODELS.items():
        if not only or setting in only:
            make(target, setting, config)

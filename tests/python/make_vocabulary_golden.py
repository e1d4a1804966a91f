"""Golden merges of two tiny Llamas with other vocabularies, by the real mergekit 0.1.5.

usage: python make_vocabulary_golden.py OUT   (needs torch, transformers 5, tokenizers, mergekit==0.1.5)

Writes OUT/models/{a,b} and OUT/NAME/{config.yml, merged.safetensors, tokenizer.json, config.json}.
Paths in config.yml are relative to OUT/models.
"""

import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"

from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402

OUT = Path(sys.argv[1]).resolve()

TEXTS = {
    "a": ["the cat sat on the mat", "that cat that sat", "a mat for the cat"],
    "b": ["the dog dug the bog", "the big dog", "a bog for the dog 12"],
}
SPECIAL = {"a": ["<s>", "</s>", "<only a>"], "b": ["<s>", "</s>", "<only b>"]}

for n, name in enumerate("ab"):
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=30 + 4 * n, special_tokens=SPECIAL[name], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[name], trainer)
    folder = OUT / "models" / name
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        dtype="float32",
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(n)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in ("generation_config.json", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True) if file.startswith("gen") else None


def pair(**more):
    entries = [
        {"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.7), ("b", 0.4))
    ]
    return dict(merge_method="linear", models=entries, dtype="float32", **more)


CONFIGS = {
    "base": pair(tokenizer_source="base"),
    "model": pair(tokenizer_source="b"),
    "union": pair(tokenizer_source="union"),
    "tokens": pair(
        tokenizer={
            "source": "union",
            "tokens": {
                "<only b>": {"source": {"kind": "zero"}},
                "<only a>": {"source": "a", "force": True},
                "</s>": {"source": {"kind": "model_token", "model": "b", "token": "the"}, "force": True},
            },
            "pad_to_multiple_of": 16,
        }
    ),
    # The base knows a token that others lack.
    "task": dict(
        merge_method="task_arithmetic",
        base_model="a",
        models=[{"model": "b", "parameters": {"weight": 0.5}}],
        tokenizer_source="union",
        dtype="float32",
    ),
}


def absolute(value):
    if isinstance(value, dict):
        return {
            k: str(OUT / "models" / v)
            if k in ("model", "base_model", "source", "tokenizer_source") and v in ("a", "b")
            else absolute(v)
            for k, v in value.items()
        }
    return [absolute(v) for v in value] if isinstance(value, list) else value


for name, config in CONFIGS.items():
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory() as made:
        run_merge(
            MergeConfiguration.model_validate(absolute(config)),
            made,
            MergeOptions(quiet=True, write_model_card=False),
        )
        merged = load_file(Path(made) / "model.safetensors")
        save_file({k: v.contiguous() for k, v in merged.items()}, folder / "merged.safetensors")
        for file in ("tokenizer.json", "config.json"):
            shutil.copy(Path(made) / file, folder / file)
    (folder / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    print(name, merged["model.embed_tokens.weight"].shape, flush=True)

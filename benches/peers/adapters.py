"""Rows of merging adapters: PEFT's `add_weighted_adapter` of eight LoRAs of rank 8 at query and value, into
one of rank 8 (density 0.5 where it trims), against the same arithmetic in modl. PEFT's call also hangs the
result into the model, which is what its `cat` takes but for two copies."""
import os

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertModel

MODEL = os.path.join(os.environ["MODL_ROOT"], "assets", "all-MiniLM-L6-v2")
ROWS = {
    f"merge 8 LoRAs, {combination}": (f"merge:{combination}", False, 0.0, False, None)
    for combination in ("cat", "ties", "svd", "ties_svd")
}


def merge(work):
    """One merge of eight adapters by PEFT."""
    combination = work.removeprefix("merge:")
    names = [f"a{i}" for i in range(8)]
    torch.manual_seed(0)
    model = get_peft_model(BertModel.from_pretrained(MODEL), lora(), names[0])
    for name in names[1:]:
        model.add_adapter(name, lora())
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p.data, std=0.02)
    density = dict(density=0.5) if "ties" in combination else {}

    def step():
        model.add_weighted_adapter(names, [1 / 8] * 8, "merged", combination_type=combination, **density)

    step.after = lambda: model.delete_adapter("merged")
    return step


def lora(**more):
    return LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], **more)

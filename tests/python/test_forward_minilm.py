"""`modl forward` on the pretrained MiniLM is what transformers computes, on a full batch.

16 sentences of up to 128 tokens, the shape of the benchmarks: large enough that the fast kernels are
used. Needs MODL_ROOT and MODL_BIN; run by `cargo xtask test --peers`.
"""
import os
import subprocess
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, logging

logging.set_verbosity_error()
ROOT, BIN = os.environ["MODL_ROOT"], os.environ["MODL_BIN"]
MODEL = os.path.join(ROOT, "assets", "all-MiniLM-L6-v2")

g = torch.Generator().manual_seed(5)
ids = torch.randint(1000, 30522, (16, 128), generator=g)
mask = torch.ones_like(ids)
for row in range(16):
    mask[row, 128 - 7 * row :] = 0
model = BertModel.from_pretrained(MODEL, dtype=torch.float32).eval()
with torch.no_grad():
    out = model(input_ids=ids, attention_mask=mask)
wanted = {"last_hidden_state": out.last_hidden_state, "pooler_output": out.pooler_output}

for threads in ("1", "2"):
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = os.path.join(folder, "in.safetensors"), os.path.join(folder, "out.safetensors")
        save_file({"input_ids": ids, "attention_mask": mask}, inputs)
        command = [BIN, "--threads", threads, "forward", "--model", MODEL, "--inputs", inputs, "--out", outputs]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = load_file(outputs)
    for name, expected in wanted.items():
        worst = (found[name] - expected).abs().max().item()
        assert torch.allclose(found[name], expected, atol=1e-5, rtol=1e-5), f"{name}: {worst}"
        print(f"{threads} threads, {name}: largest difference {worst:.1e}")

"""The same work in transformers/PEFT and in modl, step by step in turn, on this machine.

Each row runs one step of the peer, then one step of modl, and so on; the figure is the ratio of the
two in each pair. Both use the same number of threads and never run at the same time. Started by
`cargo xtask bench --peers`, which makes the Python environment and builds the Rust side.

usage: compare.py [--n 15 | --quick] [--rows TEXT] [--threads N] [--json FILE]
environment: MODL_ROOT (the workspace), MODL_PEER_STEP (the built example `peer_step`)
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, BertModel, logging

logging.set_verbosity_error()
ROOT = os.environ["MODL_ROOT"]
MODEL = os.path.join(ROOT, "assets", "all-MiniLM-L6-v2")
TEXTS = os.path.join(ROOT, "assets", "sentiment")
BATCH, SEQ, CLASSES = 16, 128, 4

# name: (train, bf16, dropout of the backbone, texts of real lengths)
ROWS = {
    "forward f32": (False, False, 0.0, False),
    "forward bf16": (False, True, 0.0, False),
    "train f32, dropout 0": (True, False, 0.0, False),
    "train f32, dropout 0.1": (True, False, 0.1, False),
    "train bf16, dropout 0": (True, True, 0.0, False),
    "train bf16, dropout 0.1": (True, True, 0.1, False),
    "train f32, real texts": (True, False, 0.1, True),
    "train bf16, real texts": (True, True, 0.1, True),
}


def batches(texts):
    """Ids of the batches that are run in turn; 0 is padding."""
    if not texts:
        g = torch.Generator().manual_seed(1)
        return [torch.randint(1000, 30522, (BATCH, SEQ), generator=g)]
    # Texts of all domains as they come when shuffled, each batch padded to its longest.
    lines = []
    for name in sorted(os.listdir(TEXTS)):
        if name.endswith(".tsv"):
            with open(os.path.join(TEXTS, name), encoding="utf-8") as f:
                lines += [line.rstrip("\n").split("\t")[-1] for line in f]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(1)).tolist()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    chosen = [lines[i] for i in order[: 8 * BATCH]]
    made = (chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH))
    tokens = (tokenizer(b, padding=True, truncation=True, max_length=256) for b in made)
    return [torch.tensor(t["input_ids"]) for t in tokens]


def peer(train, bf16, dropout, texts):
    """One step of transformers (forward) or PEFT (training, under autocast for bf16)."""
    torch.manual_seed(0)
    model = BertModel.from_pretrained(
        MODEL, dtype=torch.float32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    turn = itertools.cycle(
        [dict(input_ids=ids, attention_mask=(ids != 0).long()) for ids in batches(texts)]
    )
    if not train:
        model = model.eval().to(torch.bfloat16 if bf16 else torch.float32)

        def forward():
            with torch.no_grad():
                model(**next(turn))

        return forward
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    model.train()
    head = torch.nn.Linear(384, CLASSES)
    y = torch.arange(BATCH) % CLASSES
    params = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            hidden = model(**next(turn)).last_hidden_state[:, 0]
            loss = torch.nn.functional.cross_entropy(head(hidden).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


class Modl:
    """The same step in modl: a process that runs one for each line that it is sent."""

    def __init__(self, train, bf16, dropout, texts, threads):
        command = [
            os.environ["MODL_PEER_STEP"], MODEL, "train" if train else "forward",
            "bf16" if bf16 else "f32", str(dropout), str(threads),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for ids in batches(texts):
            line = f"batch {ids.shape[0]} " + " ".join(str(i) for i in ids.flatten().tolist())
            self.process.stdin.write(line + "\n")
        self.exchange("begin")

    def exchange(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"modl's side stopped (exit {self.process.wait()})")
        return answer

    def step(self):
        return float(self.exchange("go"))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=15, help="pairs in each row")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", default="", help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="5 pairs: a look, not a measurement")
    a = parser.parse_args()
    a.n = 5 if a.quick else a.n
    torch.set_num_threads(a.threads)
    print(f"torch {torch.__version__}, {a.threads} threads, batch {BATCH} x {SEQ}, {a.n} pairs a row\n")
    print(f"{'row':26} {'peer ms':>18} {'modl ms':>18} {'times as fast':>22}")
    figures = {}
    for name, (train, bf16, dropout, texts) in ROWS.items():
        if a.rows not in name:
            continue
        row = (train, bf16, dropout, texts)
        theirs, ours = peer(*row), Modl(*row, a.threads)
        # Each shape once, before the clock runs.
        for _ in range(max(2, len(batches(texts)))):
            theirs(), ours.step()
        pairs = []
        for _ in range(a.n):
            start = time.perf_counter()
            theirs()
            pairs.append(((time.perf_counter() - start) * 1e3, ours.step()))
        ours.close()
        ratios = sorted(p / m for p, m in pairs)
        mid = statistics.median
        p, m = mid(x for x, _ in pairs), mid(x for _, x in pairs)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        figures[name] = dict(peer_ms=p, modl_ms=m, ratio=mid(ratios), quartiles=[low, high], pairs=pairs)
        print(f"{name:26} {p:18.1f} {m:18.1f} {mid(ratios):8.2f} [{low:.2f}, {high:.2f}]", flush=True)
    if a.json:
        with open(a.json, "w") as f:
            json.dump(figures, f, indent=1)


main()

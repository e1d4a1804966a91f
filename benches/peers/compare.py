"""The same work in transformers/PEFT and in modl, step by step in turn, on this machine.

Each row runs one step of the peer, then one step of modl, and so on; the figure is the ratio of the
two in each pair. Both use the same number of threads and never run at the same time. Then what DoRA
costs over LoRA in each of them, and the peak memory of a process that trains. Started by
`cargo xtask bench --peers`, which makes the Python environment and builds the Rust side.

usage: compare.py [--n 15 | --quick] [--rows TEXT] [--threads N] [--json FILE]
environment: MODL_ROOT (the workspace), MODL_PEER_STEP (the built example `peer_step`)
"""
import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from peft import get_peft_model
from transformers import AutoTokenizer, BertModel, logging

import adapters
import mixtures
import rebasin
from adapters import MODEL, lora

logging.set_verbosity_error()
TEXTS = os.path.join(os.environ["MODL_ROOT"], "assets", "sentiment")
BATCH, SEQ, CLASSES = 16, 128, 4
PAUSE = 0.02

# name: (work, bf16, dropout of the backbone, texts of real lengths)
ROWS = {
    "forward f32": ("forward", False, 0.0, False),
    "forward bf16": ("forward", True, 0.0, False),
    "LoRA forward f32": ("lora", False, 0.0, False),
    "DoRA forward f32": ("dora", False, 0.0, False),
    "train f32, dropout 0": ("train", False, 0.0, False),
    "train f32, dropout 0.1": ("train", False, 0.1, False),
    "train bf16, dropout 0": ("train", True, 0.0, False),
    "train bf16, dropout 0.1": ("train", True, 0.1, False),
    "train f32, real texts": ("train", False, 0.1, True),
    "train bf16, real texts": ("train", True, 0.1, True),
    **mixtures.ROWS,
    **adapters.ROWS,
    **rebasin.ROWS,
}
MEMORY = {
    "memory f32, dropout 0.1": ("train", False, 0.1, False),
    "memory bf16, dropout 0.1": ("train", True, 0.1, False),
    "memory f32, checkpointed": ("checkpointed", False, 0.1, False),
    **mixtures.MEMORY,
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


def peer(work, bf16, dropout, texts, how=None):
    """One step of transformers (forward) or PEFT (all else; training under autocast for bf16)."""
    if work == "rebasin":
        return rebasin.rebasin()
    if work.startswith("mixture:"):
        return mixtures.mixture(work, bf16, how)
    if work.startswith("merge:"):
        return adapters.merge(work)
    torch.manual_seed(0)
    model = BertModel.from_pretrained(
        MODEL, dtype=torch.float32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    turn = itertools.cycle(
        [dict(input_ids=ids, attention_mask=(ids != 0).long()) for ids in batches(texts)]
    )
    if work in ("lora", "dora"):
        model = get_peft_model(model, lora(use_dora=work == "dora"))
    if work in ("forward", "lora", "dora"):
        model = model.eval().to(torch.bfloat16 if bf16 else torch.float32)

        def forward():
            with torch.no_grad():
                model(**next(turn))

        return forward
    if work == "checkpointed":
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model = get_peft_model(model, lora())
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

    def __init__(self, work, bf16, dropout, texts, threads, how=None):
        work = f"rebasin:{rebasin.networks()[-1]}" if work == "rebasin" else work
        command = [
            os.environ["MODL_PEER_STEP"], MODEL, work, "bf16" if bf16 else "f32", str(dropout), str(threads),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for ids in [] if ":" in work else batches(texts):
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

    def peak(self):
        """The most memory that the process has had, in MiB."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def modl(row, threads):
    return Modl(*row[:4], threads, *row[4:])


def summary(ratios):
    """Median, lower and upper quartile."""
    ratios = sorted(ratios)
    return statistics.median(ratios), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]


def dora_over_lora(label, lora, dora, n):
    """How much longer `dora` takes than `lora`, in pairs."""
    mid, low, high = summary(sorted(dora() / lora() for _ in range(n + 2))[1:-1])
    print(f"DoRA forward over LoRA forward, {label:6} {mid:6.2f} [{low:.2f}, {high:.2f}]", flush=True)
    return mid


def timed(step):
    def run():
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return run


def memory(name, row, threads):
    """Peak memory of five steps in a process of its own, of each side, in MiB."""
    command = [sys.executable, __file__, "--memory-of", name, "--threads", str(threads)]
    theirs = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ours = modl(row, threads)
    for _ in range(5):
        ours.step()
    peak = ours.peak()
    ours.close()
    print(f"{name:34} {theirs:10.0f} MiB {peak:14.0f} MiB {peak / theirs:8.2f} of the peer's", flush=True)
    return dict(peer_mib=theirs, modl_mib=peak)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=15, help="pairs in each row")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", default="", help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="5 pairs: a look, not a measurement")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.n = 5 if a.quick else a.n
    torch.set_num_threads(a.threads)
    if a.memory_of:
        step = peer(*MEMORY[a.memory_of])
        for _ in range(5):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print(f"torch {torch.__version__}, {a.threads} threads, batch {BATCH} x {SEQ}, {a.n} pairs a row\n")
    print(f"{'row':42} {'peer ms':>10} {'modl ms':>10} {'times as fast':>22}")
    figures = {}
    for name, row in ROWS.items():
        if a.rows not in name:
            continue
        texts = row[3]
        theirs, ours = peer(*row), modl(row, a.threads)
        after = getattr(theirs, "after", lambda: None)
        # Each shape once, before the clock runs.
        slow = row[0] == "rebasin"
        for _ in range(1 if slow else 2 if len(row) > 4 else max(2, len(batches(texts)))):
            theirs(), after(), ours.step()
        pairs = []
        for _ in range(max(3, a.n // 3) if slow else a.n):
            # Threads of the side before go on waiting for work for a while, on the cores of the next.
            time.sleep(PAUSE)
            start = time.perf_counter()
            theirs()
            took = (time.perf_counter() - start) * 1e3
            after()
            time.sleep(PAUSE)
            pairs.append((took, ours.step()))
        ours.close()
        p, m = (statistics.median(side) for side in zip(*pairs))
        mid, low, high = summary(p / m for p, m in pairs)
        figures[name] = dict(peer_ms=p, modl_ms=m, ratio=mid, quartiles=[low, high], pairs=pairs)
        print(f"{name:42} {p:10.1f} {m:10.1f} {mid:8.2f} [{low:.2f}, {high:.2f}]", flush=True)
    if a.rows in "DoRA over LoRA":
        rows = [ROWS["LoRA forward f32"], ROWS["DoRA forward f32"]]
        theirs = dora_over_lora("PEFT", *(timed(peer(*row)) for row in rows), a.n)
        ours = [modl(row, a.threads) for row in rows]
        figures["DoRA over LoRA"] = dict(peer=theirs, modl=dora_over_lora("modl", *(o.step for o in ours), a.n))
        for one in ours:
            one.close()
    for name, row in MEMORY.items():
        if a.rows in name:
            figures[name] = memory(name, row, a.threads)
    if a.json:
        with open(a.json, "w") as f:
            json.dump(figures, f, indent=1)


main()

"""Whole trainings by PEFT with transformers' Trainer and by Avalanche, and by the program `modl`, in turn.

- `epoch f32`, `epoch bf16`: one epoch of a LoRA (rank 8, query and value) and a regression head of
  MiniLM on sentiment texts of four domains, with the same settings, seeds and held-out texts; bf16 is
  autocast there, and a network in bf16 here. Tokens are those of the texts, without padding. Compared are the time from the first batch to the end, the peak memory of the process, and
  the error on the held-out texts.
- `ewc`, `replay`: orders of the pixels of digits, one after the other, in the setting of Lopez-Paz and
  Ranzato 2017 (20 tasks of 1,000 digits, a perceptron 784-100-100, batches of 10, one pass, gradient descent);
  `ewc, wide`, `replay, wide`: five tasks of 4,000, 784-256-256, batches of 32, three epochs, AdamW. Compared
  is the time from the first batch of the first task to the end of the last, with what each program does
  between tasks; Avalanche does not test on its way, modl on ten digits
  of each task. Avalanche's Fisher information is of batches of one example, as
  the paper and modl have it, over as many examples as modl takes, so that the same is computed.

Started by `cargo xtask bench --peers`, which makes the Python environment and builds the program.

usage: training.py [--n 5 | --quick] [--rows TEXT] [--threads N]
environment: MODL_ROOT (the workspace), MODL (the built program)
"""
import argparse
import hashlib
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.environ["MODL_ROOT"]
MODEL = os.path.join(ROOT, "assets", "all-MiniLM-L6-v2")
DOMAINS = ["tweets", "amazon", "movies", "nyt"]
BATCH, LR, WARMUP, DECAY = 16, 1e-3, 0.06, 0.01
FISHER, MEMORY = 256, 500
# tasks, digits of a task, width, batch, epochs, the optimiser here and there
GEM = (20, 1000, 100, 10, 1, '{ type = "sgd" }', 0.1)
WIDE = (5, 4000, 256, 32, 3, '{ type = "adamw" }', 1e-3)


def rank(text, n):
    """The place of a text in an order that is no order of the file."""
    return hashlib.sha256(f"{n} {text}".encode()).digest()


def texts(limit):
    """Rows (domain, id, score, text) to learn from and to test on."""
    train, test = [], []
    for domain in DOMAINS:
        with open(os.path.join(ROOT, "assets", "sentiment", f"{domain}.tsv"), encoding="utf-8") as f:
            rows = [line.rstrip("\n").split("\t", 2) for line in f if line.strip()]
        rows.sort(key=lambda row: rank(row[0], domain))
        rows = [(domain, *row) for row in rows[: limit + limit // 4]]
        train += rows[:limit]
        test += rows[limit:]
    return train, test


# What is run in a process of its own, so that its memory is its own.


def peer_epoch(folder, seed, bf16):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, BertModel, Trainer, TrainingArguments, logging

    logging.set_verbosity_error()
    torch.manual_seed(seed)
    random.seed(seed)
    with open(os.path.join(folder, "texts.json"), encoding="utf-8") as f:
        train, test = json.load(f)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    class Rows(torch.utils.data.Dataset):
        def __init__(self, rows):
            ids = tokenizer([row[3] for row in rows], truncation=True, max_length=512)["input_ids"]
            self.rows = [dict(input_ids=i, labels=float(row[2])) for i, row in zip(ids, rows)]

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            return self.rows[i]

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for to, row in zip(ids, rows):
            to[: len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels = torch.tensor([row["labels"] for row in rows])
        return dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)

    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            bert = BertModel.from_pretrained(MODEL, dtype=torch.float32)
            config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
            self.bert = get_peft_model(bert, config)
            self.head = torch.nn.Linear(384, 1)

        def forward(self, input_ids, attention_mask, labels=None):
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).float()
            said = self.head((hidden * mask).sum(1) / mask.sum(1)).squeeze(-1)
            return dict(loss=torch.nn.functional.mse_loss(said, labels), logits=said)

    arguments = TrainingArguments(
        output_dir=os.path.join(folder, "peer"), num_train_epochs=1, per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64, learning_rate=LR, weight_decay=DECAY, lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP * math.ceil(len(train) / BATCH)), max_grad_norm=1.0, use_cpu=True, bf16=bf16,
        report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True, seed=seed,
    )
    trainer = Trainer(model=Scored(), args=arguments, train_dataset=Rows(train), data_collator=collate)
    rows = Rows(test)
    seconds = trainer.train().metrics["train_runtime"]
    said = trainer.predict(rows).predictions
    wrong = statistics.fmean(abs(float(p) - row["labels"]) for p, row in zip(said, rows.rows))
    return dict(seconds=seconds, wrong=wrong, peak=peak_of(resource.RUSAGE_SELF))


def peer_continual(method, seed, tasks, digits, width, batch, epochs, _, lr):
    import gzip

    import torch
    from avalanche.benchmarks.scenarios.dataset_scenario import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive, Replay
    from avalanche.training.plugins.ewc import EWCPlugin
    from torch.utils.data import TensorDataset

    torch.manual_seed(seed)

    def idx(name):
        path = os.path.join(ROOT, "assets", "mnist", name)
        opened = open(path, "rb") if os.path.exists(path) else gzip.open(path + ".gz", "rb")
        with opened as f:
            return f.read()

    images = torch.frombuffer(bytearray(idx("train-images-idx3-ubyte")[16:]), dtype=torch.uint8)
    images = images.reshape(-1, 784)[:digits].float() / 255
    labels = torch.frombuffer(bytearray(idx("train-labels-idx1-ubyte")[8:]), dtype=torch.uint8)[:digits].long()
    data_of = []
    for task in range(tasks):
        order = torch.randperm(784, generator=torch.Generator().manual_seed(task)) if task else torch.arange(784)
        data = TensorDataset(images[:, order].contiguous(), labels)
        data.targets = labels.tolist()
        data_of.append(as_classification_dataset(data))
    stream = benchmark_from_datasets(train=data_of).train_stream
    layers = []
    for wide, out in [(784, width), (width, width)]:
        layers += [torch.nn.Linear(wide, out), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(width, 10))
    optimizer = torch.optim.SGD if batch == GEM[3] else torch.optim.AdamW
    settings = dict(
        model=net, optimizer=optimizer(net.parameters(), lr=lr),
        criterion=torch.nn.CrossEntropyLoss(), train_mb_size=batch, train_epochs=epochs, device="cpu",
        evaluator=EvaluationPlugin(loggers=[]),
    )
    if method == "ewc":

        class OfExamples(EWCPlugin):
            """Its own sums over batches of one example, and as many of them as modl takes."""

            def compute_importances(self, model, criterion, optimizer, dataset, device, batch_size, **kwargs):
                some = dataset.subset(range(FISHER))
                return super().compute_importances(model, criterion, optimizer, some, device, 1, **kwargs)

        strategy = Naive(plugins=[OfExamples(1000.0)], **settings)
    else:
        strategy = Replay(mem_size=MEMORY, **settings)
    clock = time.perf_counter()
    for experience in stream:
        strategy.train(experience, num_workers=0)
    return dict(seconds=time.perf_counter() - clock, peak=peak_of(resource.RUSAGE_SELF))


def peak_of(who):
    return resource.getrusage(who).ru_maxrss / 1024


# The program `modl`.


def followed(recipe, out, threads):
    """Runs a recipe; seconds from the first batch to the end of the phase, and the peak memory."""
    command = [os.environ["MODL"], "--threads", str(threads), "train", recipe, "--out", out]
    log = os.path.join(out, "events.jsonl")
    found = {}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = []
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
    reader.start()
    wanted = {"started": '{"event":"started"', "finished": '{"event":"phase_finished"'}
    peak, events, text = 0, None, ""
    while process.poll() is None or len(found) < 2:
        if events is None and os.path.exists(log):
            events = open(log, encoding="utf-8")
        # Only what is new: whoever reads all of it again and again takes a core from the program.
        text = text[-200:] + (events.read() if events else "")
        for key, words in wanted.items():
            if words in text:
                found.setdefault(key, time.perf_counter())
        try:
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as f:
                line = next((line for line in f if line.startswith("VmHWM:")), None)
            peak = max(peak, int(line.split()[1]) / 1024 if line else 0)
        except OSError:
            pass
        if process.poll() not in (None, 0):
            reader.join()
            sys.exit(f"modl train failed: {said[0]}")
        time.sleep(0.02)
    reader.join()
    events.close()
    return dict(seconds=found["finished"] - found["started"], peak=peak)


def modl_epoch(folder, seed, threads, bf16):
    out = os.path.join(folder, f"modl-{seed}")
    recipe = os.path.join(folder, "epoch.toml")
    files = lambda part: ", ".join(f'{d} = "{d}.{part}.tsv"' for d in DOMAINS)  # noqa: E731
    with open(recipe, "w", encoding="utf-8") as f:
        f.write(f"""seed = {seed}
backbone = {{ path = "{MODEL}", dtype = "{"bf16" if bf16 else "f32"}" }}
data.tasks = {{ {files("train")} }}
data.test_tasks = {{ {files("test")} }}
modules.all = {{ type = "lora", r = 8, alpha = 16, targets = ["query", "value"] }}
router = {{ type = "fixed", modules = ["all"] }}
aggregator = {{ type = "weighted_sum" }}
head = {{ type = "regression" }}
[[phases]]
name = "fit"
strategy = "joint"
epochs = 1
batch_size = {BATCH}
lr = {LR}
log_every = 10
optimizer = {{ type = "adamw", weight_decay = {DECAY} }}
schedule = {{ type = "cosine", warmup = {WARMUP} }}
""")
    found = followed(recipe, out, threads)
    with open(os.path.join(out, "predictions.json"), encoding="utf-8") as f:
        said = json.load(f)
    return found | dict(wrong=statistics.fmean(abs(p["prediction"] - p["target"]) for p in said))


def modl_continual(folder, method, seed, threads, setting):
    tasks, digits, width, batch, epochs, optimizer, lr = setting
    out = os.path.join(folder, f"modl-{method}-{seed}")
    strategy = {
        "ewc": f'{{ type = "ewc", lambda = 1000.0, examples = {FISHER} }}',
        "replay": f'{{ type = "replay", memory = {MEMORY}, rows = {batch} }}',
    }[method]
    # Avalanche does not clip; without it EWC's penalty of this weight ends in infinities here.
    clip = "clip = 1e9" if method == "replay" else ""
    recipe = os.path.join(folder, f"{method}.toml")
    with open(recipe, "w", encoding="utf-8") as f:
        # The least that can be held out; so many digits more are there.
        f.write(f"""seed = {seed}
backbone.fresh = {{ type = "mlp", inputs = 784, hidden = [{width}, {width}] }}
data = {{ format = "idx", tasks.digits = "{ROOT}/assets/mnist", stream = {{ type = "permuted", tasks = {tasks} }}, limit = {digits + digits // 100}, test = 0.01 }}
head = {{ type = "classification" }}
[[phases]]
name = "learn"
strategy = {strategy}
train = ["base.*", "heads.*"]
epochs = {epochs}
batch_size = {batch}
lr = {lr}
optimizer = {optimizer}
{clip}
log_every = 10
""")
    return followed(recipe, out, threads)


def in_process(threads, *work):
    """What a function of this file gives in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--work", json.dumps(work)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values):
    ordered = sorted(values)
    return f"{statistics.median(ordered):.2f} [{ordered[0]:.2f}, {ordered[-1]:.2f}]"


# Student's t at 97.5 %, by degrees of freedom; beyond the last as the normal distribution has it.
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def interval(values):
    """Mean and 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    t = STUDENT[len(values) - 2] if len(values) - 2 < len(STUDENT) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.4f} ± {half:.4f}"


def epoch(folder, name, n, threads, limit):
    train, test = texts(limit)
    with open(os.path.join(folder, "texts.json"), "w", encoding="utf-8") as f:
        json.dump([train, test], f)
    for part, rows in [("train", train), ("test", test)]:
        for domain in DOMAINS:
            with open(os.path.join(folder, f"{domain}.{part}.tsv"), "w", encoding="utf-8") as f:
                f.writelines("\t".join(row[1:]) + "\n" for row in rows if row[0] == domain)
    from transformers import AutoTokenizer

    tokens = sum(len(i) for i in AutoTokenizer.from_pretrained(MODEL)([r[3] for r in train])["input_ids"])
    peers, own = [], []
    for seed in range(n):
        peers.append(in_process(threads, "peer_epoch", folder, seed, name.endswith("bf16")))
        own.append(modl_epoch(folder, seed, threads, name.endswith("bf16")))
    rate = lambda all: f"{statistics.median(tokens / one['seconds'] for one in all):,.0f}"  # noqa: E731
    apart = [p["wrong"] - o["wrong"] for p, o in zip(peers, own)]
    print(f"{name}: {len(train):,} texts, {tokens:,} tokens, {n} seeds")
    print(f"  tokens per second: PEFT {rate(peers)}, modl {rate(own)}; "
          f"ratio {spread([p['seconds'] / o['seconds'] for p, o in zip(peers, own)])}")
    print(f"  peak memory: PEFT {statistics.median(p['peak'] for p in peers):,.0f} MiB, "
          f"modl {statistics.median(o['peak'] for o in own):,.0f} MiB")
    print(f"  mean error: PEFT {interval([p['wrong'] for p in peers])}, "
          f"modl {interval([o['wrong'] for o in own])}; difference {interval(apart)}", flush=True)


def continual(folder, name, n, threads):
    method, setting = name.split(",")[0], WIDE if name.endswith("wide") else GEM
    peers, own = [], []
    for seed in range(n):
        peers.append(in_process(threads, "peer_continual", method, seed, *setting))
        own.append(modl_continual(folder, method, seed, threads, setting))
    ratio = spread([p["seconds"] / o["seconds"] for p, o in zip(peers, own)])
    print(f"{name}: Avalanche {spread([p['seconds'] for p in peers])} s, "
          f"modl {spread([o['seconds'] for o in own])} s; ratio {ratio}; peak memory "
          f"{statistics.median(p['peak'] for p in peers):,.0f} and "
          f"{statistics.median(o['peak'] for o in own):,.0f} MiB", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", default="")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work")
    args, _ = parser.parse_known_args()
    if args.work:
        name, *rest = json.loads(args.work)
        print(json.dumps({"peer_epoch": peer_epoch, "peer_continual": peer_continual}[name](*rest)))
        return
    n, limit = (1, 200) if args.quick else (args.n, 1500)
    for name in ["epoch f32", "epoch bf16", "ewc", "replay", "ewc, wide", "replay, wide"]:
        if args.rows and args.rows not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            if name.startswith("epoch"):
                epoch(folder, name, n, args.threads, limit)
            elif os.path.exists(os.path.join(ROOT, "assets", "mnist")):
                continual(folder, name, n, args.threads)
            else:
                print(f"{name}: needs `cargo xtask assets mnist`")


if __name__ == "__main__":
    main()

"""Reads the event files of a run with tensorboard's own loader, as TensorBoard does.

Run by hand, with tensorboard 2.21.0, on the folder of a run of `modl train`:

    python tests/python/tensorboard_reads_modl.py runs/a

It prints the last value of each curve, and fails where the losses are not those of `events.jsonl`,
of which the last line of a step counts.
"""

import json
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

run = Path(sys.argv[1])
losses, training = {}, None
for line in (run / "events.jsonl").read_text().splitlines():
    event = json.loads(line)
    if event["event"] == "started":
        training = event["name"]
        first = event["step"]
        of = losses.setdefault(training, {})
        for step in [s for s in of if s > first]:
            del of[step]
    elif event["event"] == "step":
        losses[training][event["step"]] = event["loss"]

multiplexer = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0})
multiplexer.AddRunsFromDirectory(str(run / "tensorboard"))
multiplexer.Reload()
assert set(multiplexer.Runs()) == set(losses), (set(multiplexer.Runs()), set(losses))
for name, of in sorted(losses.items()):
    accumulator = multiplexer.GetAccumulator(name)
    for tag in accumulator.Tags()["scalars"]:
        last = accumulator.Scalars(tag)[-1]
        print(f"{name}: {tag} is {last.value:.6g} at step {last.step}")
    found = {s.step: s.value for s in accumulator.Scalars("loss")}
    assert set(found) == set(of), f"{name}: {len(found)} steps, not {len(of)}"
    for step, loss in of.items():
        assert abs(found[step] - loss) <= 1e-6 * max(1, abs(loss)), (name, step)
print("equal to events.jsonl")

"""Makes what modl-train compares its TensorBoard event files with.

Run by hand, with tensorboard 2.21.0:

    python tests/python/make_tensorboard_golden.py crates/modl-train/tests/fixtures

Four events as tensorboard's own RecordWriter writes them, at fixed times; the same are in the unit test
of `tensorboard.rs`.
"""

import sys
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

SCALARS = [("loss", 0.125), ("routing/load_cv2", -3.5e-3), ("großes ü", 1e30)]


def summary(scalars):
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars])


def main(folder):
    events = [
        Event(wall_time=1_700_000_000.25, file_version="brain.Event:2"),
        Event(wall_time=1_700_000_001.5, step=301, session_log=SessionLog(status=SessionLog.START)),
        Event(wall_time=1_700_000_002.75, step=300, summary=summary(SCALARS)),
        Event(wall_time=1_700_000_003.0, step=1 << 40, summary=summary(SCALARS[:1])),
    ]
    with open(Path(folder) / "tensorboard.tfevents", "wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString(deterministic=True))
        writer.flush()


if __name__ == "__main__":
    main(sys.argv[1])

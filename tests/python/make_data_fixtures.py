"""Makes the tables of `crates/modl-train/tests/fixtures` with pyarrow and safetensors.

    pip install pyarrow==26.0.1 safetensors numpy
    python tests/python/make_data_fixtures.py crates/modl-train/tests/fixtures
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

folder = Path(sys.argv[1])

# The hub's usual form: a text and a class, snappy, several groups of rows, another column.
texts = pa.table(
    {
        "id": ["a", "b", "c", "d", "e"],
        "text": ['one, "two"', "three", "four", "five", "six"],
        "score": pa.array([0.5, -2.0, 10.0, 0.0, 1.0], pa.float64()),
        "more": [[1], [], None, [2, 3], [4]],
    }
)
pq.write_table(texts, folder / "texts.parquet", compression="snappy", row_group_size=2)

# Lists of numbers, and a class that is a whole number; ids are counted.
lists = pa.table(
    {
        "class": pa.array([0, 1, 0, 0], pa.int64()),
        "input": pa.array([[1, -0.5], [2, 0.25], [3, 100], [4, 0]], pa.list_(pa.float32())),
    }
)
pq.write_table(lists, folder / "lists.parquet", compression="zstd")

# A number in each column, of several types, in the order of the columns.
columns = pa.table(
    {
        "p0": pa.array([1, 2, 3, 4], pa.int16()),
        "class": ["no", "yes", "no", "no"],
        "p1": pa.array([-0.5, 0.25, 100, 0], pa.float64()),
        "id": ["x", "y", "z", "w"],
    }
)
pq.write_table(columns, folder / "columns.parquet", compression="lz4", data_page_version="2.0")

gap = pa.table({"class": ["no", None, "yes", "no"], "text": ["a", "b", "c", "d"]})
pq.write_table(gap, folder / "gap.parquet", compression="gzip")

save_file(
    {
        "input_values": np.array([[1, -0.5], [2, 0.25], [3, 100], [4, 0]], np.float32),
        "class": np.array([0, 1, 0, 0], np.int64),
        "id": np.array([7, 5, 6, 9], np.int32),
    },
    folder / "rows.safetensors",
)
save_file(
    {
        "pixel_values": np.arange(16, dtype=np.uint8).reshape(4, 2, 2),
        "score": np.array([0.5, 1, 2, 3], np.float64),
    },
    folder / "images.safetensors",
)

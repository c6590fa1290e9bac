"""How long a data set larger than memory takes to the first batch, and how much memory it takes from then on.

    python scripts/bench/big_data.py --gigabytes 5 --folder /tmp/big

Writes a JSONL (pictures as base64) and a parquet file (pictures as bytes) of that size, and opens each in a process of
its own as `mmft train` does: reward statistics from its first rows, held-out rows, a cursor, a batch of 64 decoded
pictures. Then it draws `--rows` more. Exit status 0 where the first batch came within 10 s and extra memory stayed
under 1 GB. The files are removed at the end.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SECONDS, MEMORY = 10.0, 2**30
_DISTINCT = 64
_GROUP = 256  # rows of a row group


def pictures(rng: np.random.Generator) -> list[bytes]:
    """JPEGs of about 100 kB that differ in every pixel."""
    found = []
    for _ in range(_DISTINCT):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (256, 384, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=88)
        found.append(buffer.getvalue())
    return found


def rows(size: int, jpegs: list[bytes]) -> Iterator[tuple[bytes, str]]:
    """Pictures and captions of about `size` bytes together; bytes behind a JPEG's end make each picture another."""
    written = i = 0
    while written < size:
        picture = jpegs[i % _DISTINCT] + i.to_bytes(8, "big")
        yield picture, f"picture number {i} of many"
        written, i = written + len(picture), i + 1


def write_jsonl(path: Path, size: int, jpegs: list[bytes]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for picture, caption in rows(size * 3 // 4, jpegs):
            file.write(json.dumps({"image": base64.b64encode(picture).decode(), "caption": caption}) + "\n")


def write_parquet(path: Path, size: int, jpegs: list[bytes]) -> None:
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        batch: list[dict[str, object]] = []
        for picture, caption in rows(size, jpegs):
            batch.append({"image": picture, "caption": caption})
            if len(batch) == _GROUP:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema))


def memory() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(path: Path, count: int) -> dict[str, float]:
    """Opens a table as a run does; in a process that has imported what a run imports."""
    from mmft.config import load_recipe
    from mmft.data.prefetch import Prefetch
    from mmft.data.sources import open_cursor
    from mmft.run.building import prepare

    recipe = load_recipe("caption_ppo_fixed", ["data.type=table", f"data.path={path}", "reward.tripwire.action=off"])
    before, peak = memory(), 0.0
    began = time.perf_counter()
    job = prepare(recipe)
    opened = time.perf_counter() - began
    ahead = Prefetch(open_cursor(job.train, 0), 64, 2)
    first = ahead.next()
    seconds = time.perf_counter() - began
    assert len(first) == 64 and all(row.image is not None for row in first)
    at_first = memory() - before
    half = 0
    for i in range(count // 64):
        ahead.next()
        peak = max(peak, memory() - before)
        half = memory() - before if i == count // 128 else half
    ahead.close()
    took = time.perf_counter() - began - seconds
    return {
        "opened": opened, "first_batch": seconds, "extra_at_first": at_first, "extra_half_way": half,
        "extra_at_end": memory() - before, "extra_peak": max(peak, at_first), "rows_a_second": count / took,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, help="where there is room; default: the system's temporary folder")
    parser.add_argument("--rows", type=int, default=10_000, help="rows drawn after the first batch")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure, options.rows)))
        return 0
    size, status = int(options.gigabytes * 1e9), 0
    jpegs = pictures(np.random.default_rng(0))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, write in (("data.jsonl", write_jsonl), ("data.parquet", write_parquet)):
            path = Path(folder) / name
            write(path, size, jpegs)
            command = [sys.executable, __file__, "--measure", str(path), "--rows", str(options.rows)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found = json.loads(output.splitlines()[-1])
            good = found["first_batch"] <= SECONDS and found["extra_peak"] <= MEMORY
            status |= not good
            print(
                f"{name}: {path.stat().st_size / 1e9:.1f} GB; first batch after {found['first_batch']:.1f} s "
                f"(opened in {found['opened']:.1f}); extra memory {found['extra_at_first'] / 1e6:.0f} MB then, "
                f"{found['extra_half_way'] / 1e6:.0f} half-way, {found['extra_at_end'] / 1e6:.0f} after {options.rows} "
                f"rows, {found['extra_peak'] / 1e6:.0f} at most; {found['rows_a_second']:.0f} rows/s: "
                f"{'within' if good else 'NOT within'} {SECONDS:.0f} s and {MEMORY / 1e9:.1f} GB",
                flush=True,
            )
            path.unlink()
    return status


if __name__ == "__main__":
    sys.exit(main())

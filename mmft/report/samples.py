"""The pictures that a report shows, each with what the model said before and after."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmft.report.folder import EVAL_SAMPLES, PICTURES, RunFolder
from mmft.types import Row, UserError

LIMIT = 24
SIDE = 320  # pixels; enough for a page, and a report of photographs stays small


def write_eval_samples(
    run: RunFolder | str | Path,
    rows: Sequence[Row],
    before_captions: Sequence[str],
    after_captions: Sequence[str],
    before_rewards: Sequence[float] | None = None,
    after_rewards: Sequence[float] | None = None,
    limit: int = LIMIT,
) -> Path:
    """Writes the first `limit` samples to `eval_samples.jsonl` and their pictures to `pictures/`.

    The first, not the best: a selection would show what somebody wished to see. Returns the path of the file.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    count = len(rows)
    if not len(before_captions) == len(after_captions) == count:
        raise ValueError(f"{count} rows, {len(before_captions)} captions before and {len(after_captions)} after")
    lines: list[dict[str, Any]] = []
    for i in range(min(limit, count)):
        row = rows[i]
        lines.append(
            {
                "id": row.id,
                "picture": _save_picture(folder, row),
                "prompt": row.prompt,
                "references": list(row.references),
                "before": before_captions[i],
                "after": after_captions[i],
                "before_reward": None if before_rewards is None else float(before_rewards[i]),
                "after_reward": None if after_rewards is None else float(after_rewards[i]),
            }
        )
    folder.write_lines(EVAL_SAMPLES, lines)
    return folder / EVAL_SAMPLES


def sample_picture(run: RunFolder, sample: dict[str, Any]) -> Image.Image | None:
    """A sample's picture, or None where it has none that can be read. Nothing outside the run folder is opened:
    run folders are passed around, and a report must not carry a file of the machine it was made on."""
    name = sample.get("picture")
    if not isinstance(name, str):
        return None
    path = (run.path / name).resolve()
    if not path.is_relative_to(run.path.resolve()) or not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _save_picture(folder: RunFolder, row: Row) -> str | None:
    if row.image is None:
        return None
    image = row.image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    name = f"{PICTURES}/{_file_name(row.id)}.png"
    path = folder / name
    try:
        path.parent.mkdir(exist_ok=True)
        image.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error})") from error
    return name


def _file_name(row_id: str) -> str:
    """The id where it can name a file everywhere; otherwise what is plain of it, and a hash to keep names apart."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}", row_id):
        return row_id
    digest = hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', row_id)[:40].strip('-')}-{digest}".lstrip("-")

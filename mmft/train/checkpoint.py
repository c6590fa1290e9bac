"""Checkpoints on disk: whole or absent, checked before they are trusted, the oldest thinned out.

A checkpoint is written into a folder of another name, with a list of its files' sizes and digests, forced to disk and
renamed. Whatever ends a process, and whenever, `newest` finds the last one that is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from mmft.types import UserError

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_CHUNK = 2**22


def write_checkpoint(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Makes `folder`, in place of what is there, of what `fill` writes into the empty folder that it is given.

    Raises UserError where the disk is full or can't be written; `folder` is then as it was.
    """
    aside = folder.with_name(f".{folder.name}.new")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        aside.mkdir()
        fill(aside)
        files = {str(path.relative_to(aside)): _seal(path) for path in _files(aside)}
        (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True), encoding="utf-8")
        _seal(aside / MANIFEST)
        for path in [*(p for p in sorted(aside.rglob("*")) if p.is_dir()), aside]:
            _sync(path)
        if folder.exists():
            remove_checkpoint(folder)
        os.replace(aside, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be written ({reason}); earlier checkpoints are as they were") from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def check_checkpoint(folder: Path) -> None:
    """Raises UserError, naming the file, where one is missing or not as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        known = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}: not a checkpoint, or not a whole one") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read ({error})") from error
    for name, (size, digest) in known.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != size or _digest(path) != digest:
            raise UserError(f"{path}: altered or damaged since it was written")


def steps_of(root: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint under `root`, the oldest first, whole or not."""
    found = {int(match[1]): path for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def newest_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, or None; and what is wrong with those that are newer."""
    problems = []
    for folder in reversed(steps_of(root).values()):
        try:
            check_checkpoint(folder)
        except UserError as error:
            problems.append(str(error))
        else:
            return folder, problems
    return None, problems


def thin_out(root: Path, keep: int) -> None:
    """Removes all but the newest `keep`, and what an interrupted write or removal left behind."""
    for folder in list(steps_of(root).values())[:-keep]:
        remove_checkpoint(folder)
    for leftover in (*root.glob(".*.new"), *root.glob(".*.old")):
        _remove(leftover)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; at no moment does a part of one bear its name."""
    aside = folder.with_name(f".{folder.name}.old")
    _remove(aside)
    os.replace(folder, aside)
    _remove(aside)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _seal(path: Path) -> dict[str, int | str]:
    """Forces a file to disk and tells its size and digest."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)

"""One run a folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmft.types import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Held inside the block. The system lets go of it when the process ends, however it ends; without `fcntl` the file
    itself is the lock, and one that a killed run left is to be deleted by hand.

    Raises UserError, naming the process, where another holds it.
    """
    path = folder / LOCK
    try:
        handle = _exclusive(path) if fcntl is None else _locked(path)
    except FileExistsError:
        raise UserError(f"{_refusal(path)}, or delete {path} if that process is gone") from None
    except BlockingIOError:
        raise UserError(_refusal(path)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot lock ({error.strerror or error})") from error
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if fcntl is None:
            os.close(handle)  # Windows deletes no open file
            path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)  # while it is locked: later it may be another run's
            os.close(handle)


def _exclusive(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _locked(path: Path) -> int:
    """The open lock file, locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # of a run that ended in between, and took its file with it


def _refusal(path: Path) -> str:
    try:
        holder = path.read_text(encoding="utf-8", errors="replace")[:200].strip()
    except OSError:  # it ended in between
        holder = ""
    return (
        f"{path.parent}: another run is writing here ({holder or 'another process'}); wait for it, or set logging.name"
    )

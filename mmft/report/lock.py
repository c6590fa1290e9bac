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
    """Held inside the block; the system lets go of it when the process ends, however it ends.

    Raises UserError, naming the process, where another holds it. Without `fcntl` nothing is locked.
    """
    path = folder / LOCK
    handle = _locked(path)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _locked(path: Path) -> int:
    """The open lock file, locked."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot write ({error.strerror or error})") from error
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise UserError(
                f"{path.parent}: another run is writing here ({holder}); wait for it, or set logging.name"
            ) from None
        os.close(handle)  # of a run that ended in between, and took its file with it

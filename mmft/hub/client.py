"""Transfers to and from a hub (any `HF_ENDPOINT`), with every refusal answered in a line that says what to do."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from mmft import __version__
from mmft.hub.contents import KINDS, published
from mmft.types import UserError

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]  # type: ignore[assignment]  # its client's own base of all errors, whichever client this release uses
_LOGIN = "not logged in, or the token is not valid: run `hf auth login` or set HF_TOKEN"
_REASONS = {
    401: _LOGIN,
    403: "the token may not do that; it needs the right to write there",
    404: "no such repository, or a private one that the token may not see",
    409: "in conflict with what is there, or with another push",
    412: "somebody else has pushed in between",
    413: "too large for this hub",
    429: "too many requests; try again later",
}


@dataclass(frozen=True)
class Pushed:
    """What a push left: the repository's page, the commit, and the files in it."""

    url: str
    revision: str
    files: tuple[str, ...]


class Hub:
    """A model hub. endpoint, token: by default those of huggingface_hub (HF_ENDPOINT, HF_TOKEN, `hf auth login`)."""

    def __init__(self, endpoint: str | None = None, token: str | None = None):
        self.api = HfApi(endpoint, token=token, library_name="mmft", library_version=__version__)

    def user(self) -> str:
        """Who is logged in. Raises UserError where nobody is."""
        with self._explained("the hub"):
            return self.api.whoami()["name"]

    def licence(self, repo: str) -> str | None:
        """A model's licence as its card says, None where it says nothing or cannot be reached."""
        try:
            card = self.api.model_info(repo).card_data
        except (_TRANSPORT, OSError, ValueError):
            return None
        found = card.get("license") if card is not None else None
        return found if isinstance(found, str) else None

    def push(
        self, folder: Path, repo: str, private: bool, message: str, tell: Callable[[str], None] = lambda line: None
    ) -> Pushed:
        """Makes the repository where there is none, and commits the folder's files to it in one commit.

        What was uploaded before a failure is not uploaded again. Raises UserError, saying what went, where it fails;
        and before anything goes where a private push would land in a public repository.
        """
        went: list[str] = []
        with self._explained(repo, went):
            url = str(self.api.create_repo(repo, private=private, exist_ok=True))
            there = self.api.model_info(repo)
            if private and not there.private:
                raise UserError(f"{repo}: is a public repository; nothing was pushed. To publish there use --public")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in files]
            additions = [CommitOperationAdd(name, str(path)) for name, path in zip(names, files, strict=True)]
            for addition in additions:
                if addition.path_in_repo.endswith(_WEIGHTS):
                    self.api.preupload_lfs_files(repo, [addition], free_memory=False)
                    went.append(addition.path_in_repo)
                    tell(f"uploaded {addition.path_in_repo} ({size_of(addition.upload_info.size)})")
            old = [sibling.rfilename for sibling in there.siblings or ()]
            ours = {name for kind in KINDS.values() for name in published(kind, old)}
            stale = [CommitOperationDelete(name) for name in sorted(ours - set(names))]  # of an earlier push
            commit = self.api.create_commit(
                repo, [*additions, *stale], commit_message=message, parent_commit=there.sha or None
            )
        return Pushed(url, commit.oid, tuple(names))

    def pull(self, repo: str, out: Path, revision: str | None = None) -> list[str]:
        """Downloads what mmft publishes of a repository to the new folder `out`; returns the files' names.

        Nothing else of it is touched, so no code. An interrupted pull goes on where it was. Every file is compared with
        the size and digest that the hub states. Raises UserError.
        """
        if out.exists():
            raise UserError(f"{out}: is there already; choose another folder")
        part = out.with_name(out.name + ".part")
        with self._explained(repo):
            info = self.api.model_info(repo, revision=revision, files_metadata=True)
            stated = {sibling.rfilename: sibling for sibling in info.siblings or ()}
            names = sorted({n for kind in KINDS.values() for n in published(kind, list(stated))})
            if not any(kind.mark in names for kind in KINDS.values()):
                raise UserError(f"{repo}: holds neither an adapter nor a model")
            names += [name for name in ("README.md",) if name in stated]
            snapshot_download(
                repo, revision=info.sha, local_dir=part, allow_patterns=names, endpoint=self.api.endpoint,
                token=self.api.token,
            )  # fmt: skip
        shutil.rmtree(part / ".cache", ignore_errors=True)
        for name in names:
            _check(part / name, stated[name], repo)
        for path in part.rglob("*"):  # of a revision before the interruption
            if path.is_file() and path.relative_to(part).as_posix() not in names:
                path.unlink()
        os.replace(part, out)
        return names

    @contextmanager
    def _explained(self, repo: str, went: Sequence[str] = ()) -> Iterator[None]:
        """Every way in which a hub can refuse or break off, as UserError."""
        try:
            yield
        except (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
            raise UserError(f"{repo}: {_first_line(error)}") from error
        except (_TRANSPORT, LocalEntryNotFoundError, RuntimeError, ValueError) as error:
            raise UserError(f"{repo}: {self._reason(error)}{_progress(went)}") from error
        except OSError as error:  # of this machine's disk
            raise UserError(f"{repo}: {_first_line(error)}{_progress(went)}") from error

    def _reason(self, error: BaseException) -> str:
        while not isinstance(error, _TRANSPORT) and error.__cause__ is not None:
            error = error.__cause__
        response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
        if response is not None:
            said = getattr(error, "server_message", None)
            reason = _REASONS.get(response.status_code, "the hub refused")
            return f"{reason} ({response.status_code} from {self.api.endpoint}{f': {said}' if said else ''})"
        if isinstance(error, _TRANSPORT):
            return (
                f"no connection to {self.api.endpoint}, or it broke off ({type(error).__name__}: {_first_line(error)})"
            )
        return f"{self.api.endpoint} answered what cannot be understood ({_first_line(error)})"


def _progress(went: Sequence[str]) -> str:
    if not went:
        return ""
    return f"; uploaded so far: {', '.join(went)}, not committed. The same command goes on from there"


def _check(path: Path, stated: Any, repo: str) -> None:
    """Raises UserError where a file is not what the hub says it is."""
    if not path.is_file() or (stated.size is not None and path.stat().st_size != stated.size):
        raise UserError(f"{repo}: {stated.rfilename} did not arrive whole; the same command goes on from there")
    digest = getattr(stated.lfs, "sha256", None)
    if digest:
        with open(path, "rb") as file:
            found = _sha256(file)
        if found != digest:
            path.unlink()
            raise UserError(f"{repo}: {stated.rfilename} is damaged; the same command downloads it again")


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def size_of(count: int) -> str:
    """A number of bytes as people read it."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"

"""What must not be published: paths of this machine, tokens and passwords."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import huggingface_hub

from mmft.types import UserError

_SECRETS = {
    "a token": re.compile(
        r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|sk-[\w-]{20,}"
        r"|AKIA[0-9A-Z]{16}|xox[abpors]-[\w-]{10,}|AIza[\w-]{35})"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a password in an address": re.compile(r"\b\w+://[^\s/:@]+:[^\s/@]+@"),
}
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model")
_SHORTEST_SECRET = 8  # a variable's value that is shorter occurs anywhere
_HOMES = re.compile(r"(?<![\w.])(/(?:home|Users)/[^/\s\"']+|/root(?=/)|[A-Za-z]:\\+Users\\+[^\\\s\"']+)")


def without_paths(value: Any, keys: frozenset[str]) -> Any:
    """The value with paths of this machine under such keys cut to their last part; other names stay."""
    if isinstance(value, (list, tuple)):
        return [without_paths(item, keys) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _last_part(item) if key in keys and isinstance(item, str) and is_local(item) else without_paths(item, keys)
        for key, item in value.items()
    }


def _last_part(path: str) -> str:
    return Path(path.replace("\\", "/")).name or "."


def is_local(text: str) -> bool:
    """Whether a text is a path of one machine: absolute, from home or a parent, or a folder or file that is here."""
    if not text or "\n" in text:
        return False
    if text.startswith(("/", "~", "./", "../", "file:")) or PureWindowsPath(text).drive:
        return True
    try:
        return ("/" in text or "." in text) and Path(text).exists()
    except OSError:
        return False


def check_clean(folder: Path, also: tuple[str, ...] = ()) -> None:
    """Raises UserError, naming file and kind but not the secret itself, where a file to be published holds one.

    Reads text files and the headers of weights. also: further texts that must not occur, as a run's own folder.
    """
    secrets, paths = _secrets(), _paths(also)
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        text = _header(path) if path.suffix == ".safetensors" else path.read_text("utf-8", "replace")
        for found in _found(text, secrets, {} if path.name in _VOCABULARIES else paths):
            raise UserError(f"{path.relative_to(folder)}: holds {found}; not pushed")


def _found(text: str, secrets: dict[str, str], paths: dict[str, str]) -> Iterator[str]:
    yield from (name for name, pattern in _SECRETS.items() if pattern.search(text))
    yield from (name for secret, name in (secrets | paths).items() if secret in text)
    if paths and (home := _HOMES.search(text)):  # vocabularies are full of such words
        yield f"the path {home[0]} of this machine"


def _secrets() -> dict[str, str]:
    """Exact texts that must not go, and how each is called."""
    secrets = {
        value: f"the value of {name}"
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and not Path(value).exists()
    }
    if token := huggingface_hub.get_token():
        secrets[token] = "the hub's token"
    return secrets


def _paths(also: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for path in (*also, str(Path.home()), str(Path.cwd()), tempfile.gettempdir()):
        if len(Path(path).parts) > 1 and len(path) > 3:
            found[path.rstrip("/") + "/"] = f"the path {path} of this machine"
    return found


def _header(path: Path) -> str:
    """The JSON header of a safetensors file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > 100_000_000:
            raise UserError(f"{path.name}: no safetensors file")
        return json.dumps(json.loads(file.read(size)).get("__metadata__", {}))

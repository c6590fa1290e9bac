"""Hundreds of recipes as nobody should write them: each is read, or refused in one line, at once."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmft.cli import main
from mmft.config import Recipe, RewardRecipe, load_recipe, load_reward_recipe

SECONDS = 2.0
VALUES = (
    None, True, False, 0, -1, 1, 3.5, -0.0, 1e308, float("nan"), float("inf"), 10**30, "", " ", "text", "1", "null",
    "\0", "\u202e", "a" * 5000, "犬", [], [[]], [None], [1, "a"], {}, {"a": {}}, {"type": "bleu"}, {"type": None},
    {"": 1}, "${train.steps}", "${nothing}", "${train", "${oc.env:HOME}", "${", "???", "../..", "~", "1e3", "0x10",
    "1_000", "2026-01-01", "yes", "!!python/name:os.system", "<image>", "builtin:nothing", "%(x)s", "{x}", "\n",
    "a\nb",
)  # fmt: skip
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join(['*' + before] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: tuple[bytes, ...] = (
    b"", b"\0", b"\xff\xfe\x00", b"\xef\xbb\xbf", "name: x".encode("utf-16"), b"%PDF-1.4", b"\x89PNG\r\n",
    b"---\n---\n", b"- 1\n- 2", b"text", b"3", b"null", b"{", b"}", b"[", b"a: b: c", b"a:\n\t- 1", b"a: *b",
    b"a: &b *b", b"&a [*a]", b"a: &a {b: *a}", b"a: 1\na: 2", b"? [1]\n: 2", b"? {a: 1}\n: 2", b"1: 2", b"null: 3",
    b"true: 4", b"3.5: x", b"!!python/object/apply:os.system ['echo no']", b"a: !!python/name:os.system",
    b"a: !unknown x", b"a: !!binary '%%'", b"a: !!set {x}", b"a: !!timestamp 2026-13-45", b"a: !!int x",
    b"a: !!float x", b"a: 2026-13-45", b"a: 1:2:3:99", b"<<: 3", b"<<: [1]", b"a: {<<: *x}", b"model: null",
    b"model: []", b"model: {}\ndata: {}\nreward: {}\ntrain: {}", b"a: " + b"[" * 3000, b"a: " + b"{x: " * 3000,
    b"a: " + b"9" * 6000, LAUGHS.encode(), b"a: ${b}\nb: ${a}", b"a: ${a}", b"a: ${a.b.c}", b"a: ${oc.decode:x}",
    b"a: ${env:X}", b"a: ${.}", b"a: ???", b"name: ''", b"name: ../x", b"name: 3", b"name: a/b",
    b"? " + b"x" * 3000 + b"\n: 1", b"%YAML 9.9\n---\na: 1", b"a: |\n  x\n b", b"a: 'x", b'a: "\\xZZ"', b"@: 1",
    b"a: `x`", b"a: %x", b"a: >-\n", b"!!map", b"...", b"# nothing",
)  # fmt: skip


def blocks(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key and item."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from blocks(child, (*path, key))


def changed(text: str, chance: random.Random) -> bytes:
    """A shipped recipe with one to three faults."""
    tree = yaml.safe_load(text)
    for _ in range(chance.choice((1, 1, 2, 3))):
        path = chance.choice(list(blocks(tree)))
        node = tree
        for part in path[:-1]:
            node = node[part]
        kind = chance.randrange(4)
        if kind == 0:
            node[path[-1]] = chance.choice(VALUES)
        elif kind == 1:
            del node[path[-1]]
        elif kind == 2 and isinstance(node, dict):  # a typo
            key = str(path[-1])
            place = chance.randrange(len(key))
            node[key[:place] + key[place + 1 :]] = node.pop(path[-1])
        else:
            node[path[-1]] = {"x": node[path[-1]]}
        if not tree:
            break
    dumped = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    if chance.random() < 0.3:  # and bytes
        data = bytearray(dumped)
        data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data)
    return dumped


def judged(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Runs the command; returns its status, after checking what it said and how long it took."""
    began = time.perf_counter()
    status = main(arguments)
    seconds = time.perf_counter() - began
    said = capsys.readouterr()
    assert status in (0, 2), (status, said.err)
    assert seconds < SECONDS
    if status:
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.err.endswith("\n"), said.err
        assert len(said.err) < 1000 and said.out == ""
        assert said.err[:-1].isprintable()
    return status


@pytest.mark.parametrize(
    "name", ["recipes/caption_ppo", "recipes/caption_ppo_fixed", "reward_models/caption_aleatoric"]
)
def test_shipped_recipes_with_faults(
    name: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (repository / f"{name}.yaml").read_text(encoding="utf-8")
    chance, file, statuses = random.Random(name), tmp_path / "r.yaml", []
    for _ in range(60):
        file.write_bytes(changed(text, chance))
        statuses.append(judged(["validate", str(file)], capsys))
        if statuses[-1] == 0:  # what is said to be valid can be loaded and written down again
            loaded: Recipe | RewardRecipe = (load_reward_recipe if "reward" in name else load_recipe)(file)
            assert loaded.name
    assert statuses.count(2) > 20


@pytest.mark.parametrize("content", FILES, ids=[repr(content[:24]) for content in FILES])
def test_files_that_are_no_recipes(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    for command in ("validate", "train"):
        assert judged([command, str(file)], capsys) == 2


def test_overrides_with_faults(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load((repository / "recipes/caption_ppo.yaml").read_text(encoding="utf-8"))
    keys = [".".join(map(str, path)) for path in blocks(tree)]
    chance, statuses = random.Random(0), []
    values = (
        *map(str, VALUES),
        "{",
        "[",
        "{a: ",
        "*x",
        "&x",
        "!!python/name:os.system",
        "'",
        '"',
        ": :",
        "- ",
        "a: b",
        "#",
    )
    for _ in range(150):
        key = chance.choice(keys)
        key = chance.choice(
            (key, key, key, key + ".x", key[:-1], "", ".", "a..b", key + "." + "9" * 30, "é", " " + key)
        )
        statuses.append(judged(["validate", "caption_ppo", f"{key}={chance.choice(values)}"], capsys))
    assert 80 < statuses.count(2) < 150
    for odd in ("", "=", "==", "train.steps", "--", "train.steps==3", "=3", "train.steps=3=4", "\0=1"):
        judged(["validate", "caption_ppo", odd], capsys)

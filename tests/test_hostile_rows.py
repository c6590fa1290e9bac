"""Hundreds of rows as nobody should write them: each is used or listed as bad, and nothing else happens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch

from mmft.cli import main
from mmft.config import load_recipe
from mmft.data.sources import open_cursor, open_source, open_training
from mmft.data.table import TableStream
from mmft.models.policy import load_policy
from mmft.models.prompts import PromptBuilder
from mmft.report.folder import read_lines
from mmft.rewards.combine import build_reward
from mmft.types import Needs, Row

ROWS = 600
SMALL = ("train.batch=16", "train.minibatches=1", "train.epochs=1", "eval.samples=4", "generation.max_new_tokens=4",
         "model.lora.r=2", "data.max_bad_fraction=1", "reward.tripwire.action=off", "train.save_every=0")  # fmt: skip


def config(kind: str, path: Path, *more: str) -> Any:
    keys = [f"data.type={kind}", f"data.path={path}", "data.max_bad_fraction=1", *more]
    return load_recipe("caption_ppo_fixed", keys).data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("hostile")
    return path, hostile.folder(path, ROWS)


def well_formed(row: Row) -> None:
    """What every later stage relies on."""
    assert row.image.mode == "RGB" and min(row.image.size) >= 4 and max(row.image.size) <= 50 * min(row.image.size)
    assert row.prompt and all(reference.strip() == reference != "" for reference in row.references)
    "".join([row.prompt, *row.references, row.answer or ""]).encode("utf-8")


def listed(bad_rows: Iterable[dict[str, Any]]) -> set[tuple[str, int]]:
    rows = list(bad_rows)
    assert all(bad["reason"].strip() and "\n" not in bad["reason"] for bad in rows)
    places = {(bad["file"], bad["row"]) for bad in rows}
    assert len(places) == len(rows), "each once"
    return places


@pytest.mark.parametrize("needed", [None, "reward term 'bleu'"])
def test_every_line_of_a_folder_is_a_row_or_is_listed(folder: tuple[Path, int], needed: str | None) -> None:
    path, count = folder
    data = open_source(config("imagefolder", path), "all", needs=Needs(needed))
    ids = set()
    for row in data:
        well_formed(row)
        ids.add(row.id)
        assert row.references or needed is None
    bad = listed(data.bad_rows)
    assert len(ids) + len(bad) == count >= 500
    assert len(ids) > 100 and len(bad) > 100


@pytest.mark.parametrize("needed", [None, "reward term 'bleu'"])
def test_every_line_of_a_table_is_a_row_or_is_listed(tmp_path: Path, needed: str | None) -> None:
    count = hostile.folder(tmp_path, ROWS, seed=1, name="table.jsonl")
    data = config("table", tmp_path / "table.jsonl")
    stream = open_training(data, Needs(needed))
    assert isinstance(stream, TableStream)
    cursor, ids = open_cursor(stream, 0), set()
    for pending in cursor.draw(count):
        row = pending()
        well_formed(row)
        ids.add(row.id)
    held = open_source(data, "heldout", count, Needs(needed))
    ids |= {held[i].id for i in range(len(held))}
    assert len(ids) + len(listed(stream.bad_rows) | listed(held.bad_rows)) == count >= 500


def test_a_model_is_fed_with_every_row_that_it_has_room_for(folder: tuple[Path, int]) -> None:
    """A special token in a row's text stays text, so that a picture has as many placeholders as ever."""
    path, _ = folder
    policy = load_policy(load_recipe("caption_ppo_fixed").model, "cpu", torch.float32)
    builder = PromptBuilder(policy.processor)
    placeholder = builder.tokenizer.convert_tokens_to_ids(builder.placeholder)
    counts = set()
    for row in open_source(config("imagefolder", path), "all"):
        if len(row.prompt) < 2000:
            counts.add(int((builder(row).input_ids == placeholder).sum()))
    assert len(counts) == 1 and 0 not in counts


def test_captions_are_scored_whatever_is_in_them(folder: tuple[Path, int]) -> None:
    path, _ = folder
    rows = list(open_source(config("imagefolder", path), "all", needs=Needs("it")))[:80]
    captions = [row.references[0][:300] for row in rows]
    captions[:8] = ["<image>", "</s> <image> a dog", "", "\0", "\u202e", "👩‍👩‍👧‍👦", "a " * 500, "\n"]
    for name in ("caption_ppo", "caption_ppo_fixed"):
        recipe = load_recipe(name, ["reward.on_error=raise"])
        function = build_reward(recipe.reward)
        function.fit(rows)
        output = function(captions, rows)
        assert all(torch.isfinite(torch.tensor(output.total))), name


def test_training_lists_what_it_leaves_out_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, over all of the rows: none is lost without a word."""
    count = hostile.folder(tmp_path / "data", 500, seed=2)
    status = main(["train", "caption_ppo_fixed", "data.type=imagefolder", f"data.path={tmp_path / 'data'}", *SMALL,
                   f"logging.dir={tmp_path}", "train.steps=24"])  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    folder = tmp_path / "caption_ppo_fixed"
    bad = list(read_lines(folder / "bad_rows.jsonl"))
    assert f"skipped {len(bad)} bad rows" in said.err + said.out and "Traceback" not in said.err + said.out
    used = {row.id for row in rows_of(tmp_path / "data")}
    too_long = [row for row in bad if "do not fit the model's" in row["reason"]]
    assert too_long and len(listed(bad)) + len(used) - len(too_long) == count
    assert len(list(read_lines(folder / "metrics.jsonl"))) == 24


def rows_of(path: Path) -> list[Row]:
    """What the folder has, without a model's limits."""
    return list(open_source(config("imagefolder", path), "all", needs=Needs("reward term 'bleu'")))

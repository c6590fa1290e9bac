"""Tables and hub sets that are read as they are needed: what is in them, what is shuffled, and where a run goes on."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmft.config import HubDataConfig, TableConfig, load_recipe
from mmft.data import records
from mmft.data.sources import first_rows, open_cursor, open_source, open_training
from mmft.types import Row, UserError


def png(i: int) -> bytes:
    """A picture that is like no other."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (i % 256, i // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def number(row: Row) -> int:
    """Which picture a row has."""
    red, green, _ = row.image.getpixel((0, 0))
    return red + 256 * green


def row(i: int, kind: str, folder: Path) -> dict[str, Any]:
    if kind == "path":
        (folder / f"{i}.png").write_bytes(png(i))
        return {"file_name": f"{i}.png", "caption": f"caption {i}"}
    picture: Any = {
        "base64": base64.b64encode(png(i)).decode(),
        "url": "data:image/png;base64," + base64.b64encode(png(i)).decode(),
        "bytes": png(i), "struct": {"bytes": png(i), "path": None},
    }[kind]  # fmt: skip
    return {"image": picture, "captions": [f"caption {i}", "another"], "question": f"what is {i}?"}


def table(folder: Path, kind: str = "base64", count: int = 60, files: int = 1) -> Path:
    """A JSONL table, or a parquet one for bytes; several files share the rows."""
    folder.mkdir(exist_ok=True)
    rows = [row(i, kind, folder) for i in range(count)]
    for f in range(files):
        part = rows[f::files]
        if kind in ("bytes", "struct"):
            pq.write_table(pa.Table.from_pylist(part), folder / f"part-{f}.parquet", row_group_size=8)
        else:
            lines = "".join(json.dumps(line) + "\n" for line in part)
            (folder / f"part-{f}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def config(path: Path, **changes: Any) -> TableConfig:
    return TableConfig(path=str(path), **{"shuffle_window": 16, **changes})


def drawn(source: Any, count: int, seed: int = 0) -> list[int]:
    return [number(pending()) for pending in open_cursor(source, seed).draw(count)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSONL files are cut into parts of a few lines, wherever that falls."""
    monkeypatch.setattr(records, "_PART", 777)


@pytest.mark.parametrize("kind", ["path", "base64", "url", "bytes", "struct"])
@pytest.mark.parametrize("files", [1, 3])
def test_every_row_once_an_epoch(kind: str, files: int, tmp_path: Path) -> None:
    folder = table(tmp_path / "t", kind, files=files)
    source = open_training(config(folder, eval_fraction=0.0, prompt="Say it."))
    first, second = drawn(source, 60), drawn(source, 120)[60:]
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second != list(range(60)), "shuffled, otherwise in each epoch"
    assert drawn(source, 60) == first and drawn(source, 60, seed=1) != first
    assert not source.bad_rows.rows
    (some,) = first_rows(source, 1)
    assert some.prompt == ("Say it." if kind == "path" else "what is 0?") and some.references[0] == "caption 0"


def test_sides_share_no_picture(tmp_path: Path) -> None:
    folder = table(tmp_path / "t", count=80)
    with open(folder / "part-0.jsonl", "a") as file:  # the same pictures with other captions
        file.writelines(json.dumps(row(i, "base64", folder) | {"captions": "again"}) + "\n" for i in range(80))
    setting = config(folder, eval_fraction=0.3)
    heldout = open_source(setting, "heldout", 1000)
    held = [number(heldout[i]) for i in range(len(heldout))]
    train = drawn(open_training(setting), 160 - len(held))
    assert not set(held) & set(train) and set(held) | set(train) == set(range(80))
    assert sorted(held) == sorted([*set(held)] * 2)
    apart = config(folder, heldout_path=str(table(tmp_path / "other", count=5)))
    assert len(open_source(apart, "heldout", 100)) == 5
    assert sorted(drawn(open_training(apart), 160)) == sorted([*range(80)] * 2)
    assert len(open_source(setting, "heldout", 7)) == 7


@pytest.mark.parametrize("kind", ["base64", "struct", "hub"])
def test_a_cursor_goes_on_from_anywhere(kind: str, tmp_path: Path) -> None:
    folder = table(tmp_path / "t", "struct" if kind == "hub" else kind, count=40, files=2)
    if kind == "hub":
        source: Any = open_training(HubDataConfig(path=str(folder), shuffle_window=16, eval_fraction=0.0))
    else:
        source = open_training(config(folder, eval_fraction=0.0))
    expected = drawn(source, 100)
    for place in (0, 1, 15, 16, 17, 31, 39, 40, 41, 80, 99):
        cursor = open_cursor(source, 0)
        cursor.draw(place)
        state = json.loads(json.dumps(cursor.state_dict()))
        again = open_cursor(source, 0)
        again.load_state_dict(state)
        assert [number(p()) for p in again.draw(100 - place)] == expected[place:], place


def test_no_more_is_read_than_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = table(tmp_path / "t", count=200), []
    parse = records.parse_line
    monkeypatch.setattr(records, "parse_line", lambda raw: (read.append(1), parse(raw))[1])
    source = open_training(config(folder, eval_fraction=0.0))
    assert not read, "opening reads nothing"
    cursor = open_cursor(source, 0)
    cursor.draw(1)
    assert len(read) == 16
    cursor.draw(16)
    assert len(read) == 32
    assert len(list(source.rows_without_pictures(5))) == 5 and len(read) <= 32 + 6


def broken(folder: Path) -> Iterator[str]:
    """Lines that cannot be used, and one that can."""
    good = row(3, "base64", folder)
    yield "{not json\n"
    yield "\n"
    yield json.dumps({"captions": ["no picture"]}) + "\n"
    yield json.dumps(good | {"image": "nowhere.png"}) + "\n"
    yield json.dumps(good | {"image": base64.b64encode(png(5)[:40]).decode()}) + "\n"
    yield json.dumps(good | {"captions": 7}) + "\n"
    yield json.dumps([1]) + "\n"
    yield json.dumps(good)  # without an end of line


def test_bad_rows_are_listed_and_replaced(tmp_path: Path) -> None:
    folder = table(tmp_path / "t", count=2)
    with open(folder / "part-0.jsonl", "a") as file:
        file.writelines(broken(folder))
    source = open_training(config(folder, eval_fraction=0.0, max_bad_fraction=1.0))
    got = drawn(source, 50)
    assert set(got) == {0, 1, 3}
    listed = {bad["row"]: bad["reason"] for bad in source.bad_rows}
    assert len(listed) == 6, listed
    raw = (folder / "part-0.jsonl").read_bytes()
    assert [place for place, reason in listed.items() if reason.startswith("not JSON")] == [raw.index(b"{not json")]
    reasons = " ".join(listed.values())
    for said in ("no picture", "no such file, and not base64: 'nowhere.png'", "unreadable picture", "expected text"):
        assert said in reasons
    assert drawn(source, 50) == got, "what stands in is always the same"
    with pytest.raises(UserError, match=r"part-0\.jsonl: row \d+: "):
        drawn(open_training(config(folder, eval_fraction=0.0, on_bad_row="raise")), 1)


def test_too_many_bad_rows_stop(tmp_path: Path) -> None:
    folder = table(tmp_path / "t", count=100)
    with open(folder / "part-0.jsonl", "a") as file:
        file.writelines("{\n" for _ in range(50))
    with pytest.raises(UserError, match=r"rows are bad, more than data.max_bad_fraction 0.1 allows; the first: "):
        drawn(open_training(config(folder, eval_fraction=0.0)), 400)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.jsonl or \.csv or \.tsv or \.parquet file there"):
        open_training(config(tmp_path / "nowhere"))
    (tmp_path / "x.xlsx").write_text("a,b")
    with pytest.raises(UserError, match=r"x\.xlsx: not one of"):
        open_training(config(tmp_path / "x.xlsx"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read as parquet"):
        open_training(config(tmp_path / "x.parquet"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no usable rows for training"):
        drawn(open_training(config(tmp_path / "empty.jsonl")), 1)
    with pytest.raises(UserError, match="no usable rows held out"):
        open_source(config(table(tmp_path / "t", count=2), eval_fraction=0.001), "heldout", 3)
    with pytest.raises(UserError, match=r"data\.path: .*nowhere"):
        open_training(HubDataConfig(path=str(tmp_path / "nowhere")))


def test_a_recipe_names_it(tmp_path: Path) -> None:
    path = table(tmp_path / "t")
    recipe = load_recipe("caption_ppo_fixed", ["data.type=table", f"data.path={path}", "data.columns.image=image"])
    assert isinstance(recipe.data, TableConfig) and recipe.data.columns.image == "image"
    with pytest.raises(UserError, match="did you mean heldout_path"):
        load_recipe("caption_ppo_fixed", ["data.type=table", f"data.path={path}", "data.held_out_path=x"])
    with pytest.raises(UserError, match="eval_fraction"):
        load_recipe("caption_ppo_fixed", ["data.type=table", f"data.path={path}", "data.eval_fraction=0"])

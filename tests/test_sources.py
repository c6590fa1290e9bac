"""Pictures and captions as people keep them: CSV beside a folder, COCO's files, tables of text, several answers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmft import run
from mmft.config import CocoConfig, TableConfig, load_recipe
from mmft.data.coco import CocoCaptions
from mmft.data.imagefolder import ImageFolder
from mmft.data.sources import open_source
from mmft.types import Row, UserError

SMALL = (
    "train.steps=1", "train.batch=4", "train.samples_per_prompt=1", "train.minibatches=1", "train.epochs=1",
    "train.save_every=0", "eval.samples=2", "generation.max_new_tokens=4", "model.lora.r=2",
    "reward.tripwire.action=off",
)  # fmt: skip


def pictures(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (20 * i, 255 - 20 * i, 7)).save(folder / name)
    return folder


def rows_of(source: Any) -> list[Row]:
    return [source[i] for i in range(len(source))]


# CSV


def test_a_csv_beside_a_folder(tmp_path: Path) -> None:
    """As `datasets` lays it out; quoted commas and line breaks, a byte order mark, several captions of a picture."""
    pictures(tmp_path, "a.png", "b.png")
    text = 'file_name,caption\na.png,"a dog, and\na cat"\nb.png,two dogs\na.png,a dog\na.png,a dog\nc.png,nothing\n'
    (tmp_path / "metadata.csv").write_text("\ufeff" + text, encoding="utf-8")
    data = ImageFolder(tmp_path, split="all")
    assert [(row.id, row.references) for row in rows_of(data)] == [
        ("a.png", ("a dog, and\na cat", "a dog")), ("b.png", ("two dogs",))
    ]  # fmt: skip
    (bad,) = data.bad_rows
    assert bad["file"].endswith("metadata.csv") and bad["row"] == 7 and "no picture 'c.png'" in bad["reason"]


def test_a_tsv_with_questions(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    text = "file_name\tquestion\tanswer\na.png\twhat?\tdog\na.png\twhat?\tdog\na.png\twhat?\tcat\na.png\thow?\twell\n"
    (tmp_path / "metadata.tsv").write_text(text, encoding="utf-8")
    what, how = rows_of(ImageFolder(tmp_path, split="all"))
    assert (what.prompt, what.answer, what.answers) == ("what?", "dog", ("dog", "dog", "cat"))
    assert (how.prompt, how.answer, how.answers) == ("how?", "well", ())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no header line"),
        (b"file_name\n\xff\xfe.png\n", "not UTF-8"),
        (b'file_name\n"a.png\n', "unexpected end of data"),
    ],
)
def test_a_csv_that_cannot_be_read(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        ImageFolder(tmp_path)


def test_a_table_of_text(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{i}.png" for i in range(6)))
    lines = [f'{i}.png,"caption, {i}"' for i in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(["picture,text", *lines]) + "\n", encoding="utf-8")
    config = TableConfig(path=str(tmp_path / "t.csv"), eval_fraction=0.4, shuffle_window=3)
    sides = [rows_of(open_source(config, side)) for side in ("train", "heldout")]
    said = [{row.references[0] for row in side} for side in sides]
    assert said[0] | said[1] == {f"caption, {i}" for i in range(6)} and not said[0] & said[1]


def test_a_picture_inside_a_csv(tmp_path: Path) -> None:
    """Base64 of more than the 128 KiB that a field may have by default."""
    noise = np.random.default_rng(0).integers(0, 256, (250, 250, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    text = base64.b64encode((tmp_path / "noise.png").read_bytes()).decode()
    assert len(text) > 2**17
    (tmp_path / "t.csv").write_text(f"image,caption\n{text},noise\n", encoding="utf-8")
    (row,) = rows_of(open_source(TableConfig(path=str(tmp_path / "t.csv"), eval_fraction=0.0), "train"))
    assert row.references == ("noise",) and row.image.size == (250, 250)


# Several answers, and captions inside objects


def test_answers_of_many(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    asked = {"file_name": "a.png", "question": "what?", "answers": [{"answer": "cat"}, {"answer": "dog"}, "dog"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(asked) + "\n", encoding="utf-8")
    (row,) = rows_of(ImageFolder(tmp_path, split="all"))
    assert (row.answer, row.answers, row.known_answers) == ("dog", ("cat", "dog", "dog"), ("cat", "dog", "dog"))


def test_sentences_as_objects(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    lines = [{"img": f"{name}.png", "sentences": [{"raw": "a dog"}, {"raw": "one dog"}]} for name in "ab"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = TableConfig(path=str(tmp_path / "t.jsonl"), eval_fraction=0.0)
    assert [row.references for row in rows_of(open_source(config, "train"))] == [("a dog", "one dog")] * 2


def test_the_columns_that_are_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"photo": "a.png", "caption": "x"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="the columns are caption, photo"):
        open_source(TableConfig(path=str(tmp_path / "t.jsonl"), on_bad_row="raise"), "train")


# COCO


def official(folder: Path, count: int = 10) -> Path:
    pictures(folder, *(f"{i:012}.jpg" for i in range(count)))
    images = [{"id": i, "file_name": f"{i:012}.jpg"} for i in range(count)] + [{"id": 99, "file_name": "gone.jpg"}]
    said = [{"image_id": i, "id": 2 * i + k, "caption": f"picture {i} "} for i in range(count) for k in range(2)]
    file = folder / "captions_val2014.json"
    file.write_text(json.dumps({"images": images, "annotations": said}), encoding="utf-8")
    return file


def karpathy(folder: Path) -> Path:
    sides = ["train", "train", "restval", "restval", "val", "val", "test", "train", "train", "train"]
    images = [
        {"filepath": "val2014", "filename": f"{i}.jpg", "split": side,
         "sentences": [{"raw": f"picture {i}", "tokens": ["picture"]}, {"raw": f"no. {i}", "tokens": []}]}
        for i, side in enumerate(sides)
    ]  # fmt: skip
    pictures(folder, *(f"val2014/{i}.jpg" for i in range(len(sides))))
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}), encoding="utf-8")
    return file


def test_official_coco(tmp_path: Path) -> None:
    config = CocoConfig(path=str(official(tmp_path)), eval_fraction=0.3)
    train, heldout = (CocoCaptions(config, side) for side in ("train", "heldout"))
    ids = [{row.id for row in rows_of(side)} for side in (train, heldout)]
    assert len(ids[0] | ids[1]) == 10 and not ids[0] & ids[1]
    assert train[0].references == (f"picture {int(train[0].id[:12])}",) * 2 and train[0].image is not None
    (bad,) = train.bad_rows
    assert bad["row"] == 11 and "no picture 'gone.jpg'" in bad["reason"]


def test_official_coco_in_two_files(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = official(tmp_path / "other", 3)
    for picture in (tmp_path / "other").glob("*.jpg"):
        picture.rename(tmp_path / picture.name)
    config = CocoConfig(
        path=str(official(tmp_path)), heldout_path=str(other), pictures=str(tmp_path), max_bad_fraction=0.5
    )
    assert (len(CocoCaptions(config, "train")), len(CocoCaptions(config, "heldout"))) == (10, 3)


@pytest.mark.parametrize(("heldout", "count"), [("val", 2), ("test", 1)])
def test_karpathy(tmp_path: Path, heldout: str, count: int) -> None:
    """restval trains; val and test are what the file says."""
    config = CocoConfig(path=str(karpathy(tmp_path)), heldout_split=heldout)
    train = CocoCaptions(config, "train")
    assert len(train) == 7 and len(CocoCaptions(config, "heldout")) == count
    assert train[0].references == ("picture 0", "no. 0") and train[0].id == "val2014/0.jpg"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "not JSON"), ("[]", 'no list "images"'), ('{"images": [1]}', 'no list "images"'),
        ('{"images": [{"id": 1}]}', 'neither "annotations"'),
        ('{"images": [{"id": 1}], "annotations": []}', "no usable rows"),
    ],
)  # fmt: skip
def test_what_is_not_coco(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "c.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        CocoCaptions(CocoConfig(path=str(tmp_path / "c.json"), max_bad_fraction=1.0))
    with pytest.raises(UserError, match="cannot read"):
        CocoCaptions(CocoConfig(path=str(tmp_path / "nothing.json")))
    with pytest.raises(UserError, match="data.pictures: .*no such folder"):
        CocoCaptions(CocoConfig(path=str(tmp_path / "c.json"), pictures=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("kind", ["official", "karpathy", "csv"])
def test_they_train(tmp_path: Path, kind: str) -> None:
    if kind == "csv":
        pictures(tmp_path / "p", *(f"{i}.png" for i in range(8)))
        lines = "".join(f"{i}.png,picture {i}\n" for i in range(8))
        (tmp_path / "p" / "metadata.csv").write_text("file_name,caption\n" + lines, encoding="utf-8")
        data = ("data.type=imagefolder", f"data.path={tmp_path / 'p'}", "data.eval_fraction=0.3")
    else:
        file = (official if kind == "official" else karpathy)(tmp_path)
        data = ("data.type=coco", f"data.path={file}", "data.eval_fraction=0.3", "data.max_bad_fraction=0.2")
    folder = run.train(load_recipe("caption_ppo_fixed", [*SMALL, *data, f"logging.dir={tmp_path / 'runs'}"]))
    assert json.loads((folder / "eval.json").read_text())["samples"] == 2

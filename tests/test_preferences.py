"""Preferences and ratings: files read, files written, every kind of mistake, and splits by picture."""

from __future__ import annotations

import io
import json
import random

import pytest
from PIL import Image

from mmft.data.corruptions import corrupted_pairs
from mmft.data.scenes import EmojiScenes
from mmft.rewards.preferences import (
    Picture,
    Preference,
    Rating,
    read_judgements,
    read_preferences,
    read_ratings,
    split_by_picture,
    write_preferences,
    write_ratings,
)
from mmft.types import UserError

GOOD = {"image": "a.png", "chosen": "a dog", "rejected": "a cat"}
RATED = {"image": "a.png", "caption": "a dog", "rating": 0.5}


def picture(level=0):
    return Image.new("RGB", (4, 3), (level % 256, level // 256, 7))


def png(level=0):
    buffer = io.BytesIO()
    picture(level).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.png").write_bytes(png(2))
    (tmp_path / "copy of a.png").write_bytes(png(1))
    return tmp_path


def jsonl(folder, *lines, name="p.jsonl"):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text + "\n", encoding="utf-8")
    return folder / name


def parquet(folder, rows, name="p.parquet"):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


class TestReading:
    def test_every_key_of_a_preference(self, folder):
        path = jsonl(
            folder,
            GOOD,
            "",
            {
                "image": "deep/b.png",
                "prompt": "What?",
                "chosen": "two dogs",
                "rejected": "a dog",
                "margin": 2,
                "annotator": "ann",
                "references": ["two dogs", " dogs "],
                "kind": "wrong_count",
            },
            {"image": "./a.png", "chosen": "x", "rejected": "x", "tie": True, "margin": None},
        )
        items = read_preferences(path)
        assert items.bad_rows == []
        assert items[0] == Preference(picture=Picture.of(png(1)), chosen="a dog", rejected="a cat")
        assert (items[0].prompt, items[0].margin, items[0].tie) == ("Describe the picture.", None, False)
        assert (items[1].prompt, items[1].margin, items[1].annotator) == ("What?", 2.0, "ann")
        assert (items[1].references, items[1].kind) == (("two dogs", "dogs"), "wrong_count")
        assert items[2].tie

    def test_every_key_of_a_rating(self, folder):
        full = {**RATED, "rating": -1, "prompt": "?", "annotator": "b", "references": ["a dog"], "kind": "noun"}
        items = read_ratings(jsonl(folder, RATED, full))
        assert [item.rating for item in items] == [0.5, -1.0]
        assert (items[1].prompt, items[1].annotator, items[1].references, items[1].kind) == (
            "?", "b", ("a dog",), "noun",
        )  # fmt: skip

    def test_pictures_are_decoded_when_asked_and_equal_ones_have_one_key(self, folder):
        path = jsonl(folder, GOOD, {**GOOD, "image": "copy of a.png"}, {**GOOD, "image": "deep/b.png"})
        first, copy, other = read_preferences(path)
        assert first.picture_key == copy.picture_key != other.picture_key
        assert not isinstance(first.picture.source, bytes)
        assert first.open_picture().getpixel((0, 0)) == (1, 0, 7)
        row = other.row()
        assert (row.id, row.prompt, row.image.size) == (other.picture_key, "Describe the picture.", (8, 6))  # of 4 x 3
        assert other.row(picture=False).image is None

    def test_parquet_with_paths_bytes_and_what_datasets_writes(self, folder):
        rows = [{**GOOD, "image": {"bytes": png(5), "path": "gone.png"}}, {**GOOD, "image": {"bytes": png(5)}}]
        rows.append({**GOOD, "image": {"bytes": None, "path": "a.png"}})
        first, second, third = read_preferences(parquet(folder, rows))
        assert first.picture.source is second.picture.source  # held once
        assert third.open_picture().getpixel((0, 0)) == (1, 0, 7)
        (raw,) = read_ratings(parquet(folder, [{**RATED, "image": png(6)}]))
        assert raw.open_picture().getpixel((0, 0)) == (6, 0, 7)
        (named,) = read_ratings(parquet(folder, [RATED]))
        assert named.picture == Picture.of(folder / "a.png")

    def test_parquet_by_datasets_itself(self, folder):
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        features = Features({"image": ImageFeature(), "caption": Value("string"), "rating": Value("float32")})
        rows = {"image": [picture(1), picture(2)], "caption": ["a", "b"], "rating": [0.25, 0.5]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / "d.parquet")
        items = read_ratings(folder / "d.parquet")
        assert [item.rating for item in items] == [0.25, 0.5]
        assert items[1].open_picture().getpixel((0, 0)) == (2, 0, 7)

    def test_the_file_shows_what_it_holds(self, folder):
        assert isinstance(read_judgements(jsonl(folder, GOOD))[0], Preference)
        assert isinstance(read_judgements(jsonl(folder, RATED))[0], Rating)
        assert isinstance(read_judgements(parquet(folder, [{**GOOD, "margin": None}]))[0], Preference)

    def test_mixed_files_are_refused(self, folder):
        message = r"p.jsonl: row 3 is one of ratings, row 1 one of preferences; keep them in two files"
        for mode in ("raise", "skip"):
            with pytest.raises(UserError, match=message):
                read_judgements(jsonl(folder, GOOD, GOOD, RATED), mode)
        with pytest.raises(UserError, match="row 1 is one of ratings, row 1 one of preferences"):
            read_judgements(jsonl(folder, {**GOOD, **RATED}))
        with pytest.raises(UserError, match="no row has chosen and rejected, nor caption and rating"):
            read_judgements(jsonl(folder, {"image": "a.png"}))


class TestMistakes:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({**GOOD, "chosn": "x"}, "chosn: unknown key; did you mean chosen?"),
            ({**GOOD, "rating": 1}, "rating: a key of ratings, in a file read as preferences"),
            ({"image": "a.png", "chosen": "x"}, "rejected: missing"),
            ({"chosen": "x", "rejected": "y"}, "image: missing"),
            ({**GOOD, "image": None}, "image: missing"),
            ({**GOOD, "image": "no.png"}, "image: no picture 'no.png' in "),
            ({**GOOD, "image": "../a.png"}, "image: '../a.png' is outside the folder"),
            ({**GOOD, "image": "p.jsonl"}, "image: p.jsonl: unreadable picture (not a picture)"),
            ({**GOOD, "image": "deep"}, "image: deep: unreadable picture ("),
            ({**GOOD, "image": 7}, "image: expected a file name, found a number"),
            ({**GOOD, "chosen": "  "}, "chosen: empty text"),
            ({**GOOD, "rejected": ""}, "rejected: empty text"),
            ({**GOOD, "rejected": "a dog "}, "rejected: the same as chosen, and tie is not true"),
            ({**GOOD, "chosen": ["a"]}, "chosen: expected text, found a list"),
            ({**GOOD, "margin": -0.5}, "margin: -0.5 is negative; exchange chosen and rejected"),
            ({**GOOD, "margin": float("nan")}, "margin: nan is not a finite number"),
            ({**GOOD, "margin": True}, "margin: expected a number, found True"),
            ({**GOOD, "margin": 1, "tie": True}, "margin: 1, and tie is true"),
            ({**GOOD, "tie": "yes"}, "tie: expected true or false, found 'yes'"),
            ({**GOOD, "references": [1]}, "references: expected text or a list of texts, found a number in it"),
            ({**GOOD, "prompt": 3}, "prompt: expected text, found a number"),
            ({**GOOD, "chosen": "\ud800"}, "chosen: text with half a surrogate pair"),
            ("{", "not JSON: "),
            ("[1]", "expected a JSON object, found a list"),
        ],
    )
    def test_a_bad_row_is_named_or_skipped(self, folder, row, reason):
        path = jsonl(folder, GOOD, row, GOOD)
        with pytest.raises(UserError) as raised:
            read_preferences(path)
        assert str(raised.value).startswith(f"{path}: row 2: {reason}")
        assert "\n" not in str(raised.value)
        items = read_preferences(path, on_bad_row="skip")
        assert len(items) == 2
        (bad,) = items.bad_rows
        assert (bad["file"], bad["row"]) == (str(path), 2)
        assert bad["reason"].startswith(reason)

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({**RATED, "rating": float("inf")}, "rating: inf is not a finite number"),
            ({**RATED, "rating": 10**400}, "rating: inf is not a finite number"),
            ({**RATED, "rating": "5"}, "rating: expected a number, found '5'"),
            ({**RATED, "rating": None}, "rating: missing"),
            ({**RATED, "caption": ""}, "caption: empty text"),
            ({**RATED, "captoin": "x"}, "captoin: unknown key; did you mean caption?"),
            ({**RATED, "tie": True}, "tie: a key of preferences, in a file read as ratings"),
        ],
    )
    def test_a_bad_rating(self, folder, row, reason):
        path = jsonl(folder, RATED, row)
        with pytest.raises(UserError) as raised:
            read_ratings(path)
        assert str(raised.value) == f"{path}: row 2: {reason}"

    def test_bad_rows_of_parquet_count_from_one(self, folder):
        rows = [{**GOOD, "image": {"bytes": png(1)}}, {**GOOD, "image": {"bytes": b"not a picture"}}]
        path = parquet(folder, rows)
        with pytest.raises(UserError, match=r"p.parquet: row 2: image: unreadable picture \(not a picture\)"):
            read_preferences(path)
        assert [bad["row"] for bad in read_preferences(path, "skip").bad_rows] == [2]

    def test_bad_rows_come_in_the_order_of_the_file(self, folder):
        lines = [{**GOOD, "image": "no.png"}, "{", GOOD, {**GOOD, "x": 1}, {**GOOD, "chosen": ""}]
        assert [bad["row"] for bad in read_preferences(jsonl(folder, *lines), "skip").bad_rows] == [1, 2, 4, 5]

    def test_files_that_hold_nothing(self, folder):
        (folder / "empty.jsonl").write_text("\n\n")
        with pytest.raises(UserError, match=r"empty.jsonl: no rows"):
            read_preferences(folder / "empty.jsonl")
        with pytest.raises(UserError, match=r"no usable rows; the first bad row: row 1: chosen: empty text"):
            read_preferences(jsonl(folder, {**GOOD, "chosen": ""}, "{"), "skip")
        with pytest.raises(UserError, match=r"p.csv: expected a file that ends in .jsonl or .parquet"):
            read_preferences(folder / "p.csv")
        with pytest.raises(UserError, match=r"gone.jsonl: no such file"):
            read_judgements(folder / "gone.jsonl")
        (folder / "text.parquet").write_text("no parquet")
        with pytest.raises(UserError, match=r"text.parquet: cannot read as parquet"):
            read_ratings(folder / "text.parquet")
        with pytest.raises(UserError, match="on_bad_row: 'warn' is not one of skip, raise"):
            read_ratings(folder / "gone.jsonl", "warn")

    def test_items_made_in_python_are_checked_too(self):
        with pytest.raises(ValueError, match="rejected: the same as chosen"):
            Preference(picture=Picture.of(picture()), chosen="a", rejected="a")
        with pytest.raises(ValueError, match="rating: nan is not a finite number"):
            Rating(picture=Picture.of(picture()), caption="a", rating=float("nan"))


def preferences(count=5):
    shared = Picture.of(picture(100))
    items = [
        Preference(picture=Picture.of(picture(i)), chosen="a dog", rejected=f"{i} cats", margin=i / 8, kind="count")
        for i in range(count)  # margin 0.0 among them: it is not "no margin"
    ]
    full = Preference(
        picture=shared, prompt="Wie?", chosen="ein Hund – brav", rejected="x", references=("a", "b"), annotator="ann"
    )
    return [*items, full, Preference(picture=shared, chosen="x", rejected="x", tie=True)]


class TestWriting:
    @pytest.mark.parametrize("name", ["p.jsonl", "new/p.parquet"])
    def test_preferences_come_back_equal(self, tmp_path, name):
        items = preferences()
        write_preferences(tmp_path / name, items)
        back = read_preferences(tmp_path / name)
        assert list(back) == items
        assert [item.open_picture().tobytes() for item in back] == [item.open_picture().tobytes() for item in items]

    @pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
    def test_ratings_come_back_equal(self, tmp_path, name):
        items = [Rating(picture=Picture.of(picture(i)), caption="a", rating=float(i), prompt="") for i in range(300)]
        write_ratings(tmp_path / name, items)
        assert list(read_ratings(tmp_path / name)) == items
        assert list(read_judgements(tmp_path / name)) == items

    def test_pictures_lie_beside_the_jsonl_once_each_named_by_content(self, tmp_path):
        items = preferences()
        write_preferences(tmp_path / "p.jsonl", items)
        names = {path.name for path in (tmp_path / "p_pictures").iterdir()}
        assert names == {f"{item.picture_key}.png" for item in items}  # 5 and the shared one
        assert len(names) == 6
        first = json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert first == {
            "image": f"p_pictures/{items[0].picture_key}.png",
            "prompt": "Describe the picture.",
            "kind": "count",
            "chosen": "a dog",
            "rejected": "0 cats",
            "margin": 0.0,
        }

    def test_files_below_stay_others_are_copied_as_they_are(self, folder, tmp_path_factory):
        items = read_preferences(jsonl(folder, GOOD))
        write_preferences(folder / "again.jsonl", items)
        assert json.loads((folder / "again.jsonl").read_text())["image"] == "a.png"
        assert not (folder / "again_pictures").exists()
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        picture().save(elsewhere / "c.jpg")
        moved = [Preference(picture=Picture.of(elsewhere / "c.jpg"), chosen="a", rejected="b")]
        write_preferences(folder / "moved.jsonl", moved, picture_folder="kept/here")
        (copy,) = (folder / "kept" / "here").iterdir()
        assert copy.name == f"{moved[0].picture_key}.jpg"
        assert copy.read_bytes() == (elsewhere / "c.jpg").read_bytes()
        assert list(read_preferences(folder / "moved.jsonl")) == moved

    def test_datasets_sees_the_pictures(self, tmp_path):
        from datasets import Image as ImageFeature
        from datasets import load_dataset

        write_preferences(tmp_path / "p.parquet", preferences())
        data = load_dataset("parquet", data_files=str(tmp_path / "p.parquet"), cache_dir=tmp_path / "c", split="train")
        assert isinstance(data.features["image"], ImageFeature)
        assert data[3]["image"].getpixel((0, 0)) == (3, 0, 7)
        assert data[5]["references"] == ["a", "b"]

    def test_any_mode_of_picture(self):
        for mode in ("RGB", "L", "RGBA", "CMYK", "P", "I;16"):
            assert Picture.of(Image.new(mode, (2, 2))).open().mode == "RGB"

    def test_mistakes(self, tmp_path):
        items = preferences()
        with pytest.raises(UserError, match=r"p.json: expected a file that ends in"):
            write_preferences(tmp_path / "p.json", items)
        with pytest.raises(UserError, match="no preferences to write"):
            write_preferences(tmp_path / "p.jsonl", [])
        with pytest.raises(UserError, match="Preference among ratings"):
            write_ratings(tmp_path / "p.jsonl", items)
        with pytest.raises(UserError, match="pictures must lie below"):
            write_preferences(tmp_path / "p.jsonl", items, picture_folder=tmp_path.parent)
        assert list(tmp_path.iterdir()) == []  # nothing is written before everything is checked

    def test_corrupted_references_as_preferences(self, tmp_path):
        items = [
            Preference(
                picture=Picture.of(row.image), chosen=chosen, rejected=rejected, references=row.references, kind=kind
            )
            for row, chosen, rejected, kind in corrupted_pairs(EmojiScenes(6), per_row=3)
        ]
        write_preferences(tmp_path / "p.jsonl", items)
        back = read_preferences(tmp_path / "p.jsonl")
        assert list(back) == items
        assert len(back) == 18
        assert len({item.picture_key for item in back}) == 6


class TestSplit:
    ITEMS = tuple(
        Rating(picture=Picture(f"key-{number}", b""), caption=f"caption {copy}", rating=1.0)
        for number in range(400)
        for copy in range(2)
    )

    def test_no_picture_is_on_both_sides_and_nothing_is_lost(self):
        rest, held = split_by_picture(self.ITEMS, 0.25, seed=1)
        assert {item.picture_key for item in rest}.isdisjoint(item.picture_key for item in held)
        assert len(rest) + len(held) == 800
        # 400 pictures, each held with probability 1/4: 100 expected, standard deviation sqrt(400 * 3/16) = 8.7
        assert abs(len(held) / 2 - 100) < 4 * 8.7

    def test_the_order_of_items_does_not_matter_the_seed_does(self):
        shuffled = random.Random(0).sample(self.ITEMS, len(self.ITEMS))
        keys = {item.picture_key for item in split_by_picture(self.ITEMS, 0.25, seed=1)[1]}
        assert {item.picture_key for item in split_by_picture(shuffled, 0.25, seed=1)[1]} == keys
        assert {item.picture_key for item in split_by_picture(self.ITEMS, 0.25, seed=2)[1]} != keys

    def test_a_larger_share_holds_the_smaller(self):
        small, large = (
            {item.picture_key for item in split_by_picture(self.ITEMS, share, seed=0)[1]} for share in (0.1, 0.3)
        )
        assert small < large

    def test_few_pictures_leave_no_side_empty(self):
        for seed in range(20):
            for share in (0.01, 0.99):
                rest, held = split_by_picture(self.ITEMS[:4], share, seed)
                assert (len(rest), len(held)) == (2, 2)
        assert split_by_picture(self.ITEMS[:4], 0.0) == (list(self.ITEMS[:4]), [])
        with pytest.raises(UserError, match=r"fraction: 1.0 is not in \[0, 1\)"):
            split_by_picture(self.ITEMS, 1.0)

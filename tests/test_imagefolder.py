"""People's own pictures: every kind of file people have, and every kind of mistake."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image, ImageCms

from mmft.data.imagefolder import ImageFolder
from mmft.data.metadata import BadRow
from mmft.data.pictures import load_picture, to_rgb
from mmft.data.preview import contact_sheet
from mmft.data.typeset import font, wrap
from mmft.types import Row, UserError


def save(path, colour=(200, 30, 30), size=(8, 6), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def metadata(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    return tmp_path


class TestRows:
    def test_captions_are_text_or_lists_and_unmentioned_pictures_have_none(self, folder):
        metadata(
            folder,
            {"file_name": "b.png", "captions": [" two dogs ", "dogs"]},
            {"file_name": "a.png", "caption": "a cat"},
        )
        rows = list(ImageFolder(folder, split="all", prompt="Say."))
        assert [(row.id, row.references) for row in rows] == [
            ("b.png", ("two dogs", "dogs")),
            ("a.png", ("a cat",)),
            ("c.png", ()),
        ]
        assert all(row.prompt == "Say." and row.image.mode == "RGB" and row.image.size == (8, 6) for row in rows)

    def test_pictures_alone_are_enough(self, folder):
        save(folder / "deeper" / "d.JPG")
        (folder / "notes.txt").write_text("not a picture")
        (folder / ".hidden.png").write_text("not looked at")
        data = ImageFolder(folder, split="all")
        assert [row.id for row in data] == ["a.png", "b.png", "c.png", "deeper/d.JPG"]
        assert data.references() == [()] * 4
        assert data.bad_rows == []

    def test_columns_can_have_other_names_and_must_then_be_there(self, folder):
        metadata(folder, {"img": "a.png", "text": "a cat"}, {"img": "b.png", "texts": "typo"})
        data = ImageFolder(folder, columns={"image": "img", "references": "text", "question": None}, split="all")
        assert [(row.id, row.references) for row in data] == [("a.png", ("a cat",)), ("c.png", ())]
        assert data.bad_rows[0]["row"] == 2
        assert "text: no such column; did you mean texts?" in data.bad_rows[0]["reason"]
        with pytest.raises(UserError, match=r"columns\.referenecs: unknown column; did you mean references\?"):
            ImageFolder(folder, columns={"referenecs": "text"})

    def test_several_questions_to_one_picture(self, folder):
        lines = [{"file_name": "a.png", "question": f"What {n}?", "answer": f"{n}"} for n in (1, 2)]
        metadata(folder, *lines, {"file_name": "b.png"})
        rows = list(ImageFolder(folder, split="all"))
        assert [row.id for row in rows] == ["a.png", "a.png#2", "b.png", "c.png"]
        assert [(row.prompt, row.answer) for row in rows[:3]] == [
            ("What 1?", "1"),
            ("What 2?", "2"),
            ("Describe the picture.", None),
        ]
        asked = ImageFolder(folder, prompt="Answer: {question}", split="all")
        assert [row.prompt for row in asked] == ["Answer: What 1?", "Answer: What 2?"]
        assert "question: missing" in asked.bad_rows[0]["reason"]

    def test_rows_without_pictures_decode_nothing(self, folder, monkeypatch):
        data = ImageFolder(folder, split="all")
        monkeypatch.setattr("mmft.data.imagefolder.load_picture", lambda path: pytest.fail("decoded"))
        assert [row.image for row in data.rows_without_pictures()] == [None] * 3

    def test_index_errors(self, folder):
        data = ImageFolder(folder, split="all")
        assert data[-1].id == "c.png"
        with pytest.raises(IndexError):
            data[3]


class TestBadRows:
    BAD = (
        ('{"file_name": "a.png", "caption": ', "not JSON"),
        ('["a.png"]', "expected a JSON object, found a list"),
        ({"caption": "no picture named"}, "file_name: missing"),
        ({"filename": "a.png"}, "file_name: missing; did you mean filename?"),
        ({"file_name": 7}, "file_name: expected a file name, found a number"),
        ({"file_name": "gone.png"}, "file_name: no picture 'gone.png' in the folder"),
        ({"file_name": "../a.png"}, "file_name: '../a.png' is outside the folder"),
        ({"file_name": "/etc/hostname"}, "is outside the folder"),
        ({"file_name": "a.png", "caption": 3}, "caption: expected text or a list of texts, found a number"),
        (
            {"file_name": "a.png", "caption": ["ok", None]},
            "caption: expected text or a list of texts, found null in it",
        ),
        ({"file_name": "a.png", "caption": "  "}, "caption: empty text"),
        ({"file_name": "a.png", "question": ["?"]}, "question: expected text, found a list"),
        ('{"file_name": "a.png", "caption": "\\ud800"}', "half a surrogate pair"),
        ('{"file_name": "a.png", "n": ' + "9" * 5000 + "}", "not JSON"),
    )

    @pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
    def test_skipped_and_listed_or_raised_in_one_line(self, folder, line, reason):
        metadata(folder, {"file_name": "b.png", "caption": "fine"}, "", line)
        data = ImageFolder(folder, split="all")
        assert "b.png" in [row.id for row in data]
        (bad,) = data.bad_rows
        assert bad["file"] == str(folder / "metadata.jsonl")
        assert bad["row"] == 3  # the blank line counts: it is the number an editor shows
        assert reason in bad["reason"]
        with pytest.raises(UserError) as raised:
            ImageFolder(folder, split="all", on_bad_row="raise")
        assert str(raised.value) == f"{bad['file']}: row 3: {bad['reason']}"
        assert "\n" not in str(raised.value)

    def test_a_bad_caption_does_not_come_back_as_a_picture_without_one(self, folder):
        metadata(folder, {"file_name": "a.png", "caption": 3})
        assert [row.id for row in ImageFolder(folder, split="all")] == ["b.png", "c.png"]

    def test_a_line_that_is_not_utf8_costs_itself_alone(self, folder):
        first, last = json.dumps({"file_name": "a.png"}), json.dumps({"file_name": "b.png", "caption": "é"})
        (folder / "metadata.jsonl").write_bytes(
            b"\xef\xbb\xbf" + first.encode() + b'\n{"file_name": "c.png", "caption": "caf\xe9"}\n' + last.encode()
        )
        data = ImageFolder(folder, split="all")
        assert data.bad_rows[0]["row"] == 2
        assert "not UTF-8" in data.bad_rows[0]["reason"]
        assert [row.id for row in data][:2] == ["a.png", "b.png"]

    def test_unreadable_pictures(self, folder):
        (folder / "a.png").write_text("<html>404</html>")
        (folder / "empty.jpg").write_bytes(b"")
        data = ImageFolder(folder, split="all")
        assert [row.id for row in data] == ["b.png", "c.png"]
        assert {bad["file"] for bad in data.bad_rows} == {str(folder / "a.png"), str(folder / "empty.jpg")}
        assert all("unreadable picture (not a picture)" in bad["reason"] for bad in data.bad_rows)
        with pytest.raises(UserError, match=r"a\.png: unreadable picture"):
            ImageFolder(folder, split="all", on_bad_row="raise")

    def test_a_truncated_jpeg_is_found_at_access(self, folder):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        noise.save(folder / "b.jpg")
        whole = (folder / "b.jpg").read_bytes()
        (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
        data = ImageFolder(folder, split="all")
        # In order a.png, b.jpg, b.png, c.png; the next readable row stands in for the broken one, every time.
        assert [row.id for row in data] == [row.id for row in data] == ["a.png", "b.png", "b.png", "c.png"]
        assert len(data.bad_rows) == 1, "listed once, however often it is met"
        assert data.bad_rows[0]["file"] == str(folder / "b.jpg")
        strict = ImageFolder(folder, split="all", on_bad_row="raise")
        with pytest.raises(UserError, match=r"b\.jpg: unreadable picture"):
            list(strict)

    def test_nothing_usable(self, tmp_path):
        with pytest.raises(UserError, match="nowhere: no such folder"):
            ImageFolder(tmp_path / "nowhere")
        with pytest.raises(UserError, match="no usable rows: no metadata.jsonl and no picture files"):
            ImageFolder(tmp_path)
        metadata(tmp_path, {"file_name": "x.png"}, {"file_name": "y.png"})
        with pytest.raises(UserError, match=r"no usable rows; the first bad row: .*row 1: .*x\.png.*\(and 1 more\)"):
            ImageFolder(tmp_path)
        (tmp_path / "metadata.jsonl").unlink()
        (tmp_path / "metadata.csv").write_text("file_name,caption\n")
        with pytest.raises(UserError, match="no usable rows"):
            ImageFolder(tmp_path)
        with pytest.raises(UserError, match="not a folder"):
            ImageFolder(tmp_path / "metadata.csv")


class TestSplit:
    @staticmethod
    def ids(folder, split, **options):
        return {row.id for row in ImageFolder(folder, split=split, **options).rows_without_pictures()}

    def test_partition_is_by_picture_and_stays_when_pictures_are_added(self, tmp_path):
        for i in range(60):
            save(tmp_path / f"{i}.png", size=(1, 1))
        metadata(tmp_path, *[{"file_name": f"{i % 60}.png", "question": f"q{i}"} for i in range(120)])
        options = {"eval_fraction": 0.25, "seed": 3}
        train, held = self.ids(tmp_path, "train", **options), self.ids(tmp_path, "heldout", **options)
        assert not {name.split("#")[0] for name in train} & {name.split("#")[0] for name in held}
        assert len(train | held) == 120
        assert 6 <= len({name.split("#")[0] for name in held}) <= 26  # 15 expected, 3 sigma is 10
        for i in range(60, 90):
            save(tmp_path / f"{i}.png", size=(1, 1))
        assert held <= self.ids(tmp_path, "heldout", **options)
        assert train <= self.ids(tmp_path, "train", **options)
        assert self.ids(tmp_path, "heldout", eval_fraction=0.25, seed=4) != self.ids(tmp_path, "heldout", **options)

    def test_known_places(self, folder):
        # First 8 bytes of sha256("0:NAME") / 2^64: a 0.636, b 0.208, c 0.107. A release that moves a picture from
        # the held-out side to the training side would spoil every earlier result.
        assert self.ids(folder, "heldout", eval_fraction=0.5) == {"b.png", "c.png"}
        assert self.ids(folder, "heldout", eval_fraction=0.2) == {"c.png"}

    @pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
    def test_a_small_folder_has_both_sides(self, folder, fraction):
        train = self.ids(folder, "train", eval_fraction=fraction)
        held = self.ids(folder, "heldout", eval_fraction=fraction)
        assert train
        assert held
        assert len(train | held) == 3
        assert not train & held

    def test_nothing_to_hold_out(self, tmp_path):
        save(tmp_path / "only.png")
        with pytest.raises(UserError, match=r"no pictures in split 'heldout': .* has 1 usable picture"):
            ImageFolder(tmp_path, split="heldout")
        assert len(ImageFolder(tmp_path, eval_fraction=0.0)) == 1

    @pytest.mark.parametrize("wrong", [{"split": "test"}, {"eval_fraction": 1.0}, {"on_bad_row": "ignore"}])
    def test_wrong_arguments(self, folder, wrong):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ImageFolder(folder, **wrong)


class TestPictures:
    """Every mode comes out as RGB with the colours that a viewer shows."""

    def test_sixteen_bit_grey_keeps_its_tones(self, tmp_path):
        # 65535 -> 255, 0 -> 0, 25700 / 257 = 100. Pillow's own conversion clips at 255 and gives white.
        Image.fromarray(np.array([[0, 25700, 65535, 0]] * 4, dtype=np.uint16)).save(tmp_path / "deep.png")
        picture = load_picture(tmp_path / "deep.png")
        assert np.asarray(picture)[0].tolist() == [[0] * 3, [100] * 3, [255] * 3, [0] * 3]

    def test_transparency_lies_on_white(self, tmp_path):
        rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        rgba.putpixel((1, 0), (0, 0, 255, 255))
        rgba.save(tmp_path / "rgba.png")
        assert np.asarray(load_picture(tmp_path / "rgba.png"))[0, :2].tolist() == [[255] * 3, [0, 0, 255]]
        grey = Image.new("LA", (1, 1), (0, 128))
        # 0 * 128/255 + 255 * 127/255 = 127
        assert to_rgb(grey).getpixel((0, 0)) == (127, 127, 127)

    def test_palette_with_a_transparent_colour(self, tmp_path):
        image = Image.new("P", (4, 4))
        image.putpalette([255, 0, 0, 0, 128, 0])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "p.png", transparency=0)
        assert np.asarray(load_picture(tmp_path / "p.png"))[0, :2].tolist() == [[255] * 3, [0, 128, 0]]

    def test_cmyk_jpeg(self, tmp_path):
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=95)
        red, green, blue = load_picture(tmp_path / "ink.jpg").getpixel((8, 8))
        assert red > 240
        assert max(green, blue) < 15

    def test_cmyk_with_a_useless_profile_falls_back(self):
        image = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
        image.info["icc_profile"] = b"not a profile"
        assert to_rgb(image).getpixel((0, 0)) == (0, 255, 255)
        image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # for RGB
        assert to_rgb(image).getpixel((0, 0)) == (0, 255, 255)

    def test_exif_orientation(self, tmp_path):
        image = Image.new("RGB", (8, 4))
        exif = image.getexif()
        exif[0x0112] = 6  # taken with the camera on its side
        image.save(tmp_path / "phone.jpg", exif=exif)
        assert load_picture(tmp_path / "phone.jpg").size == (4, 8)

    def test_broken_camera_notes_are_ignored(self, tmp_path):
        save(tmp_path / "phone.jpg", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x63\xff\xff\xff\xff")
        assert load_picture(tmp_path / "phone.jpg").size == (8, 6)

    @pytest.mark.parametrize(
        ("size", "shown"),
        [
            ((1, 1), (4, 4)), ((3, 500), (10, 500)), ((2, 3), (4, 6)), ((1, 4000), (80, 4000)),
            ((900, 18), (900, 18)), ((901, 18), (901, 19)), ((5, 4), (5, 4)),
        ],
    )  # fmt: skip
    def test_dots_and_lines_become_pictures(self, tmp_path, size, shown):
        """Processors take three rows of pixels for three channels, and refuse what is too slender."""
        save(tmp_path / "p.png", (9, 8, 7), size)
        picture = load_picture(tmp_path / "p.png")
        assert picture.size == shown
        own = (np.asarray(picture) == (9, 8, 7)).all(-1)
        assert own.sum() == (shown[0] * shown[1] if shown[0] * size[1] == shown[1] * size[0] else size[0] * size[1])
        assert (np.asarray(picture)[~own] == 255).all()

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGBX", "YCbCr", "HSV", "LAB", "PA", "La", "RGBa", "F", "I"])
    def test_every_other_mode(self, mode):
        picture = to_rgb(Image.new(mode, (3, 2)))
        assert (picture.mode, picture.size) == ("RGB", (3, 2))

    def test_floats(self):
        share = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
        assert np.asarray(to_rgb(share))[0, :, 0].tolist() == [0, 128, 255]
        wild = Image.fromarray(np.array([[-10.0, np.nan, 10.0]], dtype=np.float32))
        assert np.asarray(to_rgb(wild))[0, :, 0].tolist() == [0, 128, 255]  # NaN counts as 0, the middle

    def test_a_picture_of_one_pixel_and_an_animation(self, tmp_path):
        save(tmp_path / "dot.png", size=(1, 1))
        frames = [Image.new("P", (3, 3), i) for i in range(3)]
        frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
        rows = ImageFolder(tmp_path, split="all")
        assert [row.image.getpixel((3, 3)) for row in rows] == [(200, 30, 30), (0, 0, 0)]  # the first frame

    def test_a_bomb_is_a_bad_row(self, folder, monkeypatch):
        for limit in (10, 47):  # the three pictures have 48: beyond twice the first, where Pillow itself refuses
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with pytest.raises(UserError, match=r"no usable rows; .* unreadable picture \(.*48 pixels|8 x 6 pixels"):
                ImageFolder(folder)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48)
        assert len(ImageFolder(folder, split="all")) == 3

    def test_a_decoder_s_own_error_is_a_bad_row(self, folder, monkeypatch):
        def broken(self):
            raise KeyError(3)

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.verify", broken)
        with pytest.raises(UserError, match=r"unreadable picture \(KeyError: 3\) \(and 2 more\)"):
            ImageFolder(folder)

    def test_rows_can_be_refused_later(self, folder):
        """As by a model whose context is too short for them."""
        metadata(folder, *({"file_name": f"{n}.png", "question": n * 9} for n in "abc"))
        data = ImageFolder(folder, split="all")

        def accept(row):
            if "b" in row.prompt:
                raise BadRow("too long")

        data.accept_only(accept)
        assert [row.id for row in data] == ["a.png", "c.png", "c.png"]
        assert data.bad_rows == [{"file": str(folder / "metadata.jsonl"), "row": 2, "reason": "b.png: too long"}]


class TestContactSheet:
    def test_pictures_with_text_beneath(self, tmp_path):
        rows = [
            Row("dot", Image.new("RGB", (1, 1), "red"), "p", ("a red dot",)),
            Row("wide", Image.new("RGB", (900, 2)), "p", tuple("reference number " * 30 for _ in range(9))),
            Row("none", None, "p", (), question="What?\n\x00", answer=None),
            Row("long" * 200, Image.new("L", (40, 90)), "p", ("كلب", "犬", "x" * 5000)),
            Row("last", Image.new("RGBA", (4, 4)), "p"),
        ]
        out = contact_sheet(iter(rows), tmp_path / "new" / "sheet.png", columns=2)
        with Image.open(out) as sheet:
            assert sheet.width == 2 * 300 + 3 * 24
            assert sheet.height > 3 * 240
            pixels = np.asarray(sheet.convert("RGB"))
        assert (pixels == (255, 0, 0)).all(axis=-1).sum() > 200 * 200  # the dot is shown large

    def test_wrapping_loses_no_word_and_fits(self):
        face = font(13)
        text = "two red apples and a dog " + "w" * 300
        lines = wrap(text, face, 120, 50)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert max(face.getlength(line) for line in lines) <= 120
        short = wrap(text, face, 120, 2)
        assert len(short) == 2
        assert short[-1].endswith("…")

    def test_errors(self, tmp_path):
        with pytest.raises(UserError, match="no rows"):
            contact_sheet([], tmp_path / "sheet.png")
        (tmp_path / "file").write_text("")
        row = Row("a", Image.new("RGB", (2, 2)), "p")
        with pytest.raises(UserError, match="cannot write"):
            contact_sheet([row], tmp_path / "file" / "sheet.png")


def test_loader_workers_can_be_sent_the_data(folder):
    assert pickle.loads(pickle.dumps(ImageFolder(folder, split="all")))[0].id == "a.png"

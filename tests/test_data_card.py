"""The data card, `mmft data check`, and what is said where data lacks what a reward needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmft import run
from mmft.cli import main
from mmft.config import ImageFolderConfig, ScenesConfig, TableConfig, load_recipe
from mmft.data.card import data_card
from mmft.data.sources import guess_type, open_source, open_training
from mmft.rewards.terms import TERMS, terms_without
from mmft.types import UserError


def pictures(folder: Path, count: int, captions: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        image = Image.effect_noise((48 + i, 40), 60).convert("RGB")
        image.save(folder / f"{i:02}.png")
        lines.append({"file_name": f"{i:02}.png", "captions": [f"picture number {i}", f"it is {i}"][: 1 + i % 2]})
    if captions:
        write(folder, lines)
    return folder


def write(folder: Path, lines: list[dict[str, object]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["data", "check", *arguments])
    return status, capsys.readouterr().err


def test_the_card_counts(tmp_path: Path) -> None:
    config = ImageFolderConfig(path=str(pictures(tmp_path / "p", 20)))
    train, heldout = open_training(config), open_source(config, "heldout")
    card = data_card(train, heldout)
    assert card.rows + card.heldout == 20 and card.all_counted and card.pictures == card.rows
    assert card.references is not None and card.references[0] == 1 and card.references[2] == 2
    assert card.words is not None and card.words[0] == card.words[2] == 3
    assert (card.without_references, card.with_answers, card.bad_rows) == (0, 0, 0)
    assert len(card.samples) == 5 and card.samples[0]["size"].endswith("x40")
    assert json.loads(json.dumps(card.as_dict()))["rows"] == card.rows
    first, *samples = card.lines()
    assert first.startswith(f"{card.rows} rows to train on, {card.heldout} held out; 1.") and len(samples) == 5


def test_a_table_says_what_it_knows(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 30, captions=False)
    rows = [{"image": f"{i:02}.png", "question": "What?", "answers": ["a", "a", "b"]} for i in range(30)]
    rows.append({"image": "nowhere.png", "question": "What?", "answers": ["a"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TableConfig(path=str(folder / "rows.jsonl"))
    card = data_card(open_training(config), open_source(config, "heldout", 4))
    assert card.all_counted and card.with_answers == card.rows and card.references is None and card.pictures is None
    assert card.bad_rows >= 1 and "no references" in card.lines()[0] and "What? -> a" in card.lines()[1]


def test_scenes_have_a_card() -> None:
    config = ScenesConfig(samples=50)
    card = data_card(open_training(config), open_source(config, "heldout", 8))
    assert (card.rows, card.heldout, card.without_references) == (50, 8, 0)


def test_a_sound_folder_has_no_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = check(capsys, str(pictures(tmp_path / "p", 12)))
    assert status == 0 and "12 rows read; 0 problems, 0 notes" in said


def test_problems_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "p", 12)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines[:6]:
        line["captions"] = ["a picture"]
    lines[6]["captions"] = "word " * 60
    lines.append({"file_name": "gone.png", "captions": ["x"]})
    write(folder, lines)
    (folder / "03.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 500)).save(folder / "04.png")
    for name in ("05.png", "06.png", "07.png", "08.png"):  # on both sides of the split, one way or the other
        (folder / name).write_bytes((folder / "09.png").read_bytes())
    status, said = check(capsys, str(folder), "data.eval_fraction=0.5")
    assert status == 1
    for words in (
        "gone.png", "03.png", "trained on and held out too", "pictures have the same caption: 'a picture'",
        "1 pictures are smaller than 32 pixels: 04.png", "1 pictures are of one colour: 04.png",
        "1 rows have references of more words than max_new_tokens, 32: 06.png",
    ):  # fmt: skip
        assert words in said.replace("\n", " "), words


def test_check_takes_recipes_and_says_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = check(capsys, "recipes/caption_ppo.yaml", "data.samples=30", "eval.samples=5")
    assert status == 0 and "35 rows read" in said
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(
    ("name", "kind"), [("a.json", "coco"), ("a.parquet", "table"), ("b/*.csv", "table"), ("nowhere", "imagefolder")]
)
def test_types_by_name(name: str, kind: str) -> None:
    assert guess_type(name) == kind


def test_types_of_folders(tmp_path: Path) -> None:
    assert guess_type(str(pictures(tmp_path / "p", 2))) == "imagefolder"
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "part-0.parquet").touch()
    assert guess_type(str(tmp_path / "t")) == "table"


def test_data_without_references_names_the_terms_that_can_do_without(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 12, captions=False)
    where = ["data.type=imagefolder", f"data.path={folder}", f"logging.dir={tmp_path / 'runs'}"]
    with pytest.raises(UserError) as raised:
        run.train(load_recipe("caption_ppo_fixed", where))
    said = str(raised.value)
    assert "reward term 'bleu' needs references, and no row of imagefolder data has any" in said
    assert said.endswith("bad_ending, clip_score, length, python, repetition")
    with pytest.raises(UserError, match=r"'vqa_accuracy' needs answers, .* data.columns.answer"):
        run.train(load_recipe("caption_ppo_fixed", [*where, "reward.terms=[{type: vqa_accuracy}]"]))
    assert not (tmp_path / "runs").exists()


def test_rows_without_the_answer_that_a_reward_needs_are_bad(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 12, captions=False)
    lines: list[dict[str, object]] = [
        {"file_name": f"{i:02}.png", "question": "What?", "answer": "a"} for i in range(12)
    ]
    del lines[3]["answer"]
    write(folder, lines)
    where = ["data.type=imagefolder", f"data.path={folder}", "reward.terms=[{type: exact_match}]"]
    job = run.prepare(load_recipe("caption_ppo_fixed", where))
    assert [bad["row"] for bad in job.train.bad_rows] == [4]  # type: ignore[union-attr]
    assert "needs an answer" in job.train.bad_rows[0]["reason"]  # type: ignore[union-attr]


def test_training_without_references_says_which_terms_are_impossible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "p", 12, captions=False)
    done = run.train(
        load_recipe("caption_ppo_fixed", [
            "data.type=imagefolder", f"data.path={folder}", f"logging.dir={tmp_path}", "reward.terms=[{type: length}]",
            "train.steps=1", "train.batch=4", "eval.samples=1", "generation.max_new_tokens=4",
        ])
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "without references these terms are impossible: bleu, chrf, cider_d, detail, rouge_l" in said
    assert json.loads((done / "data_card.json").read_text())["looked_at"] == 10


def test_terms_without() -> None:
    assert set(TERMS) - set(terms_without(references=True)) == {"bleu", "chrf", "cider_d", "detail", "rouge_l"}
    assert set(terms_without()) == set(TERMS)

"""Recipes for hub models, each run for a step: a tiny checkpoint of its family, and rows of its data set's columns."""

from __future__ import annotations

import torchvision_shim

torchvision_shim.available()  # before transformers is imported, which looks for torchvision once

import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import zoo  # noqa: E402
from datasets import Dataset, Features, Image, List, Value  # noqa: E402
from PIL import Image as Picture  # noqa: E402

from mmft import run  # noqa: E402
from mmft.cli import main  # noqa: E402
from mmft.config import find_recipes, load_recipe  # noqa: E402

FAMILIES = {
    "smolvlm_256m_caption": "smolvlm",
    "qwen2_5_vl_3b_vqa": "qwen2_5_vl",
    "llava_1_5_7b_caption": "llava",
    "paligemma_3b_caption": "paligemma",
    "blip_base_caption": "blip",
}
SHORT = (
    "train.steps=1", "train.batch=4", "train.samples_per_prompt=2", "train.micro_batch=2", "eval.samples=2",
    "generation.max_new_tokens=3", "data.eval_fraction=0.4",
)  # fmt: skip
ROWS = 12


def pictures() -> list[Picture.Image]:
    return [Picture.new("RGB", (64 + 4 * i, 48), (20 * i, 200 - 10 * i, 90)) for i in range(ROWS)]


def flickr30k(folder: Path) -> None:
    """The columns and the split of lmms-lab/flickr30k."""
    features = Features({
        "image": Image(), "caption": List(Value("string")), "sentids": List(Value("string")),
        "img_id": Value("string"), "filename": Value("string"),
    })  # fmt: skip
    captions = [[f"a picture of {i} cats", f"the {i} cats", "cats"] for i in range(ROWS)]
    columns = {
        "image": pictures(), "caption": captions, "sentids": [["0", "1", "2"]] * ROWS,
        "img_id": [str(i) for i in range(ROWS)], "filename": [f"{i}.jpg" for i in range(ROWS)],
    }  # fmt: skip
    write(Dataset.from_dict(columns, features), folder, "test")


def vqa_rad(folder: Path) -> None:
    """The columns and splits of flaviagiammarino/vqa-rad."""
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    for split in ("train", "test"):
        columns = {"image": pictures(), "question": ["what is it?"] * ROWS, "answer": ["cat", "no"] * (ROWS // 2)}
        write(Dataset.from_dict(columns, features), folder, split)


def write(data: Dataset, folder: Path, split: str) -> None:
    folder.mkdir(exist_ok=True)
    data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_every_recipe_of_a_hub_model_is_tried_here() -> None:
    recipes = {name: load_recipe(path) for name, path in find_recipes().items()}
    of_hubs = {name for name, recipe in recipes.items() if recipe.data.type == "hub"}
    assert of_hubs == set(FAMILIES)
    for name in of_hubs:
        header = find_recipes()[name].read_text(encoding="utf-8")
        assert "NOT RUN AT FULL SIZE" in header and "Memory: " in header


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recipe_trains_a_tiny_checkpoint_of_its_family(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmft.cli._quiet_libraries", lambda: None)  # it sets process-wide filters
    family = FAMILIES[name]
    if reason := zoo.missing(family):
        pytest.skip(reason)
    model, data = zoo.build(family, tmp_path / "model"), tmp_path / "data"
    recipe = load_recipe(name)
    vqa_rad(data) if recipe.data.path.endswith("vqa-rad") else flickr30k(data)
    where = [f"model.path={model}", f"data.path={data}", f"logging.dir={tmp_path / 'runs'}", "train.precision=fp32"]
    assert main(["plan", name, "--no-probe", "--memory", "64GB", *SHORT, *where]) == 0
    done = run.train(load_recipe(name, [*SHORT, *where]))
    assert (done / "adapter" / "adapter_model.safetensors").is_file()
    found = (done / "samples.jsonl").read_text(encoding="utf-8")
    assert recipe.reward.terms[0].label in found


@pytest.mark.slow
def test_those_that_need_torchvision_in_a_process_of_their_own() -> None:
    """In a whole suite transformers is there before torchvision is, and the tests above skip these families."""
    if torchvision_shim.reason() != torchvision_shim.TOO_LATE:
        pytest.skip("they run in this one, or cannot at all: " + torchvision_shim.reason())
    names = [name for name, family in FAMILIES.items() if zoo.FAMILIES[family].needs_torchvision]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", " or ".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout

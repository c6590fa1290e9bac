"""Every family of the zoo loads through the Auto classes, sees its picture and speaks English.

Families whose processors need torchvision are skipped where it isn't: tests/torchvision_shim.py says how to have it.
"""

from __future__ import annotations

import torchvision_shim

torchvision_shim.available()  # before transformers is imported, which looks for torchvision once

import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor  # noqa: E402

QUESTION = "What is there?"
CAPTION = "a big red apple, on the left of 2 cats!"


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's checkpoint, built once."""
    if reason := zoo.missing(request.param):
        pytest.skip(reason)
    return zoo.build(request.param, tmp_path_factory.mktemp(request.param))


every = pytest.mark.parametrize("folder", list(zoo.FAMILIES), indirect=True)


def family_of(folder: Path) -> zoo.Family:
    return zoo.FAMILIES[folder.name[:-1]]  # pytest numbers its folders


def picture(seed: int) -> Image.Image:
    """Coloured blocks, wider than high."""
    blocks = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(blocks.numpy()).resize((64, 48), Image.Resampling.NEAREST)


def prompt(family: zoo.Family, processor: Any) -> str:
    if not family.chat:
        return family.marker + QUESTION
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def model_inputs(folder: Path, image: Image.Image) -> dict[str, torch.Tensor]:
    """What the processor makes of a question about a picture; of an encoder-decoder with a short answer's beginning."""
    processor = AutoProcessor.from_pretrained(folder)
    if not hasattr(processor, "tokenizer"):
        found = dict(AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt"))
        return found | {"decoder_input_ids": processor(QUESTION, return_tensors="pt")["input_ids"]}
    text = prompt(family_of(folder), processor)
    bos = processor.tokenizer.bos_token
    framed = bool(bos) and text.startswith(bos)
    found = dict(processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=not framed))
    found.pop("labels", None)
    return found


def logits(folder: Path, model: Any, image: Image.Image) -> torch.Tensor:
    inputs = model_inputs(folder, image)
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        start = model.generation_config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start, *inputs["input_ids"][0, -3:]]])
    with torch.no_grad():
        return model(**inputs).logits


@every
def test_family_loads_and_sees_its_picture(folder: Path) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert {name: keys for name, keys in report.items() if keys} == {}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    found = logits(folder, model, picture(1))
    assert torch.isfinite(found).all()
    # Answers depend on the picture, and by far more than a test's tolerance: a wrong or lost picture shows.
    answer, other = (x[:, -3:].log_softmax(-1) for x in (found, logits(folder, model, picture(2))))
    assert (answer - other).abs().max() > 0.05
    # ... and no token has all the odds, which would hide everything else.
    assert answer.exp().max() < 0.5
    assert torch.equal(found, logits(folder, model, picture(1)))


@every
def test_checkpoint_is_small_and_its_words_are_english(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 3e6
    processor = AutoProcessor.from_pretrained(folder)
    words = getattr(processor, "tokenizer", processor)
    assert words.decode(words(CAPTION, add_special_tokens=False)["input_ids"]) == CAPTION
    assert bool(getattr(processor, "chat_template", None)) == family_of(folder).chat


def test_families_that_need_torchvision_in_a_process_of_their_own() -> None:
    """In a whole suite transformers is there before torchvision is, and the tests above skip these families."""
    if torchvision_shim.reason() != torchvision_shim.TOO_LATE:
        pytest.skip("they run in this one, or cannot at all: " + torchvision_shim.reason())
    names = [name for name, family in zoo.FAMILIES.items() if family.needs_torchvision]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    chosen = ["-k", " or ".join(f"[{name}]" for name in names)]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    if "passed" not in done.stdout:
        pytest.skip("torchvision does not import: tests/torchvision_shim.py says how to have it")


def test_zoo_is_large() -> None:
    """Most families without torchvision, and every kind of prompt."""
    families = zoo.FAMILIES.values()
    assert len(families) >= 38
    assert sum(not family.needs_torchvision for family in families) >= 24
    assert sum(family.chat for family in families) >= 24
    assert sum(bool(family.marker) for family in families) >= 3

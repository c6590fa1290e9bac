"""Every family of the zoo is trained for two steps and examined: the same examinations fill docs/models.md.

Families whose processors need torchvision run together in a process of their own, where it can be found before
transformers looks for it; they are skipped where it is not there. tests/torchvision_shim.py says how to have it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import zoo
from families import FamilyReport, Subject, Verdict, examine
from torch import Tensor

from mmft.models import encode_once, interface
from mmft.models.interface import Interface

HERE = [name for name, family in zoo.FAMILIES.items() if not family.needs_torchvision]
APART = [name for name, family in zoo.FAMILIES.items() if family.needs_torchvision]


class Reports(dict[str, FamilyReport]):
    """Made when they are asked for, once."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> FamilyReport:
        self[name] = examine(name, zoo.build(name, self.folder / name))
        return self[name]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return Reports(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def table(repository: Path) -> Any:
    """scripts/model_table.py."""
    spec = importlib.util.spec_from_file_location("model_table", repository / "scripts" / "model_table.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("name", HERE)
def test_family(name: str, reports: Reports, table: Any) -> None:
    assert reports[name].faults == []
    # The page says what is so: else run scripts/model_table.py.
    assert f"| {name} | {' | '.join(table.cells(reports[name]))} |" in table.PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_family(table: Any) -> None:
    rows = [line for line in table.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert {row.split("|")[1].strip() for row in rows} >= {*zoo.FAMILIES}
    assert not any("wrong" in row for row in rows)


def test_most_families_encode_once_and_share_prompts(reports: Reports) -> None:
    """What a family is refused costs it speed: a change that gives up a way everywhere must show."""
    found = [reports[name] for name in HERE]
    assert sum(report.passes for report in found) >= 20
    assert all(report.verdicts["encode_once"].result == "yes" for report in found)
    assert sum(report.verdicts["prompt_sharing"].result == "yes" for report in found) >= 14
    assert sum(report.decoder.startswith("cached") for report in found) >= len(found) - 3
    assert sum(report.verdicts["several_pictures"].result == "yes" for report in found) >= 15
    assert sum(report.verdicts["text_only"].result == "yes" for report in found) >= 15


def test_families_that_need_torchvision_in_a_process_of_their_own(tmp_path: Path, table: Any) -> None:
    command = [sys.executable, families.__file__, str(tmp_path), *APART]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.partition(": ")[2].strip())
    found = [FamilyReport.from_json(line) for line in done.stdout.splitlines()]
    assert [report.name for report in found] == APART
    assert [fault for report in found for fault in report.faults] == []
    page = table.PAGE.read_text(encoding="utf-8")
    assert [r.name for r in found if f"| {r.name} | {' | '.join(table.cells(r))} |" not in page] == []


def test_a_prompt_whose_picture_sees_itself_is_shared(tmp_path: Path) -> None:
    """Gemma 3's way, in a window that holds the prompt; the zoo's own is too short for that."""
    folder = zoo.build("gemma3", tmp_path / "gemma3")
    config = folder / "config.json"
    short = config.read_text(encoding="utf-8")
    config.write_text(short.replace('"sliding_window": 16', '"sliding_window": 512'), encoding="utf-8")
    with torch.no_grad():
        gemma = Subject(folder)
        assert families.prompt_sharing(gemma) == Verdict()
        assert gemma.interface.prompt_sees == "pictures"


# The examinations themselves: each must see the error it is there for.


def causal(segment_GL: Tensor) -> Tensor:
    """The mask of a row that is read as one text."""
    length = segment_GL.shape[1]
    return torch.ones(len(segment_GL), 1, length, length, dtype=torch.bool).tril()


@pytest.fixture
def llava(tmp_path: Path) -> Iterator[Subject]:
    with torch.no_grad():
        yield Subject(zoo.build("llava", tmp_path / "llava"))


def test_features_of_another_picture_are_seen(llava: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = encode_once.merge_outputs
    assert families.encode_once(llava).result == "yes"
    monkeypatch.setattr(encode_once, "merge_outputs", lambda outputs: merge(outputs[::-1]))
    assert "features change" in families.encode_once(llava).reason


def test_a_leak_between_answers_is_seen(llava: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert families.prompt_sharing(llava).result == "yes"
    monkeypatch.setattr(interface, "tree_mask", lambda segment_GL, _: causal(segment_GL))
    assert "answers change" in families.prompt_sharing(llava).reason


def test_positions_that_padding_moves_are_seen(llava: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert families.padding(llava).result == "yes"
    plain = Interface.prompt_positions
    monkeypatch.setattr(Interface, "prompt_positions", lambda self, prompt: 2 * plain(self, prompt))
    assert "sampling and scoring differ" in families.padding(llava).reason


def test_a_base_that_moved_is_seen(llava: Subject) -> None:
    assert families.adapter_off(llava).reason == "the adapter changes nothing"
    for name, parameter in llava.policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    assert families.adapter_off(llava).result == "yes"
    llava.interface.head.weight.data += 1e-4
    assert "log-probabilities change" in families.adapter_off(llava).reason

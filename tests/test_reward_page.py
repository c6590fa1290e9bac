"""The page and the table of a reward model's judgement: whole, half missing, and with hostile strings."""

from __future__ import annotations

import copy
import io
import json
import re

import pytest
from rich.console import Console

from mmft.report.reward_page import print_reward, reward_table, write_reward_page
from mmft.types import UserError

HOSTILE = '<script>alert("x")</script> {{ 7 * 7 }} [red]$\\frac{$ \x00 \u202e\n_é'
PIXEL = "data:image/png;base64,iVBORw0KGgo="
NAMES = ("reward", "network", "linear", "bleu", "length")
SECTIONS = (
    "Beside its baselines",
    "Accuracy by kind",
    "How the weights were learned",
    "Calibration",
    "In and out of distribution",
    "Adversarial captions",
    "Length bias",
    "Training",
    "Examples",
)


def summary(mean, reach=0.02):
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def judged():
    accuracy = dict(zip(NAMES, (0.871, 0.86, 0.82, 0.7, 0.55), strict=True))
    kinds = {"colour": 0.02, "count": -0.05, "cut_off": -0.01}
    return {
        "samples": {"pictures": 400, "pairs": 1600, "ratings": 2400, "ood": 200},
        "agreement": summary(0.9),
        "pairwise": {
            name: {
                "all": summary(mean),
                "by_kind": {kind: {**summary(mean + shift, 0.05), "pairs": 320} for kind, shift in kinds.items()},
            }
            for name, mean in accuracy.items()
        },
        "differences": {"reward - linear": summary(0.051), "linear - bleu": summary(0.01), "bleu - length": None},
        "kendall_tau": {name: summary(mean - 0.3) for name, mean in accuracy.items()},
        "length_bias": {name: summary(0.1 * i) for i, name in enumerate(NAMES)},
        "calibration": {
            "preferences": {
                "nll": 0.3125,
                "ece": 0.0215,
                "bins": [{"confidence": 0.55 + 0.1 * i, "accuracy": 0.54 + 0.1 * i, "count": 50 + i} for i in range(5)],
            },
            "ratings": {
                "nll": 1.25,
                "rmse": 0.75,
                "sigma_scale": 1.1,
                "coverage": {"0.5": 0.52, "0.8": 0.79, "0.9": 0.912, "0.95": 0.95},
            },
        },
        "ood": {
            "auroc": summary(0.93),
            "by_kind": {"noise": 0.99, "grey": 0.85},
            "sigma_in": [0.2 + 0.001 * i for i in range(200)],
            "sigma_out": [0.35 + 0.002 * i for i in range(200)],
        },
        "adversarial": {**summary(0.95), "by_kind": {"negation": {"mean": 0.9, "pairs": 20}}, "scenes": 20},
        "weights": [
            {"name": "bleu", "weight": 1.2, "low": 1.0, "high": 1.4, "unconstrained": 1.2, "sign": "as expected"},
            {"name": "detail", "weight": 0.1, "low": 0.0, "high": 0.3, "unconstrained": 0.1, "sign": "not told from 0"},
            {"name": "length", "weight": 0.0, "low": 0.0, "high": 0.0, "unconstrained": -0.4, "sign": "against"},
        ],
    }


def write(folder, record=None, config=None, metrics=None, examples=None):
    folder.mkdir(exist_ok=True)
    for name, content in (("eval.json", record), ("config.json", config), ("examples.json", examples)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def whole(folder):
    metrics = [{"step": step, "loss/train": 0.7 - step / 1000, "lr": 1e-3} for step in range(1, 101)]
    for step, loss in ((25, 0.61), (50, 0.55), (75, 0.52), (100, 0.53)):
        metrics[step - 1]["loss/validation"] = loss
    examples = [
        {
            "image": PIXEL,
            "kind": "colour",
            "chosen": "a red apple",
            "rejected": "a blue apple",
            "score_chosen": 1.254,
            "score_rejected": -0.5,
            "sigma_chosen": 0.2,
            "sigma_rejected": None,
        },
        {"image": "https://example.org/track.png", "kind": None, "chosen": "b", "score_chosen": 0, "score_rejected": 1},
    ]
    config = {
        "vision": "builtin:tiny-vlm",
        "text": "builtin:tiny-vlm",
        "fusion": "cross_attention",
        "loss": "aleatoric",
    }
    return write(folder, judged(), config, metrics, examples)


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


class TestPage:
    def test_every_section_is_there(self, tmp_path):
        path = write_reward_page(whole(tmp_path / "caption"))
        page = path.read_text(encoding="utf-8")
        assert path.name == "report.html"
        assert tuple(headings(page)) == SECTIONS
        assert "vision builtin:tiny-vlm, text builtin:tiny-vlm, fusion cross_attention, loss aleatoric" in page
        assert "400 pictures, 1600 pairs, 2400 ratings, 200 out-of-distribution pictures" in page
        # Headlines: accuracy, tau .871 - .3, coverage of 90% intervals, AUROC, adversarial.
        assert re.findall(r"<b>([\d.%]+)</b>", page) == ["87.1%", "0.571", "91.2%", "0.930", "95.0%"]
        assert page.count("<figure") == len(re.findall('alt="[^"]+"', page)) == 10
        assert not re.search(r'alt="[^"]*\bnan\b', page)

    def test_plots_say_what_they_show(self, tmp_path):
        page = write_reward_page(whole(tmp_path / "caption")).read_text(encoding="utf-8")
        # Kinds by falling accuracy of the reward: .871 + .02, - .01, - .05.
        assert "all 87.1%; colour (320) 89.1%; cut_off (320) 86.1%; count (320) 82.1%" in page
        assert "bleu 1.200 [1.000, 1.400] as expected; detail 0.100 [0.000, 0.300] not told from 0" in page
        assert "52.0% within 50% intervals" in page
        assert "55% sure, 54% right" in page
        assert "held-out loss lowest at step 75" in page
        # Medians: .2 + .001 * 99.5 = .2995, shortened, and .35 + .002 * 99.5 = .549.
        assert "median 0.3 in distribution, median 0.549 out of distribution" in page

    def test_differences_carry_a_verdict_only_where_the_interval_leaves_out_zero(self, tmp_path):
        page = write_reward_page(write(tmp_path / "m", judged())).read_text(encoding="utf-8")
        rows = re.findall(r"<td>([\w ]+ over [\w ]+)</td>\n<td class=\"(\w+)\">(\S+ pt)", page)
        assert rows == [
            ("reward over linear", "better", "+5.1 pt"),
            ("linear over BLEU alone", "unclear", "+1.0 pt"),
        ]

    def test_examples(self, tmp_path):
        page = write_reward_page(whole(tmp_path / "caption")).read_text(encoding="utf-8")
        assert "1.25 ± 0.20" in page and "-0.50<" in page
        assert page.count("ranked right") == page.count("ranked wrong") == 1
        assert PIXEL in page
        assert "example.org" not in page  # the page asks nobody for a picture

    def test_nothing_is_loaded_or_run(self, tmp_path):
        page = write_reward_page(whole(tmp_path / "caption")).read_text(encoding="utf-8")
        assert "default-src 'none'" in page and "<script" not in page
        assert not re.search(r'(src|href)="(?!data:image/png)', page)

    def test_hostile_strings_are_text(self, tmp_path):
        record = judged()
        hostile = {HOSTILE: summary(0.5), "$": summary(0.4), "_x" * 80: summary(0.3)}
        record["pairwise"][HOSTILE] = {"all": summary(0.5), "by_kind": hostile}
        record["kendall_tau"][HOSTILE] = record["length_bias"][HOSTILE] = summary(0.1)
        record["differences"][HOSTILE] = summary(0.1)
        record["weights"][0]["name"] = record["weights"][0]["sign"] = HOSTILE
        record["ood"]["by_kind"] = {HOSTILE: 0.5}
        record["adversarial"]["by_kind"] = {HOSTILE: summary(0.5)}
        record["calibration"]["ratings"]["coverage"][HOSTILE] = 0.5
        examples = [dict.fromkeys(("image", "kind", "chosen", "rejected", "score_chosen", "sigma_chosen"), HOSTILE)]
        examples.append({"image": f'data:image/png;base64,x" onerror="{HOSTILE}', "kind": HOSTILE})
        config = dict.fromkeys(("vision", "text", "fusion", "loss"), HOSTILE)
        metrics = [{"step": 1, "loss/train": 0.5, HOSTILE: 1.0}]
        page = write_reward_page(write(tmp_path / "m", record, config, metrics, examples)).read_text(encoding="utf-8")
        assert "<script" not in page and '" onerror="' not in page and "\0" not in page
        assert "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page and "[red]" in page

    @pytest.mark.parametrize("missing", sorted(judged()))
    def test_what_is_missing_is_left_out(self, tmp_path, missing):
        record = judged()
        del record[missing]
        found = headings(write_reward_page(write(tmp_path / "m", record)).read_text(encoding="utf-8"))
        gone = {
            "pairwise": "Accuracy by kind",
            "weights": "How the weights were learned",
            "calibration": "Calibration",
            "ood": "In and out of distribution",
            "adversarial": "Adversarial captions",
            "length_bias": "Length bias",
        }
        assert [name for name in SECTIONS[:7] if name not in found] == ([gone[missing]] if missing in gone else [])

    def test_every_leaf_may_be_null(self, tmp_path):
        def null(value):
            if isinstance(value, dict):
                return {key: null(child) for key, child in value.items()}
            return [null(child) for child in value] if isinstance(value, list) else None

        page = write_reward_page(write(tmp_path / "m", null(judged()), {})).read_text(encoding="utf-8")
        assert headings(page) == ["Beside its baselines"]  # names without numbers
        print_reward(null(judged()), Console(file=io.StringIO()))

    def test_a_model_before_its_judgement(self, tmp_path):
        page = write_reward_page(write(tmp_path / "m", config={"fusion": None, "loss": "mse"})).read_text("utf-8")
        assert "Not judged yet" in page and headings(page) == []

    def test_same_record_same_page(self, tmp_path):
        first, second = (write_reward_page(whole(tmp_path / name / "m")).read_bytes() for name in _folders(tmp_path))
        assert first == second

    def test_other_folders_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="not a reward model's folder"):
            write_reward_page(tmp_path)
        with pytest.raises(UserError, match="no such run folder"):
            write_reward_page(tmp_path / "nowhere")
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(UserError, match=r"config\.json: cannot read"):
            write_reward_page(tmp_path)


def _folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        yield name


class TestTable:
    def printed(self, record, width=100):
        console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
        print_reward(record, console)
        return console.export_text()

    def test_rows_and_columns(self):
        text = self.printed(judged())
        lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
        assert ["Pairwise accuracy [95%]", "Kendall's tau [95%]", "Length bias [95%]"] in lines
        first = ["reward", "87.1% [85.1, 89.1]", "0.571 [0.551, 0.591]", "0.000 [-0.020, 0.020]"]
        assert first in lines
        assert [line[0] for line in lines[lines.index(first) :][:5]] == [
            "reward",
            "network alone",
            "linear",
            "BLEU alone",
            "length alone",
        ]
        assert reward_table(judged()).row_count == 5

    def test_lines_below(self):
        text = self.printed(judged(), width=200)
        assert "reward over linear: +5.1 pt [+3.1, +7.1]" in text
        assert "annotators agree: 90.0% [88.0, 92.0]" in text
        assert "NLL of preferences 0.312, expected calibration error 0.021, NLL of ratings 1.250" in text
        assert "52.0% of 50%, 79.0% of 80%, 91.2% of 90%, 95.0% of 95%" in text
        assert "told by sigma with AUROC 0.930 [0.910, 0.950]" in text
        assert "95.0% [93.0, 97.0] below the true caption in 20 pictures" in text
        assert "length 0.000 [0.000, 0.000] against" in text

    def test_a_narrow_terminal_keeps_the_accuracy_s_interval(self):
        text = self.printed(judged(), width=72)
        assert "87.1% [85.1, 89.1]" in text and "0.571" in text and "[0.551, 0.591]" not in text
        assert max(map(len, text.splitlines()[:9])) <= 72

    def test_names_are_no_markup(self):
        record = copy.deepcopy(judged())
        record["pairwise"]["[red]x[/red]"] = {"all": summary(0.5)}
        record["weights"][0]["name"] = "[bold]w[/bold]"
        text = self.printed(record)
        assert "[red]x[/red]" in text and "[bold]w[/bold]" in text

    def test_nothing_to_say(self):
        assert self.printed({}) == ""

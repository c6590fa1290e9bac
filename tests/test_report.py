"""The run folder, the final table, the page and the pictures, with hostile captions and half-written runs."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmft.eval.evaluator import evaluation_record
from mmft.report.folder import RunFolder, read_lines, write_atomic
from mmft.report.html import write_report
from mmft.report.labels import Label, comparisons, in_order, verdict
from mmft.report.plots import learning_curves, smooth
from mmft.report.progress import ProgressReporter
from mmft.report.samples import write_eval_samples
from mmft.report.strip import picture_strip
from mmft.report.table import evaluation_table, print_evaluation
from mmft.types import RewardOutput, Row, UserError

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> {{ 7 * 7 }} [red]markup[/red] \x00 ‮ é犬'


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "runs", "demo")


def scores(shift=0.0, n=40):
    base = np.linspace(0, 1, n)
    return {
        "length": base * 10 + shift,
        "oracle_recall": base * 0.5 + shift / 10,
        "oracle_hallucination": base * 0.2,
        "term_detail": base + shift,
        "term_" + HOSTILE: base,
        "reward": base + shift,
        "bleu_4": np.full(n, math.nan),
    }


def full_run(run):
    run.write_recipe(f"name: demo\ndata: {{prompt: '{HOSTILE}'}}\n")
    for step in range(1, 81):
        run.log(
            step,
            {
                "reward/mean": step / 80,
                "reward/raw/detail": math.nan if step == 3 else 0.5,
                "reward/raw/$bad_{name": 0.1,
                "reward/weighted/detail": 0.4,
                "objective/kl": np.float32(0.25),
                "anchor/l2_distance": 1.5,
                "policy/ratio_mean": 1.0,
                "policy/ratio_max": math.inf,
                "unknown/<b>metric</b>": 2,
                "time/step": 0.1,
            },
        )
    rows = [
        Row("plain-1", Image.new("RGB", (1, 1), "red"), "p", (HOSTILE, "a red dot")),
        Row("../../escape/" + HOSTILE, Image.new("RGBA", (900, 300)), "p"),
        Row("text", None, HOSTILE, ()),
    ]
    output = RewardOutput([0.5, math.nan, -1.0], {"detail": [1, 2, 3]}, {}, {"detail": [0.1, 0.2, math.nan]})
    run.write_samples(80, [HOSTILE, "b", ""], rows, output, [True, False, True])
    write_eval_samples(run, rows, [HOSTILE] * 3, ["", "a dot", "c" * 400], [0.1, math.nan, 1], [0.2, 0.3, 1])
    run.write_eval(evaluation_record(scores(), scores(1.0), reference_reward=3.0))
    return run


class TestRunFolder:
    def test_a_second_run_gets_a_number(self, tmp_path):
        first = RunFolder.create(tmp_path, "a")
        assert RunFolder.create(tmp_path, "a").path == first.path, "nothing is in it yet"
        first.write_recipe("name: a\n")
        second = RunFolder.create(tmp_path, "a")
        second.log(1, {})
        assert [second.path.name, RunFolder.create(tmp_path, "a").path.name] == ["a-2", "a-3"]

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "../a"])
    def test_names_that_are_no_folder(self, tmp_path, name):
        with pytest.raises(UserError, match=r"logging\.name"):
            RunFolder.create(tmp_path, name)

    def test_unwritable(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write") as raised:
            RunFolder.create(tmp_path / "file", "a")
        assert "\n" not in str(raised.value)

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tempfile.TemporaryFile", full)
        with pytest.raises(UserError, match="No space left"):
            RunFolder.create(tmp_path, "b")

    def test_opening_what_is_not_there(self, tmp_path):
        with pytest.raises(UserError, match="no such run folder"):
            RunFolder(tmp_path / "gone")

    def test_metrics_are_the_same_bytes_whatever_the_clock_and_the_order(self, tmp_path):
        runs = [RunFolder.create(tmp_path, name) for name in ("a", "b")]
        runs[0].log(1, {"b": 0.1, "a": np.float32(0.5), "time/step": 1.0, "train_runtime": 3, "eps": 5})
        runs[1].log(1, {"time/step": 2.0, "a": 0.5, "b": 0.1})
        texts = [(one / "metrics.jsonl").read_bytes() for one in runs]
        assert texts[0] == texts[1] == b'{"step": 1, "a": 0.5, "b": 0.1}\n'
        assert runs[0].timing() == [{"step": 1, "eps": 5, "time/step": 1.0, "train_runtime": 3}]

    def test_numbers_are_strict_json(self, run):
        run.log(np.int64(2), {"nan": math.nan, "inf": -math.inf, "int": np.int64(3), "flag": True, "none": None})
        line = (run / "metrics.jsonl").read_text()
        strict = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert strict == {"step": 2, "flag": True, "inf": None, "int": 3, "nan": None, "none": None}

    def test_a_line_torn_by_a_kill_is_left_out_and_damage_is_named(self, run):
        run.log(1, {"a": 1.0})
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 2, "a"')
        assert run.metrics() == [{"step": 1, "a": 1.0}]
        (run / "samples.jsonl").write_text("{}\noops\n{}\n")
        with pytest.raises(UserError, match=r"samples\.jsonl: row 2: not JSON"):
            list(run.samples())
        assert list(read_lines(run / "nothing.jsonl")) == []

    def test_samples_carry_every_stage_of_every_term(self, run):
        output = RewardOutput([1.5], {"bleu": [0.5], "len": [3]}, {"bleu": [math.nan]}, {"bleu": [1.0], "len": [0.5]})
        run.write_samples(7, [HOSTILE], [Row("x", None, "p", ("r",))], output, [np.bool_(True)])
        run.write_samples(8, ["c"], [Row("y", None, "p")], RewardOutput([0.0]))
        first, second = run.samples()
        assert first == {
            "step": 7,
            "id": "x",
            "prompt": "p",
            "caption": HOSTILE,
            "references": ["r"],
            "finished": True,
            "reward": 1.5,
            "terms": {
                "bleu": {"raw": 0.5, "normalized": None, "weighted": 1.0},
                "len": {"raw": 3, "normalized": None, "weighted": 0.5},
            },
        }
        assert second["finished"] is None
        assert second["terms"] == {}

    def test_half_a_surrogate_pair_does_not_stop_a_run(self, run):
        run.write_samples(1, ["\ud800"], [Row("x", None, "p")], RewardOutput([0.0]))
        assert next(run.samples())["caption"] == "?"

    def test_eval_is_replaced_whole_or_not_at_all(self, run, monkeypatch):
        assert run.evaluation() is None
        run.write_eval({"samples": 1, "x": {"mean": math.nan}})
        assert run.evaluation() == {"samples": 1, "x": {"mean": None}}

        def crash(*args):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("os.replace", crash)
        with pytest.raises(UserError, match=r"eval\.json: cannot write \(Input/output error\)"):
            run.write_eval({"samples": 2})
        assert run.evaluation()["samples"] == 1
        assert [path.name for path in run.path.iterdir()] == ["eval.json"], "no temporary file stays behind"

    def test_damaged_eval(self, run):
        (run / "eval.json").write_text("{")
        with pytest.raises(UserError, match=r"eval\.json: cannot read"):
            run.evaluation()

    def test_atomic_files_can_be_read_by_others(self, tmp_path):
        write_atomic(tmp_path / "a", b"x")
        (tmp_path / "b").write_bytes(b"x")
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


class TestTable:
    def test_verdicts(self):
        up, down, neutral = Label("x", +1), Label("x", -1), Label("x", 0)
        bounds = ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3))
        rise, fall, both = ({"mean": (low + high) / 2, "low": low, "high": high} for low, high in bounds)
        assert [verdict(up, change) for change in (rise, fall, both, None)] == ["better", "worse", "unclear", ""]
        assert [verdict(down, change) for change in (rise, fall, both)] == ["worse", "better", "unclear"]
        assert verdict(neutral, rise) == "changed"
        assert verdict(up, {"mean": None, "low": None, "high": None}) == ""
        assert verdict(up, {"mean": 0.0, "low": 0.0, "high": 0.0}) == "same"

    def test_order_and_numbers(self):
        record = evaluation_record(scores(), scores(1.0))
        lines = comparisons(record, {"objective/kl": 0.25, "anchor/l2_distance": 1.5, "reward/mean": 9})
        names = [line.label.text for line in lines]
        assert names[:2] == ["Reward", "Term: detail"]
        assert names[-2:] == ["KL to the reference", "L2 distance"]
        recall = next(line for line in lines if "recall" in line.label.text)
        assert recall.before.value == "25.0%"
        assert str(recall.before).startswith("25.0% [2")
        assert str(recall.change) == "+10.0 pt [+10.0, +10.0]"
        assert recall.verdict == "better"
        bleu = next(line for line in lines if line.label.text == "BLEU-4")
        assert (str(bleu.before), str(bleu.change), bleu.verdict) == ("–", "–", "")
        assert lines[-2].before.value == "0.000"
        assert lines[-2].after.value == "0.250"
        assert in_order(["zz", "length", "term_b", "term_a", "reward"]) == [
            "reward",
            "term_b",
            "term_a",
            "length",
            "zz",
        ]

    def test_printed(self):
        record = evaluation_record(scores(), scores(1.0), reference_reward=3.5)
        stream = io.StringIO()
        print_evaluation(record, None, Console(file=stream, width=160))
        text = stream.getvalue()
        assert "[red]markup[/red]" in text, "names print as they are"
        assert "40 samples; the references' own reward is 3.500; 33% of the distance to it covered" in " ".join(
            text.split()
        )

    def test_a_narrow_terminal_keeps_the_interval_of_the_change(self):
        record = evaluation_record({"reward": [0.0, 1.0]}, {"reward": [1.0, 2.0]})
        stream = io.StringIO()
        print_evaluation(record, None, Console(file=stream, width=80, force_terminal=True, color_system=None))
        assert "0.500 1.500 +1.000 [+1.000, +1.000] better" in " ".join(stream.getvalue().split())
        assert max(map(len, stream.getvalue().splitlines())) <= 80

    def test_colour_follows_direction(self):
        stream = io.StringIO()
        console = Console(file=stream, width=200, force_terminal=True, color_system="standard")
        worse = {"mean": 0.2, "low": 0.1, "high": 0.3}
        sides = {"oracle_hallucination": worse}
        console.print(
            evaluation_table({"before": sides, "after": sides, "difference": {"oracle_hallucination": worse}})
        )
        assert "\x1b[31mworse" in stream.getvalue()

    def test_one_side_alone(self):
        lines = comparisons(evaluation_record(scores(), None))
        assert all(line.after.value == "–" and line.verdict == "" for line in lines)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]


class TestReport:
    def test_one_page_that_runs_and_loads_nothing(self, run):
        path = write_report(full_run(run).path)
        assert path == run / "report.html"
        page = path.read_text(encoding="utf-8")
        parsed = Tags()
        parsed.feed(page)
        assert "script" not in parsed.tags
        assert not [found for found in parsed.attributes if found[1].startswith("on")]
        sources = [value for tag, name, value in parsed.attributes if name in ("src", "href")]
        assert sources
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        assert page.count("&lt;script&gt;alert(") >= 6  # prompt, references, captions, term, recipe, id
        assert "{{ 7 * 7 }}" in page, "captions are no templates"
        assert "&lt;b&gt;metric" in page
        assert "default-src 'none'" in page
        assert "NaN" not in page
        assert "33% of" not in page
        assert re.search(r"40 samples; the references&#39; own reward is 3\.000", page)

    def test_pictures_stay_inside_the_run(self, run, tmp_path):
        full_run(run)
        names = [sample["picture"] for sample in run.eval_samples()]
        assert names[0] == "pictures/plain-1.png"
        assert names[2] is None
        assert re.fullmatch(r"pictures/[A-Za-z0-9_-]+\.png", names[1])
        with Image.open(run / names[1]) as image:
            assert image.size == (320, 107)
        secret = tmp_path / "secret.png"
        Image.new("RGB", (5, 5)).save(secret)
        sample = run.eval_samples()[0]
        for outside in ("../../secret.png", str(secret)):
            run.write_lines("eval_samples.jsonl", [{**sample, "picture": outside}])
            assert "no picture" in write_report(run.path).read_text(encoding="utf-8")

    def test_whatever_there_is(self, run):
        with pytest.raises(UserError, match="not a run folder"):
            write_report(run.path)
        run.write_recipe("name: demo\n")
        page = write_report(run.path).read_text()
        assert "Not evaluated yet" in page
        assert "No steps logged yet" in page
        run.log(1, {"reward/mean": 0.5})
        run.write_lines("eval_samples.jsonl", [{"id": "x"}, {"references": "no list", "picture": 3}])
        (run / "samples.jsonl").write_text('{"step": 1}\n{"step": 1, "terms": {"a": null}}\n')
        assert "data:image/png" in write_report(run.path).read_text()

    def test_curves(self):
        main, rest = learning_curves([{"step": 1, "reward/mean": 1.0, "x": 2}, {"step": 2, "reward/mean": None}])
        assert [plot.title for plot in main] == ["Reward"]
        assert [plot.title for plot in rest] == ["x"]
        assert main[0].alt == "Reward: mean from 1 to 1"
        assert learning_curves([]) == ([], [])

    def test_smoothing_by_hand(self):
        # 0.1 / 0.1 = 1;  (0.9 * 0.1 + 0.1 * 3) / (0.9 * 0.1 + 0.1) = 0.39 / 0.19
        assert smooth([1.0, math.nan, 3.0], 0.9) == pytest.approx([1.0, math.nan, 0.39 / 0.19], nan_ok=True)

    def test_mismatched_samples(self, run):
        with pytest.raises(ValueError, match="2 captions before"):
            write_eval_samples(run, [Row("a", None, "p")], ["a", "b"], ["c"])

    def test_limit_takes_the_first(self, run):
        rows = [Row(str(i), None, "p") for i in range(30)]
        write_eval_samples(run, rows, ["b"] * 30, ["a"] * 30)
        assert [sample["id"] for sample in run.eval_samples()] == [str(i) for i in range(24)]


class TestStrip:
    def test_drawn_for_a_readme(self, run, tmp_path):
        out = picture_strip(full_run(run).path, tmp_path / "docs" / "strip.png")
        with Image.open(out) as image:
            assert image.width == 2 * 396 + 3 * 40  # the two samples that have pictures
            assert image.height < 2000, "long captions are cut, not the page grown without end"

    def test_without_pictures(self, run, tmp_path):
        with pytest.raises(UserError, match="no evaluated pictures"):
            picture_strip(run.path, tmp_path / "strip.png")


class TestProgress:
    @staticmethod
    def train(console, steps=100, main=True):
        state = SimpleNamespace(max_steps=steps, global_step=0, is_world_process_zero=main)
        reporter = ProgressReporter(console)
        reporter.on_train_begin(None, state, None)
        for step in range(1, steps + 1):
            state.global_step = step
            reporter.on_log(None, state, None, {"reward/mean": step / 100, "objective/kl": 0.5, "time/step": math.nan})
            reporter.on_step_end(None, state, None)
        reporter.on_log(None, state, None, {"train_runtime": 1.0})
        reporter.on_train_end(None, state, None)
        reporter.close()
        return reporter

    def test_a_log_file_gets_some_lines(self):
        stream = io.StringIO()
        self.train(Console(file=stream, width=200))
        lines = stream.getvalue().splitlines()
        assert lines[0] == "step 1/100  reward 0.010  kl 0.500"
        assert lines[-1] == "step 100/100  reward 1.000 (+0.990)  kl 0.500"
        assert len(lines) == 21

    def test_a_terminal_gets_one_bar(self):
        stream = io.StringIO()
        reporter = self.train(Console(file=stream, width=120, force_terminal=True))
        assert "100/100" in stream.getvalue()
        assert "reward 1.000 (+0.990)" in stream.getvalue()
        assert stream.getvalue().rstrip("\n").endswith("\x1b[?25h"), "the cursor is back"
        assert reporter._bar is None

    def test_other_processes_are_silent(self):
        stream = io.StringIO()
        self.train(Console(file=stream, force_terminal=True), main=False)
        assert stream.getvalue() == ""

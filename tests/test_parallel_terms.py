"""Terms in worker processes give what the term itself gives: values, order, errors; and no process is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmft.data.scenes import EmojiScenes
from mmft.rewards.parallel import ParallelTerm, _parts
from mmft.rewards.terms import build_term
from mmft.types import Row, UserError

FUNCTIONS = """
import os, time
from pathlib import Path

def f(captions, rows):
    if captions[0] == "fail":
        raise KeyError("no such word")
    if captions[0] == "die":
        os._exit(3)
    if captions[0].startswith("sleep"):
        Path(captions[0].split(" ", 1)[1]).write_text(str(os.getpid()))
        time.sleep(600)
    return [float(row.image is None) for row in rows]
"""


@pytest.fixture(scope="module")
def batch() -> tuple[list[str], list[Row]]:
    """200 captions, most of them of another scene of which they are said, some cut short or empty."""
    rows = list(EmojiScenes(200).rows_without_pictures())
    rng = random.Random(0)
    said = [rng.choice(rows[max(0, i - 1)].references) for i in range(200)]
    return [caption[: rng.choice([0, 9, 99])] for caption in said], rows


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a function in a module that lies in the working directory."""
    (tmp_path / "slow_words.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_words", raising=False)
    return "slow_words:f"


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but whose parent hasn't asked is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: object, what: str) -> None:
    assert callable(condition)
    for _ in range(3000):  # a bound for a hang, not a measurement
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"waited in vain: {what}")


@pytest.mark.parametrize(("count", "parts"), [(0, 2), (1, 3), (5, 2), (200, 3)])
def test_parts_cover_the_batch_in_order(count: int, parts: int) -> None:
    slices = _parts(count, parts)
    assert [i for part in slices for i in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in slices]
    assert len(sizes) == min(parts, count) and (not sizes or 0 < max(sizes) <= min(sizes) + 1)


def test_bleu_equals_the_serial_term(batch: tuple[list[str], list[Row]]) -> None:
    captions, rows = batch
    options = {"max_order": 3, "smoothing": "add-k", "smooth_value": 0.5}
    with ParallelTerm("bleu", options, workers=2) as term:
        assert term.needs_references and not term.needs_fit and term.sign == 1
        values = term(captions, rows)
        assert values == build_term("bleu", **options)(captions, rows)
        assert len(set(values)) > 50  # not a constant that any order would equal
        assert term(captions[:1], rows[:1]) == values[:1] and term([], []) == []
        with pytest.raises(ValueError, match="not the same number"):
            term(captions, rows[:-1])


def test_fitted_detail_equals_the_serial_term(batch: tuple[list[str], list[Row]]) -> None:
    captions, rows = batch
    serial = build_term("detail", beta=2.0)
    with ParallelTerm("detail", {"beta": 2.0}, workers=1) as term:
        assert term.needs_fit
        for training in (rows, rows[:20]):  # fitted again, the workers must know
            serial.fit(training)
            term.fit(training)
            assert term(captions, rows) == serial(captions, rows)
        assert term.state_dict() == serial.state_dict()


def test_state_reaches_the_workers(batch: tuple[list[str], list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    captions, rows = batch
    serial = build_term("detail")
    serial.fit(rows)
    term = ParallelTerm("detail", workers=1)
    term.load_state_dict(serial.state_dict())
    # In this process, without the cost of starting another: what a worker is given is enough.
    monkeypatch.setattr("mmft.rewards.parallel.signal.signal", lambda *_: None)
    monkeypatch.setattr("mmft.rewards.parallel._term", UserError("not started"))
    from mmft.rewards import parallel

    parallel._start_worker("mmft.rewards.terms", "detail", {}, term.state_dict())
    assert parallel._score(captions[:9], rows[:9], None) == serial(captions[:9], rows[:9])
    parallel._start_worker("mmft.rewards.terms", "detial", {}, {})
    with pytest.raises(UserError, match="did you mean detail"):
        parallel._score(captions[:1], rows[:1], None)


def test_finished_goes_with_its_caption(batch: tuple[list[str], list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        """An executor in this process."""

        def submit(self, function, captions, rows, finished):
            values = build_term("bad_ending")(captions, rows, finished)
            return type("Done", (), {"result": lambda self: values, "cancel": lambda self: None})()

    rows, captions = batch[1][:5], ["a dog"] * 5
    term = ParallelTerm("bad_ending", workers=3)
    monkeypatch.setattr(term, "_start", lambda: Here())
    assert term(captions, rows, [True, False, True, True, False]) == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert term.sign == -1


def test_errors_deaths_and_interrupts(functions: str, tmp_path: Path) -> None:
    row = EmojiScenes(1)[0]
    serial = build_term("python", function=functions)
    with pytest.raises(UserError) as alone:
        serial(["fail"], [row])
    with ParallelTerm("python", {"function": functions}, workers=1) as term:
        with pytest.raises(UserError) as together:
            term(["fail"], [row])
        assert str(together.value) == str(alone.value)
        assert "slow_words:f' failed: KeyError: 'no such word'" in str(together.value)
        assert row.image is not None and term(["a dog"], [row]) == [0.0]  # works on, and its picture came along

        # Ctrl-C while a worker is busy for ten minutes: the call ends, and so does the worker.
        started = tmp_path / "started"

        def interrupt() -> None:
            wait_for(lambda: started.exists() and started.read_text(), "the worker starts")
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # which alone is woken by it

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores Ctrl-C for what it runs behind
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            term([f"sleep {started}"], [row])
        assert not is_alive(int(started.read_text()))

        with pytest.raises(UserError, match="'python': a worker process died"):
            term(["die"], [row])


def test_pictures_travel_where_the_term_needs_them(functions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Row] = []

    class Here:
        def submit(self, function, captions, rows, finished):
            sent.extend(rows)
            return type("Done", (), {"result": lambda self: [0.0], "cancel": lambda self: None})()

    term, row = ParallelTerm("python", {"function": functions}, workers=1), EmojiScenes(1)[0]
    monkeypatch.setattr(term, "_start", lambda: Here())
    for needs in (False, True):
        monkeypatch.setattr(type(term.term), "needs_images", needs, raising=False)
        term(["a dog"], [row])
    assert sent[0].image is None and sent[1].image is row.image
    assert sent[0].references == row.references


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="workers must be at least 1, not 0"):
        ParallelTerm("bleu", workers=0)
    with pytest.raises(UserError, match="did you mean bleu"):
        ParallelTerm("blue")
    with pytest.raises(UserError, match="smoothing 'no' is not one of"):
        ParallelTerm("bleu", {"smoothing": "no"})


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_end_with_a_killed_parent(functions: str, tmp_path: Path, repository: Path) -> None:
    started = tmp_path / "started"
    code = (
        "from mmft.rewards.parallel import ParallelTerm; from mmft.types import Row\n"
        f"if __name__ == '__main__': ParallelTerm('python', {{'function': {functions!r}}}, workers=1)"
        f"(['sleep {started}'], [Row('r', None, '')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        wait_for(lambda: (started.exists() and started.read_text()) or parent.poll() is not None, "the worker starts")
        worker = int(started.read_text())
        assert is_alive(worker)
        parent.kill()
    wait_for(lambda: not is_alive(worker), "the worker ends")

"""The house rules that a machine can check: layers, import weight, equations, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "evaluate", "matplotlib", "numpy")


def run(code: str, repository: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_imports_go_down_only(repository: Path) -> None:
    run("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))", repository)


def test_functional_imports_torch_alone(repository: Path) -> None:
    allowed = sys.stdlib_module_names | {"torch"}
    for file in (repository / "mmft" / "functional").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                ours = module == "mmft.types" or module.startswith("mmft.functional")
                assert ours or module.split(".")[0] in allowed, f"{file.name} imports {module}"


@pytest.mark.parametrize("module", ["mmft", "mmft.cli", "mmft.config", "mmft.types"])
def test_light_modules_import_nothing_heavy(module: str, repository: Path) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code, repository).strip() == "[]"


def test_metrics_import_no_torch(repository: Path) -> None:
    modules = [
        f"mmft.metrics.{file.stem}" for file in (repository / "mmft/metrics").glob("*.py") if file.stem[0] != "_"
    ]
    assert modules
    assert run(f"import sys, {', '.join(modules)}; print('torch' in sys.modules)", repository).strip() == "False"


@pytest.mark.parametrize(("arguments", "limit"), [(["-c", "import mmft"], 0.3), (["-m", "mmft", "--help"], 1.0)])
def test_start_is_fast(arguments: list[str], limit: float, repository: Path) -> None:
    def seconds(arguments: list[str]) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=repository, capture_output=True, check=True, timeout=60)
        return time.perf_counter() - start

    # The best of a few, without the interpreter's own start: a busy machine must not fail the check.
    bare = min(seconds(["-c", "pass"]) for _ in range(3))
    assert min(seconds(arguments) for _ in range(5)) - bare < limit


def test_equations_have_documented_homes_and_callers(repository: Path) -> None:
    check = subprocess.run(
        [sys.executable, "scripts/check_equations.py"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


def equation_faults(root: Path, home: str, rest: str, repository: Path) -> str:
    """Faults of a small project in which E12 is done, at `f` in mmft/a.py."""
    rows = [
        f"| E{n:02d} | x | {'`mmft/a.py:f`' if n == 12 else ''} | {'done' if n == 12 else 'planned'} |"
        for n in range(1, 36)
    ]
    (root / "docs").mkdir(parents=True)
    (root / "mmft").mkdir()
    (root / "docs/equations.md").write_text("\n".join(rows), encoding="utf-8")
    (root / "mmft/a.py").write_text(home, encoding="utf-8")
    (root / "mmft/b.py").write_text(rest, encoding="utf-8")
    script = str(repository / "scripts/check_equations.py")
    command = [sys.executable, script, "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip()


@pytest.mark.parametrize(
    ("home", "rest", "fault"),
    [
        ('def f():\n    """Equation: E12"""\n', "from mmft.a import f\nf()\n", ""),
        ('def f():\n    """Equation: E05, E12"""\n', "from mmft import a\nloss = {'ppo': a.f}\n", ""),
        ('def g():\n    """Equation: E12"""\n', "f()\n", "E12: mmft/a.py:f does not exist"),
        ('def f():\n    """PPO."""\n', "f()\n", "E12: the docstring of mmft/a.py:f lacks 'Equation: E12'"),
        ('def f():\n    """Equation: E12"""\n', "from mmft.a import f\n", "E12: nothing in mmft/ calls mmft/a.py:f"),
        ('def f():\n    """Equation: E12"""\n    f()\n', "", "E12: nothing in mmft/ calls mmft/a.py:f"),
        ('def f():\n    """Equation: E12, E99"""\n', "f()\n", "mmft/a.py: a docstring names E99, which is no equation"),
    ],
)
def test_equation_check_itself(home: str, rest: str, fault: str, tmp_path: Path, repository: Path) -> None:
    assert equation_faults(tmp_path, home, rest, repository) == fault


def test_files_and_functions_stay_short(repository: Path) -> None:
    too_long = []
    for file in (repository / "mmft").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if len(text.splitlines()) > 430:
            too_long.append(file.name)
        functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        too_long += [f"{file.name}:{node.name}" for node in functions if (node.end_lineno or 0) - node.lineno > 75]
    assert too_long == []


def test_no_unsafe_loading(repository: Path) -> None:
    """Weights come from safetensors alone."""
    for file in (repository / "mmft").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "import pickle" not in text, file
        assert "weights_only=False" not in text, file

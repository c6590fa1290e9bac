"""Check docs/equations.md against the code: each equation marked done has a documented home that the pipeline calls.

    python scripts/check_equations.py [--root DIR]

A home is `path.py:name`, a function or class at the top of a file. It must exist, say `Equation: <id>` in its
docstring, and be used somewhere in mmft/ outside its own body; an import alone is no use, and tests are not looked at.
Exits 1 with one line a fault.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

TABLE = Path("docs/equations.md")
IDS = [f"E{number:02d}" for number in range(1, 36)]
STATUSES = ("done", "planned")
_ROW = re.compile(r"^\|\s*(E\d+)\s*\|(.*)\|([^|]*)\|([^|]*)\|\s*$")
_HOME = re.compile(r"`([\w/]+\.py):(\w+)`")
_NAMED = re.compile(r"Equations?:\s*((?:E\d\d(?:\s*(?:,|and)\s*)?)+)")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Equation:
    """A row of the table; homes are (file, name)."""

    id: str
    homes: tuple[tuple[str, str], ...]
    status: str


def read_table(text: str) -> list[Equation]:
    matches = filter(None, map(_ROW.match, text.splitlines()))
    return [Equation(m[1], tuple(_HOME.findall(m[3])), m[4].strip()) for m in matches]


def parse_package(root: Path) -> dict[str, ast.Module]:
    """Path relative to `root` -> syntax tree, for every module of the package."""
    files = sorted((root / "mmft").rglob("*.py"))
    return {file.relative_to(root).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def definition(tree: ast.Module, name: str) -> Definition | None:
    return next((node for node in tree.body if isinstance(node, Definition) and node.name == name), None)


def named_ids(node: ast.AST) -> set[str]:
    """The ids that a docstring names."""
    documented = ast.Module | Definition
    docstring = (ast.get_docstring(node) if isinstance(node, documented) else None) or ""
    return {id_ for listed in _NAMED.findall(docstring) for id_ in re.findall(r"E\d\d", listed)}


def is_used(name: str, own: Definition, trees: dict[str, ast.Module]) -> bool:
    """Whether any module reads `name` outside the body of its definition."""
    inside = set(map(id, ast.walk(own)))
    for tree in trees.values():
        for node in ast.walk(tree):
            read = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if read == name and id(node) not in inside and isinstance(getattr(node, "ctx", None), ast.Load):
                return True
    return False


def check_home(equation: Equation, file: str, name: str, trees: dict[str, ast.Module]) -> str | None:
    """What is wrong with one home, or None."""
    node = definition(trees[file], name) if file in trees else None
    if node is None:
        return f"{equation.id}: {file}:{name} does not exist"
    if equation.id not in named_ids(node):
        return f"{equation.id}: the docstring of {file}:{name} lacks 'Equation: {equation.id}'"
    if not is_used(name, node, trees):
        return f"{equation.id}: nothing in mmft/ calls {file}:{name}"
    return None


def check(root: Path) -> list[str]:
    """Every fault, one line each."""
    equations = read_table((root / TABLE).read_text(encoding="utf-8"))
    trees = parse_package(root)
    found = [equation.id for equation in equations]
    faults = [f"{TABLE}: {id_} is there {found.count(id_)} times, not once" for id_ in IDS if found.count(id_) != 1]
    faults += [f"{TABLE}: {id_} is not one of the {len(IDS)} equations" for id_ in found if id_ not in IDS]
    for equation in equations:
        if equation.status not in STATUSES:
            faults.append(f"{equation.id}: status {equation.status!r} is not one of {', '.join(STATUSES)}")
        if equation.status == "done":
            if not equation.homes:
                faults.append(f"{equation.id}: done, but without a home")
            faults += filter(None, (check_home(equation, file, name, trees) for file, name in equation.homes))
    for file, tree in trees.items():
        unknown = {id_ for node in ast.walk(tree) for id_ in named_ids(node)} - set(IDS)
        faults += [f"{file}: a docstring names {id_}, which is no equation" for id_ in sorted(unknown)]
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    root = parser.parse_args().root
    faults = check(root)
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    if not faults:
        done = [
            equation for equation in read_table((root / TABLE).read_text(encoding="utf-8")) if equation.status == "done"
        ]
        print(f"equations: {len(done)} done, {len(IDS) - len(done)} planned")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

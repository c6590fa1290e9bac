"""Reward functions of users, named `module:function`: found, checked and called with errors that name them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmft.types import Row, UserError

Function = Callable[[list[str], list[Row]], Sequence[float]]


def load_function(spec: str) -> Function:
    """The function that `module:function` names; modules in the working directory are found too.

    Raises UserError when it is missing, is not callable or does not take (captions, rows).
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UserError(f"reward function {spec!r} is not of the form module:function")
    function: Any = _import(module_name, spec)
    for part in name.split("."):
        if not hasattr(function, part):
            raise UserError(f"reward function {spec!r}: {module_name} has no {name!r}")
        function = getattr(function, part)
    if not callable(function):
        raise UserError(f"reward function {spec!r} is a {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise UserError(f"reward function {spec!r} cannot be called as f(captions, rows): {error}") from error
    except ValueError:
        pass  # a built-in without a signature: only the call can tell
    return function


def call(function: Function, spec: str, captions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """function(captions, rows) as floats. Raises UserError, naming `spec`, when it fails or gives not B numbers."""
    try:
        values = function(list(captions), list(rows))
    except Exception as error:  # any exception of foreign code becomes one line that says whose it is
        raise UserError(f"reward function {spec!r} failed: {type(error).__name__}: {error}") from error
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward function {spec!r} must return one number a caption: {error}") from error
    if len(numbers) != len(captions):
        raise UserError(f"reward function {spec!r} returned {len(numbers)} numbers for {len(captions)} captions")
    return numbers


def _import(module_name: str, spec: str) -> Any:
    # The `mmft` command, unlike `python -m`, does not search the working directory, where the user's file lies.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # a broken module may raise anything while it is imported
        raise UserError(f"reward function {spec!r}: cannot import {module_name}: {error}") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)

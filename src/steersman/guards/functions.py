"""Finds a user's function by "module:function" or "path/to/file.py:function"."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from steersman.guards.raised import place_of
from steersman.guards.user_code import user_code
from steersman.types import SteersmanError


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `spec` names; modules are looked for in the current folder too.

    Raises SteersmanError when there is no such file or module, when importing it fails (the original exception
    is chained), or when it has no such function, naming the nearest ones that it has.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise SteersmanError(
            f"function '{spec}': write it as module:function or path/to/file.py:function, "
            f"for instance my_rewards.py:politeness"
        )
    module = _from_file(Path(where), spec) if where.endswith(".py") else _from_module(where, spec)
    function = getattr(module, name, None)
    if callable(function):
        return function
    offered = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    near = difflib.get_close_matches(name, offered, n=3, cutoff=0.5)
    if function is not None:
        problem = f"'{name}' is {type(function).__name__} and can't be called"
    else:
        problem = f"{where} has no '{name}'"
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(offered[:8]) or 'none'}"
    if "." in name:
        hint = "a method of a class can not be named; write a function that calls it"
    raise SteersmanError(f"function '{spec}': {problem}; {hint}")


def describe_function(function: Callable[..., Any]) -> str:
    """Where the function comes from, as "module:name"."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None) or 'builtins'}:{name}"


def _from_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise SteersmanError(f"function '{spec}': there is no file {path} (looked from {Path.cwd()})")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        with user_code(f"function '{spec}': importing {path}"):
            module_spec.loader.exec_module(module)
    except SteersmanError:
        raise
    except Exception as error:
        raise _failed(spec, str(path), error) from error
    return module


def _from_module(name: str, spec: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a command installed elsewhere doesn't look in the folder where it is typed
    try:
        with user_code(f"function '{spec}': importing {name}"):
            return importlib.import_module(name)
    except SteersmanError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _failed(spec, name, error) from error
        raise SteersmanError(
            f"function '{spec}': there is no module {name}, neither in {here} nor installed; for a file write "
            f"path/to/file.py:function"
        ) from None
    except Exception as error:
        raise _failed(spec, name, error) from error
    finally:
        sys.path.remove(here)


def _failed(spec: str, where: str, error: Exception) -> SteersmanError:
    return SteersmanError(
        f"function '{spec}': importing {where} raised {type(error).__name__}: {error}{place_of(error)}"
    )

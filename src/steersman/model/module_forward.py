"""A forward that one module has of its own, in the place of its class's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

from torch import nn


class ModuleForward:
    """`function(module, *given, ...)` as the module's own `forward`, which does not keep the module alive.

    torch calls a module's own forward without the module. A forward that held it would make a cycle, and the weights
    would stay on their device until Python's collector happens to run. A module that is copied or pickled has a
    forward of its own there.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module, *given: Any) -> None:
        self.function, self.given = function, given
        self._module = ref(module)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.function(self._module(), *self.given, *args, **named)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleForward, (self.function, self._module(), *self.given)

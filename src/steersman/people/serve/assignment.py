"""Which model answers which user, as serving.json says at the moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from steersman.people.serving import ServedModel as ServedModel
from steersman.people.serving import Serving, read_serving
from steersman.types import SteersmanError

Model = TypeVar("Model")


class Assignment(Generic[Model]):
    """Users by the model that the wheel gives them: the same at every visit, for as long as a test runs.

    `open` makes what answers from a name and a folder, `close` ends it; both may take long. The file is looked at
    anew at every request; where it can not be read at the moment, what was read last goes on.
    Raises SteersmanError where it can not be read at the beginning.
    """

    def __init__(
        self, path: str, open_model: Callable[[ServedModel], Model], close_model: Callable[[Model], None]
    ) -> None:
        self.path, self.open, self.close = Path(path), open_model, close_model
        self.changing = asyncio.Lock()
        self.serving, self.modified = self._read()
        self.models = {one: open_model(one) for one in self._named(self.serving)}

    async def pick(self, user: str | None) -> Model:
        """The model of a user; who says no name gets the one that stands."""
        async with self.changing:
            await self._refresh()
            chosen = self.serving.current if user is None else self.serving.arm(user)
            return self.models[ServedModel(chosen.name, chosen.path)]

    async def _refresh(self) -> None:
        try:
            if self.path.stat().st_mtime_ns == self.modified:
                return
            serving, seen = self._read()
            named = self._named(serving)
            fresh = {one: await asyncio.to_thread(self.open, one) for one in named if one not in self.models}
        except (OSError, SteersmanError):
            return
        old = [model for one, model in self.models.items() if one not in named]
        self.models = {one: self.models.get(one) or fresh[one] for one in named}
        self.serving, self.modified = serving, seen
        for model in old:  # it finishes what it took in, while the others answer
            asyncio.get_running_loop().run_in_executor(None, self.close, model)

    def _read(self) -> tuple[Serving, int]:
        try:
            seen = self.path.stat().st_mtime_ns
            return read_serving(self.path), seen
        except FileNotFoundError:
            raise SteersmanError(
                f"serving {self.path}: there is no such file; `steersman wheel` writes it into its run folder"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise SteersmanError(
                f"serving {self.path}: it is no serving.json as `steersman wheel` writes it "
                f"({type(error).__name__}); name that of the wheel's run folder"
            ) from None

    @staticmethod
    def _named(serving: Serving) -> list[ServedModel]:
        both = [serving.current, *([serving.candidate] if serving.candidate is not None else [])]
        return [ServedModel(one.name, one.path) for one in both]

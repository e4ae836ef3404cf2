"""Which model answers which user, as serving.json says at the moment."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from steersman.guards.terminal import say
from steersman.people.serving import ServedModel as ServedModel
from steersman.people.serving import Serving, read_serving
from steersman.types import SteersmanError

Model = TypeVar("Model")


AGAIN = 60.0
"""Seconds after which models that could not be loaded are tried again, where the file stays as it is."""


class Assignment(Generic[Model]):
    """Users by the model that the wheel gives them: the same at every visit, for as long as a test runs.

    `open` makes what answers from a name and a folder, `close` ends it; both may take long. The file is looked at
    anew at every request. New models are loaded beside, and those that stand answer until all of them are there.
    Where one can not be loaded, or the file not be read at the moment, what was read last goes on, and `failures`
    counts it. Raises SteersmanError where it can not be read at the beginning.
    """

    def __init__(
        self,
        path: str,
        open_model: Callable[[ServedModel], Model],
        close_model: Callable[[Model], None],
    ) -> None:
        self.path, self.open, self.close = Path(path), open_model, close_model
        self.serving, self.modified = self._read()
        self.models = {one: open_model(one) for one in self._named(self.serving)}
        self.loading: asyncio.Task[None] | None = None
        self.failures, self._failed, self._until = 0, 0, 0.0

    def pick(self, user: str | None) -> Model:
        """The model of a user; who says no name gets the one that stands."""
        if self.loading is None or self.loading.done():
            self._look()
        chosen = self.serving.current if user is None else self.serving.arm(user)
        return self.models[ServedModel(chosen.name, chosen.path)]

    def _look(self) -> None:
        """Follows the file, where it says something that was not tried a moment ago."""
        try:
            seen = self.path.stat().st_mtime_ns
        except OSError:
            return
        if seen == self.modified or (seen == self._failed and time.monotonic() < self._until):
            return
        try:
            serving, seen = self._read()
        except SteersmanError as error:
            self._note_failure(seen, error)
            return
        missing = [one for one in self._named(serving) if one not in self.models]
        if missing:
            self.loading = asyncio.create_task(self._load(serving, seen, missing))
        else:
            self._follow(serving, seen, {})

    async def _load(self, serving: Serving, seen: int, missing: list[ServedModel]) -> None:
        try:
            fresh = await asyncio.to_thread(self._opened, missing)
        except Exception as error:  # whatever is wrong with a model's folder, those that stand go on
            self._note_failure(seen, error)
        else:
            self._follow(serving, seen, fresh)

    def _follow(self, serving: Serving, seen: int, fresh: dict[ServedModel, Model]) -> None:
        models, named = self.models | fresh, self._named(serving)
        self.serving, self.modified, self.models = serving, seen, {one: models[one] for one in named}
        for one, model in models.items():
            if one not in named:  # it finishes what it took in, while the others answer
                asyncio.get_running_loop().run_in_executor(None, self.close, model)

    def _note_failure(self, seen: int, error: Exception) -> None:
        """Tells it once for each state of the file."""
        self.failures += 1
        if seen != self._failed:
            say(
                f"serving {self.path}: {error}; what was served before goes on, and it is tried again every "
                f"{AGAIN:g} seconds, and when the file changes"
            )
        self._failed, self._until = seen, time.monotonic() + AGAIN

    def _opened(self, wanted: list[ServedModel]) -> dict[ServedModel, Model]:
        """All of them, or none is left open."""
        fresh: dict[ServedModel, Model] = {}
        try:
            for one in wanted:
                fresh[one] = self.open(one)
        except BaseException:
            for model in fresh.values():
                self.close(model)
            raise
        return fresh

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

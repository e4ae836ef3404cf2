"""Which models answer people now: a small file that a server reads, written whole.

    {"turn": 2, "current": {"name": "turn-01", "path": "..."}, "salt": "...",
     "candidate": {"name": "turn-02", "path": "...", "share": 0.1}}

`candidate` is null where no test is running. `arm` says which of them a user gets.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from steersman.atomic import write_atomic
from steersman.people.experiments import is_assigned


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model by the name under which judgements speak of it; `share` of users get it."""

    name: str
    path: str
    share: float = 1.0

    def absolute(self) -> ServedModel:
        """The same with a folder's absolute path, which a server finds from wherever it was started."""
        return replace(self, path=str(Path(self.path).resolve())) if Path(self.path).exists() else self


@dataclass(frozen=True, slots=True)
class Serving:
    """The model that stands, and the candidate that is tried, if there is one."""

    turn: int
    current: ServedModel
    candidate: ServedModel | None = None
    salt: str = ""

    def arm(self, user: str) -> ServedModel:
        """The model that answers this user, the same at every visit."""
        if self.candidate is not None and is_assigned(user, self.salt, self.candidate.share):
            return self.candidate
        return self.current

    @property
    def text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        write_atomic(path, self.text)


def read_serving(path: Path) -> Serving:
    """What `Serving.write` wrote."""
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    candidate = None if told["candidate"] is None else ServedModel(**told["candidate"])
    return Serving(told["turn"], ServedModel(**told["current"]), candidate, told["salt"])

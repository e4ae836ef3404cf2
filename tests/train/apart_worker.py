"""A rank of `rank_worker.py` on a machine whose CPU stands for the second device of `frozen_apart` too.

Whenever the actor samples, it must lie in pieces, and the frozen models must not.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from steersman.train import roles

plain = roles.Roles.generate


def in_pieces(model: Any) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def generate(self: roles.Roles, *given: Any, **named: Any) -> Any:
    frozen = self.frozen()
    assert len(frozen) == 2
    assert not any(map(in_pieces, frozen))
    assert in_pieces(self.policy)
    return plain(self, *given, **named)


if __name__ == "__main__":
    roles.device_apart = lambda device: device
    roles.Roles.generate = generate
    runpy.run_path(str(Path(__file__).with_name("rank_worker.py")), run_name="__main__")

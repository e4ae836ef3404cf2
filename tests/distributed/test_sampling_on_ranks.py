"""Sampling shared out over ranks: the error that is told is the first one."""

from __future__ import annotations

from typing import Any

import pytest

from steersman.distributed.ranks import Ranks, as_one_of, ranks
from steersman.distributed.waiting import MissingRankError, NoStore
from steersman.rollout import Sampling
from steersman.setup.generators import sample_on_all_ranks
from steersman.types import Prompt


class Waiting:
    """Asks the other ranks for something while it samples, as what samples on rank 0 alone does."""

    def generate(self, *_: Any, **__: Any) -> list[Any]:
        with ranks().call("the weights' receipt"):
            raise RuntimeError("[pair.cc:534] gloo: Connection closed by peer [127.0.0.1]:4711")


def test_a_rank_that_is_missed_while_sampling_is_missed_in_that_call():
    prompts: list[Any] = [Prompt([1], "a", index=0), Prompt([2], "b", index=1)]
    generator: Any = Waiting()
    with (
        as_one_of(Ranks(0, 2, store=NoStore())),
        pytest.raises(MissingRankError, match="the weights' receipt failed"),
    ):
        sample_on_all_ranks(generator, prompts, Sampling(max_new_tokens=2))

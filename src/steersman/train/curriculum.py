"""Prompts drawn by how often they are solved, and the weights that keep the gradient what it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.recipe.curriculum import CurriculumConfig
from steersman.run.seed import stream
from steersman.types import Prompt, Stats


class Curriculum:
    """Pass rates of the prompts so far, and draws by them.

        p = (right + 1) / (tries + 2),  q = uniform / N + (1 - uniform) p (1 - p) / sum of these,  w = 1 / (N q)

    An answer's advantage over its group has variance p (1 - p): prompts of half a chance teach most (arXiv
    2504.03380, 2510.01135). Draws are independent, with replacement, so E_q[w g] is the mean of g over the
    prompts for whatever gradient g(x) a prompt has (`verify/curriculum.py`). Departure: the papers leave the weight
    out, and then maximise another mixture of the prompts, one that moves with the policy.
    """

    def __init__(self, config: CurriculumConfig, prompts: Sequence[Prompt], seed: int) -> None:
        self.config, self.seed = config, seed
        self.place = {prompt.index: i for i, prompt in enumerate(prompts)}
        self.right, self.tries = (torch.zeros(len(prompts), dtype=torch.float64) for _ in range(2))
        self.draws = 0

    def probability(self) -> Tensor:
        """q of every prompt, [N]."""
        rate, share = (self.right + 1) / (self.tries + 2), self.config.uniform
        teaches = rate * (1 - rate)
        return share / len(rate) + (1 - share) * teaches / teaches.sum()

    def draw(self, count: int) -> list[int]:
        """The places of the next prompts, some perhaps twice."""
        self.draws += 1
        generator = stream(self.seed, "curriculum", self.draws)
        return torch.multinomial(self.probability(), count, replacement=True, generator=generator).tolist()

    def weight(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """What each prompt's loss counts, [B]; None where nothing is corrected. As long as no outcome comes in it is
        that of the draw."""
        if not self.config.corrected:
            return None
        q = self.probability()[[self.place[p.index] for p in prompts]]
        return 1 / (len(self.tries) * q)

    def outcome(self, prompts: Sequence[Prompt], scores: Tensor) -> Stats:
        """Counts the answers of an iteration; what the draws were like."""
        q = self.probability()
        places = torch.tensor([self.place[p.index] for p in prompts])
        seen = places.unique()
        self.right[seen] *= self.config.forget
        self.tries[seen] *= self.config.forget
        self.right.index_add_(0, places, (scores >= self.config.right_from).double())
        self.tries.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
        rate = (self.right + 1) / (self.tries + 2)
        return {
            "curriculum/pass_rate": float(rate.mean()), "curriculum/seen": float((self.tries > 0).double().mean()),
            "curriculum/largest_weight": float(1 / (len(q) * q).min()),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"right": self.right, "tries": self.tries, "draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.right, self.tries, self.draws = state["right"].clone(), state["tries"].clone(), state["draws"]

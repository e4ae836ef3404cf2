"""Reward models of comparisons: pairs, and rankings of K answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from steersman.data import Encoded, EncodedSet, Preference, Ranking, TrainingSet, collate_groups, collate_pairs
from steersman.loss.reward import centring, pairwise, plackett_luce, ranking, ranking_centring
from steersman.model import AttributeModel, ScalarModel
from steersman.objectives.batch import majority, over_answers, right, scores_of, weight_of
from steersman.objectives.reward_config import EvaluationConfig, RewardModelConfig
from steersman.ops.style import FEATURES
from steersman.statistics.reward_report import Report, keys, pair_report, ranking_report, subsets
from steersman.train.tally import Tally
from steersman.types import Stats, SteersmanError, Tokens, send

M = TypeVar("M", bound=ScalarModel | AttributeModel)


class PairwiseReward(Generic[M]):
    """The objective: mean Bradley-Terry loss per pair, both answers in one forward."""

    def __init__(
        self,
        model: M,
        train: TrainingSet[Preference],
        held_out: EncodedSet[Preference] | None,
        config: RewardModelConfig,
        micro_tokens: int,
    ) -> None:
        require_loss(config, "preference", ("auto", "pairs"))
        self.module, self.train, self.held_out, self.config, self.micro = model, train, held_out, config, micro_tokens

    @property
    def cost(self) -> np.ndarray:
        """Tokens of each pair; of a stream, of those in its buffer."""
        return 2 * self.train.lengths

    def denominator(self, rows: Sequence[int]) -> float:
        return weight_of(self.train.examples, rows)

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        tokens = collate_pairs([self.train.groups[i] for i in rows])
        examples = [self.train.examples[i] for i in rows]
        per_pair, lead = self.per_pair(tokens, examples)
        target, weights = [e.agreement for e in examples], [e.weight for e in examples]
        target_there, weight = send(torch.tensor([target, weights], dtype=lead.dtype), lead.device)
        tally.add("loss", (weight * per_pair).sum(), sum(weights))
        decided = sum(share != 0.5 for share in target)
        tally.add("accuracy", right(lead, target_there).sum(), decided)
        tally.add("margin", (lead * majority(target_there)).sum(), decided)
        return (weight * per_pair).sum() / denominator

    def per_pair(self, tokens: Tokens, examples: Sequence[Preference]) -> tuple[Tensor, Tensor]:
        """The loss of each pair and the lead of its chosen answer, `[B]`; `tokens` are all chosen answers, then all
        rejected ones."""
        chosen, rejected = self.module.score(tokens).chunk(2)
        target, margin = self.labels(examples, chosen)
        loss = pairwise(chosen, rejected, target=target, margin=margin)
        return loss + self.config.centre * centring(chosen, rejected), chosen - rejected

    def labels(self, examples: Sequence[Preference], like: Tensor) -> tuple[Tensor, Tensor]:
        """How probable it is that the first answer wins, and by how much it must lead, `[B]`."""
        margin = [e.margin or 0.0 if self.config.use_margin else 0.0 for e in examples]
        target, lead = send(torch.tensor([[e.agreement for e in examples], margin], dtype=like.dtype), like.device)
        return target, lead

    def debias(self) -> dict[str, float]:
        """Frees the model's score of the features that `train.debias` names, and returns what each unit was worth.

            lambda = argmin sum over the training pairs of (lead - lambda . (f_w - f_l))^2,  r' = r - lambda . f

        So over the training pairs, in both orders, the leads that remain are uncorrelated with the features' leads.
        Source: arXiv 2409.17407 (calibration after training). Departure: a straight line in several features, where
        the paper takes a locally weighted regression on one.
        """
        wanted = [FEATURES.index(name) for name in self.config.debias]
        if not wanted:
            return {}
        score, style = self._scores(self.train), over_answers(self.train.groups, self.micro, self.module.style)
        by = style.view(len(score), 2, -1)[..., wanted].double()
        lead, gap = (score[:, 0] - score[:, 1]).double(), by[:, 0] - by[:, 1]
        found = np.linalg.lstsq(gap.numpy(), lead.numpy(), rcond=None)[0]
        worth: dict[str, float] = {str(n): w for n, w in zip(self.config.debias, found.tolist(), strict=True)}
        self.module.means(replace(self.module.meaning, debiased=worth))
        return worth

    def evaluate(self) -> Stats:
        """Held-out loss, with the data's margins but without centring, and accuracy, with that of the trivial rule
        "the longer answer wins" beside it."""
        held = self.held_out
        if held is None:
            return {}
        scores = self._scores(held)
        first, second = scores.unbind(1)
        target, margin = self.labels(held.examples, scores)
        return {
            "held_out/loss": float(pairwise(first, second, target=target, margin=margin).mean()),
            **told_of_leads(first - second, longer_lead(held.groups), target),
            "held_out/score_mean": float(scores.mean()),
            "held_out/score_std": float(scores.std()),
        }

    def report(self, config: EvaluationConfig) -> Report | None:
        held = self.held_out
        if held is None:
            return None
        scores = self._scores(held).double().numpy()
        return pair_report(
            scores[:, 0] - scores[:, 1],
            np.array([e.agreement for e in held.examples]),
            lengths=np.array([[len(e.response) for e in group] for group in held.groups]),
            scores=scores,
            votes=[e.votes for e in held.examples],
            prompts=keys(held.examples),
            subset=subsets(held.examples, config.subset),
            draws=config.draws,
        )

    def _scores(self, data: TrainingSet[Preference]) -> Tensor:
        return scores_of(self.module, data.groups, self.micro).view(-1, 2)


class RankingReward:
    """The objective: all K answers of a prompt in one forward; the mean over its pairs, or Plackett-Luce.

    Answers beyond a prompt's own count are masked, so prompts with different K share a batch. Centring is the
    mean of (r_i + r_j)^2 over the pairs.
    """

    def __init__(
        self,
        model: ScalarModel,
        train: TrainingSet[Ranking],
        held_out: EncodedSet[Ranking] | None,
        config: RewardModelConfig,
        micro_tokens: int,
    ) -> None:
        require_loss(config, "ranking", ("auto", "pairs", "plackett_luce"))
        self.module, self.train, self.held_out, self.config, self.micro = model, train, held_out, config, micro_tokens
        self.listwise = config.loss == "plackett_luce"
        self.cost = np.array([len(group) * max(map(len, group)) for group in train.groups])

    def denominator(self, rows: Sequence[int]) -> float:
        return float(len(rows))

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor:
        groups = [self.train.groups[i] for i in rows]
        tokens, owner = collate_groups(groups)
        score, mask = side_by_side(self.module.score(tokens), owner)
        rank = dense_ranks([self.train.examples[i].ranks for i in rows]).to(score.device)
        per_prompt = self.per_prompt(score, rank, mask)
        if self.config.centre:
            per_prompt = per_prompt + self.config.centre * ranking_centring(score, mask)
        tally.add("loss", per_prompt.sum(), len(rows))
        ordered = (rank[:, :, None] < rank[:, None, :]) & mask[:, :, None] & mask[:, None, :]
        leads = (score[:, :, None] - score[:, None, :])[ordered]
        tally.add("accuracy", right(leads).sum(), leads.numel())
        return per_prompt.sum() / denominator

    def per_prompt(self, score: Tensor, rank: Tensor, mask: Tensor) -> Tensor:
        """The loss of each ranking without its centring, `[B]`."""
        return plackett_luce(score, rank, mask) if self.listwise else ranking(score, rank, mask)

    def evaluate(self) -> Stats:
        """Held-out loss per prompt, and pairs of unequal rank that are put right, of all prompts together."""
        held = self.held_out
        if held is None:
            return {}
        flat = scores_of(self.module, held.groups, self.micro)
        owner = torch.repeat_interleave(torch.arange(len(held.groups)), torch.tensor(list(map(len, held.groups))))
        score, mask = side_by_side(flat, owner)
        rank = dense_ranks([e.ranks for e in held.examples])
        leads, longer = [], []
        for group, example, numbers in zip(held.groups, held.examples, _per_group(flat, held), strict=True):
            for i, j in ordered_pairs(example.ranks):
                leads.append(numbers[i] - numbers[j])
                longer.append(float(len(group[i].response) - len(group[j].response)))
        return {
            "held_out/loss": float(self.per_prompt(score, rank, mask).mean()),
            "held_out/accuracy": share(right(torch.tensor(leads))),
            "held_out/accuracy_longer_wins": share(right(torch.tensor(longer))),
            "held_out/score_mean": float(flat.mean()),
            "held_out/score_std": float(flat.std()),
        }

    def report(self, config: EvaluationConfig) -> Report | None:
        held = self.held_out
        if held is None:
            return None
        flat = scores_of(self.module, held.groups, self.micro)
        return ranking_report(
            _per_group(flat, held),
            [e.ranks for e in held.examples],
            [[len(e.response) for e in group] for group in held.groups],
            subset=subsets(held.examples, config.subset),
            draws=config.draws,
        )


def _per_group(flat: Tensor, data: EncodedSet[Ranking]) -> list[list[float]]:
    return [part.tolist() for part in flat.split([len(group) for group in data.groups])]


def ordered_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """Places (better, worse) of every pair of unequal rank."""
    pairs = combinations(range(len(ranks)), 2)
    return [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in pairs if ranks[i] != ranks[j]]


def side_by_side(score: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [N] of answers whose prompts are numbered by `owner` [N] as `[B, K]`, and where there is one."""
    count = torch.bincount(owner)
    mask = (torch.arange(int(count.max())) < count[:, None]).to(score.device)
    return score.new_zeros(mask.shape).masked_scatter(mask, score), mask


def dense_ranks(ranks: Sequence[Sequence[float]]) -> Tensor:
    """Ranks as integers from 0, equal ones equal, `[B, K]`; 0 where there is none (see the mask)."""
    out = torch.zeros(len(ranks), max(map(len, ranks)), dtype=torch.long)
    for row, given in zip(out, ranks, strict=True):
        row[: len(given)] = torch.from_numpy(np.unique(given, return_inverse=True)[1])
    return out


def share(x: Tensor) -> float:
    return float(x.mean()) if x.numel() else float("nan")


def told_of_leads(lead: Tensor, longer: Tensor, target: Tensor) -> Stats:
    """How often and by how much the answers lead that most raters preferred (`target` above 1/2: the first one), and
    how often the longer ones are those; of the pairs on which raters are not evenly split."""
    decided = target != 0.5
    return {
        "held_out/accuracy": share(right(lead, target)[decided]),
        "held_out/accuracy_longer_wins": share(right(longer, target)[decided]),
        "held_out/margin": share((lead * majority(target))[decided]),
    }


def longer_lead(groups: Sequence[Sequence[Encoded]]) -> Tensor:
    return torch.tensor([float(len(g[0].response) - len(g[1].response)) for g in groups])


def require_loss(config: RewardModelConfig, kind: str, fitting: Sequence[str]) -> None:
    """Raises SteersmanError where the recipe asks for a loss of another kind of data."""
    if config.loss not in fitting:
        raise SteersmanError(f"train.loss is {config.loss}, but the data is of kind {kind}: {' or '.join(fitting)}")

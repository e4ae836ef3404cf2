"""The objectives of the reward verb against sums that are written out here."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from letter_models import write_jsonl
from reward_kit import settings
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from steersman.data import DataConfig, collate_pairs, encode, feedback, layout, preferences, rankings, ratings, steps
from steersman.model import AttributeModel, load_reward, load_scalar
from steersman.objectives.reward_config import EvaluationConfig, GatingConfig, RewardModelConfig
from steersman.objectives.reward_gating import GatingReward, penalty
from steersman.objectives.reward_pairs import PairwiseReward, RankingReward
from steersman.objectives.reward_points import FeedbackReward, RatingReward, StepReward
from steersman.run.run_config import RunConfig
from steersman.statistics.estimates import pearson, spearman
from steersman.train.offline import Offline
from steersman.train.tally import Tally
from steersman.update.optimizer import OptimizerConfig

LOADERS = {"preference": preferences, "ranking": rankings, "rating": ratings, "attributes": ratings,
           "feedback": feedback, "steps": steps}  # fmt: skip
NAMES = {"rating": ["score"], "attributes": ["a", "e"]}


def objective_of(kind, folder, mini, micro=4096, **config):
    """The objective on the kit's rows, on a model whose head is not zero, in float64."""
    model = load_reward(mini, attributes=NAMES["attributes"]) if kind == "attributes" else load_scalar(mini)
    model.double()
    torch.nn.init.normal_(model.model.score.weight, generator=torch.Generator().manual_seed(1))
    data = DataConfig(**(settings(folder, mini, kind)["data"] | {"held_out": 0}))
    encoded = encode(LOADERS[kind](data).train, layout(model.tokenizer, data), data)
    made = {"preference": PairwiseReward, "ranking": RankingReward, "feedback": FeedbackReward, "steps": StepReward}
    given = (model, encoded, None, RewardModelConfig(**config), micro)
    return RatingReward(*given, NAMES[kind]) if kind in NAMES else made[kind](*given)


def loss(objective, rows):
    return objective.loss(rows, objective.denominator(rows), Tally())


def alone(model, encoded) -> torch.Tensor:
    """Raw head numbers after each response token, from one unpadded row."""
    ids = torch.tensor([encoded.prompt + encoded.response])
    hidden = model.model.model(input_ids=ids).last_hidden_state[0, len(encoded.prompt) :]
    return model.model.score(hidden).float()


def test_a_ranking_in_one_forward_is_its_pairs_one_by_one(tmp_path, mini):
    objective = objective_of("ranking", tmp_path, mini)
    rows = list(range(7))
    one = loss(objective, rows)
    one.backward()
    gradient = [p.grad.clone() for p in objective.module.parameters() if p.grad is not None]
    objective.module.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        example, group = objective.train.examples[i], objective.train.groups[i]
        pairs = list(itertools.combinations(range(len(group)), 2))
        for a, b in pairs:
            a, b = (a, b) if example.ranks[a] <= example.ranks[b] else (b, a)
            tokens = collate_pairs([[group[a], group[b]]])
            lead = torch.sub(*objective.module.score(tokens))
            tie = example.ranks[a] == example.ranks[b]
            per_pair = -logsigmoid(lead) if not tie else -0.5 * (logsigmoid(lead) + logsigmoid(-lead))
            total = total + per_pair / len(pairs) / len(rows)
    total.backward()
    torch.testing.assert_close(one.double(), total, rtol=1e-5, atol=1e-6)
    again = [p.grad for p in objective.module.parameters() if p.grad is not None]
    for a, b in zip(gradient, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_accuracy_in_training_counts_the_pairs_that_are_there(tmp_path, mini):
    objective, tally = objective_of("ranking", tmp_path, mini), Tally()
    rows, right, count = [0, 1, 2], 0.0, 0
    objective.loss(rows, 3.0, tally)
    for i in rows:
        ranks = objective.train.examples[i].ranks
        r = [float(alone(objective.module, e)[-1, 0].detach()) for e in objective.train.groups[i]]
        for a, b in itertools.permutations(range(len(r)), 2):
            if ranks[a] < ranks[b]:
                right, count = right + (r[a] > r[b]), count + 1
    assert count == 8  # prompts of 2, 3 and 4 answers: 1, 2 and 5 pairs of unequal rank
    assert tally.counts["accuracy"] == count
    assert tally.means()["accuracy"] == pytest.approx(right / count)


def test_plackett_luce_draws_the_best_then_the_best_of_the_rest(tmp_path, mini):
    objective = objective_of("ranking", tmp_path, mini, loss="plackett_luce")
    rows, total = [0, 3, 2], 0.0
    for i in rows:
        ranks = objective.train.examples[i].ranks
        r = [float(alone(objective.module, e)[-1, 0].detach()) for e in objective.train.groups[i]]
        for k in range(len(r)):
            total += math.log(sum(math.exp(r[j]) for j in range(len(r)) if ranks[j] >= ranks[k])) - r[k]
    assert float(loss(objective, rows)) == pytest.approx(total / 3, rel=1e-5)


def test_centring_of_a_ranking(tmp_path, mini):
    plain, centred = objective_of("ranking", tmp_path, mini), objective_of("ranking", tmp_path, mini, centre=0.5)
    rows, total = [1, 2], 0.0
    for i in rows:
        r = [float(alone(plain.module, e)[-1, 0]) for e in plain.train.groups[i]]
        pairs = list(itertools.combinations(r, 2))
        total += sum((a + b) ** 2 for a, b in pairs) / len(pairs)
    assert float(loss(centred, rows) - loss(plain, rows)) == pytest.approx(0.5 * total / 2, rel=1e-4)
    centred.held_out = plain.held_out = plain.train  # what is held out is told without it, as of pairs
    assert centred.evaluate()["held_out/loss"] == pytest.approx(plain.evaluate()["held_out/loss"], rel=1e-6)


def test_soft_labels_of_pairs(tmp_path, mini):
    objective = objective_of("preference", tmp_path, mini)
    rows, total = [0, 1, 2, 5], 0.0
    for i in rows:
        w, l = (float(alone(objective.module, e)[-1, 0]) for e in objective.train.groups[i])  # noqa: E741
        p = objective.train.examples[i].agreement
        total += p * math.log1p(math.exp(l - w)) + (1 - p) * math.log1p(math.exp(w - l))
    assert {objective.train.examples[i].agreement for i in rows} == {2 / 3, 1.0, 0.5}
    assert float(loss(objective, rows)) == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize("name", ["squared", "huber"])
def test_ratings_with_gaps_in_deviations_of_each_attribute(name, tmp_path, mini):
    objective = objective_of("attributes", tmp_path, mini, loss=name)
    given = objective.train.examples
    e = [x.scores["e"] for x in given if "e" in x.scores]
    centre, deviation = sum(e) / len(e), float(np.std(e))
    assert objective.module.meaning.shift[1] == pytest.approx(centre)
    assert objective.module.meaning.scale[1] == pytest.approx(deviation)
    rows, total = [0, 1, 5, 7], 0.0
    for i in rows:
        r, errors = alone(objective.module, objective.train.first[i])[-1].tolist(), []
        for k, attribute in enumerate(("a", "e")):
            if attribute in given[i].scores:
                y = (given[i].scores[attribute] - objective.module.meaning.shift[k]) / objective.module.meaning.scale[
                    k
                ]
                x = abs(r[k] - y)
                errors.append(x**2 if name == "squared" else x**2 / 2 if x <= 1 else x - 0.5)
        total += sum(errors) / len(errors)
    assert sum("e" not in given[i].scores for i in rows) == 2
    assert float(loss(objective, rows)) == pytest.approx(total / 4, rel=1e-5)


def test_thumbs_start_at_the_datas_log_odds(tmp_path, mini):
    objective = objective_of("feedback", tmp_path, mini)
    ups = sum(e.label for e in objective.train.examples)
    rows = [0, 1, 2, 3]
    odds = math.log(ups / (30 - ups))
    r = torch.stack([alone(objective.module, objective.train.first[i])[-1, 0] for i in rows]) + odds
    label = torch.tensor([float(objective.train.examples[i].label) for i in rows])
    assert float(loss(objective, rows)) == pytest.approx(float(binary_cross_entropy_with_logits(r, label)), rel=1e-5)


def test_steps_are_judged_where_they_end(tmp_path, mini):
    objective = objective_of("steps", tmp_path, mini)
    rows, total, count = [0, 1, 3], 0.0, 0
    shift = objective.module.meaning.shift[0]
    for i in rows:
        example, encoded = objective.train.examples[i], objective.train.first[i]
        ends = (
            [len(example.steps[0]), len(encoded.response) - 1]
            if len(example.steps) > 1
            else [len(encoded.response) - 1]
        )
        for t, label in zip(ends, example.labels, strict=True):  # one letter is one token
            p = 1 / (1 + math.exp(-float(alone(objective.module, encoded)[t, 0]) - shift))
            total -= label * math.log(p) + (1 - label) * math.log(1 - p)
            count += 1
    assert count == 5
    assert float(loss(objective, rows)) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", list(LOADERS))
def test_micro_batches_change_no_gradient(kind, tmp_path, mini):
    gradients = []
    for micro in (4096, 50):
        objective = objective_of(kind, tmp_path, mini, micro=micro)
        state = Offline(objective, RewardModelConfig(), OptimizerConfig(), RunConfig(micro_tokens=micro))
        kept = []
        state.optimizer.step = lambda objective=objective, kept=kept: (
            kept.extend(p.grad.clone() for p in objective.module.parameters() if p.grad is not None) or {}
        )
        state.step(list(range(10)))
        gradients.append(kept)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-6 + 1e-4 * a.abs().max()


# --- gating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "correlation"), [("pearson", pearson), ("spearman", spearman)])
def test_the_penalty_takes_the_correlation_away(name, correlation):
    rng = np.random.default_rng(0)
    v = rng.exponential(size=400)
    for slope in (1.5, -0.6, 0.0):
        r = slope * v + rng.normal(size=400)
        found = penalty(r, v, name)
        assert abs(correlation(r - found * v, v)) < 1e-3
        assert found == pytest.approx(slope, abs=0.25)
    assert penalty(r, np.ones(400), name) == 0.0
    assert penalty(v, v, name) == pytest.approx(1.0, abs=1e-6)


def test_gating_learns_which_attribute_a_prompt_asks_for(tmp_path, mini):
    """Prompts that begin with a ask for attribute a, the others for e; no single attribute can know that."""
    rng = np.random.default_rng(1)
    pairs = []
    for i in range(120):
        asked = "ae"[i % 2]
        one, two = ("".join(rng.choice(list("aexyz"), size=12)) for _ in range(2))
        if one.count(asked) == two.count(asked):
            two = two.replace("x", asked) + asked * 2
        better, worse = (one, two) if one.count(asked) > two.count(asked) else (two, one)
        pairs.append({"prompt": asked + "bcdfgh"[i % 6] * 2, "chosen": better, "rejected": worse})
    data = DataConfig(path=str(write_jsonl(tmp_path / "pairs.jsonl", pairs)))
    model = load_reward(mini, attributes=["a", "e"])
    assert isinstance(model, AttributeModel)
    encoded = encode(preferences(data).train, layout(model.tokenizer, data), data)
    letters = {name: model.tokenizer.convert_tokens_to_ids(name) for name in "ae"}

    def counts(tokens):  # heads that know the attributes exactly
        read = tokens.response.masked_fill(~tokens.mask, -1)
        numbers = torch.stack([(read == letters[name]).sum(1).float() for name in "ae"], 1)
        return numbers, AttributeModel.with_prompt(model, tokens)[1]

    model.with_prompt = counts
    model.requires_grad_(False)
    config = RewardModelConfig(epochs=40, batch_size=20)
    gating = GatingConfig(hidden=16, layers=1, verbosity="none")
    torch.manual_seed(0)
    objective = GatingReward(model, encoded, encoded, config, gating, 4096)
    before = objective.evaluate()["held_out/accuracy"]
    state = Offline(objective, config, OptimizerConfig(lr=0.03), RunConfig())
    order = state.batches.forever()
    for _ in range(state.total):
        state.step(next(order))
    report = objective.report(EvaluationConfig(draws=100))
    assert before < 0.85
    assert report.numbers["accuracy"].value > 0.97
    best = max(report.numbers[f"accuracy/{name} alone"].value for name in "ae")
    assert report.numbers["accuracy"].value > best + 0.1
    weights = objective.module.weights(objective.features.prompt)
    wants_a = torch.tensor([e.prompt.startswith("a") for e in encoded.examples])
    assert float(weights[wants_a, 0].mean().detach()) > 0.8 > 0.2 > float(weights[~wants_a, 0].mean().detach())

"""The preference loop: the objective's numbers from plain forward passes, split batches, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from letter_models import letters
from pydantic import ValidationError
from tiny_models import tiny_model

from steersman.data import DataConfig, Encoded, EncodedSet, Preference, RowError, encode, layout
from steersman.data.rows import Row
from steersman.loss.offline import LOSSES
from steersman.model import Policy
from steersman.objectives.batch import right, rounding
from steersman.objectives.preference import PairObjective
from steersman.objectives.preference_config import PairLossConfig
from steersman.setup.reference import divergence
from steersman.train.tally import Tally
from steersman.types import SteersmanError
from steersman.verbs.preference import PreferenceRecipe

PAIRS = [name for name, entry in LOSSES.items() if entry.data == "pair"]


def encoded(*, gold: bool = False) -> EncodedSet[Preference]:
    random = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=random).tolist()

    data: EncodedSet[Preference] = EncodedSet()
    for number, (p, w, r) in enumerate([(3, 5, 2), (1, 2, 7), (4, 4, 4)]):
        prompt = ids(p)
        data.groups.append([Encoded(prompt, ids(n), [True] * n) for n in (w, r)])
        data.examples.append(Preference("x", "a", "b", Row({}, "f", number), weight=1.0 + number))
    for number, group in enumerate(data.groups if gold else ()):
        group.append(Encoded(group[0].prompt, ids(3 + number), [True] * (3 + number)))
    return data


def objective(config: PairLossConfig, seed: int = 1) -> PairObjective:
    policy, reference = (Policy(tiny_model("llama", seed=s, scale=2.0).double(), None) for s in (seed, 2))
    train, held = (encoded(gold=config.gold_nll > 0) for _ in range(2))
    made = PairObjective(policy, reference.requires_grad_(False), train, held, config, 10_000)
    made.read_reference(range(3))
    return made


def plain_logp(policy: Policy, e: Encoded) -> torch.Tensor:
    logits = policy.model(torch.tensor([e.prompt + e.response])).logits[0].log_softmax(-1)
    at = range(len(e.prompt) - 1, len(e.prompt) + len(e.response) - 1)
    return torch.stack([logits[t] for t in at])


def test_dpo_equals_the_paper_on_plain_forward_passes():
    made = objective(PairLossConfig(name="dpo", settings={"beta": 0.3}, nll=0.5))
    total = weights = 0.0
    for group, example in zip(made.train.groups, made.train.examples, strict=True):
        sums = []
        for e in group:
            rows = torch.arange(len(e.response)), torch.tensor(e.response)
            sums.append([plain_logp(m, e)[rows].sum() for m in (made.module, made.reference)])
        (w, w_ref), (r, r_ref) = sums
        loss = -torch.nn.functional.logsigmoid(0.3 * ((w - w_ref) - (r - r_ref))) - 0.5 * w / len(group[0].response)
        total, weights = total + example.weight * float(loss), weights + example.weight
    tally = Tally()
    found = made.loss([0, 1, 2], made.denominator([0, 1, 2]), tally)
    # the reference's sums are kept in float32
    assert float(found) == pytest.approx(total / weights, rel=1e-5)
    assert tally.means()["loss"] == pytest.approx(total / weights, rel=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_micro_batches_add_up_for_every_loss(name):
    made = objective(PairLossConfig(name=name, nll=0.1))
    made.look([0, 1, 2])
    parameters = list(made.module.parameters())
    denominator = made.denominator([0, 1, 2])
    whole = torch.autograd.grad(made.loss([0, 1, 2], denominator, Tally()), parameters, allow_unused=True)
    parts = [
        torch.autograd.grad(made.loss([i], denominator, Tally()), parameters, allow_unused=True) for i in range(3)
    ]
    for k, g in enumerate(whole):
        if g is not None:
            torch.testing.assert_close(sum(p[k] for p in parts), g, rtol=1e-6, atol=1e-9)


def weighed_sums(made: PairObjective, group: list[Encoded], alpha: float) -> list[torch.Tensor]:
    """log pi of both answers, then the reference's: up to the shorter one's length, and alpha times the rest."""
    shared, found = min(len(e.response) for e in group), []
    for model in (made.module, made.reference):
        for e in group:
            each = plain_logp(model, e)[torch.arange(len(e.response)), torch.tensor(e.response)]
            found.append(sum(x if t < shared else alpha * x for t, x in enumerate(each)))
    return found


def test_ld_dpo_weighs_both_models_and_no_other_term():
    """From plain forward passes: the likelihood and what is told are of whole answers, soft labels go both ways."""
    made = objective(PairLossConfig(name="dpo", settings={"beta": 0.3}, nll=0.5, ld_alpha=0.25))
    agreement = (0.75, 1.0, 0.5)
    for example, share in zip(made.train.examples, agreement, strict=True):
        example.weight, example.agreement = 1.0, share
    expected, drift = torch.zeros(()), 0.0
    for group, share in zip(made.train.groups, agreement, strict=True):
        w, r, w_ref, r_ref = weighed_sums(made, group, 0.25)
        whole_w, whole_r, whole_w_ref, _ = weighed_sums(made, group, 1.0)
        z = 0.3 * ((w - w_ref) - (r - r_ref))
        nll = [-x / len(e.response) for x, e in zip((whole_w, whole_r), group, strict=True)]
        for part, sign, likelihood in ((share, 1, nll[0]), (1 - share, -1, nll[1])):
            expected = expected + part * (0.5 * likelihood - torch.nn.functional.logsigmoid(sign * z)) / 3
        drift += float(whole_w.detach() - whole_w_ref.detach()) / 3
    tally = Tally()
    found = made.loss([0, 1, 2], 3.0, tally)
    torch.testing.assert_close(found, expected.to(found), rtol=1e-9, atol=0)
    parameters = list(made.module.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert tally.means()["drift/chosen"] == pytest.approx(drift, rel=1e-9)
    assert float(found.detach()) != pytest.approx(
        float(objective(PairLossConfig(name="dpo", settings={"beta": 0.3}, nll=0.5)).loss([0, 1, 2], 3.0, Tally()))
    )


@pytest.mark.parametrize("name", ["dpo", "hinge", "wpo", "apo_zero", "aot", "aot_unpaired"])
def test_ld_alpha_is_the_same_in_micro_batches_and_of_streams(name, monkeypatch):
    made = objective(PairLossConfig(name=name, nll=0.1, ld_alpha=0.5))
    made.look([0, 1, 2])
    parameters = list(made.module.parameters())
    whole = torch.autograd.grad(made.loss([0, 1, 2], 3.0, Tally()), parameters)
    parts = [torch.autograd.grad(made.loss([i], 3.0, Tally()), parameters) for i in range(3)]
    monkeypatch.setattr(type(made.train), "in_memory", False)
    made.look([0, 1, 2])
    streamed = torch.autograd.grad(made.loss([0, 1, 2], 3.0, Tally()), parameters)
    for k, g in enumerate(whole):
        torch.testing.assert_close(sum(p[k] for p in parts), g, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(streamed[k], g, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["cpo", "simpo", "dpo", "tdpo1", "wpo", "aot"])
def test_gold_answers_add_their_likelihood_to_any_loss(name):
    """From plain forward passes; the losses of the pairs, their numbers and the reference's readings stay as they
    are."""
    own = {"nll_weight": 0.0} if name == "cpo" else {}
    ld_alpha = 0.5 if LOSSES[name].takes_ld_alpha else 1.0
    made, plain = (
        objective(PairLossConfig(name=name, settings=own, gold_nll=weight, ld_alpha=ld_alpha))
        for weight in (0.4, 0.0)
    )
    if plain.readings.models:
        torch.testing.assert_close(*(x.reference_logp[id(x.train)] for x in (made, plain)))
    assert made.cost.tolist() == [3 * max(map(len, group)) for group in made.train.groups]
    likelihood = torch.zeros(())
    tallies = Tally(), Tally()
    for each in (made, plain):
        each.look([0, 1, 2])
    for group, example in zip(made.train.groups, made.train.examples, strict=True):
        gold = group[2]
        logp = plain_logp(made.module, gold)[torch.arange(len(gold.response)), torch.tensor(gold.response)].sum()
        likelihood = likelihood - example.weight * logp / len(gold.response) / 6
    found, pairs = (x.loss([0, 1, 2], 6.0, tally) for x, tally in zip((made, plain), tallies, strict=True))
    expected = pairs + 0.4 * likelihood
    torch.testing.assert_close(found, expected.to(found), rtol=1e-6, atol=1e-9)
    told, without = (tally.means() for tally in tallies)
    assert told.keys() - without.keys() == {"logp/gold"}
    assert {key: told[key] for key in without if key != "loss"} == pytest.approx(
        {key: value for key, value in without.items() if key != "loss"}, rel=1e-6
    )
    grads = [
        torch.autograd.grad(x, list(y.module.parameters()), allow_unused=True, materialize_grads=True)
        for x, y in ((found, made), (pairs, plain), (0.4 * likelihood, made))
    ]
    for a, b, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-4, atol=1e-7)
    parts = [made.loss([i], 6.0, Tally()) for i in range(3)]
    torch.testing.assert_close(sum(parts), found, rtol=1e-9, atol=0)


def sorted_batch(made: PairObjective, rows: list[int], alpha: float = 1.0) -> torch.Tensor:
    """Unpaired AOT plus half the paired one, from plain forward passes over rows that may stand there several times,
    by sorting with gradients in one piece."""
    sums = [torch.stack(weighed_sums(made, made.train.groups[i], alpha)) for i in rows]
    w, r, w_ref, r_ref = torch.stack(sums, 1).unbind()
    value = torch.zeros(())
    for share, upper, lower in ((1.0, w - w_ref, r - r_ref), (0.5, w - r, w_ref - r_ref)):
        lead = upper.sort().values - lower.sort().values
        value = value + share * torch.log(1 + torch.exp(-0.3 * lead)).mean()
    return value


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 2, 1]], ids=["once", "a row twice"])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_aot_equals_the_sorted_batch_on_plain_forward_passes(rows, alpha):
    """Rows of weights 1, 2 and 3 count as so many copies, whatever the micro-batches."""
    config = PairLossConfig(name="aot_unpaired", also={"aot": 0.5}, settings={"beta": 0.3}, ld_alpha=alpha)
    made = objective(config)
    made.look(rows)
    denominator, tally = made.denominator(rows), Tally()
    found = made.loss(rows[:1], denominator, tally) + made.loss(rows[1:], denominator, tally)
    expected = sorted_batch(made, [row for row in rows for _ in range(1 + row)], alpha)
    torch.testing.assert_close(found, expected.to(found), rtol=1e-9, atol=0)
    assert tally.means()["loss"] == pytest.approx(float(expected.detach()), rel=1e-9)
    parameters = list(made.module.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_aot_beside_a_loss_of_whole_distributions_has_its_reference():
    mixed = objective(PairLossConfig(name="aot", also={"tdpo1": 0.5}))
    apart = [objective(PairLossConfig(name=name)) for name in ("aot", "tdpo1")]
    for made in (mixed, *apart):
        made.look([0, 1, 2])
    found, one, other = (made.loss([0, 1, 2], 6.0, Tally()) for made in (mixed, *apart))
    torch.testing.assert_close(found, one + 0.5 * other)


def test_a_batch_of_one_pair_is_refused_for_a_loss_of_the_batch():
    asked = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"batch_size": 1}}
    with pytest.raises(ValidationError, match=r"train\.batch_size is 1, but aot compares the distributions"):
        PreferenceRecipe.model_validate({**asked, "loss": {"name": "dpo", "also": {"aot": 1.0}}})
    assert PreferenceRecipe.model_validate(asked).train.batch_size == 1


def test_a_mixture_is_the_weighed_sum_of_its_losses():
    """MPO: each loss with those of the settings that it has, the likelihood beside them, and all that any reads."""
    settings = {"beta": 0.3, "alpha": 0.7, "flip": 0.2}
    weights = {"dpo": 0.8, "bco_pair": 0.2, "robust_dpo": 0.3, "simpo": 0.1, "wpo": 0.4, "tdpo2": 0.6}
    own = {name: {key: settings[key] for key in keys} for name, keys in {
        "dpo": ["beta"], "bco_pair": ["beta"], "robust_dpo": ["beta", "flip"], "simpo": ["beta"], "wpo": ["beta"],
        "tdpo2": ["beta", "alpha"]}.items()}  # fmt: skip
    expected = sum(
        weight
        * float(objective(PairLossConfig(name=name, settings=own[name])).loss([0, 1, 2], 3.0, Tally()).detach())
        for name, weight in weights.items()
    )
    nll = objective(PairLossConfig(name="dpo", nll=1.0)).loss([0, 1, 2], 3.0, Tally()).detach()
    plain = objective(PairLossConfig(name="dpo")).loss([0, 1, 2], 3.0, Tally()).detach()
    config = PairLossConfig(
        name="dpo", settings=settings, weight=0.8, also={k: v for k, v in weights.items() if k != "dpo"}, nll=0.5
    )
    assert config.needs_full_kl
    assert config.needs_log_weight
    tally = Tally()
    found = objective(config).loss([0, 1, 2], 3.0, tally)
    assert float(found.detach()) == pytest.approx(expected + 0.5 * float(nll - plain), rel=1e-6)
    alone = Tally()
    objective(PairLossConfig(name="dpo", settings={"beta": 0.3})).loss([0, 1, 2], 3.0, alone)
    assert tally.means()["margin"] == pytest.approx(alone.means()["margin"], rel=1e-6)


def test_a_loss_without_a_reference_gets_one_where_another_reads_it():
    assert not PairLossConfig(name="simpo").needs_reference
    assert PairLossConfig(name="simpo", also={"dpo": 0.5}).needs_reference
    mixed = objective(PairLossConfig(name="simpo", also={"dpo": 0.5})).loss([0, 1, 2], 3.0, Tally())
    apart = [objective(PairLossConfig(name=name)).loss([0, 1, 2], 3.0, Tally()) for name in ("simpo", "dpo")]
    # beta of each is its own where settings give none
    torch.testing.assert_close(mixed, apart[0] + 0.5 * apart[1])


def test_divergence_is_the_exact_sum_with_gradient_to_the_policy():
    made = objective(PairLossConfig(name="tdpo1"))
    e = made.train.groups[0][0]
    ref, own = plain_logp(made.reference, e).detach(), plain_logp(made.module, e)
    exact = (ref.exp() * (ref - own)).sum(-1)
    from steersman.data import collate

    tokens = collate([e])
    found = divergence(
        made.reference.hidden(tokens).detach(), made.reference.head(), made.module.hidden(tokens), made.module.head(),
        rows=2,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    weight = made.module.model.get_output_embeddings().weight
    (a,), (b,) = (torch.autograd.grad(x.sum(), [weight], retain_graph=True) for x in (found, exact))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["simpo", "aot", "aot_unpaired"])
def test_held_out_numbers_are_those_of_the_same_pairs(name):
    made = objective(PairLossConfig(name=name, nll=0.2))
    made.micro_tokens = 20
    for example in (*made.train.examples, *made.held_out.examples):
        example.weight = 1.0
    tally = Tally()
    made.look([0, 1, 2])
    made.loss([0, 1, 2], 3.0, tally)
    held = made.evaluate()
    for name, value in tally.means().items():
        assert held[f"held_out/{name}"] == pytest.approx(value, rel=1e-6)


def test_an_unknown_setting_is_named_with_the_nearest():
    with pytest.raises(ValidationError, match="did you mean label_smoothing"):
        PairLossConfig(name="dpo", settings={"label_smooth": 0.1})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "robust_dpo", "settings": {"flip": 0.5}}, "below 0.5"),
        ({"name": "simpo", "settings": {"beta": 0.0}}, "above 0"),
        ({"name": "exo", "settings": {"epsilon": 0.0}}, "above 0 and below 0.5"),
        ({"name": "discopop", "settings": {"tau": 1.0}}, "above 0 and below 1"),
        ({"name": "fdpo_alpha", "settings": {"alpha": 1.5}}, "at least 0 and at most 1"),
        ({"name": "ipo", "margin_weight": 1.0}, "goes with dpo, hinge, rso, simpo"),
        ({"name": "simpo", "ld_alpha": 0.5}, r"loss\.ld_alpha .* simpo takes means .* goes with dpo, robust_dpo"),
        ({"name": "tdpo1", "ld_alpha": 0.5}, r"loss\.ld_alpha .* tdpo1"),
        ({"name": "cpo", "ld_alpha": 0.5}, r"loss\.ld_alpha .* cpo .* likelihood"),
        ({"name": "ipo", "settings": {"length_normalised": 1}, "ld_alpha": 0.5}, r"ipo without length_normalised"),
        ({"name": "dpo", "also": {"simpo": 1.0}, "ld_alpha": 0.5}, r"loss\.ld_alpha .* simpo takes"),
        ({"name": "dpo", "ld_alpha": 1.5}, "ld_alpha"),
        ({"name": "aot", "margin_weight": 1.0}, "aot has no place for margins"),
        ({"name": "dpo", "also": {"dpo": 1.0}}, r"loss\.also: dpo is loss\.name itself"),
        ({"name": "dpo", "also": {"bco_pair": 0.0}}, r"loss\.also: the weight of bco_pair is 0"),
        ({"name": "dpo", "weight": 0.5}, r"loss\.weight .* nothing is"),
        ({"name": "dpo", "also": {"ipo": 0.5}, "margin_weight": 1.0}, "ipo has no place for margins"),
        ({"name": "dpo", "also": {"exo": 0.5}, "settings": {"epsilon": 0.7}}, "exo: epsilon is 0.7"),
        ({"name": "dpo", "also": {"exo": 0.5}, "settings": {"tau": 0.7}}, "dpo and exo has no setting `tau`"),
    ],
)
def test_settings_without_meaning_are_refused(config, words):
    with pytest.raises(ValidationError, match=words):
        PairLossConfig(**config)


def test_soft_labels_and_margins_of_the_data_count():
    made = objective(PairLossConfig(name="dpo", settings={"beta": 0.3}, margin_weight=0.5))
    for example, agreement, margin in zip(made.train.examples, (0.75, 1.0, 0.5), (2.0, None, 1.0), strict=True):
        example.weight, example.agreement, example.margin = 1.0, agreement, margin
    expected = 0.0
    for group, agreement, lead in zip(made.train.groups, (0.75, 1.0, 0.5), (1.0, 0.0, 0.5), strict=True):
        (w, w_ref), (r, r_ref) = (
            [
                plain_logp(m, e)[torch.arange(len(e.response)), torch.tensor(e.response)].sum()
                for m in (made.module, made.reference)
            ]
            for e in group
        )
        z = 0.3 * ((w - w_ref) - (r - r_ref)) - lead
        for share, sign in ((agreement, 1), (1 - agreement, -1)):
            expected -= share * float(torch.nn.functional.logsigmoid(sign * z).detach()) / 3
    assert float(made.loss([0, 1, 2], 3.0, Tally()).detach()) == pytest.approx(expected, rel=1e-5)
    made.config = made.config.model_copy(update={"soft_labels": False, "margin_weight": 0.0})
    losses = []
    for shares in ((0.6, 0.1, 0.5), (1.0, 0.0, 0.5)):
        for example, share in zip(made.train.examples, shares, strict=True):
            example.agreement = share
        losses.append(float(made.loss([0, 1, 2], 3.0, Tally()).detach()))
    made.config = made.config.model_copy(update={"soft_labels": True})
    assert losses == [float(made.loss([0, 1, 2], 3.0, Tally()).detach())] * 2


def test_pairs_that_the_length_limit_made_equal_are_named_or_left_out():
    pairs = [("no a", "no b"), ("no way at all, a", "no way at all, b"), ("yes", "no")]
    cut = [Preference("ask", w, r, Row({}, "f", n)) for n, (w, r) in enumerate(pairs)]

    def config(**more: str) -> DataConfig:
        return DataConfig.model_validate({"path": "f", "max_length": 12, "on_too_long": "truncate", **more})

    laid = layout(letters(), config())
    with pytest.raises(RowError, match=r"f, row 1.*same tokens, cut to data.max_length.*on_bad_row"):
        encode(cut, laid, config())
    left = encode(cut, laid, config(on_bad_row="skip"))
    assert ([e.row.number for e in left.examples], left.equal) == ([0, 2], 1)
    with pytest.raises(SteersmanError, match="no pair is left: in 1 the answers are the same tokens"):
        encode(cut[1:2], laid, config(on_bad_row="skip"))


def test_a_lead_that_is_rounding_is_half_right():
    lead, logp = torch.tensor([1e-5, -1e-5, 1e-3, -2.0, 0.0]), torch.tensor([-90.0, -90.0, -90.0, -1.0, -0.5])
    assert right(lead, tie=rounding(logp)).tolist() == [0.5, 0.5, 1.0, 0.0, 0.5]
    raters = torch.tensor([0.9, 0.2, 0.2, 0.5, 0.9])
    assert right(torch.tensor([1.0, 1.0, -1.0, 3.0, 0.0]), raters).tolist() == [1.0, 0.0, 1.0, 0.0, 0.5]
    made = objective(PairLossConfig(name="dpo"))
    for data in (made.train, made.held_out):
        told = made._run(data, [0, 1, 2])[1]
        made.reference_logp[id(data)] = torch.stack([told["logp/chosen"], told["logp/rejected"]], 1)
    assert made.evaluate()["held_out/accuracy"] == 0.5


def test_an_anchor_makes_the_reference_a_geometric_mixture():
    config = PairLossConfig(name="ipo")
    plain = objective(config)
    anchor = Policy(tiny_model("llama", seed=5, scale=2.0).double(), None)
    both = PairObjective(
        plain.module, plain.reference, plain.train, plain.held_out, config, 10_000, None, (anchor, 0.3)
    )
    alone = PairObjective(plain.module, anchor, plain.train, plain.held_out, config, 10_000)
    for made in (both, alone):
        made.read_reference(range(3))
    mixed = [x.reference_logp[id(plain.train)] for x in (plain, alone, both)]
    torch.testing.assert_close(mixed[2], 0.7 * mixed[0] + 0.3 * mixed[1])

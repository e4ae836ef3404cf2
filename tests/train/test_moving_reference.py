"""A reference that follows the policy (TR-DPO, arXiv 2404.09656; BEMA, arXiv 2508.00180): whole runs beside the
formulas of both papers written anew, what a run keeps of it, and what is refused."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from letter_models import letters, write_jsonl
from ranks_kit import trained_weights
from test_resume import compare
from torch.nn.functional import logsigmoid
from train_kit import merge, plain, rows

from steersman import cli
from steersman.config.load import load_recipe
from steersman.model import frozen_copy, load_policy
from steersman.recipe.moving_reference import MovingReference
from steersman.train import offline
from steersman.train.moving import BiasCorrectedAverage
from steersman.train.offline import Offline, trainable
from steersman.types import SteersmanError
from steersman.verbs import feedback, plan, preference
from steersman.verbs.feedback import RECIPES
from steersman.verbs.preference import PreferenceRecipe

TEXTS = [("ask", "yes it is.", "no"), ("ask?", "a cat", "so she said"), ("who", "up", "look there"),
         ("why", "go on", "hm, no"), ("a dog", "sat", "ran off"), ("we", "see", "did not")]  # fmt: skip
PAIRS = [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in TEXTS]
THUMBS = [{"prompt": p, "completion": f" {(c, r)[i % 2]}", "label": i % 2 == 0} for i, (p, c, r) in enumerate(TEXTS)]
SOFT, HARD = {"decay": 0.3, "every": 2}, {"decay": 0.0, "every": 3}
BEMA = {"kind": "bema", "every": 2, "after": 1, "ema_power": 0.7, "bias_power": 0.4, "lag": 2, "multiplier": 0.5}
STEPS, LR, BETA = 7, 0.02, 0.3


@pytest.fixture
def asked(tmp_path, mini):
    """Updates on all training rows at once, with a look after each."""
    return {
        "model": {"path": str(mini), "dtype": "float64"},
        "data": {"path": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS)), "held_out": 2},
        "loss": {"settings": {"beta": BETA}},
        "train": {"batch_size": 4, "max_steps": STEPS, "epochs": 99},
        "optimizer": {"lr": LR, "schedule": "constant", "warmup": 0, "max_grad_norm": 1e9},
        "samples": {"prompts": 0},
        "run": {"dir": str(tmp_path / "run"), "threads": 1, "eval_every": 1, "save_every": 1, "micro_tokens": 40},
    }


def run(asked, verb="dpo", *, resume=False, **extra):
    """The summary of a run; `__` in a name stands for a dot."""
    values = merge(asked, {k.replace("__", "."): v for k, v in extra.items()})
    if verb == "dpo":
        return preference.run(PreferenceRecipe.model_validate(values), resume=resume)
    return feedback.run(RECIPES[verb].model_validate(values), resume=resume)


# -- the formulas, written anew --------------------------------------------------------------------------------


def answer_logp(model, prompt: str, answer: str) -> torch.Tensor:
    """log pi of an answer and its end, in nats."""
    tokenizer = letters()
    asked, said = tokenizer(prompt).input_ids, [*tokenizer(answer).input_ids, 2]
    logp = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
    return logp[torch.arange(len(asked) - 1, len(asked) + len(said) - 1), torch.tensor(said)].sum()


def leads(model, pairs) -> tuple[torch.Tensor, torch.Tensor]:
    found = [[answer_logp(model, row["prompt"], row[side]) for row in pairs] for side in ("chosen", "rejected")]
    return torch.stack(found[0]), torch.stack(found[1])


def of_pairs(name: str, policy, reference, pairs) -> torch.Tensor:
    """Equation 7 of DPO, and paired AOT: the sorted leads of the policy against those of the reference."""
    with torch.no_grad():
        ref_w, ref_l = leads(reference, pairs)
    w, l = leads(policy, pairs)  # noqa: E741
    own, their = w - l, ref_w - ref_l
    if name == "aot":
        own, their = own.sort().values, their.sort().values
    return -logsigmoid(BETA * (own - their)).mean()


def moved(section: dict, t: int, theta, reference, kept: dict) -> None:
    """What the papers do to the reference after update t, on plain tensors."""
    if section.get("kind") != "bema":
        if t % section["every"] == 0:
            alpha = 1 - section["decay"]
            for p, now in zip(reference, theta, strict=True):
                p.copy_(alpha * now + (1 - alpha) * p)
        return
    if t == section["after"]:
        kept["start"], kept["mu"] = ([x.clone() for x in theta] for _ in range(2))
    elif t > section["after"] and (t - section["after"]) % section["every"] == 0:
        age = section["lag"] + section["multiplier"] * t
        beta, alpha = age ** -section["ema_power"], age ** -section["bias_power"]
        for p, now, start, mu in zip(reference, theta, kept["start"], kept["mu"], strict=True):
            mu.copy_((1 - beta) * mu + beta * now)
            p.copy_(mu + alpha * (now - start))


@pytest.mark.parametrize("name", ["dpo", "aot"])
@pytest.mark.parametrize("section", [SOFT, HARD, BEMA], ids=["soft", "hard", "bema"])
def test_a_run_is_the_paper_s_update_by_update(asked, tmp_path, mini, name, section):
    """Weights after seven updates, and the losses of training and of held-out pairs at each of them."""
    run(asked, moving_reference=section, loss__name=name)
    policy = load_policy(str(mini), dtype="float64").model
    reference, kept = copy.deepcopy(policy).requires_grad_(False), {}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    # which pairs are held out, and in which order the rest comes, does not matter to a batch of all
    held = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["held_out/logp/chosen"]
    with torch.no_grad():
        chosen = {i: float(answer_logp(policy, row["prompt"], row["chosen"])) for i, row in enumerate(PAIRS)}
    two = next((i, j) for i in chosen for j in chosen if i < j and abs((chosen[i] + chosen[j]) / 2 - held) < 1e-9)
    out, train = ([row for i, row in enumerate(PAIRS) if (i in two) is here] for here in (True, False))
    told = rows(tmp_path / "run")
    for t in range(1, STEPS + 1):
        loss = of_pairs(name, policy, reference, train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            moved(section, t, list(policy.parameters()), list(reference.parameters()), kept)
            now = float(of_pairs(name, policy, reference, out))
        assert told[t]["loss"] == pytest.approx(float(loss.detach()), rel=1e-9), t
        assert told[t]["held_out/loss"] == pytest.approx(now, rel=1e-9), t
    found = trained_weights(tmp_path / "run")
    for key, wanted in policy.named_parameters():
        torch.testing.assert_close(found[f"model.model.{key}"], wanted.detach(), rtol=1e-9, atol=1e-11)


def test_after_a_hard_update_the_margins_are_0_until_the_policy_moves(asked, tmp_path):
    run(asked, moving_reference=HARD)
    margins = {row["step"]: row["held_out/margin"] for row in rows(tmp_path / "run")}
    assert [step for step, margin in margins.items() if margin == 0] == [0, 3, 6]


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        ("dpo", {}),
        ("dpo", {"loss__name": "tdpo2", "loss__settings": {}}),
        ("dpo", {"loss__ld_alpha": 0.5, "train__batch_size": 2}),
        ("dpo", {"loss__name": "aot", "model__lora": {"r": 2}}),
        ("kto", {}),
        ("bco", {"train__batch_size": 2, "model__lora": {"r": 2}}),
    ],
)
def test_a_reference_that_moves_at_the_end_alone_teaches_what_one_that_stays_does(asked, tmp_path, verb, extra):
    """Of the one all is read batch by batch, of the other once before training, where that can be; and sums that are
    kept are in float32."""
    if verb != "dpo":
        asked = merge(asked, {"data.path": str(write_jsonl(tmp_path / "thumbs.jsonl", THUMBS)), "loss": {}})
    run(asked, verb, **extra, run__dir=str(tmp_path / "stays"))
    run(asked, verb, **extra, moving_reference={"every": STEPS, "decay": 0})
    found, wanted = (rows(tmp_path / name) for name in ("run", "stays"))
    for a, b in zip(found[:-1], wanted[:-1], strict=True):
        assert plain(a) == {key: pytest.approx(value, rel=1e-5, abs=1e-5) for key, value in plain(b).items()}
    assert found[-1]["held_out/loss"] != pytest.approx(wanted[-1]["held_out/loss"], rel=1e-3)
    a, b = (load_policy(str(tmp_path / name / "model"), dtype="float64") for name in ("run", "stays"))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# -- what is kept ----------------------------------------------------------------------------------------------


def nudge(policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(policy).values():
            p.add_((0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype))


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_bias_corrected_average_is_the_recursion_and_goes_on_from_its_state(mini, after, dtype):
    """In half precision the average is that of float32 numbers, rounded once into the copy."""
    section = MovingReference(**{**BEMA, "after": after})
    policy = load_policy(str(mini), dtype=dtype)
    found = BiasCorrectedAverage(frozen_copy(policy), policy, section)
    names, before = list(trainable(policy)), [p.detach().double().clone() for p in trainable(policy).values()]
    reference, kept = [p.clone() for p in before], {"start": before, "mu": [p.clone() for p in before]}
    state = None
    for t in range(1, 10):
        nudge(policy, t)
        found.follow(t)
        moved(section.model_dump(), t, [p.detach().double() for p in trainable(policy).values()], reference, kept)
        close = {"rtol": 1e-12, "atol": 1e-14} if dtype == "float64" else {"rtol": 2**-8, "atol": 1e-5}
        own = dict(found.copy.named_parameters())
        for name, wanted in zip(names, reference, strict=True):
            torch.testing.assert_close(own[name].double(), wanted, **close)
        if t == 5:
            state = copy.deepcopy(found.state_dict())
    again = load_policy(str(mini), dtype=dtype)
    other = BiasCorrectedAverage(frozen_copy(again), again, section)
    for t in range(1, 6):
        nudge(again, t)
    other.load_state_dict(state)
    for t in range(6, 10):
        nudge(again, t)
        other.follow(t)
    for p, q in zip(other.copy.parameters(), found.copy.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        ("dpo", {"moving_reference": {"decay": 0.7, "every": 2}, "model__dtype": "bfloat16"}),
        ("dpo", {"moving_reference": BEMA, "model__lora": {"r": 2, "dropout": 0.2}}),
        ("dpo", {"moving_reference": {**BEMA, "after": 0}, "loss__name": "aot", "model__dtype": "bfloat16"}),
        ("kto", {"moving_reference": SOFT}),
    ],
)
def test_a_stopped_run_goes_on_with_its_reference_bit_for_bit(asked, tmp_path, monkeypatch, verb, extra):
    asked = merge(asked, {"train.batch_size": 2, "samples": {"prompts": 2, "max_new_tokens": 3}})
    if verb == "kto":
        asked = merge(asked, {"data.path": str(write_jsonl(tmp_path / "thumbs.jsonl", THUMBS)), "loss": {}})
    run(asked, verb, **extra)
    step, done = Offline.step, []

    def dies(self, some):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(1)
        return step(self, some)

    again = {**extra, "run__dir": str(tmp_path / "cut")}
    with monkeypatch.context() as patch:
        patch.setattr(offline.Offline, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(asked, verb, **again)
    run(asked, verb, **again, resume=True)
    if "model__lora" in extra:
        a, b = (load_policy(str(tmp_path / name / "model"), dtype="float64") for name in ("run", "cut"))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert [plain(x) for x in rows(tmp_path / "run")] == [plain(x) for x in rows(tmp_path / "cut")]
    else:
        compare(tmp_path / "run", tmp_path / "cut")


def test_the_best_weights_come_with_the_reference_of_their_look(asked, tmp_path):
    out = run(asked, moving_reference={"decay": 0.2, "every": 2}, train__keep="best", optimizer__lr=0.2)
    looks = [row for row in rows(tmp_path / "run") if "held_out/accuracy" in row]
    best = max(looks, key=lambda row: row["held_out/accuracy"])
    assert best["step"] < STEPS
    for key in ("held_out/accuracy", "held_out/loss", "held_out/margin", "held_out/drift/chosen"):
        assert out[key] == pytest.approx(best[key], rel=1e-9), key


def test_adapters_follow_on_the_policy_s_own_base(asked, capsys):
    """The copy adds its adapters' weights, and BEMA's averages twice as many; the page before the run counts them."""
    run(merge(asked, {"model.lora": {"r": 2}, "model.dtype": "float32"}), moving_reference=BEMA)
    said = capsys.readouterr().out
    assert "bias-corrected moving average, every 2 updates from update 1 on" in " ".join(said.split())
    held = {found[1]: found[2] for found in re.finditer(r"^(policy|reference\S*.*?)  +.*?([\d.]+ KiB)", said, re.M)}
    sizes = {held[name] for name in ("reference", "reference's average", "reference's first weights")}
    assert len(sizes) == 1
    assert float(sizes.pop().split()[0]) < float(held["policy"].split()[0]) / 4


# -- the plan and the page before a run ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "copies"),
    [
        ({"moving_reference": {}, "model.dtype": "float32"}, {"weights": 1, "averages": 0}),
        ({"moving_reference": {}, "model.dtype": "bfloat16"}, {"weights": 1, "averages": 1}),
        ({"moving_reference": {"kind": "bema"}, "model.dtype": "bfloat16"}, {"weights": 1, "averages": 2}),
        ({"moving_reference": {"kind": "bema"}, "model.lora": {"r": 2}}, {"weights": 0, "averages": 2}),
    ],
)
def test_the_plan_counts_the_copy_and_its_averages(asked, extra, copies):
    recipe = PreferenceRecipe.model_validate(merge(asked, extra))
    own, reference = plan.roles_of(recipe, "135m")
    number = 2 if recipe.model.dtype == "bfloat16" else 4
    learned = own.trained * 4
    adapters = own.adapter_parameters * 4
    wanted = copies["weights"] * own.shape.parameters * number + adapters + copies["averages"] * learned
    assert reference.weights(number) == wanted
    assert not reference.trained


# -- what is refused -------------------------------------------------------------------------------------------

REFUSED = [
    ({"reference": "folder"}, "moving_reference begins as the policy before training, and reference is folder"),
    ({"anchor": "folder"}, "a mixture with an anchor does not move"),
    ({"loss": {"name": "simpo"}}, "simpo has no reference; remove it, or choose a loss with one"),
    ({"loss": {"name": "orpo"}, "samples": {"prompts": 3}}, "orpo has no reference"),
    ({"offload": True}, "offload: the reference is read in every micro-batch .*moving_reference"),
    ({"parallel": {"mode": "zero2"}, "model.dtype": "float32"}, "parallel.mode zero2 is not for it; use mode: fsdp"),
    ({"moving_reference": {"kind": "bema", "decay": 0.5}}, "decay is of kind ema, and kind is bema"),
    ({"moving_reference": {"lag": 3}}, "lag is of kind bema, and kind is ema"),
    ({"moving_reference": {"decay": 0, "every": 2}, "train.keep": "best", "run.eval_every": 4},
     "every evaluation comes right after that"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "said"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(asked, extra, said):
    with pytest.raises(ValueError, match=said):
        PreferenceRecipe.model_validate(merge(asked, {"moving_reference": {}, **extra}))


@pytest.mark.parametrize("section", [{}, {"kind": "bema", "every": 5, "after": 3}])
def test_a_reference_that_would_never_move_is_refused_before_work(asked, tmp_path, section):
    with pytest.raises(SteersmanError, match=rf"for the first time after update \d+, and the run has {STEPS}; give"):
        run(asked, moving_reference=section)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_key_is_given_on_the_command_line_too(asked, tmp_path, mini):
    words = ["--model.path", str(mini), "--data.path", asked["data"]["path"], "--moving_reference.every", "3"]
    section = load_recipe(PreferenceRecipe, None, words).moving_reference
    assert section == MovingReference(kind="ema", decay=0.4, every=3)
    assert MovingReference(kind="bema").every == 400
    assert cli.main(["dpo", *words, "--train.max_steps", "2", "--run.dir", str(tmp_path / "cli")]) == 2

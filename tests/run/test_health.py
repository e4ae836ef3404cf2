"""The health watch: speaks when it should, and is silent over healthy runs and ordinary text."""

from __future__ import annotations

import json
import math
import random

import pytest

from steersman.ops.text import distinct_share, ngrams, pieces, repeated_share, text_stats
from steersman.run.health.checks import CHECKS
from steersman.run.health.history import History
from steersman.run.health.limits import HealthConfig
from steersman.run.health.watch import HealthWatch

OPENINGS = [
    "Once upon a time there was a little girl named Lily. She loved to play in the garden with her dog.",
    "Tom had a big red ball. One day the ball rolled down the hill and into the cold blue river.",
    "The sun was bright and the birds were singing. Ben and his mother walked slowly to the park.",
    "There was a small boat at the lake. Nobody knew who owned it, but Mia wanted to sail away in it.",
]


def healthy(step: int, rng: random.Random) -> dict[str, float]:
    """A run that learns: everything moves, with noise, within reason."""
    t = step / 100
    return {
        "reward/total": 2 * t + rng.gauss(0, 0.2), "reward/gold": t + rng.gauss(0, 0.2), "reward/kl": -9 * t,
        "kl": 12 * t + rng.gauss(0, 0.5), "entropy": 2.0 - 0.8 * t + rng.gauss(0, 0.05), "ratio_gap": 1e-6,
        "explained_variance": min(0.6, -0.3 + step / 10) + rng.gauss(0, 0.1), "finish/length": 0.4,
        "finish/eos": 0.6, "length/mean": 50.0, "loss/policy": rng.gauss(0, 0.1), "grad_norm/actor": 1.0,
    }  # fmt: skip


def codes(rows, texts=None, config=None) -> list[str]:
    watch = HealthWatch(config)
    found = [f for i, row in enumerate(rows, 1) for f in watch.update(i, row, texts[i - 1] if texts else ())]
    return list(dict.fromkeys(f.code for f in found))


@pytest.mark.parametrize("seed", range(20))
def test_silent_over_a_healthy_run(seed):
    rng = random.Random(seed)
    assert codes([healthy(i, rng) for i in range(100)], [rng.sample(OPENINGS, 3) for _ in range(100)]) == []


@pytest.mark.parametrize("seed", range(20))
def test_noise_that_goes_nowhere_is_no_reward_hacking(seed):
    rng = random.Random(seed)
    rows = [{"reward/total": rng.gauss(0, 1), "reward/gold": rng.gauss(0, 1)} for _ in range(150)]
    assert codes(rows) == []


def ramp(key: str, values, **others) -> list[dict[str, float]]:
    return [{key: v, **others} for v in values]


CASES = {
    "kl_runaway": ramp("kl", [0, 5, 20, 60, 90, 120], **{"length/mean": 60.0}),
    "entropy_collapse": ramp("entropy", [2.0, 1.9, 1.8, 1.0, 0.4, 0.2, 0.1, 0.05]),
    "all_cut": ramp("finish/length", [0.5, 1.0, 1.0, 1.0], **{"finish/eos": 0.1}),
    "eos_never": ramp("finish/eos", [0.0] * 3, **{"finish/length": 1.0}),
    "ratio_gap": ramp("ratio_gap", [1e-6, 0.2]),
    "bad_critic": ramp("explained_variance", [-0.5] * 10),
    "reward_hacking": [
        {
            "reward/total": i / 10 + 0.01 * (i % 3),
            "reward/gold": min(i, 15) / 10 - max(0, i - 15) / 8 + 0.02 * (i % 2),
        }
        for i in range(40)
    ],
}
CASES["chosen_falls"] = [
    {"held_out/logp/chosen": -40.0 - 2 * i, "held_out/logp/rejected": -42.0 - 5 * i} for i in range(6)
]
CASES["nothing_moved"] = ramp("kl", [1e-5 * i for i in range(25)], **{"length/mean": 40.0})
CASES["strange_answers"] = ramp("held_out/perplexity", [4.0, 5.0, 7.9, 8.1])


@pytest.mark.parametrize("code", CASES)
def test_each_fault_is_named_and_only_it(code):
    assert codes(CASES[code]) == [code]


def test_a_fault_is_said_when_it_comes_and_again_when_it_lasts():
    watch = HealthWatch(HealthConfig(repeat_every=5))
    said = [
        f.step for i in range(1, 17) for f in watch.update(i, {"kl": 1.0 if i < 4 else 99.0, "length/mean": 40.0})
    ]
    assert said == [4, 9, 14]
    text = watch.findings[0].text
    assert "33.7 nats per response over 40 tokens, limit 20.0" in text
    assert "KL coefficient" in text


def test_a_policy_that_never_had_entropy_has_not_lost_it():
    watch = HealthWatch()
    (finding,) = [f for i in range(1, 5) for f in watch.update(i, {"entropy": 0.0})]
    assert "0.000 nats per token from the start" in finding.text
    assert "collapse" not in finding.text


def test_fixed_length_answers_can_be_meant():
    rows = ramp("finish/eos", [0.0] * 6, **{"finish/length": 1.0})
    assert codes(rows, config=HealthConfig(expect_eos=False)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_and_is_named(value):
    watch = HealthWatch()
    assert watch.update(1, {"loss/policy": 0.1}) == []
    (finding,) = watch.update(2, {"kl": 1.0, "loss/policy": value, "grad_norm/actor": math.nan})
    assert (finding.code, finding.severity) == ("non_finite", "stop")
    assert f"at step 2 loss/policy = {value}, grad_norm/actor = nan" in finding.text


COLLAPSED = [
    "friend " * 60,
    "and they were happy. " + "friend " * 40,
    "friend, friend, friend! " * 15,
    "I love you so much. " * 12,
    "happyhappyhappyhappyhappyhappyhappyhappyhappyhappy" * 2,
    "朋友" * 30,
    "!" * 50,
]


@pytest.mark.parametrize("end", COLLAPSED)
def test_repetition_is_named_while_it_grows(end):
    """Responses turn to the collapsed text one word after the other; the watch speaks before it is all there."""
    iterations = 20
    texts = []
    for i in range(iterations):
        share = max(0.0, (i - 4) / 15)
        words = [o.split() for o in OPENINGS]
        texts.append(
            [" ".join(w[: round(len(w) * (1 - share))]) + " " + end[: round(len(end) * share)] for w in words]
        )
    watch = HealthWatch()
    said = [f for i, t in enumerate(texts, 1) for f in watch.update(i, {}, t) if f.code == "repetition"]
    assert said, end
    assert 5 < said[0].step <= 15
    assert "distinct-2 per response" in said[0].text


def test_a_run_that_is_collapsed_from_the_start_is_named_too():
    assert "repetition" in codes([{}], [["friend " * 60] * 8])


def test_one_answer_to_everything_and_no_answer():
    varied = [f"{o} {i}" for i, o in enumerate(OPENINGS * 3)]
    assert codes([{}] * 4, [varied, varied, [OPENINGS[0]] * 12, [OPENINGS[0]] * 12]) == ["same_answer"]
    assert "empty_answers" in codes([{}] * 3, [varied, [""] * 12, [""] * 12])


def test_state_continues_where_it_was():
    rows = CASES["reward_hacking"]
    whole, first, second = HealthWatch(), HealthWatch(), HealthWatch()
    expected = [f for i, r in enumerate(rows, 1) for f in whole.update(i, r)]
    found = [f for i, r in enumerate(rows[:20], 1) for f in first.update(i, r)]
    second.load_state_dict(first.state_dict())
    found += [f for i, r in enumerate(rows[20:], 21) for f in second.update(i, r)]
    assert found == expected
    assert second.findings == whole.findings


def test_text_numbers_by_hand():
    assert pieces("The cat, THE cat!") == ["the", "cat", ",", "the", "cat", "!"]
    assert distinct_share(ngrams(["a", "b", "a", "b", "a"], 2)) == 0.5  # ab ba ab ba
    assert repeated_share(["a", "b", "c", "d", "e", "a", "a"]) == pytest.approx(1 / 7)
    stats = text_stats(["a b c d e f g h", "a a a a a a a a", "", " "])
    assert stats == {
        "text/unique": 0.75, "text/empty": 0.5, "text/distinct2": (1 + 1 / 7) / 2, "text/repeated": 7 / 16,
        "text/distinct2_all": 8 / 14, "text/phrase": 0.5,
    }  # fmt: skip
    # each answer is varied within itself; together they hold 7 + 1 different pairs, and all share "a b c d e"
    alike = text_stats(["a b c d e f g h", "a b c d e f g x"])
    assert (alike["text/distinct2"], alike["text/distinct2_all"], alike["text/phrase"]) == (1.0, 8 / 14, 1.0)
    assert text_stats(["a b c d e f g h"])["text/phrase"] == 1.0


def words_of(vocabulary: int, rng: random.Random, answers: int = 40, length: int = 24) -> list[str]:
    """Answers of different words each, drawn from the first `vocabulary` words."""
    return [" ".join(f"w{i}" for i in rng.sample(range(vocabulary), length)) for _ in range(answers)]


def test_answers_that_grow_alike_are_named_though_each_is_varied_within_itself():
    rng, watch = random.Random(0), HealthWatch()
    wide, narrow = [words_of(60, rng) for _ in range(5)], [words_of(26, rng) for _ in range(5)]
    said = [f for i, t in enumerate(wide + narrow, 1) for f in watch.update(i, {"reward/total": 1.0}, t)]
    (finding,) = said
    assert finding.code == "answers_alike"
    assert finding.step in (6, 7)
    assert "KL coefficient" in finding.text
    assert watch.history.latest["text/distinct2"] == 1.0
    # no more than a fifth less of it is no finding
    assert codes([{}] * 10, wide + [words_of(55, rng) for _ in range(5)]) == []


@pytest.mark.parametrize("place", ["first", "last", "middle"])
def test_one_phrase_in_most_answers_is_named_wherever_it_stands(place):
    rng = random.Random(0)
    before = [words_of(400, rng) for _ in range(5)]
    after = []
    for texts in [words_of(400, rng) for _ in range(5)]:
        cut = {"first": 0, "last": 24, "middle": 12}[place]
        after.append([" ".join([*t.split()[:cut], "I am very happy to", *t.split()[cut:]]) for t in texts])
    watch = HealthWatch()
    said = [f for i, t in enumerate(before + after, 1) for f in watch.update(i, {}, t)]
    assert [f.code for f in said] == ["same_phrase"]
    assert "51% of the responses" in said[0].text  # the mean of the last two iterations
    assert "reward" not in said[0].text


def test_repetition_from_the_start_is_no_collapse_and_is_not_told_before_the_first_step():
    watch, loops = HealthWatch(), [["friend " * 60] * 8] * 3
    assert [f.code for f in watch.update(0, {}, loops[0])] == []
    (finding,) = watch.update(1, {}, loops[1])
    assert finding.code == "repetition"
    assert "training is not the cause" in finding.text
    assert "collapse" not in finding.text


def test_collapse_speaks_of_a_reward_only_where_there_is_one():
    varied, loops = (
        [[f"{o} {i}" for i, o in enumerate(OPENINGS)]] * 3,
        [["friend " * 60 + str(i) for i in range(4)]] * 3,
    )
    for stats, told in (({}, False), ({"reward/total": 1.0}, True)):
        watch = HealthWatch()
        said = [f for i, t in enumerate(varied + loops, 1) for f in watch.update(i, dict(stats), t)]
        assert said[0].text.startswith("repetition collapse")
        assert ("reward" in said[0].text) is told


def test_nothing_moved_waits_for_its_steps_and_for_a_run_that_moves():
    still = [{"held_out/margin": 1.0 + 1e-5 * i} for i in range(30)]
    watch = HealthWatch()
    assert [f.step for i, row in enumerate(still) for f in watch.update(i, row)] == [10]
    assert codes(still[:9]) == []
    assert codes([{"held_out/kl": 2e-4 * i} for i in range(30)]) == []
    # one that has moved once is not still, and where KL is measured the margin is not asked
    assert codes([{"kl": 0.5 if i == 3 else 0.0} for i in range(40)]) == []
    assert codes([{"kl": 0.02 * i, "held_out/margin": 0.0} for i in range(40)]) == []


def test_nothing_moved_knows_dpo_at_a_rate_for_whole_models_under_adapters():
    """A margin of 0.005 after 13 updates, as measured on a chat model, and 0.43 at a rate for adapters."""
    run = lambda end: [{"margin": end * i / 13, "held_out/kl": 0.01 * end * i} for i in range(14)]  # noqa: E731
    assert codes(run(0.005)) == ["nothing_moved"]
    assert codes(run(0.43)) == []
    rising = [{**row, "lr": 1e-7 * i} for i, row in enumerate(run(0.005))]
    assert codes(rising) == []
    assert codes([*rising, *({**row, "lr": 1.3e-6} for row in run(0.005))]) == ["nothing_moved"]


def test_no_alarm_over_real_stories(shared):
    raw = (shared / "tinystories" / "tinystories_sample.part1.txt").read_text(encoding="utf-8")
    stories = [s.strip() for s in raw.split("<|endoftext|>") if s.strip()]
    rng = random.Random(0)
    # lengths grow from 15 to 200 words over the run, which lowers distinct-2 by itself
    texts = [[" ".join(s.split()[: 15 + 2 * i]) for s in rng.sample(stories, 16)] for i in range(95)]
    assert codes([{}] * 95, texts) == []
    # two words of three turn into one: a collapse while its text still shows the story
    turned = [
        [" ".join("friend" if j % 3 else w for j, w in enumerate(t.split())) for t in ts] for ts in texts[40:60]
    ]
    assert codes([{}] * 60, texts[:40] + turned) == ["repetition"]


def test_every_check_has_a_case():
    in_text = {"repetition", "answers_alike", "same_phrase", "same_answer", "empty_answers"}
    assert set(CHECKS) == {*CASES, *in_text}


def falling(fall: float, n: int = 20, good: str = "chosen", bad: str = "rejected") -> list[dict[str, float]]:
    """Noisy batches whose preferred answers lose `fall` nats over the run, the others thrice as many."""
    rng = random.Random(0)
    return [
        {
            f"logp/{good}": -60 + rng.gauss(0, 1) - fall * i / n,
            f"logp/{bad}": -60 + rng.gauss(0, 1) - 3 * fall * i / n,
        }
        for i in range(n)
    ]


def test_a_falling_chosen_likelihood_is_told_with_its_numbers_and_remedies():
    watch = HealthWatch()
    (finding,) = [f for i, row in enumerate(CASES["chosen_falls"]) for f in watch.update(i, row)]
    assert finding.step == 3  # 6 nats of 40; 4 are the limit
    for words in ("from -40.0 to -46.0", "rejected ones from -42.0 to -57.0", "held-out", "dpop", "loss.nll"):
        assert words in finding.text


@pytest.mark.parametrize(("good", "bad"), [("chosen", "rejected"), ("liked", "disliked")])
def test_the_chosen_likelihood_may_rise_stay_or_fall_a_little(good, bad):
    assert codes(falling(20.0, good=good, bad=bad)) == ["chosen_falls"]
    for fall in (-20.0, 0.0, 3.0):
        assert codes(falling(fall, good=good, bad=bad)) == []
    # what counts is the held-out data where there is some, and steps without a look at it say nothing
    rows = [
        {**row, **({f"held_out/logp/{good}": -50.0} if i % 5 == 0 else {})}
        for i, row in enumerate(falling(20.0, 20, good, bad))
    ]
    assert codes(rows) == []


def test_kl_on_held_prompts_stands_in_for_that_of_rollouts():
    assert codes([{"held_out/kl": 30.0, "held_out/length": 40.0}]) == ["kl_runaway"]
    assert codes([{"held_out/kl": 30.0, "held_out/length": 40.0, "kl": 1.0, "length/mean": 40.0}]) == []


def numbers(step: int) -> dict[str, float]:
    """A run whose second reward rises and then falls while the first one rises all along."""
    noise = random.Random(step)
    return {
        "reward/total": step / 400 + noise.gauss(0, 0.05),
        "reward/taste": 1 - abs(step - 150) / 200 + noise.gauss(0, 0.05),
        "kl": 1.0 + noise.random(), "entropy": 2.0, "finish/eos": 0.5, "logp/chosen": -50.0, "logp/rejected": -60.0,
    }  # fmt: skip


def test_a_step_costs_the_same_however_late_it_is():
    """What is kept, and so what is looked at and put into a checkpoint, does not grow."""
    watch = HealthWatch(HealthConfig(repeat_every=10_000))
    sizes = {}
    for step in range(1, 3001):
        watch.update(step, {**numbers(min(step, 600)), "step": float(step)})
        if step in (300, 3000):
            sizes[step] = sum(len(x.first) + len(x.last) for x in watch.history.series.values())
            sizes[step] += sum(len(x.last) + len(x.best) for x in watch.history.partings.values())
    assert sizes[3000] == sizes[300]
    assert len(json.dumps(watch.state_dict())) < 20_000


def test_the_best_stretch_of_a_reward_is_found_as_if_all_rows_had_been_kept():
    config, n = HealthConfig(), 8
    history = History(length=config.critic_window, window=n)
    rows = [numbers(step) for step in range(1, 401)]
    for i, row in enumerate(rows, start=1):
        history.add(row)
        pairs = [(r["reward/total"], r["reward/taste"]) for r in rows[:i]]
        if i >= 2 * n:
            windows = [pairs[j : j + n] for j in range(i - 2 * n + 1)]
            expected = max(windows, key=lambda w: sum(b for _, b in w))
            assert history.partings["reward/taste"].best == expected
            assert history.partings["reward/taste"].last == pairs[-2 * n :]


def test_what_was_seen_comes_back_from_a_checkpoint():
    one, two = HealthWatch(), HealthWatch()
    for step in range(1, 100):
        one.update(step, numbers(step))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(100, 500):
        assert one.update(step, numbers(step)) == two.update(step, numbers(step))
    assert {f.code for f in one.findings} >= {"reward_hacking"}


def test_each_limit_names_the_findings_that_it_decides():
    limits = {name: (info.description or "") for name, info in HealthConfig.model_fields.items()}
    limits.pop("repeat_every")  # which holds for all of them
    for name, text in limits.items():
        codes = text.partition(":")[0].split(", ")
        assert set(codes) <= set(CHECKS), f"{name}: {text}"

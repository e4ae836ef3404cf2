"""What loops hand to the verbs that are their stages is refused before a loop starts, or can be used."""

from __future__ import annotations

import pytest
import yaml
from letter_models import rows_of, save_mini, write_jsonl
from wheel_kit import loop_settings

from steersman import cli
from steersman.flywheel import refresh
from steersman.flywheel.arena import ArenaRecipe, PPOStage, decided_pairs
from steersman.flywheel.online_dpo import OnlineDPORecipe, PairsConfig, pairs_of
from steersman.flywheel.stages import stage_data
from steersman.recipe.sections import RolloutConfig
from steersman.run.files.ledger import Ledger
from steersman.run.run_config import RunConfig
from steersman.types import SteersmanError
from steersman.verbs import rl
from steersman.verbs.feedback import RECIPES

TALK = [("the cat", "no", "thanks!"), ("a dog", "oh", "that is wrong")]


def settings(verb, tmp_path, model):
    if verb == "feedback":
        turns = [
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}, {"role": "user", "content": r}]
            for q, a, r in TALK
        ]
        data = write_jsonl(tmp_path / "talk.jsonl", [{"messages": t} for t in turns])
        return {"data": {"path": str(data)}, "model": {"path": str(model)}, "run": {"dir": str(tmp_path / "run")}}
    own = {"opponents": {"other": str(model)}} if verb == "arena" else {}
    return loop_settings(tmp_path, model, "run", **own)


@pytest.mark.parametrize(
    ("verb", "extra", "said"),
    [
        ("online-dpo", {"reference": "mixed", "loss": {"name": "simpo"}},
         "stage dpo: reference mixed: the mixture of two references is known up to a number per prompt, and simpo"),
        ("online-dpo", {"reference": "last", "loss": {"name": "simpo"}}, "reference last: simpo has no reference"),
        ("online-dpo", {"anchor_share": 0.5}, "anchor_share is the first model's share of `reference: mixed`"),
        ("best-of-n", {"train": {"keep": "best"}, "run": {"keep_best": 0}}, "stage sft: train.keep is best"),
        ("arena", {"sft": {"train": {"keep": "best"}}, "run": {"keep_best": 0}},
         "stage sft: sft.train.keep is best"),
        ("arena", {"ppo": {"iterations": 1, "critic": {"warmup": 1}}},
         "stage ppo: ppo.critic.warmup is 1 of 1 iterations"),
        ("arena", {"ppo": {"reward_train": {"heads": 2, "planes": 2}}}, "stage ppo: ppo.reward_train.planes and"),
        ("arena", {"ppo": {"prompts": 3, "samples": 2, "algorithm": {"minibatches": 4}}},
         "ppo: 6 answers an iteration (prompts x samples) do not divide into algorithm.minibatches = 4"),
        ("best-of-n", {"judge": {"reward": {"m": {"model": "r"}}}, "refresh": {"by": "words", "train": {"heads": 2,
         "planes": 2}}}, "stage refresh: refresh.train.planes and"),
        ("feedback", {"then": ["kto"], "kto": {"train": {"batch_size": 1}}},
         "stage kto: kto.train.batch_size is 1, but KTO"),
    ],
)  # fmt: skip
def test_a_stage_that_would_be_refused_is_refused_before_the_loop_starts(
    verb, extra, said, tmp_path, mini_model, capsys
):
    values = settings(verb, tmp_path, mini_model)
    for key, more in extra.items():
        values[key] = {**values.get(key, {}), **more} if key == "run" else more
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    assert cli.main([verb, str(file)]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_stage_that_is_refused_after_all_ends_the_run_in_words(tmp_path):
    """So where a recipe is changed between two starts, and where a loop asks no stage before."""

    class Loop:
        run = RunConfig(dir=str(tmp_path / "run"))

    from steersman.config.sections import Section

    class Recipe(Section):
        run: RunConfig = RunConfig(dir=str(tmp_path / "run"))

    values = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"batch_size": 1}}
    with (
        pytest.raises(SteersmanError, match=r"kto: this stage's verb refuses its settings: train\.batch_size is 1"),
        Ledger("loop", Recipe(), resume=False, rounds=0) as ledger,
    ):
        ledger.stage("kto", rl.run, RECIPES["kto"].model_validate, values)


@pytest.mark.parametrize(
    ("samples", "minibatches", "known", "prompts", "made"),
    [(2, 4, 100, 8, 4), (2, 4, 7, 6, 4), (1, 8, 5, 5, 5), (1, 8, 7, 7, 7), (3, 4, 2, 2, 3), (2, 4, 1, 1, 2)],
)
def test_answers_to_fewer_prompts_divide_into_minibatches_too(samples, minibatches, known, prompts, made):
    stage = PPOStage.model_validate({"prompts": 8, "samples": samples, "algorithm": {"minibatches": minibatches}})
    values = stage.toward("m", RolloutConfig(), known)
    assert values["rollout"]["prompts"] == prompts
    assert values["algorithm"].minibatches == made


def test_a_loop_s_own_rows_that_teach_nothing_are_left_out(tmp_path, mini_model):
    recipe = OnlineDPORecipe.model_validate(loop_settings(tmp_path, mini_model, "run"))
    assert stage_data(recipe, "pairs.jsonl")["on_bad_row"] == "skip"


def test_answers_that_differ_in_white_space_are_no_pair():
    rows = [{"index": 0, "prompt": "p", "completion": text, "grade": grade, "tokens": 1}
            for text, grade in (("ok", 1.0), ("ok ", 0.0), ("no", 0.5))]  # fmt: skip
    assert [*pairs_of(rows, PairsConfig())] == []
    every = [(p["chosen"], p["rejected"]) for p in pairs_of(rows, PairsConfig(form="all"))]
    assert every == [("ok", "no"), ("no", "ok ")]

    class Wheel:
        @staticmethod
        def gold(prompts, texts, columns):
            return {"g": [float(len(text)) for text in texts]}

        @staticmethod
        def columns(rows):
            return [{} for _ in rows]

    wheel: object = Wheel()
    answers = [{"index": i // 2, "prompt": "p", "completion": c} for i, c in enumerate(("ok", "ok ", "a", "abc"))]
    assert [p["chosen"] for p in refresh.watched_pairs(wheel, answers, "g")] == ["abc"]  # pyright: ignore


def test_an_arena_whose_players_say_the_same_but_for_white_space_goes_on(tmp_path, mini_model, monkeypatch):
    """Two answers that a reward tells apart by their length alone: their battle is a tie, and makes no pair."""
    from steersman.flywheel import arena, players

    other = save_mini(tmp_path / "other", seed=1, context=128)
    (tmp_path / "short.py").write_text("def short(prompts, texts):\n    return [-float(len(t)) for t in texts]\n")
    values = loop_settings(tmp_path, mini_model, "run", opponents={"other": str(other)}, stages=["dpo"], rounds=1)
    values["judge"] = {"reward": {"short": {"function": f"{tmp_path / 'short.py'}:short"}}}
    values["dpo"] = {"train": {"batch_size": 2}}
    real = players.Player.answer

    def padded(self, queries, places, *given, **how):
        """The first prompt of a batch is answered alike by both; the seat says who answers."""
        rows, samples = real(self, queries, places, *given, **how)
        if len(how["seed"]) == 3:
            rows[0]["completion"] = "yes" + " " * how["seed"][-1]
        return rows, samples

    monkeypatch.setattr(players.Player, "answer", padded)
    assert arena.run(ArenaRecipe.model_validate(values))["finished"]
    battles = rows_of(tmp_path / "run" / "round-01" / "1-dpo" / "battles.jsonl")
    alike = [b for b in battles if b["mine"].strip() == b["theirs"].strip()]
    assert alike
    assert all(b["share"] == 0.5 for b in alike)
    assert decided_pairs(alike) == []

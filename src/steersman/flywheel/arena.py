"""`steersman arena`: the model battles opponents, a judge decides, and what it lost becomes the next lesson.

    for each round, each of its stages on prompts of its own:
      sft   battles -> where the model lost, the winner's answer is a demonstration
      dpo   battles -> every decided battle is a pair, winner chosen, loser rejected
      ppo   battles -> the pairs train a reward model, and PPO follows it on the same prompts

Source: Arena Learning, arXiv 2407.10627, sections 3.2 and 3.3. Departures: where several opponents won, the answer of
the one who won most of the batch is the lesson; pairs come from all decided battles, those that the model won too;
ratings after each round are a Bradley-Terry fit with bootstrap intervals over held-out prompts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.algorithms.ppo import PPO
from steersman.config.sections import Section, key_names
from steersman.flywheel.flywheel import Flywheel
from steersman.flywheel.league import League
from steersman.flywheel.players import usable
from steersman.flywheel.sections import LoopRecipe, refuse_idle_stages
from steersman.flywheel.stages import NOT_IN_PAIRS, PLACE, WORDS, stage_data, stage_model, trained_by
from steersman.objectives.preference_config import PairLossConfig
from steersman.objectives.reward_config import RewardModelConfig
from steersman.recipe.on_policy import CriticConfig
from steersman.recipe.sections import RolloutConfig
from steersman.run.files.ledger import Ledger, Rows
from steersman.train.offline import PackedOfflineConfig
from steersman.types import Stats
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs import preference, reward_model, rl, sft
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_model import RewardModelRecipe
from steersman.verbs.sft import SFTConfig, SFTRecipe


class SFTStage(Section):
    """Fine-tuning on the answers that beat the model."""

    train: SFTConfig = SFTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class DPOStage(Section):
    """Preference optimisation on decided battles."""

    loss: PairLossConfig = PairLossConfig()
    train: PackedOfflineConfig = PackedOfflineConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, warmup=0.1, schedule="linear")


class PPOStage(Section):
    """A reward model from decided battles, then PPO toward it."""

    reward_train: RewardModelConfig = RewardModelConfig(keep="last")
    reward_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    iterations: int = Field(default=20, ge=1, description="iterations of PPO")
    prompts: int = Field(default=32, ge=1, description="prompts per iteration of PPO")
    samples: int = Field(default=2, ge=1, description="answers per prompt in PPO")
    algorithm: PPO = PPO()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()

    @model_validator(mode="after")
    def _divides(self) -> PPOStage:
        answers, minibatches = self.prompts * self.samples, self.algorithm.minibatches
        if answers % minibatches:
            raise ValueError(
                f"{answers} answers an iteration (prompts x samples) do not divide into algorithm.minibatches = "
                f"{minibatches} equal parts"
            )
        return self

    def toward(self, reward_model: str, rollout: RolloutConfig, known_prompts: int) -> dict[str, Any]:
        """What PPO's recipe has beside model and data: a reward model's folder or hub name as the reward, and as many
        prompts an iteration as are known, or fewer, so that their answers divide into the minibatches. Where those of
        no number of prompts do, there are fewer minibatches."""
        prompts, minibatches = min(self.prompts, known_prompts), self.algorithm.minibatches
        dividing = [n for n in range(prompts, 0, -1) if n * self.samples % minibatches == 0]
        if dividing:
            prompts = dividing[0]
        else:
            minibatches = max(m for m in range(1, minibatches) if prompts * self.samples % m == 0)
        return {
            "reward": {"parts": {"reward_model": {"model": reward_model}}, "normalise": True},
            "rollout": rollout.model_dump()
            | {"prompts": prompts, "samples": self.samples, "held_out": 0},
            "algorithm": self.algorithm.model_copy(update={"minibatches": minibatches}),
            "optimizer": self.optimizer, "critic": self.critic, "iterations": self.iterations,
        }  # fmt: skip


class ArenaRecipe(LoopRecipe):
    """Arena Learning: battles against opponents make the data of every stage."""

    opponents: dict[str, str] = Field(description="name: folder or hub name of a model to battle")
    stages: list[Literal["sft", "dpo", "ppo"]] = Field(
        default=["sft", "dpo", "ppo"],
        description="what each round does, in this order, each on prompts of its own. sft: train on answers that "
        "beat the model; dpo: on decided battles as pairs; ppo: by a reward model of decided battles",
    )
    rollout: RolloutConfig = Field(
        default=RolloutConfig(prompts=64), description="prompts of a stage; every player gives one answer to each"
    )
    sft: SFTStage = SFTStage()
    dpo: DPOStage = DPOStage()
    ppo: PPOStage = PPOStage()
    draws: int = Field(default=300, ge=10, description="bootstrap draws behind the ratings' intervals")

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return super().unread_keys() | {"rollout.samples"} | key_names(**{"dpo.loss": NOT_IN_PAIRS})

    @model_validator(mode="after")
    def _has_opponents(self) -> ArenaRecipe:
        if not self.opponents or not self.stages:
            raise ValueError("give at least one opponent, such as {base: path/to/model}, and at least one stage")
        if "model" in self.opponents or any(name.startswith("round-") for name in self.opponents):
            raise ValueError("opponents: the names `model` and `round-...` are the model's own; choose others")
        refuse_idle_stages({"sft": self.sft, "dpo": self.dpo, "ppo": self.ppo}, self.stages, "stages")
        return self

    @classmethod
    def trained_by(cls, given: dict[str, Any]) -> list[str]:
        stages = ["sft", "dpo", "ppo"]
        return trained_by(stages, given.get("stages", stages))

    @model_validator(mode="after")
    def _stages_fit(self) -> ArenaRecipe:
        start = self.model.path
        if "sft" in self.stages:
            self.require_stage("sft", SFTRecipe, self.sft_stage(start, PLACE), WORDS["sft"])
        if "dpo" in self.stages:
            self.require_stage("dpo", PreferenceRecipe, self.dpo_stage(start, PLACE), WORDS["dpo"])
        if "ppo" in self.stages:
            self.require_stage("ppo", RewardModelRecipe, self.reward_stage(start, PLACE), WORDS["reward"])
            values = self.ppo_stage(start, PLACE, PLACE, self.ppo.prompts)
            self.require_stage("ppo", RECIPES["ppo"], values, WORDS["ppo"])
        return self

    def sft_stage(self, path: str, file: str) -> dict[str, Any]:
        """What `sft` gets: the model at `path`, and a file of lessons."""
        return self._trains(path, file) | {"train": self.sft.train, "optimizer": self.sft.optimizer}

    def dpo_stage(self, path: str, file: str) -> dict[str, Any]:
        """What `dpo` gets: the model at `path`, and a file of pairs."""
        config = self.dpo
        return self._trains(path, file) | {"loss": config.loss, "train": config.train, "optimizer": config.optimizer}

    def reward_stage(self, path: str, file: str) -> dict[str, Any]:
        """What `reward` gets: the model at `path`, whose trunk the reward model has, and a file of pairs."""
        return self._trains(path, file) | {"train": self.ppo.reward_train, "optimizer": self.ppo.reward_optimizer}

    def ppo_stage(self, path: str, file: str, reward_model: str, known_prompts: int) -> dict[str, Any]:
        """What `ppo` gets: the model at `path`, a file of prompts, and the reward model."""
        return self._trains(path, file) | self.ppo.toward(reward_model, self.rollout, known_prompts)

    def _trains(self, path: str, file: str) -> dict[str, Any]:
        return {"model": stage_model(self, path), "data": stage_data(self, file)}


def run(recipe: ArenaRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Runs all rounds; leaves each round's battles, data and model, and the ratings; returns the summary."""
    headline = ("rating/model", "reward/judge", "kl")
    path = recipe.model.path
    with Ledger("arena", recipe, resume=resume, rounds=recipe.rounds, headline=headline) as ledger:
        flywheel = Flywheel(ledger, recipe)
        league = League(flywheel, recipe.opponents, recipe.draws)
        stats, samples = flywheel.look(0, path)
        ledger.finish_round(0, stats | league.rate(0), samples)
        flywheel.ends(path, stats)
        for number in range(1, recipe.rounds + 1):
            counts: Stats = {}
            for place, stage in enumerate(recipe.stages):
                name = f"round-{number:02d}/{place + 1}-{stage}"
                batch = (number - 1) * len(recipe.stages) + place
                battles = hold_battles(flywheel, recipe, name, path, batch)
                counts |= {f"lost/{stage}": sum(b["share"] == 0 for b in battles) / max(len(battles), 1)}
                path, used = _STAGES[stage](flywheel, recipe, name, path, battles)
                counts[f"data/{stage}"] = used
            stats, samples = flywheel.look(number, path)
            ledger.finish_round(number, stats | league.rate(number) | counts, samples)
            if flywheel.ends(path, stats):
                break
        return flywheel.finish({"table": league.table(len(flywheel.paths) - 1)})
    return ledger.summary({})


def hold_battles(flywheel: Flywheel, recipe: ArenaRecipe, name: str, path: str, batch: int) -> Rows:
    """Table: one battle per prompt and opponent, `share` 1 where the model won, 0 where it lost.

    Prompts that the model, or an opponent, gave no usable answer to make no battle.
    """
    ledger, answers = flywheel.ledger, {}
    for seat, (player, where) in enumerate({"model": path, **recipe.opponents}.items()):
        with flywheel.player(where) as opened:
            rows = flywheel.answers(f"{name}/answers-{player}", opened, batch, 1, seat)
        answers[player] = {r["index"]: r for r in usable(rows, recipe.unfinished)[0]}

    def make() -> Rows:
        met = [
            (mine, answers[o][i], o)
            for o in recipe.opponents
            for i, mine in answers["model"].items()
            if i in answers[o]
        ]
        asked = [(mine["prompt"], mine["completion"], theirs["completion"]) for mine, theirs, _ in met]
        outcomes = flywheel.judge.compare(asked, flywheel.columns([mine for mine, _, _ in met]))
        return [
            {
                "prompt": mine["prompt"], "index": mine["index"], "opponent": opponent, "mine": mine["completion"],
                "theirs": theirs["completion"], "share": o.share, "consistent": o.consistent,
            }
            for (mine, theirs, opponent), o in zip(met, outcomes, strict=True)
            if o is not None
        ]  # fmt: skip

    sources = ledger.sources(*(f"{name}/answers-{player}" for player in answers))
    return ledger.table(f"{name}/battles", make, judge=flywheel.about_judge(), made_from=sources)


def lessons(battles: Rows) -> Rows:
    """Demonstrations from lost battles, one a prompt: the answer of the opponent who won most in the batch."""
    won = Counter(b["opponent"] for b in battles if b["share"] == 0)
    best: dict[int, dict[str, Any]] = {}
    for b in battles:
        if b["share"] == 0 and (b["index"] not in best or won[b["opponent"]] > won[best[b["index"]]["teacher"]]):
            best[b["index"]] = {
                "prompt": b["prompt"], "completion": b["theirs"], "teacher": b["opponent"], "index": b["index"],
            }  # fmt: skip
    return list(best.values())


def decided_pairs(battles: Rows) -> Rows:
    """Pairs from every battle that was won or lost."""
    return [
        {
            "prompt": b["prompt"], "chosen": b["mine"] if b["share"] == 1 else b["theirs"],
            "rejected": b["theirs"] if b["share"] == 1 else b["mine"],
            "winner": "model" if b["share"] == 1 else b["opponent"], "index": b["index"],
        }
        for b in battles
        if b["share"] != 0.5
    ]  # fmt: skip


def _sft(flywheel: Flywheel, recipe: ArenaRecipe, name: str, path: str, battles: Rows) -> tuple[str, int]:
    ledger = flywheel.ledger
    rows = ledger.table(f"{name}/lessons", lambda: lessons(battles), made_from=ledger.sources(f"{name}/battles"))
    if not rows:
        ledger.log.note(f"{name}: the model lost no battle, so there is nothing to learn", style="yellow")
        return path, 0
    values = recipe.sft_stage(path, str(ledger.path / f"{name}/lessons.jsonl"))
    return ledger.stage(f"{name}/train", sft.run, SFTRecipe.model_validate, values)["model"], len(rows)


def _dpo(flywheel: Flywheel, recipe: ArenaRecipe, name: str, path: str, battles: Rows) -> tuple[str, int]:
    rows, file = _decided(flywheel, name, battles)
    if not rows:
        return path, 0
    values = recipe.dpo_stage(path, file)
    trained = flywheel.ledger.stage(f"{name}/train", preference.run, PreferenceRecipe.model_validate, values)
    return trained["model"], len(rows)


def _ppo(flywheel: Flywheel, recipe: ArenaRecipe, name: str, path: str, battles: Rows) -> tuple[str, int]:
    rows, file = _decided(flywheel, name, battles)
    if not rows:
        return path, 0
    ledger, values = flywheel.ledger, recipe.reward_stage(path, file)
    reward = ledger.stage(f"{name}/reward", reward_model.run, RewardModelRecipe.model_validate, values)["model"]
    asked = ledger.table(f"{name}/prompts", lambda: [{"prompt": flywheel.train[i].prompt} for i in _places(battles)])
    values = recipe.ppo_stage(path, str(ledger.path / f"{name}/prompts.jsonl"), reward, len(asked))
    return ledger.stage(f"{name}/train", rl.run, RECIPES["ppo"].model_validate, values)["model"], len(rows)


def _decided(flywheel: Flywheel, name: str, battles: Rows) -> tuple[Rows, str]:
    """The pairs of decided battles, and the file that holds them."""
    ledger = flywheel.ledger
    rows = ledger.table(f"{name}/pairs", lambda: decided_pairs(battles), made_from=ledger.sources(f"{name}/battles"))
    if not rows:
        ledger.log.note(f"{name}: no battle was decided, so there is nothing to learn", style="yellow")
    return rows, str(ledger.path / f"{name}/pairs.jsonl")


def _places(battles: Rows) -> list[int]:
    return sorted({b["index"] for b in battles})


_STAGES = {"sft": _sft, "dpo": _dpo, "ppo": _ppo}

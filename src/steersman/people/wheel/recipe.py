"""The recipe of `steersman wheel`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section, key_names
from steersman.data import DataConfig
from steersman.flywheel.arena import DPOStage, PPOStage, SFTStage
from steersman.flywheel.feedback import KTOStage
from steersman.flywheel.sections import refuse_idle_stages
from steersman.flywheel.stages import PLACE, WORDS, require_stage, trained_by
from steersman.judge import JudgeConfig
from steersman.people.experiments import Experiment
from steersman.people.filters import FilterConfig
from steersman.people.wheel.gates import Gate, standard_gates
from steersman.people.wheel.lessons import Kind, MixConfig
from steersman.recipe.sections import LEARNED_ONLY, ModelConfig, RolloutConfig, adapter_defaults
from steersman.run.run_config import RunConfig
from steersman.verbs import feedback
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_recipe import RewardModelRecipe
from steersman.verbs.sft import SFTRecipe

Stage = Literal["sft", "kto", "dpo", "ppo"]
LEARNS: dict[Stage, Kind] = {"sft": "sft", "kto": "kto", "dpo": "pairs", "ppo": "pairs"}
"""The table that each stage trains on."""
FIRST: dict[Stage, type[Section]] = {
    "sft": SFTRecipe, "kto": feedback.RECIPES["kto"], "dpo": PreferenceRecipe, "ppo": RewardModelRecipe,
}  # fmt: skip
"""The recipe of the verb that trains on that table; PPO comes behind its reward model."""


class ArrivalsConfig(Section):
    """Where judgements arrive, and when there are enough of them."""

    folder: str = Field(
        description="folder or file of judgements, which grows, or a store: sqlite:///FILE, postgresql://HOST/NAME"
    )
    at_least: int = Field(
        default=50, ge=1, description="a turn of the wheel begins once so many new judgements are in"
    )
    held_out: float = Field(default=0.2, gt=0, lt=1, description="share of prompts that no turn learns from")
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop", description="stop: end with an error at a bad row; skip: leave it out and count it"
    )


class LimitsConfig(Section):
    """How prompts and answers become tokens."""

    max_prompt_tokens: int | None = Field(default=None, ge=1, description="longest prompt, in tokens")
    max_length: int | None = Field(default=None, ge=2, description="longest prompt + response, in tokens")
    wrap_in_chat: bool | None = Field(
        default=None, description="plain-text prompts are a user's turn; null: where the model has a chat template"
    )

    def data(self, path: str, *, chats: bool) -> DataConfig:
        """The data section of a file of lessons; `chats` says whether the model has a chat template."""
        wrap = chats if self.wrap_in_chat is None else self.wrap_in_chat
        return DataConfig(
            path=path, max_prompt_tokens=self.max_prompt_tokens, max_length=self.max_length, wrap_in_chat=wrap,
            assistant_turns="last", on_too_long="drop",
        )  # fmt: skip


class WheelRecipe(Section):
    """From people's judgements to a better model that people prefer, turn after turn."""

    model: ModelConfig
    judgements: ArrivalsConfig
    limits: LimitsConfig = LimitsConfig()
    sift: FilterConfig = FilterConfig()
    mix: MixConfig = MixConfig()
    then: list[Stage] = Field(
        default=["dpo"],
        min_length=1,
        description="training stages of the candidate, in order: sft, kto, dpo, ppo. Each starts from the model of "
        "the one before",
    )
    sft: SFTStage = SFTStage()
    kto: KTOStage = KTOStage()
    dpo: DPOStage = DPOStage()
    ppo: PPOStage = PPOStage()
    rollout: RolloutConfig = Field(
        default=RolloutConfig(held_out=64), description="how held-out prompts are answered, and how many"
    )
    judge: JudgeConfig | None = Field(
        default=None, description="who compares the candidate's answers with the current model's; null: nobody"
    )
    gates: dict[str, Gate] = Field(
        default_factory=standard_gates, description="metric: what the candidate must show before anybody meets it"
    )
    experiment: Experiment | None = Field(
        default=Experiment(share=0.1), description="the A/B test that decides; null: the gates decide alone"
    )
    turns: int = Field(default=1, ge=1, description="turns of the wheel, each from new judgements to a decision")
    poll: float | None = Field(
        default=None, gt=0, description="seconds after which it looks for judgements again; null: it ends and waits "
        "for the next --resume"
    )  # fmt: skip
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        # the wheel names its models by their turns; all that is sampled is one answer a held-out prompt
        return key_names(experiment=("control", "treatment"), rollout=("prompts", "samples", *LEARNED_ONLY))

    @classmethod
    def dependent_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        return adapter_defaults(given, *trained_by(LEARNS, given.get("then", ["dpo"])))

    @model_validator(mode="after")
    def _can_turn(self) -> WheelRecipe:
        if self.model.scratch is not None:
            raise ValueError("model.scratch: a model with fresh weights has nothing to be judged; train it with sft")
        judged = [name for name in self.gates if name.startswith("judge/")]
        if judged and self.judge is None:
            raise ValueError(f"gates.{judged[0]} needs a judge, and there is none; give the section judge")
        if self.rollout.held_out < 1:
            raise ValueError("rollout.held_out is 0: the gates look at answers to held-out prompts")
        if self.mix.anchor and not set(self.mix.anchors) >= {LEARNS[name] for name in self.then}:
            raise ValueError(
                "mix.anchor is above 0, but mix.anchors has no file for every table that `then` trains on"
            )
        stages = {"sft": self.sft, "kto": self.kto, "dpo": self.dpo, "ppo": self.ppo}
        refuse_idle_stages(stages, self.then, "then")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> WheelRecipe:
        start = self.model.path
        for name in self.then:
            words = WORDS["reward" if name == "ppo" else name]
            require_stage(name, FIRST[name], self.stage(name, start, PLACE, chats=True), self.run, words)
        if "ppo" in self.then:
            values = self.ppo_stage(start, PLACE, PLACE, self.ppo.prompts, chats=True)
            require_stage("ppo", RECIPES["ppo"], values, self.run, WORDS["ppo"])
        return self

    def stage(self, name: Stage, path: str, file: str, *, chats: bool) -> dict[str, Any]:
        """What the verb of a stage gets, for PPO the one that trains its reward model: the model at `path`, and a
        file of lessons; `chats` says whether the model has a chat template."""
        values = self._trains(path, file, chats=chats)
        if name == "ppo":
            return values | {"train": self.ppo.reward_train, "optimizer": self.ppo.reward_optimizer}
        if name == "sft":
            return values | {"train": self.sft.train, "optimizer": self.sft.optimizer}
        config = self.kto if name == "kto" else self.dpo
        return values | {"train": config.train, "optimizer": config.optimizer, "loss": config.loss}

    def ppo_stage(self, path: str, file: str, reward: str, known_prompts: int, *, chats: bool) -> dict[str, Any]:
        """What `ppo` gets: the model at `path`, a file of prompts, and the reward model."""
        return self._trains(path, file, chats=chats) | self.ppo.toward(reward, self.rollout, known_prompts)

    def _trains(self, path: str, file: str, *, chats: bool) -> dict[str, Any]:
        data = self.limits.data(file, chats=chats)
        return {"model": self.model.model_dump() | {"path": path, "merge": True}, "data": data.model_dump()}

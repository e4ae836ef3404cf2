"""The recipe of the on-policy verbs: one section per stage; `algorithm` is the algorithm itself."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import Field, model_validator

from steersman.algorithms.base import Algorithm
from steersman.config.sections import Section, key_names
from steersman.data import DataConfig, keys_of_other_kinds
from steersman.distributed.parallel import ParallelConfig
from steersman.environments.config import EnvironmentConfig
from steersman.recipe.curriculum import CurriculumConfig
from steersman.recipe.evaluation import EvaluationSection
from steersman.recipe.sections import CorrectionConfig, ModelConfig, RolloutConfig, TrainingRecipe
from steersman.recipe.stopping import StopConfig
from steersman.reward import RewardConfig
from steersman.run.health.limits import HealthConfig
from steersman.run.run_config import ManyRunConfig
from steersman.update.optimizer import OptimizerConfig

A = TypeVar("A", bound=Algorithm)
Cut = Literal["end", "bootstrap"]
KL_HORIZON = Algorithm.model_fields["kl_horizon"].default


class CriticConfig(Section):
    """Where the critic comes from and how it is trained; methods without a critic refuse this section."""

    init: str = Field(
        default="auto",
        description="auto (the reward model if there is one, else the policy's trunk), shared (a head on the "
        "actor's own trunk), policy, or a folder",
    )
    value_clip: float | None = Field(
        default=0.2, gt=0, description="how far a value may move from its old one; null is off"
    )
    vf_coef: float = Field(default=0.5, gt=0, description="weight of the value loss where the trunk is shared")
    warmup: int = Field(default=0, ge=0, description="first iterations in which only the critic learns")
    cut: Cut = Field(
        default="end",
        description="how a response counts that the length limit cut off. end: by its score, as any other; "
        "bootstrap: its score is dropped, and the critic's value of the state that follows takes its place (an "
        "episode of several turns keeps the rewards of its turns, and the state is what its next turn would have "
        "seen)",
    )
    optimizer: OptimizerConfig = OptimizerConfig()


class OnPolicyRecipe(TrainingRecipe, Generic[A]):
    """Reinforcement learning of a language model from rewards."""

    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    environment: EnvironmentConfig | None = Field(
        default=None, description="what the model plays in, over several turns; null: one answer to each prompt"
    )
    rollout: RolloutConfig = RolloutConfig()
    algorithm: A = Field(default_factory=dict, description="the algorithm's own settings")  # type: ignore
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig | None = None
    evaluation: EvaluationSection | None = Field(
        default=None, description="what else is measured of the policy at every evaluation, beside the reward"
    )
    reference: str = Field(
        default="start", description="what KL is measured to: start (the policy before training), none, or a folder"
    )
    share: Literal["none", "base"] = Field(
        default="none",
        description="base: actor, critic and reward models saved as adapters are adapters on one frozen base "
        "(needs model.lora); none: every model has weights of its own",
    )
    offload: bool = Field(
        default=False,
        description="reference and reward models wait in the CPU's memory and are on the device only while they "
        "are read; an iteration takes the time to copy each of them once. Weights whose file is in half precision "
        "stay so while they wait: on a CPU, too, they then take half the memory of float32",
    )
    frozen_apart: bool = Field(
        default=False,
        description="put reference and reward models, whole, on devices of their own: with run.devices N on a "
        "machine, rank i trains on device i and its frozen models are on device N + i",
    )
    iterations: int = Field(default=100, ge=1, description="passes through the loop: rollout, reward, update")
    curriculum: CurriculumConfig | None = Field(
        default=None, description="draw prompts by how often they are solved; null: all alike, each once an epoch"
    )
    stop: StopConfig | None = Field(
        default=None,
        description="stop early: when a reward on held-out prompts no longer improves, or KL to the reference "
        "exceeds its budget",
    )
    run: ManyRunConfig = ManyRunConfig()
    parallel: ParallelConfig = ParallelConfig()
    health: HealthConfig = HealthConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        method = cls.model_fields["algorithm"].annotation
        if not (isinstance(method, type) and issubclass(method, Algorithm)):
            return frozenset()
        # a line search makes no gradient step, so nothing of the optimizer
        actor = OptimizerConfig.model_fields if method.update == "trust_region" else ()
        own = key_names(algorithm=method.unread, optimizer=actor, data=("max_length",))
        return keys_of_other_kinds("query") | own

    @property
    def optimizers(self) -> dict[str, OptimizerConfig]:
        critic = self.critic or CriticConfig()
        own = self.algorithm.critic and critic.init != "shared"
        return {"optimizer": self.optimizer, **({"critic.optimizer": critic.optimizer} if own else {})}

    @model_validator(mode="after")
    def _fits(self) -> OnPolicyRecipe[A]:
        self._method_fits()
        self._prompts_fit()
        self._models_fit()
        self._critic_fits()
        self._samples_fit()
        self._ahead_fits()
        self._environment_fits()
        self._devices_fit()
        self._frozen_fit()
        return self

    def _method_fits(self) -> None:
        """What the method refuses of its own settings, its samples and its reward."""
        algorithm, rollout = self.algorithm, self.rollout
        if algorithm.group and rollout.samples < 2:
            raise ValueError(
                f"{algorithm.title} compares the samples of one prompt, and rollout.samples is {rollout.samples}; "
                "give at least 2"
            )
        if (why := algorithm.refusal(rollout.samples)) is not None:
            raise ValueError(f"{algorithm.title}: {why}")
        if algorithm.parts and (self.reward.normalise or self.reward.whiten or self.reward.clip is not None):
            raise ValueError(
                f"{algorithm.title} gives each part of the reward a scale of its own; remove reward.normalise, "
                "reward.whiten and reward.clip"
            )
        if algorithm.kl_in == "loss" and algorithm.kl_estimator == "k1" and algorithm.beta > 0:
            raise ValueError(
                "algorithm.kl_estimator k1 has an expected gradient of 0 inside the loss, so it would restrain "
                "nothing; use k1_to_go, k2 or k3 there, or algorithm.kl_in: reward"
            )
        if algorithm.kl_target is not None and (algorithm.beta == 0 or self.reference == "none"):
            what = "without a reference no KL is measured" if self.reference == "none" else "a beta of 0 stays 0"
            raise ValueError(
                f"algorithm.kl_target {algorithm.kl_target:g} steers algorithm.beta, and {what}; give the reference "
                "(start, or a folder) and a first algorithm.beta above 0, such as 0.05, or remove kl_target"
            )
        if algorithm.kl_target is None and algorithm.kl_horizon != KL_HORIZON:
            raise ValueError(
                "algorithm.kl_horizon says how fast beta is steered to algorithm.kl_target; give that, or remove it"
            )
        if algorithm.kl_in == "reward" and algorithm.kl_estimator == "k1_to_go":
            raise ValueError(
                "algorithm.kl_estimator k1_to_go is for kl_in: loss; in the reward, k1 is the same gradient "
                "(the return sums it to the end)"
            )
        self._optimal_value_fits()
        if self.reward.whiten and algorithm.baseline == "greedy":
            raise ValueError(
                f"reward.whiten changes the scale of returns, which {algorithm.title} compares with the greedy "
                "response's score; use reward.normalise instead"
            )

    def _optimal_value_fits(self) -> None:
        """What refuses values that are estimated once, from responses of the policy that training begins with."""
        wanted = self.algorithm.optimal_value()
        if wanted is None:
            return
        title = self.algorithm.title
        if self.reference != "start":
            raise ValueError(
                f"reference {self.reference}: {title} draws the responses for its optimal values from the policy "
                "before training, which must be the reference; use reference: start, and model.path for the model"
            )
        if self.reward.normalise or self.reward.whiten:
            raise ValueError(
                f"{title} compares scores with values that are estimated once, before training, and reward.normalise "
                "and reward.whiten change the scale of scores meanwhile; remove them"
            )
        if wanted.solved_above is not None and self.curriculum is not None:
            raise ValueError(
                "algorithm.solved_above leaves prompts out for good, and curriculum draws them by how often they are "
                "solved; remove one of the two"
            )

    def _models_fit(self) -> None:
        """What the models refuse: adapters, a shared base, shards."""
        algorithm = self.algorithm
        if self.model.lora is not None and self.model.lora.dropout > 0:
            raise ValueError(
                "model.lora.dropout makes every training pass another policy than the one that sampled, so no ratio "
                "would be 1 at the start; leave it at 0 for on-policy methods"
            )
        if self.share == "base" and self.parallel.in_pieces:
            raise ValueError(
                "share: base keeps one whole base on each device; use parallel.mode: replicas, or share: none, where "
                "every model lies in pieces"
            )
        if self.parallel.stage and (self.share == "base" or algorithm.update == "trust_region"):
            what = "share: base" if self.share == "base" else algorithm.title
            raise ValueError(f"parallel.mode {self.parallel.mode} is not for {what}; use mode: replicas")
        if self.share == "base" and self.model.lora is None:
            raise ValueError(
                "share: base needs adapters to tell the models apart; give model.lora, for instance '{}'"
            )
        if self.model.scratch is not None:
            raise ValueError(
                "model.scratch: a model with fresh weights has nothing to say yet; train it with sft first"
            )
        if self.parallel.in_pieces and algorithm.update == "trust_region":
            raise ValueError(
                f"parallel.mode {self.parallel.mode}: {algorithm.title} needs second derivatives, which layers in "
                "pieces do not give; use mode: replicas"
            )

    def _frozen_fit(self) -> None:
        """Which frozen models can not wait in the CPU's memory, or lie on devices of their own."""
        if not self.offload and not self.frozen_apart:
            return
        key = "offload" if self.offload else "frozen_apart"
        if self.offload and self.frozen_apart:
            raise ValueError("offload and frozen_apart are two places for the same models; remove one of the two")
        if self.offload:
            self._require_movable()
        if self.share == "base":
            raise ValueError(f"{key}: with share: base no frozen model has weights of its own; remove one of the two")
        judged = any(part.model is not None for part in self.reward.parts.values())
        separate = self.reference != "none" and (self.reference != "start" or self.model.lora is None)
        if not judged and not separate:
            raise ValueError(f"{key}: there is no reference of its own and no reward model to move; remove it")
        if self.offload and self.rollout.ahead:
            raise ValueError(
                "offload: with rollout.ahead rewards are computed while the policy trains, so their models are never "
                "idle; use rollout.ahead: 0, or frozen_apart, or remove offload"
            )

    def _prompts_fit(self) -> None:
        """What drawing prompts by difficulty refuses, and an early stop."""
        algorithm, rollout, stop = self.algorithm, self.rollout, self.stop
        if self.curriculum is not None and (rollout.ahead or algorithm.resampling() or self.data.mix):
            raise ValueError(
                "curriculum draws prompts by the newest outcomes: it does not go with rollout.ahead, data.mix, or a "
                f"method that replaces groups itself ({algorithm.title}: {'yes' if algorithm.resampling() else 'no'})"
            )
        if stop is None:
            return
        if stop.judge not in self.reward.parts:
            raise ValueError(
                f"stop.judge is {stop.judge!r}, which is no part of the reward; there are: "
                f"{', '.join(self.reward.parts)}. Add one with weight 0, so that it only looks"
            )
        if not rollout.held_out or not self.run.keep_best:
            raise ValueError("stop needs rollout.held_out, and run.keep_best for the best weights: both at least 1")
        if stop.max_kl is not None and self.reference == "none":
            raise ValueError("stop.max_kl is KL to the reference, and reference is none")

    def _critic_fits(self) -> None:
        """What a critic refuses."""
        algorithm, critic = self.algorithm, self.critic
        if critic is None:
            return
        if not algorithm.critic:
            raise ValueError(f"{algorithm.title} has no critic; remove the section `critic`")
        if critic.init == "shared":
            if algorithm.update == "trust_region":
                raise ValueError(
                    f"critic.init shared: {algorithm.title} moves the actor by a line search, and the critic by "
                    "gradient steps of its own; give it a critic of its own (critic.init: policy)"
                )
            if critic.warmup:
                raise ValueError(
                    "critic.warmup: a shared critic can not learn without changing the actor's trunk; remove "
                    "warmup, or give the critic a model of its own (critic.init: policy)"
                )
            if critic.optimizer != CriticConfig().optimizer:
                raise ValueError(
                    "critic.optimizer: a shared critic learns by the actor's updates, which `optimizer` makes; set "
                    "that, or give the critic a model of its own (critic.init: policy)"
                )
        elif critic.vf_coef != CriticConfig().vf_coef:
            raise ValueError(
                "critic.vf_coef weighs the value loss beside the policy's where both share a trunk (critic.init: "
                "shared); this critic has updates of its own, so remove it"
            )
        if critic.warmup >= self.iterations:
            raise ValueError(
                f"critic.warmup is {critic.warmup} of {self.iterations} iterations: none is left for the policy"
            )
        withheld = self.reward.missing_eos_penalty or self.reward.overlong_buffer
        if withheld and critic.cut == "bootstrap":
            raise ValueError(
                "critic.cut bootstrap withholds the score of a cut response, and with it missing_eos_penalty and "
                "overlong_buffer of section reward; set these to 0, or critic.cut: end"
            )

    def _samples_fit(self) -> None:
        """What the samples refuse: their number, where their distribution was cut, another engine's."""
        algorithm, rollout = self.algorithm, self.rollout
        samples = rollout.prompts * rollout.samples
        if samples % algorithm.minibatches:
            raise ValueError(
                f"{samples} samples per iteration (rollout.prompts x rollout.samples) do not divide into "
                f"algorithm.minibatches = {algorithm.minibatches} equal parts"
            )
        if rollout.correction != CorrectionConfig() and not rollout.recompute_logp:
            raise ValueError(
                "rollout.correction weighs steps by what rollout.recompute_logp computes, and that is off; set "
                "rollout.recompute_logp: true, or remove correction"
            )
        if rollout.engine != "inside" and algorithm.sampling_mask() is not None:
            raise ValueError(
                f"rollout.engine {rollout.engine}: {algorithm.title} samples under the mask of a second model, which "
                "must be in the same process; use rollout.engine: inside"
            )
        truncated = rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0
        if truncated and rollout.engine == "vllm" and not rollout.top_k:
            raise ValueError(
                "rollout: vLLM tells which tokens top_p and min_p left only beside a top_k, and the loss needs them; "
                "set rollout.top_k too, such as 100"
            )
        if truncated and algorithm.update == "trust_region":
            raise ValueError(
                f"{algorithm.title} measures KL over whole distributions; sample without top_k, top_p and min_p"
            )

    def _ahead_fits(self) -> None:
        """What sampling ahead of the updates refuses, and what needs it."""
        algorithm, rollout = self.algorithm, self.rollout
        if not rollout.ahead:
            if rollout.in_flight != "finish":
                raise ValueError(
                    f"rollout.in_flight {rollout.in_flight} is about answers that are sampled ahead, and "
                    "rollout.ahead is 0; give rollout.ahead at least 1, or remove in_flight"
                )
            return
        if algorithm.baseline == "greedy":
            raise ValueError(
                f"rollout.ahead: {algorithm.title} answers each prompt greedily by the weights of the moment, which "
                "would wait for all that is sampled ahead; use rloo, or rollout.ahead: 0"
            )
        if self.environment is not None:
            raise ValueError(
                "rollout.ahead: episodes of an environment are not played ahead yet; use rollout.ahead: 0"
            )

    def _environment_fits(self) -> None:
        """What episodes of an environment refuse, and what needs them."""
        if self.environment is None:
            paying = [name for name, part in self.reward.parts.items() if part.environment is not None]
            if paying:
                raise ValueError(f"reward.parts.{paying[0]}.environment: the recipe has no section `environment`")
            return
        if self.reward.overlong_buffer:
            raise ValueError("reward.overlong_buffer counts the tokens of one response; an episode has several turns")
        if self.environment.baseline_per == "turn" and (why := self.algorithm.turns_refused()):
            raise ValueError(
                f"environment.baseline_per turn: {self.algorithm.title} {why}; use rloo or grpo, or episode"
            )

    def _devices_fit(self) -> None:
        """What several devices refuse."""
        rollout = self.rollout
        if self.run.ranks == 1:
            return
        if rollout.engine != "inside" and self.environment:
            raise ValueError(
                f"rollout.engine {rollout.engine}: on several devices it samples single answers; remove "
                "`environment`, or use engine: inside"
            )
        judged = any(part.model is not None for part in self.reward.parts.values())
        if self.parallel.in_pieces and rollout.ahead and judged:
            raise ValueError(
                "rollout.ahead: rank 0 computes rewards ahead, and a reward model that lies in pieces needs all "
                "ranks; use parallel.mode: replicas, or rollout.ahead: 0"
            )
        if rollout.engine != "inside" and self.parallel.in_pieces and self.model.lora is not None:
            raise ValueError(
                f"rollout.engine {rollout.engine}: adapters of a policy that lies in pieces are not sent "
                "to other processes; use parallel.mode: replicas"
            )

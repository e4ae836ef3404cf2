"""The recipe of `steersman distill`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section, key_names
from steersman.data import DataConfig, keys_of_other_kinds
from steersman.distributed.parallel import WithoutZeroConfig
from steersman.judge.config import AddressConfig
from steersman.loss.reduce import AVERAGED_BY, Average
from steersman.ops.divergence import Divergence
from steersman.recipe.evaluation import EvaluationSection
from steersman.recipe.sections import LEARNED_ONLY, ModelConfig, RolloutConfig, TrainingRecipe
from steersman.reward import RewardConfig
from steersman.run.health.limits import HealthConfig
from steersman.run.run_config import ManyRunConfig
from steersman.update.optimizer import OptimizerConfig

SOURCES = {
    "reverse_kl": "arXiv 2306.13649",
    "forward_kl": "arXiv 1503.02531",
    "jsd": "arXiv 2306.13649",
    "skew_kl": "arXiv 2402.03898",
    "skew_reverse_kl": "arXiv 2402.03898",
    "minillm": "arXiv 2306.08543",
    "uld": "arXiv 2402.12030",
}
"""Each loss's paper."""


OWN = ("start", "live", "ema")
"""Paths of teachers that are the student itself."""
SHOWN: tuple[str, ...] = ("solution", "feedback")
"""Names in `teacher.prompt` that stand for what `teacher.feedback` shows."""
REPROMPT = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
"""`teacher.prompt` with `teacher.feedback`, where none is given."""


class TeacherFeedback(Section):
    """What the teacher reads of how an update's answers fared (SDPO): in `teacher.prompt`, {solution} is another
    answer to the same prompt that succeeded, {feedback} what is said of the answer itself; each is empty where there
    is none."""

    success: float | None = Field(
        default=1.0, description="the score from which an answer is a solution; null shows none"
    )
    own: bool = Field(
        default=False, description="show an answer that succeeded to the teacher of that very answer too"
    )
    solution: str = Field(
        default="\nCorrect solution:\n\n{answer}\n\n", description="what {solution} is, made of {answer} and columns"
    )
    thinking: bool = Field(default=True, description="show a solution with what it has between think tags")
    text: str = Field(
        default="\nThe following is feedback from your unsuccessful earlier attempt:\n\n{text}\n\n",
        description="what {feedback} is, made of {text}, which the rewards say of the answer, and columns",
    )
    column: str | None = Field(
        default=None, description="column of the data whose text is feedback on every answer to its row"
    )
    beside_solution: bool = Field(default=True, description="show feedback also where there is a solution")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="longest prompt of the teacher; an answer whose teacher's would be longer is not taught. null is "
        "what fits the teacher's context",
    )

    @model_validator(mode="after")
    def _shows_something(self) -> TeacherFeedback:
        for key, name in (("solution", "answer"), ("text", "text")):
            if f"{{{name}}}" not in getattr(self, key):
                raise ValueError(f"{key} must hold {{{name}}}, which it is there to show")
        plain = type(self).model_fields
        if self.success is None:
            about = ("own", "solution", "thinking", "beside_solution")
            if idle := {key for key in about if getattr(self, key) != plain[key].default}:
                raise ValueError(f"{min(idle)} is about solutions, and success is null; give one of the two")
        return self


class TeacherEndpoint(AddressConfig):
    """A teacher behind an OpenAI-compatible /completions that tells the log-probabilities of a given text."""

    top_k: int = Field(
        default=20, ge=1, description="tokens that it lists at each position; the rest counts as one outcome"
    )
    form: Literal["prompt_logprobs", "echo"] = Field(
        default="prompt_logprobs",
        description="how the server tells log-probabilities of a given text. prompt_logprobs: vLLM's field; echo: "
        "the older completions API with echo and logprobs, tokens named token_id:N",
    )


class TeacherConfig(Section):
    """Who teaches: exactly one of path and endpoint."""

    path: str | None = Field(
        default=None,
        description="folder or hub name of a model; start: the student before training; live: the student as it is "
        "at each step; ema: a moving average of it (the last three with `prompt`)",
    )
    decay: float = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="ema: the share of itself that the average keeps at a refresh; with 0 "
        "it is a snapshot of the student",
    )
    every: int = Field(default=1, ge=1, description="ema: updates from one refresh to the next")
    endpoint: TeacherEndpoint | None = Field(
        default=None, description="a model behind a server, of the same tokenizer"
    )
    prompt: str | None = Field(
        default=None,
        description="the prompt that the teacher reads, made of the row's columns and {prompt}: what it may know and "
        'the student may not, such as "{prompt}\\n\\nThe answer is {answer}."',
    )
    feedback: TeacherFeedback | None = Field(
        default=None, description="show it how the update's answers fared, by {solution} and {feedback} in `prompt`"
    )
    dtype: Literal["same", "float32", "bfloat16", "float16"] = Field(
        default="same", description="precision of its weights: float32, bfloat16, float16, or same (the student's)"
    )
    device: str = Field(default="same", description="same, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _one(self) -> TeacherConfig:
        if (self.path is None) == (self.endpoint is None):
            raise ValueError("give exactly one of path and endpoint")
        if self.path in OWN and self.prompt is None:
            raise ValueError(
                f"path {self.path}: the student has nothing to learn from itself unless the teacher knows more; give "
                "prompt, such as '{prompt} (the answer is {answer})'"
            )
        if self.feedback is not None and not any(f"{{{name}}}" in (self.prompt or "") for name in SHOWN):
            raise ValueError("feedback is shown where prompt has {solution} or {feedback}, and it has neither")
        return self

    @model_validator(mode="after")
    def _read_by_its_kind(self) -> TeacherConfig:
        fields = type(self).model_fields
        given = {key for key in ("decay", "every", "dtype", "device") if getattr(self, key) != fields[key].default}
        if self.path != "ema" and (idle := given & {"decay", "every"}):
            raise ValueError(f"{min(idle)} is about the moving average of `path: ema`; give that, or remove it")
        shared = {"device"} if self.path == "start" else {"dtype", "device"} if self.path in (None, *OWN) else set()
        if idle := given & shared:
            who = "behind an endpoint" if self.path is None else f"of `path: {self.path}`"
            raise ValueError(f"{min(idle)}: a teacher {who} has none of its own; remove it")
        return self


class DistillLoss(Section):
    """What brings the student to the teacher."""

    name: Literal[Divergence, "minillm", "uld"] = Field(  # type: ignore[valid-type]
        default="reverse_kl",
        description="forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl: a divergence at each token "
        "(docs/how-to/distill.md); minillm: reverse KL of whole answers, by policy gradient; uld: distance of "
        "sorted probabilities, for a teacher with another tokenizer",
    )
    mix: float = Field(
        default_factory=lambda known: 0.1 if str(known.get("name")).startswith("skew") else 0.5,
        ge=0,
        le=1,
        description="jsd: the teacher's share of the mixture; skew_kl: the teacher's share in the student's "
        "distribution that it is compared with; skew_reverse_kl: the student's share in the teacher's. If not "
        "given 0.5 for jsd, 0.1 for skew_*",
    )
    temperature: float = Field(default=1.0, gt=0, description="both distributions are softmax(logits / temperature)")
    top_k: int | None = Field(
        default=None, ge=1, description="compare the student's k likeliest tokens at each place; null compares all"
    )
    tail: bool = Field(
        default=True,
        description="with top_k: count all other tokens together as one more; off: renormalise both distributions "
        "over the k",
    )
    average: Average = Field(default="token", description=AVERAGED_BY)
    normalised: bool = Field(
        default=True,
        description="minillm: divide the return by the number of its steps, as the paper does; off: the exact "
        "gradient",
    )
    skip_first: int = Field(
        default=0,
        ge=0,
        description="tokens at the beginning of each answer that the loss leaves out: a teacher that "
        "has read more may open as nobody would without it",
    )
    nll: float = Field(default=0.0, ge=0, description="weight of the likelihood of given answers, added to the loss")
    reward_weight: float = Field(
        default=1.0,
        ge=0,
        description="with a reward section: weight of the advantage in the policy gradient, in nats per unit of "
        "reward; with teacher.feedback 0 unless given",
    )


class DistillTraining(Section):
    """How long and in what batches."""

    epochs: float = Field(default=1.0, gt=0, description="passes over the prompts; a fraction is allowed")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many optimizer updates")
    batch_size: int = Field(default=16, ge=1, description="prompts (or given answers) per optimizer update")
    on_policy: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of updates on the student's own answers; the others are on the answers of the data",
    )


class DistillRecipe(TrainingRecipe):
    """Distillation of a teacher into a student."""

    model: ModelConfig
    teacher: TeacherConfig
    data: DataConfig
    loss: DistillLoss = DistillLoss()
    train: DistillTraining = DistillTraining()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig | None = Field(default=None, description="rewards added to the student's own answers")
    evaluation: EvaluationSection | None = Field(
        default=None, description="what else is measured of the student at every evaluation, beside its divergence"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    run: ManyRunConfig = ManyRunConfig()
    parallel: WithoutZeroConfig = WithoutZeroConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    health: HealthConfig = HealthConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        own = key_names(rollout=("prompts", *LEARNED_ONLY), reward=("whiten",))
        return keys_of_other_kinds("query", "demonstration") | own

    @classmethod
    def dependent_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        defaults, teacher = super().dependent_defaults(given), given.get("teacher")
        if not isinstance(teacher, dict) or not isinstance(teacher.get("feedback"), dict):
            return defaults
        return {**defaults, "teacher": {"prompt": REPROMPT}, "loss": {"reward_weight": 0.0}}

    @property
    def reward_weight(self) -> float:
        """The weight of the rewards' policy gradient in the loss, 0 where there is none."""
        return 0.0 if self.reward is None else self.loss.reward_weight

    @property
    def gradient_through_samples(self) -> bool:
        """Whether a policy gradient is part of the loss, which must know how tokens were drawn."""
        return self.loss.name == "minillm" or self.reward_weight > 0

    @model_validator(mode="after")
    def _reads_its_loss(self) -> DistillRecipe:
        loss, plain = self.loss, DistillLoss()
        if loss.mix != plain.mix and loss.name != "jsd" and not loss.name.startswith("skew"):
            raise ValueError(f"loss.mix is for jsd and the skew divergences; {loss.name} mixes nothing")
        if loss.normalised != plain.normalised and loss.name != "minillm":
            raise ValueError(f"loss.normalised is for minillm; {loss.name} divides nothing by the steps to come")
        if loss.tail != plain.tail and loss.top_k is None:
            raise ValueError("loss.tail is about the tokens that loss.top_k leaves out; give top_k, or remove tail")
        if loss.top_k is not None and loss.name in ("minillm", "uld"):
            raise ValueError(f"loss.top_k is for divergences at each token; {loss.name} is another loss")
        if loss.top_k is not None and self.teacher.endpoint is not None:
            raise ValueError("loss.top_k: a teacher behind an endpoint lists its own likeliest tokens; remove top_k")
        whole = "minillm" if loss.name == "minillm" else "a reward" if self.reward_weight > 0 else "loss.nll"
        if loss.skip_first and (self.gradient_through_samples or loss.nll):
            raise ValueError(f"loss.skip_first leaves tokens out, and {whole} is about whole answers; remove one")
        return self

    @model_validator(mode="after")
    def _has_feedback(self) -> DistillRecipe:
        shown = self.teacher.feedback
        if shown is None:
            return self
        if self.reward is None and (shown.success is not None or shown.column is None):
            raise ValueError(
                "teacher.feedback: a reward says which answers succeed and what is wrong with the others; give a "
                "section `reward`, or success: null with a column of the data"
            )
        if self.train.on_policy < 1:
            raise ValueError(
                "teacher.feedback is about the student's own answers, in every update: train.on_policy 1"
            )
        if shown.success is not None and not shown.own and self.rollout.samples < 2:
            raise ValueError(
                "teacher.feedback shows an answer what another one to its prompt achieved; raise rollout.samples, or "
                "give success: null for feedback in words alone"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> DistillRecipe:
        loss, rollout, share = self.loss, self.rollout, self.train.on_policy
        if self.run.ranks > 1 and rollout.engine != "inside":
            raise ValueError(
                "run.devices: sampling by other processes goes with one device so far; use rollout.engine: inside"
            )
        if self.parallel.mode == "fsdp" and self.teacher.path == "live":
            raise ValueError(
                "parallel.mode fsdp: a live teacher reads with the student's own weights while these learn; use "
                "mode: replicas, or teacher.path: start"
            )
        if self.gradient_through_samples:
            what = "minillm" if loss.name == "minillm" else "a reward"
            if share < 1:
                raise ValueError(f"{what} needs the student's own answers in every update: train.on_policy 1")
            if rollout.top_k or rollout.top_p < 1 or rollout.min_p or rollout.min_new_tokens:
                raise ValueError(
                    f"{what} takes a policy gradient of answers as the student draws them; sample without top_k, "
                    "top_p, min_p and min_new_tokens"
                )
            if rollout.temperature != loss.temperature:
                raise ValueError(
                    f"{what} takes a policy gradient of answers as the student draws them: rollout.temperature "
                    f"({rollout.temperature:g}) must be loss.temperature ({loss.temperature:g})"
                )
        if self.reward_weight > 0 and self.train.batch_size * rollout.samples < 2:
            raise ValueError(
                "reward: an answer is worth what it earns beyond the other answers of its update; train.batch_size 1 "
                "with rollout.samples 1 has no other, so the reward would teach nothing. Raise one of the two"
            )
        if self.reward is None and loss.reward_weight != DistillLoss().reward_weight:
            raise ValueError("loss.reward_weight: the recipe has no section `reward`; give one, or remove the weight")
        if loss.nll and share == 1:
            raise ValueError(
                "loss.nll is the likelihood of given answers, and train.on_policy 1 gives none; lower on_policy"
            )
        if self.teacher.endpoint is not None:
            if loss.temperature != 1:
                raise ValueError("loss.temperature: an endpoint tells its log-probabilities at temperature 1 only")
            if loss.name == "uld":
                raise ValueError("loss.name uld sorts whole distributions, and an endpoint lists only top_k of them")
        if loss.name == "uld" and self.teacher.path in OWN:
            raise ValueError("loss.name uld is for a teacher with another tokenizer; the student's own is the same")
        if self.model.scratch is not None and (share > 0 or self.teacher.path in OWN):
            raise ValueError(
                "model.scratch: a model with fresh weights has nothing to say yet; distil it with train.on_policy 0 "
                "from another model first"
            )
        return self

"""The recipe of a matrix: tasks, methods and seeds, and what all cells have in common."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from steersman.config.sections import Section
from steersman.distributed.parallel import WithoutZeroConfig
from steersman.grue.task import TASKS
from steersman.ops.distributions import LEAST_TEMPERATURE
from steersman.recipe.sections import ModelConfig, adapter_defaults, not_zero
from steersman.reward import RewardPart
from steersman.run.run_config import micro_tokens
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.sft import SFTConfig

ZERO, SUPERVISED = "zero-shot", "supervised"
METHODS = [ZERO, SUPERVISED, *RECIPES, *(f"{SUPERVISED}+{name}" for name in RECIPES)]
SHOWN = [
    ZERO,
    SUPERVISED,
    *(f"{front}{name}" for front in ("", f"{SUPERVISED}+") for name in ("ppo", "nlpo", "grpo")),
]


class DataSource(Section):
    """Which rows the tasks read."""

    source: Literal["hub", "files"] = Field(
        default="hub",
        description="hub: the original data sets; files: local files in `folder`, by each task's own reader (the "
        "seven built-in tasks have stand-ins for the originals)",
    )
    folder: str | None = Field(
        default=None,
        description="files: where they are; hub: a folder with saved copies, one per task name, read without network",
    )
    train_split: str = Field(default="train", description="the split that is trained on")
    held_out_split: str = Field(default="validation", description="the split that cells are judged on")
    train: int = Field(default=1000, ge=1, description="training prompts per task, those of smallest hash")
    held_out: int = Field(default=100, ge=2, description="held-out prompts per task, those of smallest hash")


class Supervised(Section):
    """Supervised fine-tuning on the references."""

    train: SFTConfig = SFTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval_every: int | None = Field(
        default=None, ge=1, description="its steps between evaluations on held-out data; null takes run.eval_every"
    )


class OnPolicySettings(Section):
    """What the on-policy methods share, so that they differ in the method alone: the same samples, the same rates."""

    iterations: int = Field(default=100, ge=1, description="passes through rollout, reward, update")
    prompts: int = Field(default=16, ge=1, description="prompts per iteration")
    samples: int = Field(default=4, ge=1, description="responses per prompt, for methods without groups too")
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: OptimizerConfig = OptimizerConfig()
    normalise: bool = Field(
        default=True,
        description="normalise rewards: subtract their running mean, divide by their running standard deviation",
    )
    looks: int = Field(default=32, ge=1, description="held-out prompts of the learning curves")
    watch: bool = Field(default=True, description="draw learning curves of the metrics that are no reward too")


class Generation(Section):
    """Settings of sampling that take the place of the task's own; null keeps those."""

    max_new_tokens: int | None = Field(default=None, ge=1, description="longest response, in tokens")
    min_new_tokens: int | None = Field(
        default=None, ge=0, description="shortest response: no end token before so many tokens"
    )
    temperature: float | None = Field(default=None, ge=LEAST_TEMPERATURE, description="logits are divided by it")
    top_k: int | None = Field(default=None, ge=0, description="sample among the k likeliest tokens; 0 is off")
    top_p: float | None = Field(default=None, gt=0, le=1, description="sample from the smallest set of this mass")
    stop: list[str] | None = Field(default=None, description="strings that end a response")

    _greedy = field_validator("temperature", mode="before")(not_zero)


class TaskSettings(Section):
    """What one task has otherwise than its file says."""

    reward: dict[str, RewardPart] | None = Field(default=None, description="in the place of the task's rewards")
    generation: Generation = Generation()
    train: int | None = Field(default=None, ge=1, description="training prompts")
    held_out: int | None = Field(default=None, ge=2, description="held-out prompts")
    words: int | None = Field(default=None, ge=1, description="words that a long field of the prompt is cut to")


class Evaluation(Section):
    """How a cell's model is judged on the held-out prompts."""

    greedy: bool = Field(default=False, description="the likeliest token each time; off: as the task samples")
    msttr_segment: int = Field(default=100, ge=2, description="words per segment of the type-token ratio")
    sheets: int = Field(default=6, ge=1, description="held-out prompts shown in the sample sheets")


class MatrixRun(Section):
    """Where the matrix lives and how its cells run."""

    dir: str = Field(default="runs/grue", description="folder of the matrix; each cell has a run folder in it")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(default=0, ge=0, description="CPU threads for torch; 0 leaves torch's own choice")
    micro_tokens: int = Field(
        default_factory=micro_tokens,
        ge=1,
        description="padded tokens that go through a model at once, 2,048 on a CPU and 16,384 on an accelerator if "
        "not given",
    )
    eval_every: int = Field(default=10, ge=1, description="steps between evaluations on held-out data")
    devices: int = Field(
        default=1, ge=1, description="processes that share the training of each cell; cells are judged by one"
    )
    save_every: int = Field(
        default=20, ge=1, description="steps between checkpoints, from which a killed cell resumes"
    )
    keep_checkpoints: bool = Field(default=False, description="keep the checkpoints of cells that are done")
    show_cells: bool = Field(default=False, description="print each cell's own output; off: into its output.txt")


class GrueRecipe(Section):
    """A matrix of tasks x methods x seeds."""

    tasks: list[str] = Field(default=list(TASKS), min_length=1, description="names, or files of one's own tasks")
    methods: list[str] = Field(
        default=SHOWN, min_length=1,
        description="zero-shot, supervised, any on-policy verb, and supervised+VERB",
    )  # fmt: skip
    seeds: list[int] = Field(
        default=[0, 1, 2], min_length=1, description="seeds; every task and method is run once with each"
    )
    model: ModelConfig
    data: DataSource = DataSource()
    supervised: Supervised = Supervised()
    rl: OnPolicySettings = OnPolicySettings()
    algorithms: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="verb: settings of its algorithm, such as {ppo: {beta: 0.1}}"
    )
    generation: Generation = Generation()
    per_task: dict[str, TaskSettings] = Field(
        default_factory=dict, description="settings of single tasks, by the task's name"
    )
    evaluation: Evaluation = Evaluation()
    run: MatrixRun = MatrixRun()
    parallel: WithoutZeroConfig = WithoutZeroConfig()

    @classmethod
    def dependent_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        return adapter_defaults(given, "supervised.optimizer", "rl.optimizer")

    @property
    def model_name(self) -> str:
        """What tables and leaderboards call the model; fresh weights are not the model whose tokenizer they have."""
        if self.model.scratch is None:
            return self.model.path
        return f"{self.model.scratch.get('model_type', 'model')} of fresh weights, tokenizer {self.model.path}"

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str]) -> list[str]:
        for name in methods:
            if name not in METHODS:
                near = difflib.get_close_matches(name, METHODS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(METHODS)}"
                raise ValueError(f"there is no method '{name}'; {hint}")
        return _once(methods)

    @field_validator("seeds", "tasks")
    @classmethod
    def _unique(cls, values: list[Any]) -> list[Any]:
        return _once(values)

    @model_validator(mode="after")
    def _fits(self) -> GrueRecipe:
        for name in self.algorithms:
            if name not in RECIPES:
                near = difflib.get_close_matches(name, RECIPES, n=1)
                raise ValueError(
                    f"algorithms: there is no verb '{name}'{f'; did you mean {near[0]}?' if near else ''}"
                )
        if self.data.source == "files" and self.data.folder is None:
            raise ValueError("data.folder: say where the files are; docs/grue.md says which")
        if self.model.scratch is not None:
            early = [m for m in self.methods if not m.startswith(SUPERVISED)]
            if early:
                raise ValueError(
                    f"methods {', '.join(early)}: a model with fresh weights (model.scratch) has nothing to say "
                    "before it is supervised; leave them out"
                )
        return self


def _once(values: list[Any]) -> list[Any]:
    twice = [v for i, v in enumerate(values) if v in values[:i]]
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice")
    return values

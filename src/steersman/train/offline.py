"""The offline loop: examples -> collate -> loss -> update -> observe.

Supervised fine-tuning, reward models and preference optimisation differ only in their `Objective`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from steersman.config.sections import Section
from steersman.data import Batches, Streamed, Training
from steersman.distributed.micro import my_micro_batches
from steersman.distributed.pieces import put_into
from steersman.distributed.ranks import ranks
from steersman.model import as_local_shards
from steersman.plan.memory import Load, largest_load
from steersman.run.run_config import RunConfig
from steersman.train.model_optimizer import model_optimizer
from steersman.train.session import Session, kept_state
from steersman.train.tally import Tally
from steersman.types import Stats
from steersman.update.optimizer import OptimizerConfig, not_finite

if TYPE_CHECKING:
    from steersman.train.moving import MovingCopy
    from steersman.train.routers import RouterBalance


class OfflineConfig(Section):
    """How long and in what batches to train on given examples."""

    epochs: float = Field(default=1.0, gt=0, description="passes over the data; a fraction is allowed")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many optimizer updates")
    batch_size: int = Field(default=16, ge=1, description="examples (or groups of answers) per optimizer update")
    keep: Literal["last", "best"] = Field(
        default="last",
        description="which weights the saved model has: the last, or the best on held-out data, where those that "
        "training began with count too",
    )

    def require_kept(self, run: RunConfig) -> None:
        """Raises ValueError where the best weights are asked for and no checkpoint of them is kept."""
        if self.keep == "best" and not run.keep_best:
            raise ValueError(
                "train.keep is best, which takes the weights of the best checkpoint, and run.keep_best 0 keeps none; "
                "give run.keep_best at least 1, or train.keep: last"
            )


class PackedOfflineConfig(OfflineConfig):
    """How long and in what batches a policy is trained on given examples."""

    pack: int = Field(
        default=0,
        ge=0,
        description="put several sequences into rows of so many tokens, kept apart by position; 0 is off",
    )
    router_loss: float | None = Field(
        default=None,
        gt=0,
        description="mixtures of experts: weight of the loss that keeps experts in equal use (arXiv 2101.03961, "
        "eq. 4-6), added to the loss; null: it is not. router_aux_loss_coef in the model's config.json is the weight "
        "that its makers chose. It is measured in each micro-batch, over all tokens of prompts and answers (a prompt "
        "counts with each answer, padding never), and weighed by the micro-batch's share of the batch. metrics.jsonl "
        "tells it as router_loss, without the weight, and loss without it. With model.lora it changes what routers "
        "read, and the routers themselves only where lora.targets names them",
    )


class Objective(Protocol):
    """What is learned from examples: a loss over rows, and a look at held-out data.

    `cost` is the number of tokens of each example with all its answers. `denominator` is counted once over the
    whole batch, and `loss` divides by it, so that micro-batches add up to the batch exactly.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def cost(self) -> Sequence[int] | np.ndarray: ...

    def denominator(self, rows: Sequence[int]) -> float: ...

    def loss(self, rows: Sequence[int], denominator: float, tally: Tally) -> Tensor: ...

    def evaluate(self) -> Stats: ...


class Offline:
    """One offline run: the objective's trainable weights, its optimiser and the order of its data."""

    by_length: ClassVar[bool] = True
    """Whether rows of like length share a batch."""

    def __init__(
        self,
        objective: Objective,
        config: OfflineConfig,
        optimizer: OptimizerConfig,
        run: Any,
        *,
        shuffle: bool = True,
        data: Training[Any] | None = None,
    ) -> None:
        self.objective, self.micro_tokens, self.eval_every = objective, run.micro_tokens, run.eval_every
        self.batch_size, self.keep = config.batch_size, config.keep
        self.start_counts = True
        """Whether the weights that training begins with can be the best: not where they are no model yet."""
        self.batches: Batches | Streamed
        self.rows: list[int] = []
        """The rows that the run trains on, whatever step it is at; of a stream none is known before it is read."""
        if data is not None and data.stream is not None:
            assert config.max_steps is not None
            self.batches, self.total = data.stream, config.max_steps
        else:
            mix, content = (None, ()) if data is None else (data.mix, data.content)
            lengths = objective.cost if self.by_length else None
            self.batches = batches = Batches(
                len(objective.cost), config.batch_size, run.seed, lengths, shuffle=shuffle, mix=mix, content=content
            )
            steps = max(1, round(config.epochs * len(batches)))
            self.total = min(steps, config.max_steps or steps)
            self.rows = batches.rows_of(self.total)
        self.beside: Callable[[], Stats] = dict  # what else a look measures
        self.prepare: Callable[[Sequence[int]], None] = _nothing  # what the objective must know of those rows
        self.moving: MovingCopy | None = None  # what follows the weights, such as a reference
        self.balance: RouterBalance | None = None  # what is added for a mixture's routers
        self.whole = True
        self.optimizer = model_optimizer(objective.module, optimizer, self.total)

    def load(self, longest: int) -> Load:
        """The largest micro-batch; `longest` is the longest sequence in tokens."""
        return largest_load(self.objective.cost, longest, self.micro_tokens, self.batch_size)

    def run(self, session: Session) -> None:
        """Trains to the end; the held-out data is looked at before the first step, now and then, and at the end."""
        session.begin(self, self.total)
        self.prepare(self.rows)
        if not session.metrics():
            session.observe(0, self.look())
            if self.keep == "best" and self.start_counts:
                session.keep_start()
        session.make_up(self.look)
        order = self.batches.forever()
        for step in session.steps():
            stats = self.step(next(order))
            if self.moving is not None:
                self.moving.follow(step)
            due = step % self.eval_every == 0 or step == self.total
            session.observe(step, stats, look=self.look if due else None)

    def look(self) -> Stats:
        """The held-out data, and what is measured beside."""
        return {**self.objective.evaluate(), **self.beside()}

    def step(self, rows: Sequence[int]) -> Stats:
        """One optimizer update on the given examples."""
        started, tally = time.monotonic(), Tally()
        cost = torch.tensor(np.asarray(self.objective.cost)[list(rows)])
        denominator, index = self.objective.denominator(rows), torch.tensor(rows)
        losses = []
        for part in my_micro_batches(cost, self.micro_tokens):
            told = tally if part.counts else Tally()
            run = partial(self.objective.loss, index[part.rows].tolist(), denominator, told)
            share = float(cost[part.rows].sum()) / float(cost.sum())
            loss = run() if self.balance is None else self.balance.with_loss(run, share, told)
            (loss * part.weight).backward()
            losses.append({"loss": loss.detach()})
        ranks().agree(not_finite(losses))
        self.whole = False
        stats = self.optimizer.step() | tally.means()
        seconds = time.monotonic() - started
        return stats | {"time/step": seconds, "throughput": float(cost.sum()) / seconds}

    def position(self) -> dict[str, Any]:
        return {"batches": self.batches.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        moving = {} if self.moving is None else {"moving": self.moving.state_dict()}
        return {
            "model": kept_state(trainable(self.objective.module)),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            **moving,
        }

    def load_learned(self, state: dict[str, Any]) -> None:
        """Takes from a `state_dict` what was learned, and what followed it; leaves optimizer and order of the data as
        they are."""
        load_trainable(self.objective.module, state["model"])
        if self.moving is not None:
            self.moving.load_state_dict(state["moving"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load_learned(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])


class WholeBatches(Offline):
    """The offline loop of an objective that must know something of each whole batch before its update, which its
    `look(rows)` reads.

    Batches are not made of rows of like length, as elsewhere: what is measured of a batch would depend on how long
    its rows are.
    """

    objective: Any
    by_length = False

    def step(self, rows: Sequence[int]) -> Stats:
        self.objective.look(rows)
        return super().step(rows)


def _nothing(_rows: Sequence[int]) -> None:
    """Most objectives need no pass over the rows before the first step."""


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name; tied ones once."""
    as_local_shards(module)
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def load_trainable(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Puts `trainable` back, in place."""
    put_back(trainable(module), saved)


def put_back(parameters: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Gives the parameters the values that were saved under their names."""
    for name, p in parameters.items():
        put_into(p, saved[name])


def restore_best(session: Session, state: Offline) -> None:
    """Takes up what was learned until the look that was best on held-out data; nothing where none was ranked."""
    found = session.best()
    if found is not None:
        state.load_learned(found.state["state"])

"""Tasks of lm-evaluation-harness on the policy as it is, without a copy of it on disk or in memory."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

from steersman.extras import explain_missing
from steersman.guards.user_code import user_code
from steersman.model import Policy
from steersman.recipe.evaluation import HarnessSection
from steersman.run.seed import rng_state, set_rng_state
from steersman.types import Stats, SteersmanError

SECTION = "evaluation.harness"
SHOTS_SEED = 1234
"""The seed of the package's own command, by which it draws the examples before a question."""
RESAMPLED = 1000
"""Bootstrap samples for the standard errors of measures that have no formula."""


class Harness:
    """The tasks, found and loaded when this is made.

    Raises SteersmanError where lm-evaluation-harness is not installed, a task is unknown or its data are not here,
    and for a policy that is an encoder-decoder.
    """

    def __init__(self, policy: Policy, config: HarnessSection, micro_tokens: int) -> None:
        if policy.model.config.is_encoder_decoder:
            raise SteersmanError(
                f"{SECTION}: it asks causal models, and this is an encoder-decoder; remove the section"
            )
        if config.chat_template and policy.tokenizer.chat_template is None:
            raise SteersmanError(f"{SECTION}.chat_template: the model has no chat template")
        with explain_missing(SECTION):
            from lm_eval.tasks import TaskManager

            from steersman.evaluation.harness_model import PolicyModel
        self.config, self.model = config, PolicyModel(policy, micro_tokens)
        with _quiet():
            own = TaskManager(include_path=config.include, include_defaults=False) if config.include else None
            # the package's own are thousands of files, looked through where they are asked for
            known = TaskManager(include_path=config.include) if own is None or _unknown(own, config) else own
            if unknown := _unknown(known, config):
                where = f"in {config.include}, nor among" if config.include else "among"
                raise SteersmanError(
                    f"{SECTION}.tasks: there is no task {', '.join(unknown)} {where} the package's own; "
                    "`lm-eval ls tasks` lists these"
                )
            self.tasks = self._loaded(known)
            self._run(limit=1)

    def look(self) -> Stats:
        """`TASK/MEASURE` and `TASK/MEASURE_stderr`; a measure behind a filter is `MEASURE:FILTER`."""
        with _quiet():
            results = self._run(self.config.limit)
        return {
            f"{task}/{_measure(name)}": float(value)
            for task, measures in results.items()
            for name, value in measures.items()
            if "," in name and isinstance(value, (int, float))
        }

    def _loaded(self, known: Any) -> dict[str, Any]:
        with _telling(self.config):
            loaded = known.load(list(self.config.tasks))
            for task in loaded["tasks"].values():  # as the package's own command sets them
                said = task.get_config("num_fewshot")
                if said is None or (said and self.config.shots is not None):
                    task.set_config(key="num_fewshot", value=self.config.shots or 0)
                task.set_fewshot_seed(seed=SHOTS_SEED)
        return loaded

    def _run(self, limit: int | None) -> dict[str, dict[str, Any]]:
        from lm_eval import evaluate

        ask: Any = evaluate  # which a decorator hides
        with _telling(self.config):
            return ask(
                self.model, self.tasks, limit=limit, bootstrap_iters=RESAMPLED, log_samples=False,
                apply_chat_template=self.config.chat_template, fewshot_as_multiturn=self.config.chat_template,
            )["results"]  # fmt: skip


@contextlib.contextmanager
def _telling(config: HarnessSection) -> Iterator[None]:
    """Tasks are programs and files of others: what they raise is said with their names."""
    try:
        yield
    except SteersmanError:
        raise
    except Exception as error:
        names = ", ".join(config.tasks)
        raise SteersmanError(f"{SECTION}: {names} did not run: {type(error).__name__}: {error}") from error


def _unknown(known: Any, config: HarnessSection) -> list[str]:
    return [name for name in config.tasks if not known.match_tasks([name])]


def _measure(name: str) -> str:
    measure, _, filtered = name.partition(",")
    return measure if filtered in ("", "none") else f"{measure}:{filtered}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The package's bars and remarks are left out, and what it sets in the process is put back."""
    log = logging.getLogger("lm_eval")
    level, streams = log.level, rng_state()
    log.setLevel(logging.ERROR)
    try:
        with user_code(SECTION), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
        set_rng_state(streams)

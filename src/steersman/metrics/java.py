"""METEOR 1.5 by its authors' Java program, and why SPICE is not offered."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from steersman.metrics.core import Metric, MetricInput, Scorer
from steersman.types import SteersmanError


@dataclass
class METEOR15(Scorer):
    """METEOR 1.5 for English with stems, synonyms and paraphrases, in [0, 1], against its best reference.

    The program of the package `pycocoevalcap` runs once and is spoken to; it starts in seconds and needs 2 GB. One
    that was interrupted, or failed, is ended, and the next texts start another.
    Source: Denkowski and Lavie 2014. The value of a set is the mean over its texts.
    """

    name = "meteor1.5"
    needs = ("references",)

    def __post_init__(self) -> None:
        if find_spec("pycocoevalcap") is None or shutil.which("java") is None:
            raise SteersmanError(
                "metric 'meteor1.5': it needs Java and the package pycocoevalcap (pip install 'steersman[meteor]'); "
                "`meteor` needs neither, and has no synonyms"
            )

    @property
    def implementation(self) -> str:
        return "pycocoevalcap 1.2, meteor-1.5.jar -l en -norm"

    def rows(self, batch: MetricInput) -> Sequence[float]:
        given = {i: [_one_line(r) for r in references] for i, references in enumerate(batch.references)}
        texts = {i: [_one_line(t)] for i, t in enumerate(batch.texts)}
        program = self._program
        try:
            return program.compute_score(given, texts)[1]
        except BaseException:  # Ctrl-C too: its next line would answer the texts before, and its lock stays taken
            del self._program
            program.meteor_p.kill()
            if program.lock.locked():
                program.lock.release()
            raise

    @cached_property
    def _program(self) -> Any:
        from pycocoevalcap.meteor.meteor import Meteor  # pyright: ignore[reportMissingImports]

        program = Meteor()
        weakref.finalize(self, program.meteor_p.kill)
        return program


def _one_line(text: str) -> str:
    """A text as the program's line protocol takes it: without line ends and without its separator."""
    return " ".join(text.replace("|||", " ").split())


def spice() -> Metric:
    """Refuses: SPICE's parser is a set of models apart from every package.

    Raises SteersmanError always.
    """
    raise SteersmanError(
        "metric 'spice': it can't be offered. SPICE needs the Java models of Stanford CoreNLP 3.6, which no Python "
        "package carries, and Java 8; use cider, or concept_coverage with bertscore"
    )

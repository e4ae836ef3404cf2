"""What both sides of the learning comparison share: settings, reward, record. Imports nothing of steersman."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEW = 48
SHARED: dict[str, Any] = {"lr": 5e-5, "beta": 0.05, "clip": 0.2, "temperature": 1.0}
"""Learning rate, coefficient of KL, clip of the ratio and temperature, for both methods and both sides."""

METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"prompts": 64, "samples": 1, "epochs": 2, "minibatches": 4, "gamma": 1.0, "lam": 0.95, "value_clip": 0.2},
    "grpo": {"prompts": 8, "samples": 8, "epochs": 2, "minibatches": 1, "max_grad_norm": 1.0},
}
"""64 responses per iteration. TRL's PPO does not clip gradients, so neither does ours here. TRL's GRPO cuts its
minibatches once per iteration and steersman once per epoch; with one minibatch the two are the same."""

REWARD = '''
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


def mood(prompts, completions, **columns):
    """VADER's compound score of each completion, -1 to 1."""
    return [ANALYZER.polarity_scores(text)["compound"] for text in completions]
'''


def reward_function(folder: Path) -> Any:
    """The function of the task's rewards.py."""
    space: dict[str, Any] = {}
    exec((folder / "rewards.py").read_text(), space)
    return space["mood"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Job:
    """One run as the command line names it: METHOD TASK OUT SEED ITERATIONS EVERY [given].

    `given` is the name of a file in the task's folder with responses by iteration and prompt. With it nothing is
    sampled and one minibatch makes the epoch, so that nothing in a run is random; arithmetic is in float64.
    """

    def __init__(self) -> None:
        method, task, out, seed, iterations, every, *given = sys.argv[1:]
        self.method, self.task, self.out = method, Path(task), Path(out)
        self.seed, self.iterations, self.every = int(seed), int(iterations), int(every)
        self.settings = {**SHARED, **METHODS[method]}
        self.given: list[dict[str, list[list[int]]]] | None = None
        self.prompts = self.task / "prompts.jsonl"
        if given:
            self.settings["minibatches"] = 1
            self.given = json.loads((self.task / given[0]).read_text())
            self.prompts = self.task / given[0].replace(".json", "-prompts.jsonl")
        self.scores: list[float] = []

    def responses(self, iteration: int, prompt: Sequence[int]) -> list[list[int]]:
        """The responses to a prompt that were given for an iteration."""
        assert self.given is not None
        return self.given[iteration][json.dumps(list(prompt))]

    def step(self, done: int, model: Any) -> None:
        """Keeps the policy's weights after every so many iterations, and the last."""
        from safetensors.torch import save_file

        if done % self.every == 0 or done == self.iterations:
            weights = {name: x.detach().cpu().contiguous() for name, x in model.named_parameters()}
            save_file(weights, self.out / f"weights-{done:05}.safetensors")

    def finish(self, **facts: Any) -> None:
        """The mean score of each iteration's responses; written last, so its presence says that the run is whole."""
        (self.out / "log.json").write_text(json.dumps({"score": self.scores, **facts}))

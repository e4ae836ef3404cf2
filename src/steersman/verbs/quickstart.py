"""`steersman quickstart`: SFT -> preference pairs -> reward model -> PPO, offline, in minutes, and a judge.

Everything is real, only small: the included story model, the same verbs that a user runs, and a gold reward
that labels the pairs and judges the outcome but is never seen by PPO, which sees the reward model only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.table import Table
from rich.text import Text

from steersman.assets import openings, story_model
from steersman.atomic import write_atomic
from steersman.config.sections import Section
from steersman.data import Codec
from steersman.guards.terminal import printable
from steersman.jsonl import jsonl_text, read_jsonl
from steersman.ops.text import distinct_n, sentences
from steersman.recipe.sections import ModelConfig, RolloutConfig
from steersman.reward.gold import judge
from steersman.run.console import new_console
from steersman.run.device import resolve_device
from steersman.run.run_config import RunConfig
from steersman.run.stop_request import StopRequest
from steersman.setup.generators import open_generator
from steersman.setup.models import policy_from
from steersman.types import Prompt, Sample, SteersmanError
from steersman.verbs import reward_model, rl, sft
from steersman.verbs.on_policy_recipes import RECIPES

TEMPERATURE = 0.8
"""All stages sample at it: a model this small is readable below 1, and the ratio is 1 at any temperature."""


class QuickstartRecipe(Section):
    """The whole pipeline on the included model; the defaults take a few minutes on two cores."""

    dir: str = Field(default="runs/quickstart", description="folder of the run; each stage has one of its own in it")
    seed: int = Field(default=0, ge=0, description="every random stream derives from it")
    threads: int = Field(default=0, ge=0, description="CPU threads for torch; 0 leaves torch's own choice")
    sft_samples: int = Field(
        default=4, ge=1, description="stories per opening that the model writes as demonstrations"
    )
    pair_samples: int = Field(default=16, ge=2, description="stories per opening that the judge compares")
    iterations: int = Field(default=20, ge=1, description="iterations of PPO")
    held_out: int = Field(default=40, ge=1, description="openings that no stage trains on")
    max_new_tokens: int = Field(default=48, ge=8, description="longest story, in tokens")


def run(recipe: QuickstartRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Runs the stages in order, skips those that a resumed run has finished; returns what `summary.json` holds."""
    with StopRequest() as signal:
        return _run(Stages(recipe, resume, signal))


def _run(stages: Stages) -> dict[str, Any]:
    started, base = time.monotonic(), str(story_model())
    _say("1/4", "supervised fine-tuning: short stories that come to an end")
    starting = stages.sft(base)
    _say("2/4", "preference pairs: the model's own stories, compared by a judge")
    pairs = stages.pairs(starting)
    _say("3/4", "reward model: learns the judge's taste from the pairs")
    reward = stages.reward(starting, pairs)
    _say("4/4", "PPO: actor, critic, reward model and reference")
    outcome = stages.ppo(starting, reward["model"])
    return stages.finish(started, reward, outcome)


class Stages:
    """The four stages, each a run of a verb in a folder of its own, and the tables that connect them."""

    def __init__(self, recipe: QuickstartRecipe, resume: bool, signal: StopRequest) -> None:
        self.recipe, self.resume, self.root, self.signal = recipe, resume, Path(recipe.dir), signal
        self.device = resolve_device()
        if self.root.exists() and any(self.root.iterdir()) and not resume:
            raise SteersmanError(
                f"{self.root} holds a run already; go on with --resume, or choose another folder with --dir"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        every = openings()
        self.train, self.held_out = every[recipe.held_out :], every[: recipe.held_out]

    def sft(self, base: str) -> str:
        """Demonstrations sampled from the base model and cut at the end of a sentence; then `steersman sft`."""
        table = self.root / "demonstrations.jsonl"
        if not table.exists():
            rows = []
            for sample in self._sample(base, self.train, self.recipe.sft_samples):
                whole = _whole_sentences(sample.text)
                if whole is not None:
                    rows.append({"prompt": sample.prompt.text, "completion": whole})
            write_atomic(table, jsonl_text(rows))
        return self._verb(
            "1-sft", sft, sft.SFTRecipe,
            {
                "model": {"path": base},
                "data": {"path": str(table), "held_out": 0.1},
                "optimizer": {"lr": 5e-4, "schedule": "linear"},
                "train": {"epochs": 1, "batch_size": 32},
                "run": {"eval_every": 10},
            },
        )["model"]  # fmt: skip

    def pairs(self, model: str) -> Path:
        """Stories of the fine-tuned model, in pairs labelled by the gold reward."""
        table = self.root / "pairs.jsonl"
        if not table.exists():
            n = self.recipe.pair_samples
            samples = self._sample(model, self.train, n)
            score = gold_scores([s.text for s in samples])
            rows = []
            for start in range(0, len(samples), n):
                group = sorted(range(start, start + n), key=lambda i: score[i])
                for low, high in zip(group[: n // 2], group[n // 2 :], strict=False):
                    if score[high] - score[low] > 0.02 and samples[high].text.strip() and samples[low].text.strip():
                        rows.append(
                            {
                                "prompt": samples[start].prompt.text,
                                "chosen": samples[high].text,
                                "rejected": samples[low].text,
                            }
                        )
            write_atomic(table, jsonl_text(rows))
        return table

    def reward(self, model: str, pairs: Path) -> dict[str, Any]:
        """`steersman reward` on the pairs, whole openings held out."""
        return self._verb(
            "2-reward", reward_model, reward_model.RewardModelRecipe,
            {
                "model": {"path": model},
                "data": {"path": str(pairs), "held_out": 0.15},
                "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup": 5},
                "train": {"epochs": 2, "batch_size": 32},
                "run": {"eval_every": 10},
            },
        )  # fmt: skip

    def ppo(self, model: str, reward: str) -> dict[str, Any]:
        """`steersman ppo` against the reward model; the gold reward is not part of it.

        The entropy bonus keeps the stories varied: without it, and at a KL coefficient of 0.1, distinct-2 over all
        held-out stories fell to two thirds of its start.
        """
        prompts, held = self.root / "openings.jsonl", self.root / "held-out-openings.jsonl"
        write_atomic(prompts, jsonl_text([{"prompt": text} for text in self.train]))
        write_atomic(held, jsonl_text([{"prompt": text} for text in self.held_out]))
        return self._verb(
            "3-ppo", rl, RECIPES["ppo"],
            {
                "model": {"path": model},
                "data": {"path": str(prompts), "held_out_files": [str(held)]},
                "reward": {"parts": {"reward_model": {"model": reward}}, "normalise": True},
                "rollout": {
                    "prompts": 64, "samples": 2, "max_new_tokens": self.recipe.max_new_tokens,
                    "temperature": TEMPERATURE, "held_out": self.recipe.held_out,
                },
                "algorithm": {"beta": 0.15, "entropy_coef": 0.04, "epochs": 2, "minibatches": 4},
                "optimizer": {"lr": 3e-4, "warmup": 4},
                "critic": {"optimizer": {"lr": 5e-4}},
                "iterations": self.recipe.iterations,
                "run": {"eval_every": 5},
            },
        )  # fmt: skip

    def finish(self, started: float, reward: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
        """Judges the held-out stories of before and after by the gold reward, and prints what came of it."""
        before, after = self._held_samples()
        rows = read_jsonl(self.root / "3-ppo" / "metrics.jsonl")
        summary = {
            "seconds": round(time.monotonic() - started, 1),
            "reward_model_accuracy": reward["held_out/accuracy"],
            "reward_before": outcome["reward/total_before"],
            "reward_after": outcome["reward/total_after"],
            "gold_before": _mean(gold_scores(before)),
            "gold_after": _mean(gold_scores(after)),
            "kl": outcome["kl_after"],
            "perplexity_before": outcome["perplexity_before"],
            "perplexity_after": outcome["perplexity_after"],
            "distinct2_before": distinct_n(before, 2),
            "distinct2_after": distinct_n(after, 2),
            "ratio_gap": max(row.get("ratio_gap", 0.0) for row in rows),
            "model": outcome["model"],
            "findings": outcome["findings"],
        }
        write_atomic(self.root / "summary.json", json.dumps(summary, indent=1))
        report = self.root / "3-ppo" / "report.html"
        show_outcome(summary, list(zip(self.held_out, before, after, strict=True)), report)
        return summary

    def _held_samples(self) -> tuple[list[str], list[str]]:
        rows = read_jsonl(self.root / "3-ppo" / "samples.jsonl")
        last = max(row["step"] for row in rows)

        def at(step: int) -> list[str]:
            return [r["completion"] for r in sorted(rows, key=lambda r: r["index"]) if r["step"] == step]

        return at(0), at(last)

    def _verb(self, name: str, module: Any, recipe_class: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Runs a verb in its own folder, or returns the summary of the one that ran there before."""
        folder = self.root / name
        done = folder / "summary.json"
        if done.exists():
            summary = json.loads(done.read_text())
            if summary["finished"]:
                return summary
        run = {"dir": str(folder), "seed": self.recipe.seed, "threads": self.recipe.threads, "save_every": 20}
        recipe = recipe_class.model_validate({**values, "run": {**run, **values["run"]}})
        self.check()
        summary = module.run(recipe, resume=self.resume)
        self.check()
        return summary

    def check(self) -> None:
        """Raises SteersmanError where a signal asks for the end: all that was made until now is kept."""
        if self.signal:
            raise SteersmanError(f"stopped; go on with: steersman quickstart --dir {self.root} --resume")

    def _sample(self, path: str, texts: Sequence[str], n: int) -> list[Sample]:
        run = RunConfig(seed=self.recipe.seed, threads=self.recipe.threads)
        policy = policy_from(ModelConfig(path=path), run, self.device, trainable=False)
        codec = Codec(policy.tokenizer)
        prompts = [Prompt(codec.begin(text), text, index=i) for i, text in enumerate(texts)]
        rollout = RolloutConfig(max_new_tokens=self.recipe.max_new_tokens, temperature=TEMPERATURE)
        return open_generator(rollout, policy).generate(prompts, rollout.sampling(), n=n, seed=self.recipe.seed)


def show_outcome(summary: dict[str, Any], stories: Sequence[tuple[str, str, str]], report: Path) -> None:
    """The table of before and after, a few stories side by side, and where the rest is."""
    table = Table(title="What PPO changed, on openings that no stage has seen", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    rows = [
        ("gold score, 0 to 1 (the judge; never seen by PPO)", "gold", ".3f"),
        ("reward model's score (what PPO maximised)", "reward", ".3f"),
        ("perplexity under the starting model", "perplexity", ".2f"),
        ("distinct word pairs", "distinct2", ".3f"),
    ]
    for label, key, form in rows:
        table.add_row(label, f"{summary[f'{key}_before']:{form}}", f"{summary[f'{key}_after']:{form}}")
    table.add_row("KL to the starting model, nats per story", "0", f"{summary['kl']:.2f}")
    console = new_console()
    console.print(table)
    console.print(
        f"reward model: {summary['reward_model_accuracy']:.1%} of held-out pairs right. "
        f"Largest gap between sampled and trained log-probabilities: {summary['ratio_gap']:.1e} nats.\n"
    )
    step = max(1, len(stories) // 3)
    for opening, before, after in stories[::step][:3]:
        for label, text in (("before", before), ("after ", after)):
            console.print(Text.assemble((f"{label}  {_in_line(opening)}", "dim"), _in_line(text)))
        console.print()
    console.print(f"report   {report}\nmodel    {summary['model']}\n{summary['seconds']:.0f} seconds", soft_wrap=True)


def _in_line(text: str) -> str:
    return printable(text).replace("\n", " ")


def _say(step: str, what: str) -> None:
    new_console().rule(Text.assemble((step, "bold"), f"  {what}"), align="left")


def gold_scores(texts: Sequence[str]) -> list[float]:
    """The judge's scores, in [0, 1]; 0.5 is a neutral story."""
    return [judge(text).gold for text in texts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _whole_sentences(text: str) -> str | None:
    """The text up to its last full stop; None where not even two sentences came to an end."""
    end = max(text.rfind(mark) for mark in (".", "!", "?", '."', '!"'))
    whole = text[: end + 1]
    if whole.count('"') % 2:
        whole += '"'
    return whole if len(sentences(whole)) >= 2 else None

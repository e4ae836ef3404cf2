"""report.html of a run folder: one page without scripts or links, made from what the run left.

Works for any verb: it shows the curves, samples and findings that are there.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from steersman.atomic import write_atomic
from steersman.config.dump import flat_keys
from steersman.config.recipe_text import load_yaml
from steersman.extras import installed
from steersman.guards.terminal import printable
from steersman.jsonl import read_jsonl
from steersman.run.console import duration_text
from steersman.run.held_out import NONE_HELD_OUT, looks_are_trained_on
from steersman.run.report.charts import SERIES, Line, line_chart
from steersman.types import SteersmanError

# First part of a metric's name -> (title, what to look for). The order here is the order on the page.
GROUPS: dict[str, tuple[str, str]] = {
    "reward": ("Reward", "by part; all parts should rise, or at least none should pay for another"),
    "reward_se": ("Standard error of the reward at looks", "1.96 of it to each side of the mean are a 95% interval"),
    "accuracy": ("Accuracy", "share judged right"),
    "evaluation": (
        "Evaluation",
        "metrics of answers, and tasks; 1.96 of a stderr to each side are a 95% interval",
    ),
    "margin": ("Margin", "by how much the better one leads"),
    "kl": ("KL to the reference", "nats per response; a steady climb is a policy that walks away"),
    "coefficient": ("Coefficients", ""),
    "entropy": ("Entropy", "nats per token; near 0 the policy no longer explores"),
    "length": ("Length", "tokens"),
    "finish": ("How responses ended", "shares"),
    "text": ("Variety of the text", "distinct-2 falling and repetition rising is collapse"),
    "loss": ("Losses", ""),
    "perplexity": ("Perplexity", ""),
    "explained_variance": ("Explained variance of the critic", "1 is perfect, below 0 is worse than a constant"),
    "ratio_gap": ("Gap between rollout and training", "largest difference of log-probabilities, nats"),
    "clip": ("Clipping", "share of tokens"),
    "ratio": ("Probability ratio", ""),
    "grad_norm": ("Gradient norms", ""),
    "lr": ("Learning rates", ""),
    "throughput": ("Throughput", "per second"),
    "seconds": ("Where the time goes", "seconds"),
}
LOG_SCALE = {"ratio_gap", "lr"}


@dataclass(slots=True)
class Chart:
    title: str
    note: str
    svg: Markup
    legend: list[tuple[str, str]]
    """Name and last value of each line, in the order of the colours; of a line that lies on another, which."""
    left_out: int = 0


@dataclass(slots=True)
class Pair:
    """One held prompt: its first and its last answer, and the ones between."""

    prompt: str
    before: dict[str, Any]
    after: dict[str, Any]
    rewards: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Name, before, after, and "up", "down" or "same"."""
    between: list[dict[str, Any]] = field(default_factory=list)


def write_report(folder: Path) -> Path:
    """Writes `report.html` into the run folder and gives its path.

    Raises SteersmanError where the folder holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SteersmanError(f"run folder {folder}: there is no such folder")
    if not any(
        (folder / name).exists() for name in ("metrics.jsonl", "summary.json", "samples.jsonl", "config.yaml")
    ):
        raise SteersmanError(f"run folder {folder}: it holds no run (no metrics, samples, summary or config)")
    metrics, summary = _rows(folder / "metrics.jsonl"), _summary(folder / "summary.json")
    compared, single = summary_rows({k: v for k, v in summary.items() if k != "verb"})
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steersman.run.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_written_out,
    )  # fmt: skip
    config = folder / "config.yaml"
    told = _told(config)
    on_training_data = looks_are_trained_on(told, metrics)
    page = environment.get_template("report.html.j2").render(
        name=folder.resolve().name,
        verb=str(summary.get("verb", "")),
        written=datetime.now().strftime("%d %B %Y, %H:%M"),
        steps=max((int(row.get("step", 0)) for row in metrics), default=0),
        duration=_duration(metrics, summary),
        setup=[*setup(told), *([("looks", NONE_HELD_OUT)] if on_training_data else [])],
        compared=compared,
        single=single,
        findings=findings(_rows(folder / "health.jsonl")),
        charts=charts(metrics, looks="trained on" if on_training_data else "held out"),
        drawn=installed("matplotlib"),
        pairs=[p for name in ("samples", "evaluation") for p in sample_pairs(_rows(folder / f"{name}.jsonl"))],
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        show=_show,
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _written_out(value: Any) -> Any:
    """Text of others with its control characters and direction marks written out; what is HTML of ours stays."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _told(config: Path) -> dict[str, Any]:
    """The recipe in a config.yaml; empty where it can not be read."""
    try:
        return _section(load_yaml(config.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def setup(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was trained, on what and with which versions, as (name, text), from the run's recipe."""
    if not told:
        return []
    model, data, run = (_section(told.get(name)) for name in ("model", "data", "run"))
    rows = [("environment", told.get("env")), ("method", told.get("algorithm") if "env" in told else None)]
    if model:
        lora = model.get("lora")
        trained = "all weights" if not lora else f"adapters of rank {lora.get('r')}, alpha {lora.get('alpha')}"
        rows += [("model", model.get("path")), ("trained", f"{trained}, in {model.get('dtype')}")]
    rows += [("data", data.get("path")), ("seed", run.get("seed"))]
    rows += [("versions", ", ".join(f"{name} {version(name)}" for name in ("steersman", "torch", "transformers")))]
    return [(name, _show(value)) for name, value in rows if value is not None]


def _section(told: Any) -> dict[str, Any]:
    return told if isinstance(told, dict) else {}


def charts(metrics: Sequence[Mapping[str, Any]], *, looks: str = "held out") -> list[Chart]:
    """One chart per group of metrics that has at least one finite point, in the order of GROUPS; `looks` is said of
    those that were measured at looks.

    There is none where matplotlib is not installed.
    """
    if not installed("matplotlib"):
        return []
    lines: dict[str, dict[str, Line]] = {}
    for row in metrics:
        for key, raw in row.items():
            value = _number(raw)
            if key in ("step", "seconds") or value is None or not math.isfinite(value):
                continue
            line = lines.setdefault(_group(key), {}).setdefault(key, Line(_label(key, looks), [], []))
            line.steps.append(float(row.get("step", 0)))
            line.values.append(value)
    order = [*(g for g in GROUPS if g in lines), *sorted(g for g in lines if g not in GROUPS)]
    return [_chart(group, lines[group]) for group in order]


def _chart(group: str, found: Mapping[str, Line]) -> Chart:
    title, note = GROUPS.get(group, (group.replace("_", " ").capitalize(), ""))
    # The sum first, then by name; the health of a chart is that its lines can be told apart.
    ordered = [found[k] for k in sorted(found, key=lambda k: (not k.endswith("/total") and k != group, k))]
    shown = ordered[:SERIES]
    svg = line_chart(group, shown, log=group in LOG_SCALE, label=title)
    label = f'<svg role="img" aria-label="{html.escape(title)}: {html.escape(", ".join(x.name for x in shown))}"'
    legend = [(line.name, _last(line, shown[:i])) for i, line in enumerate(shown)]
    return Chart(title, note, Markup(svg.replace("<svg", label, 1)), legend, len(ordered) - len(shown))


def _last(line: Line, before: Sequence[Line]) -> str:
    """The last value, and the first of the lines `before` that this one can't be seen beside."""
    same = next((x.name for x in before if (x.steps, x.values) == (line.steps, line.values)), None)
    return _show(line.values[-1]) + ("" if same is None else f", lies on {same}")


def _group(key: str) -> str:
    """The chart that a metric belongs to; coefficients are not of the scale of what they weigh."""
    parts = [p for p in key.split("/") if p != "held_out"] or [key]
    return "coefficient" if parts[-1] in ("coefficient", "beta") else parts[0]


def _label(key: str, looks: str) -> str:
    parts = [p for p in key.split("/") if p != "held_out"]
    name = printable(" ".join(parts[1:] or parts).replace("_", " "))
    return f"{name} ({looks})" if "held_out" in key.split("/") else name


def summary_rows(summary: Mapping[str, Any]) -> tuple[list[tuple[str, Any, Any]], list[tuple[str, Any]]]:
    """The summary as (name, before, after) where there are both, and (name, value) for the rest."""
    flat = flat_keys(summary, between=" ")
    compared, single = [], []
    for key, value in flat.items():
        stem = key.removesuffix("_before")
        if key.endswith("_before") and f"{stem}_after" in flat:
            compared.append((stem.replace("_", " "), value, flat[f"{stem}_after"]))
        elif not (key.endswith("_after") and f"{key.removesuffix('_after')}_before" in flat):
            single.append((key.replace("_", " "), value))
    return compared, single


def sample_pairs(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """The answers to each held prompt, first and last, with their rewards."""
    by_prompt: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault((row.get("index"), row.get("prompt")), []).append(
            {"step": 0, "completion": "", "finish": "", **row}
        )
    pairs = []
    for (_, prompt), answers in by_prompt.items():
        answers.sort(key=lambda r: r.get("step", 0))
        first, last = answers[0], answers[-1]
        pair = Pair(str(prompt or ""), first, last, between=answers[1:-1])
        before, after = _rewards(first), _rewards(last)
        for name in dict.fromkeys([*before, *after]):
            a, b = before.get(name), after.get(name)
            way = "same" if a is None or b is None else "up" if b > a else "down" if b < a else "same"
            pair.rewards.append((name, _show(a), _show(b), way))
        pairs.append(pair)
    return pairs


def findings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per code: when it was first and last said, how often, and the last sentence."""
    by_code: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = by_code.setdefault(
            str(row.get("code")), {"code": str(row.get("code")), "first": row.get("step"), "times": 0}
        )
        entry |= {"last": row.get("step"), "times": entry["times"] + 1}
        entry |= {"text": row.get("text", ""), "severity": row.get("severity", "note")}
    rank = {"stop": 0, "warning": 1, "note": 2}
    return sorted(by_code.values(), key=lambda e: rank.get(e["severity"], 3))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file whose step is a number that can be drawn; a run of somebody else's may hold others."""
    return [row for row in read_jsonl(path) if type(row.get("step", 0)) is int and abs(row.get("step", 0)) < 2**53]


def _rewards(row: Mapping[str, Any]) -> dict[str, float]:
    reward = row.get("reward", {})
    if not isinstance(reward, Mapping):
        reward = {"reward": reward}
    numbers = {str(k): _number(v) for k, v in reward.items()}
    return {k: v for k, v in numbers.items() if v is not None}


def _summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    """The value as a float; "nan" and "inf" are numbers that JSON could not hold."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _show(value: Any) -> str:
    """A value to read: four figures, thousands set apart, a real minus sign."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        small = value != 0 and abs(value) < 1e-3
        text = (
            f"{value:.2e}" if small or abs(value) >= 1e7 else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        )
        return text.replace("-", "−")
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(v) for v in value) or "none"
    return str(value)


def _duration(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    seconds = _number(summary.get("seconds")) or (_number(metrics[-1].get("seconds")) if metrics else None)
    if seconds is None or not math.isfinite(seconds):
        return ""
    return duration_text(seconds)

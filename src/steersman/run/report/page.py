"""report.html of a run folder: one page without scripts or links, made from what the run left.

Works for any verb: it shows the curves, samples and findings that are there.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
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
from steersman.run.report.charts import SERIES, Line, line_chart, never_moves, typeset
from steersman.types import SteersmanError

# First part of a metric's name -> (title, what to look for). The order here is the order on the page.
GROUPS: dict[str, tuple[str, str]] = {
    "reward": ("Reward", "by part; all parts should rise, or at least none should pay for another"),
    "implicit_reward": ("Implicit reward", "liked answers should come to lead disliked ones"),
    "reward_se": ("Standard error of the reward at looks", "1.96 of it to each side of the mean are a 95% interval"),
    "accuracy": ("Accuracy", "share judged right"),
    "auc": ("Area under the ROC curve", "how often a good answer is ranked above a bad one; 0.5 is guessing"),
    "human": ("What people chose", "share in which the candidate favours it"),
    "win_rate": ("Win rate", "share of comparisons that are won"),
    "evaluation": (
        "Evaluation",
        "metrics of answers, and tasks; 1.96 of a stderr to each side are a 95% interval",
    ),
    "margin": ("Margin", "by how much the better one leads"),
    "drift": ("Drift from the reference", "log-probability of answers less the reference's, nats"),
    "logp": ("Log-probability of the answers", "nats"),
    "kl": ("KL to the reference", "nats per response; a steady climb is a policy that walks away"),
    "kl_old": (
        "KL to the sampling policy",
        "nats per token or step; only rounding where each sample is used for one update",
    ),
    "teacher_kl": ("KL to the teacher", "nats"),
    "coefficient": ("Coefficients of the KL penalty", ""),
    "entropy": ("Entropy", "nats per token; near 0 the policy no longer explores"),
    "length": ("Length", "tokens, or steps of an environment"),
    "finish": ("How responses ended", "shares"),
    "text": ("Variety of the text", "distinct-2 falling and repetition rising is collapse"),
    "loss": ("Losses", ""),
    "loss_last_token": ("Loss at the last token", "nats; high where the model does not know when to end"),
    "perplexity": ("Perplexity", ""),
    "router_loss": ("Loss of the routers", "the number of experts that a token passes, where all are in equal use"),
    "explained_variance": ("Explained variance of the critic", "1 is perfect, below 0 is worse than a constant"),
    "value": ("Values", "what is expected of the rest of an episode"),
    "ratio_gap": ("Gap between rollout and training", "largest difference of log-probabilities, nats"),
    "clip_fraction": ("Clipping", "share of tokens or steps whose ratio is outside the clip range"),
    "off_policy_fraction": ("Too far off policy", "share of tokens that are left out"),
    "score": ("Scores", ""),
    "grad_norm": ("Gradient norms", ""),
    "lr": ("Learning rates", ""),
    "throughput": ("Throughput", "tokens per second"),
    "time": ("Where the time goes", "seconds"),
}
LOG_SCALE = {"ratio_gap"}
PLACED = {
    "kl/old": "kl_old", "distinct2": "text", "accuracy_longer_wins": "accuracy", "score_mean": "score",
    "score_std": "score", "teacher_kl_se": "teacher_kl",
}  # fmt: skip
"""Charts of numbers that do not belong in the one that the first part of their name says."""


@dataclass(slots=True)
class Chart:
    title: str
    note: str
    svg: Markup
    legend: list[tuple[str, str]]
    """Name and last value of each line, in the order of the colours; of a line that lies on another, which."""
    left_out: int = 0


@dataclass(slots=True)
class Table:
    """Rows that a summary has, such as the players of an arena: what is one number or text in each of them."""

    name: str
    columns: list[str]
    rows: list[list[Any]]


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
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steersman.run.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_written_out,
    )  # fmt: skip
    config = folder / "config.yaml"
    told = _told(config)
    on_training_data = looks_are_trained_on(told, metrics)
    looks = "trained on" if on_training_data else "held out"
    first_look = metrics[0] if len(metrics) > 1 and metrics[0].get("step") == 0 else {}
    tables = summary_tables(summary)
    told_apart = {"verb", *(table.name for table in tables)}
    compared, single = summary_rows(
        {k: v for k, v in summary.items() if k not in told_apart}, first_look, looks=looks
    )
    page = environment.get_template("report.html.j2").render(
        name=folder.resolve().name,
        verb=str(summary.get("verb", "")),
        written=datetime.now().strftime("%d %B %Y, %H:%M"),
        steps=max((int(row.get("step", 0)) for row in metrics), default=0),
        duration=_duration(metrics, summary),
        setup=[*setup(told), *([("looks", NONE_HELD_OUT)] if on_training_data else [])],
        compared=compared,
        single=single,
        tables=tables,
        of_best=_section(told.get("train")).get("keep") == "best" or bool(told.get("stop")),
        findings=findings(_rows(folder / "health.jsonl")),
        charts=charts(metrics, looks=looks),
        unmoved=unmoved(metrics, looks=looks),
        drawn=installed("matplotlib"),
        calibration=_base64(folder / "calibration.png"),
        pairs=[p for name in ("samples", "evaluation") for p in sample_pairs(_rows(folder / f"{name}.jsonl"))],
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        show=_show,
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _base64(picture: Path) -> str:
    """The file as base64; empty where there is none."""
    return base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""


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
    """One chart per group of metrics of which at least one moves, in the order of GROUPS; `looks` is said of those
    that were measured at looks. The others are what `unmoved` tells.

    There is none where matplotlib is not installed.
    """
    if not installed("matplotlib"):
        return []
    groups = _grouped(metrics, looks).items()
    return [_chart(group, found) for group, found in groups if not all(map(never_moves, found.values()))]


def unmoved(metrics: Sequence[Mapping[str, Any]], *, looks: str = "held out") -> list[tuple[str, str]]:
    """Title with name, and the value, of every metric of a chart that would have but level lines or single points."""
    rows = []
    for group, found in _grouped(metrics, looks).items():
        if all(map(never_moves, found.values())):
            title, same = _title(group), group.replace("_", " ")
            named = [(title if x.name == same else f"{title}: {x.name}", x) for x in _ordered(found)]
            rows += [(name, _show(line.values[-1])) for name, line in named]
    return rows


def _grouped(metrics: Sequence[Mapping[str, Any]], looks: str) -> dict[str, dict[str, Line]]:
    """The lines of each chart by the names of their metrics, in the order of GROUPS."""
    lines: dict[str, dict[str, Line]] = {}
    for row in metrics:
        for key, raw in row.items():
            value = _number(raw)
            if key in ("step", "seconds") or value is None or not math.isfinite(value):
                continue
            line = lines.setdefault(_group(key), {}).setdefault(key, Line(_label(key, looks), [], []))
            line.steps.append(float(row.get("step", 0)))
            line.values.append(value)
    if {"reward/liked", "reward/disliked"} & lines.get("reward", {}).keys() and "reward/total" not in lines["reward"]:
        lines["implicit_reward"] = lines.pop("reward")
    return {group: lines[group] for group in sorted(lines, key=_place)}


def _place(group: str) -> tuple[int, str]:
    """Where a group stands on the page; those without a place of their own come last, by name."""
    order = list(GROUPS)
    return (order.index(group), "") if group in GROUPS else (len(order), group)


def _title(group: str) -> str:
    return GROUPS.get(group, (printable(group.replace("_", " ").capitalize()), ""))[0]


def _ordered(found: Mapping[str, Line]) -> list[Line]:
    """The sum first, then by name; what was measured in training, and beside it the same at looks."""

    def order(key: str) -> tuple[bool, str, bool]:
        parts = [p for p in key.split("/") if p != "held_out"]
        return parts[-1] != "total" and len(parts) > 1, "/".join(parts), "held_out" in key.split("/")

    return [found[key] for key in sorted(found, key=order)]


def _chart(group: str, found: Mapping[str, Line]) -> Chart:
    title, note = _title(group), GROUPS.get(group, ("", ""))[1]
    ordered = _ordered(found)
    shown = ordered[:SERIES]  # the health of a chart is that its lines can be told apart
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
    placed = PLACED.get("/".join(parts), parts[0])
    return "coefficient" if parts[-1] in ("coefficient", "beta") else placed


def _label(key: str, looks: str) -> str:
    parts = [p for p in key.split("/") if p != "held_out"]
    told = parts if "/".join(parts) in PLACED else parts[1:] or parts
    name = printable(" ".join(told).replace("_", " "))
    return f"{name} ({looks})" if "held_out" in key.split("/") else name


def summary_rows(
    summary: Mapping[str, Any], first_look: Mapping[str, Any], *, looks: str = "held out"
) -> tuple[list[tuple[str, Any, Any]], list[tuple[str, Any]]]:
    """The summary as (name, before, after) where there are both, and (name, value) for the rest.

    What was before is in the summary itself, as `NAME_before` beside `NAME_after`, or in the `first_look`, the row of
    metrics from before the first step. Those with both come in the order of their charts.
    """
    flat = flat_keys(summary, between=" ")
    compared, single = {}, []
    for key, value in flat.items():
        stem, before = key.removesuffix("_before"), _number(first_look.get(key))
        if key.endswith("_before") and f"{stem}_after" in flat:
            compared[stem] = (stem.replace("_", " "), value, flat[f"{stem}_after"])
        elif key.endswith("_after") and f"{key.removesuffix('_after')}_before" in flat:
            continue
        elif key != "seconds" and before is not None and _number(value) is not None:
            compared[key] = (_said(key, looks), before, value)
        else:
            single.append((_said(key, looks), value))
    return [compared[key] for key in sorted(compared, key=lambda key: _place(_group(key)))], single


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The lists of the summary whose entries have names for what they hold."""
    tables = []
    for name, rows in summary.items():
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            nested = {key for row in rows for key, value in row.items() if isinstance(value, (Mapping, list))}
            columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in nested]
            tables.append(Table(name, columns, [[row.get(key) for key in columns] for row in rows]))
    return tables


def _said(key: str, looks: str) -> str:
    """The name of a number of the summary, which is of looks where its key says so."""
    name = key.removeprefix("held_out/")
    return name.replace("_", " ") + (f" ({looks})" if name != key else "")


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
        if (value != 0 and abs(value) < 1e-3) or abs(value) >= 1e7:
            return typeset(re.sub(r"\.?0*e", "e", f"{value:.2e}"))
        return typeset(f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}")
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(v) for v in value) or "none"
    return str(value)


def _duration(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    seconds = _number(summary.get("seconds")) or (_number(metrics[-1].get("seconds")) if metrics else None)
    if seconds is None or not math.isfinite(seconds):
        return ""
    return duration_text(seconds)

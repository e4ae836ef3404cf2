"""What a run resolved, told before it starts; and everything that will not work, told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from steersman.run.terminal import printable
from steersman.types import SteersmanError

Segment = tuple[str, bool]
"""A piece of a training sample, and whether it counts in the loss."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A rough estimate of one role's peak memory, in bytes."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.cache


@dataclass(frozen=True, slots=True)
class Role:
    """One model of the run: "actor", "critic", ...; `source` is its path or which role it shares weights with."""

    name: str
    source: str
    parameters: int
    trained: int = 0
    memory: Memory = field(default_factory=Memory)


def weight_memory(
    parameters: int, trained: int, *, weight_bytes: int = 4, optimizer_bytes: int = 8
) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, optimizer state): Adam in float32 keeps two moments, 8 bytes a weight."""
    return parameters * weight_bytes, trained * weight_bytes, trained * optimizer_bytes


def activation_memory(
    *, tokens: int, hidden: int, layers: int, heads: int, length: int, logit_rows: int, vocabulary: int,
    element_bytes: int = 4, trained: bool = True,
) -> int:  # fmt: skip
    """Bytes of activations of one micro-batch of `tokens` tokens in rows of `length`, and of one chunk of logits.

    A layer keeps 34 * hidden / 2 elements per token for its backward pass; attention scores are counted for
    one layer only, since fused attention makes them again. Without training one layer at a time lives.
    `logit_rows` rows of the vocabulary exist at once, in float32, with their gradient.
    Source: Korthikanti et al. 2022, arXiv 2205.05198, eq. 1 (there in bytes at 16 bits, with dropout masks).
    """
    per_layer = 17 * hidden * tokens * element_bytes
    scores = heads * length * tokens * element_bytes
    logits = logit_rows * vocabulary * 4 * (2 if trained else 1)
    return per_layer * (layers if trained else 1) + scores + logits


def cache_memory(*, layers: int, kv_heads: int, head_dim: int, rows: int, length: int, element_bytes: int = 4) -> int:
    """Bytes of keys and values while sampling `rows` sequences of up to `length` tokens."""
    return 2 * layers * kv_heads * head_dim * rows * length * element_bytes


class Preflight:
    """Gathers what a run resolved and what is wrong with it; `check` refuses, `show` prints."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.facts: list[tuple[str, str]] = []
        self.roles: list[Role] = []
        self.samples: list[list[Segment]] = []
        self.problems: list[str] = []

    def fact(self, name: str, value: str | int) -> None:
        """A line such as ("prompts per iteration", 64) or ("data", "2,200 rows of plain text from a.jsonl")."""
        self.facts.append((name, f"{value:,}" if isinstance(value, int) else value))

    def role(self, role: Role) -> None:
        self.roles.append(role)

    def sample(self, segments: Sequence[Segment]) -> None:
        """A rendered training sample; pieces that do not count in the loss are dimmed."""
        self.samples.append(list(segments))

    def refuse(self, problem: str) -> None:
        """Something that will not work, with what to do about it."""
        self.problems.append(problem)

    def check(self) -> None:
        """Raises one SteersmanError with all problems, where there are any."""
        refusals(self.problems)

    def show(self, console: Console | None = None) -> None:
        console = console or Console()
        console.print(Group(*self._parts(console.is_terminal)))

    def _parts(self, color: bool) -> list[Text | Table | Panel]:
        parts: list[Text | Table | Panel] = [Text(printable(self.title), style="bold")]
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        for name, value in self.facts:
            grid.add_row(Text(printable(name)), Text(printable(value)))
        parts.append(grid)
        if self.roles:
            parts += [Text(), _role_table(self.roles)]
        for number, segments in enumerate(self.samples[:3], 1):
            legend = "dim: not in the loss" if color else "[[...]]: not in the loss"
            parts.append(Panel(_render(segments, color), title=f"sample {number} ({legend})", title_align="left"))
        return parts


def refusals(problems: Sequence[str]) -> None:
    """Raises one SteersmanError that lists all problems, where there are any."""
    if len(problems) == 1:
        raise SteersmanError(problems[0])
    if problems:
        raise SteersmanError(f"{len(problems)} problems:" + "".join(f"\n  - {p}" for p in problems))


def size(bytes_: int) -> str:
    """A size to read: 812 B, 31 KiB, 1.4 MiB, 12.0 GiB."""
    value = float(bytes_)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def count(number: int) -> str:
    """A number of parameters to read: 260 k, 5.1 M, 1.2 B."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.{0 if number >= 100 * limit else 1}f} {unit}"
    return str(number)


def _role_table(roles: Sequence[Role]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", no_wrap=True)
    for name in ("parameters", "trained", "peak, about"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("of which, and where from")
    for role in roles:
        kinds = ("weights", "gradients", "optimizer", "activations", "cache")
        shares = ", ".join(f"{k} {size(getattr(role.memory, k))}" for k in kinds if getattr(role.memory, k))
        trained = count(role.trained) if role.trained else "-"
        peak = size(role.memory.total) if role.memory.total else "-"
        origin = Text(f"{shares}\n" if shares else "").append(printable(role.source), style="dim")
        table.add_row(role.name, count(role.parameters), trained, peak, origin)
    table.add_row("together", "", "", size(sum(role.memory.total for role in roles)), "", style="bold")
    return table


def _render(segments: Sequence[Segment], color: bool) -> Text:
    """Pieces that count plainly, the others dim; where there is no colour, in double brackets."""
    text = Text()
    for piece, counts in segments:
        piece = printable(piece)
        shown = (
            piece if len(piece) <= 1500 else f"{piece[:700]} [... {len(piece) - 1400} characters ...] {piece[-700:]}"
        )
        if counts or color:
            text.append(shown, style=None if counts else "dim")
        else:
            text.append(f"[[{shown}]]")
    return text

"""What a run resolved, told before it starts; and everything that will not work, told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from steersman.guards.terminal import printable
from steersman.run.console import new_console
from steersman.types import SteersmanError

Segment = tuple[str, bool]
"""A piece of a training sample, and whether it counts in the loss."""


@dataclass(frozen=True, slots=True)
class Role:
    """One model of the run: "actor", "critic", ...; `source` is its path or which role it shares weights with.

    `weights`, `gradients` and `optimizer` are the bytes of what it has for its parameters.
    """

    name: str
    source: str
    parameters: int
    trained: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run, such as "update", and the bytes that it has at once, by what they are for."""

    name: str
    shares: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.shares.values())


class Preflight:
    """Gathers what a run resolved and what is wrong with it; `check` refuses, `show` prints."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.facts: list[tuple[str, str]] = []
        self.roles: list[Role] = []
        self.phases: list[Phase] = []
        self.samples: list[list[Segment]] = []
        self.problems: list[str] = []

    def fact(self, name: str, value: str | int) -> None:
        """A line such as ("prompts per iteration", 64) or ("data", "2,200 rows of plain text from a.jsonl")."""
        self.facts.append((name, f"{value:,}" if isinstance(value, int) else value))

    def role(self, role: Role) -> None:
        self.roles.append(role)

    def phase(self, phase: Phase) -> None:
        self.phases.append(phase)

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
        console = console or new_console()
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
        if self.phases:
            parts += [Text(), _phase_table(self.phases)]
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
    table = _table("model", "parameters", "trained", "memory")
    table.add_column("of which, and where from")
    for role in roles:
        held = {"weights": role.weights, "gradients": role.gradients, "optimizer": role.optimizer}
        trained = count(role.trained) if role.trained else "-"
        total = size(sum(held.values())) if role.weights else "-"
        origin = Text(f"{shares}\n" if (shares := _shares(held)) else "").append(printable(role.source), style="dim")
        table.add_row(role.name, count(role.parameters), trained, total, origin)
    return table


def _phase_table(phases: Sequence[Phase]) -> Table:
    """Phases do not add up: what one of them needs for itself is given back before the next."""
    table = _table("phase", "memory, about")
    table.add_column("of which")
    for phase in phases:
        table.add_row(phase.name, size(phase.total), _shares(phase.shares))
    table.add_row("peak", size(max(phase.total for phase in phases)), "", style="bold")
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _shares(shares: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(bytes_)}" for name, bytes_ in shares.items() if bytes_)


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

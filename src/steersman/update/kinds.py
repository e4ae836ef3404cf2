"""Kinds of optimizers, and how their updates are kept in weights of half precision.

An update of AdamW is about as large as the learning rate, whatever the weight. A bfloat16 number of size 0.05 has
neighbours 0.0002 away, so a rate of 1e-6 rounds to nothing, step after step. `Rounded` computes every update in
float32 and keeps what the weight itself can not hold.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steersman.distributed.pieces import shard_moments
from steersman.ops.rounding import stochastic
from steersman.types import SteersmanError

Kind = Literal["adamw", "adamw-8bit", "adamw-8bit-paged", "adafactor", "lion", "lion-8bit", "muon"]
Rounding = Literal["master", "kahan", "stochastic", "nearest"]
Group = dict[str, Any]

SMALL = 4096
"""Tensors of fewer elements keep moments of 32 bits in 8-bit optimizers."""


class Several:
    """Optimizers that step together, with the interface of one."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[Group]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            restore(part, saved)


class Rounded:
    """An optimizer of half-precision weights: each update in float32, and its remainder kept as `rounding` says.

    master: w32 <- w32 - u, w <- round(w32), with w32 kept (mixed precision, arXiv 1710.03740, section 3.1).
    kahan: w32 = w + c; w <- round(w32 - u); c <- (w32 - u) - w in the weight's own precision (arXiv 2010.06192,
    algorithm 1; departure: the update itself is float32). stochastic: w32 = w; w <- one of the two neighbours of
    w32 - u, with the probability that makes the mean exact (ibid., section 3). nearest: w <- round(w32 - u).

    Moments are float32. One weight at a time is widened, so the others cost nothing meanwhile. Raises SteersmanError
    for stochastic rounding of float16, and for `nearest` where most weights would not move at the peak rate.
    """

    def __init__(self, groups: Iterable[Group], config: Any, tables: Collection[int] = ()) -> None:
        self.rounding: Rounding = config.rounding
        self.parts: list[tuple[nn.Parameter, nn.Parameter, Any]] = []
        self.remainders: list[Tensor] = []
        self.updates = 0
        for group in groups:
            for p in group["params"]:
                self._add(p, group["weight_decay"], config, id(p) in tables)
        self._require_movement(config.lr)

    def _add(self, p: nn.Parameter, weight_decay: float, config: Any, table: bool) -> None:
        if self.rounding == "stochastic" and p.dtype != torch.bfloat16:
            raise SteersmanError(f"optimizer.rounding stochastic rounds to bfloat16, and the weights are {p.dtype}")
        shell = nn.Parameter(p.detach().float())
        inner = _made([{"params": [shell], "weight_decay": weight_decay}], config, [id(shell)] if table else [])
        self.parts.append((p, shell, inner))
        if self.rounding == "kahan":
            self.remainders.append(torch.zeros_like(p))
        if self.rounding != "master":
            shell.data = shell.data.new_empty(0)

    def _require_movement(self, lr: float) -> None:
        if self.rounding != "nearest":
            return
        weights = [p for p, _, _ in self.parts]
        stuck = sum(int((half_gap(p) > lr).sum()) for p in weights) / max(sum(p.numel() for p in weights), 1)
        if stuck > 0.5:
            raise SteersmanError(
                f"optimizer.rounding nearest: at a rate of {lr:g}, {stuck:.0%} of the {weights[0].dtype} weights are "
                "too large to be moved by an update of that size; use master, kahan or stochastic, or float32 weights"
            )

    @property
    def param_groups(self) -> list[Group]:
        return [group for _, _, inner in self.parts for group in inner.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        self.updates += 1
        for place, (p, shell, inner) in enumerate(self.parts):
            if p.grad is None:
                continue
            if self.rounding != "master":
                shell.data = p.float() + (self.remainders[place].float() if self.rounding == "kahan" else 0)
            shell.grad = p.grad.float()
            inner.step()
            self._keep(place, p, shell.data)
            shell.grad = None
            if self.rounding != "master":
                shell.data = shell.data.new_empty(0)

    def _keep(self, place: int, p: nn.Parameter, wide: Tensor) -> None:
        if self.rounding == "stochastic":
            generator = torch.Generator(device=p.device).manual_seed((self.updates << 20) + place)
            wide = stochastic(wide, torch.bfloat16, generator)
        p.copy_(wide)
        if self.rounding == "kahan":
            self.remainders[place].copy_(wide - p.float())

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p, _, _ in self.parts:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        kept = self.remainders if self.rounding == "kahan" else [shell.data for _, shell, _ in self.parts]
        return {
            "updates": self.updates,
            "kept": [x.detach() for x in kept],
            "inner": [inner.state_dict() for _, _, inner in self.parts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = self.remainders if self.rounding == "kahan" else [shell.data for _, shell, _ in self.parts]
        for mine, saved in zip(kept, state["kept"], strict=True):
            mine.copy_(saved)
        for (_, _, inner), saved in zip(self.parts, state["inner"], strict=True):
            restore(inner, saved)
        self.updates = state["updates"]


def steps_of(groups: Sequence[Group], config: Any, tables: Iterable[Tensor] = ()) -> Any:
    """What steps over the groups (`params`, `weight_decay`) as an `OptimizerConfig` asks.

    Weights of float32 and wider go by the kind itself, those of half precision by `Rounded`. `tables` are the
    weights that Muon leaves to AdamW whatever their shape: embeddings, output layers, adapters and stacked vectors.

    Raises SteersmanError where the kind's package is missing.
    """
    apart = {id(p) for p in tables}
    wide, half = (_where(groups, lambda p, want=want: (p.element_size() < 4) == want) for want in (False, True))
    parts = [make(some, config, apart) for make, some in ((_made, wide), (Rounded, half)) if some]
    return parts[0] if len(parts) == 1 else Several(parts)


def restore(steps: Any, saved: dict[str, Any]) -> None:
    """Puts back what the `state_dict` of `steps_of`'s answer was, each moment laid out as its weight is."""
    if "state" in saved:
        saved = shard_moments(saved, [p for group in steps.param_groups for p in group["params"]])
    steps.load_state_dict(saved)


def state_bytes(parameters: Iterable[Tensor], config: Any, tables: Iterable[Tensor] = ()) -> int:
    """Bytes that the optimizer keeps for these parameters: moments, and what half-precision weights can not hold.
    `tables` are those of `steps_of`."""
    kept, apart = {"master": 4, "kahan": 2}.get(config.rounding, 0), {id(p) for p in tables}
    return sum(
        round(_moments(p, config.kind, apart)) + (kept * p.numel() if p.element_size() < 4 else 0) for p in parameters
    )


def half_gap(p: Tensor) -> Tensor:
    """Half the distance from each number to the next: a smaller change rounds to none."""
    return torch.ldexp(
        torch.full_like(p, torch.finfo(p.dtype).eps, dtype=torch.float32), torch.frexp(p.float())[1] - 2
    )


def _moments(p: Tensor, kind: str, tables: Collection[int]) -> float:
    size, wide = p.numel(), max(p.element_size(), 4)
    if kind == "adafactor":
        return wide * (size / p.shape[-1] + size / p.shape[-2] if p.dim() > 1 else size)
    if kind in ("lion", "lion-8bit"):
        return size * (1.02 if kind == "lion-8bit" and size >= SMALL else wide)
    if kind.startswith("adamw-8bit") and size >= SMALL:
        return size * 2.04
    return size * wide * (1 if kind == "muon" and _muon_takes(p, tables) else 2)


def _where(groups: Sequence[Group], takes: Callable[[nn.Parameter], bool]) -> list[Group]:
    """The groups with the parameters that are taken, those with none left out."""
    found = [group | {"params": [p for p in group["params"] if takes(p)]} for group in groups]
    return [group for group in found if group["params"]]


def _made(groups: Sequence[Group], config: Any, tables: Collection[int]) -> Any:
    """The kind's own optimizer; `tables` are the ids of weights that Muon leaves to AdamW."""
    betas = (config.beta1, config.beta2)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    if config.kind == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    if config.kind == "muon":
        return _muon(groups, config, tables)
    optim = _bitsandbytes().optim
    if config.kind.startswith("lion"):
        return (optim.Lion8bit if config.kind == "lion-8bit" else optim.Lion)(groups, lr=config.lr, betas=betas)
    made = optim.PagedAdamW8bit if config.kind == "adamw-8bit-paged" else optim.AdamW8bit
    return made(groups, lr=config.lr, betas=betas, eps=config.eps)


def _muon(groups: Sequence[Group], config: Any, tables: Collection[int]) -> Any:
    """Muon over matrices (arXiv 2502.16982, eq. 4: its updates have AdamW's size, so it takes AdamW's rates), AdamW
    over the rest."""
    hidden, rest = (_where(groups, lambda p, want=want: _muon_takes(p, tables) == want) for want in (True, False))
    parts: list[Any] = []
    if hidden:
        parts.append(torch.optim.Muon(hidden, lr=config.lr, momentum=config.beta1, adjust_lr_fn="match_rms_adamw"))
    if rest:
        adamw = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        parts.append(torch.optim.AdamW(rest, **adamw, fused=True))
    return parts[0] if len(parts) == 1 else Several(parts)


def _muon_takes(p: Tensor, tables: Collection[int]) -> bool:
    return p.dim() == 2 and min(p.shape) > 1 and id(p) not in tables


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise SteersmanError(
            "optimizer.kind: 8-bit optimizers and Lion need bitsandbytes: pip install 'steersman[bitsandbytes]'"
        ) from error

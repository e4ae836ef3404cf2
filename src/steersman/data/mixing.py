"""Several sets of rows, drawn from in given shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steersman.data.config import DataConfig
from steersman.types import SteersmanError


@dataclass(frozen=True, slots=True)
class Mixture:
    """`members[k]` are the row numbers of set k, and `counts[k]` how many of them every epoch draws.

    The counts are share_k times the number of all rows, rounded so that an epoch has as many draws as there are rows.
    """

    members: tuple[np.ndarray, ...]
    counts: tuple[int, ...]

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch, in random order.

        Each set is passed over in an order of its own, again and again whatever the epochs: no row of a set comes
        twice before all of them came once.
        """
        drawn = [self._drawn(seed, epoch, k) for k in range(len(self.members))]
        return np.random.default_rng((seed, epoch)).permutation(np.concatenate(drawn))

    def _drawn(self, seed: int, epoch: int, k: int) -> np.ndarray:
        own, count = self.members[k], self.counts[k]
        places = np.arange(epoch * count, (epoch + 1) * count)
        out = np.empty(count, dtype=own.dtype)
        for turn in np.unique(places // len(own)):
            here = places // len(own) == turn
            order = np.random.default_rng((seed, k, int(turn), 1)).permutation(len(own))
            out[here] = own[order[places[here] % len(own)]]
        return out


def mixture(config: DataConfig, parts: Sequence[int] | np.ndarray) -> Mixture | None:
    """How rows are drawn of which path each is; None where the section gives no shares.

    Raises SteersmanError for a set of which nothing is left, or whose share is less than one row of an epoch.
    """
    if not config.mix:
        return None
    of = np.asarray(parts)
    shares = np.array(config.mix) / sum(config.mix)
    exact = shares * len(of)
    counts = np.floor(exact).astype(int)
    for k in np.argsort(counts - exact, kind="stable")[: len(of) - counts.sum()]:
        counts[k] += 1
    members = tuple(np.flatnonzero(of == k) for k in range(len(shares)))
    for k, own in enumerate(members):
        if not len(own):
            raise SteersmanError(f"data.mix: no row of {config.path[k]} is left to train on; see what was left out")
        if not counts[k]:
            raise SteersmanError(
                f"data.mix: a share of {shares[k]:.2g} of {len(of)} rows is less than one row an epoch, so "
                f"{config.path[k]} would never be read; give it more"
            )
    return Mixture(members, tuple(int(n) for n in counts))

"""The routers' loss beside the objective's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from steersman.model import Routers
from steersman.train.tally import Tally


@dataclass(frozen=True, slots=True)
class RouterBalance:
    """The loss that keeps experts in equal use (`Routers.loss`), times `weight`, of each micro-batch.

    A batch's is the mean over its micro-batches, weighed by their tokens. With several it is not that of the whole
    batch, whose experts may be in equal use where those of its parts are not.
    """

    routers: Routers
    weight: float

    def with_loss(self, run: Callable[[], Tensor], share: float, tally: Tally) -> Tensor:
        """What `run` gives, which reads one micro-batch, and the routers' loss of what it read with gradients.
        `share` is how much of the batch the micro-batch is; the shares of a batch add up to 1 over all ranks."""
        with self.routers.listening():
            loss = run()
            balance = self.routers.loss()
        tally.add("router_loss", share * balance, share)
        return loss + self.weight * share * balance.to(loss.dtype)

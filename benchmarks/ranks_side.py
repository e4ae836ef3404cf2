"""One rank of `ranks.py memory`: a few SFT updates of a model, and what this process holds of it."""

from __future__ import annotations

import json
import resource
import sys
import time

import torch

from steersman.data import Encoded, EncodedSet
from steersman.distributed.join import join_ranks
from steersman.distributed.parallel import ParallelConfig
from steersman.distributed.pieces import local_shard
from steersman.distributed.ranks import ranks
from steersman.model import load_policy, place
from steersman.objectives.supervised import SFT
from steersman.run.run_config import ManyRunConfig
from steersman.train.offline import Offline, OfflineConfig
from steersman.update.optimizer import OptimizerConfig

ROWS, LENGTH, UPDATES = 8, 128, 2


def held(state: Offline) -> int:
    """Bytes of trained weights, their gradients and their moments on this rank, at an update's end."""
    tensors = [x for p in state.optimizer.parameters for x in (p, p.grad) if x is not None]
    tensors += [x for of_one in state.optimizer.adamw.state.values() for x in of_one.values()]
    return sum(local_shard(x).numel() * x.element_size() for x in tensors)


def main(path: str, mode: str) -> None:
    torch.set_num_threads(1)
    with join_ranks(ParallelConfig.model_validate({"mode": mode})):
        policy = load_policy(path, device="cpu")
        policy.max_tokens = 512
        place(policy)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(10, 1000, (ROWS * UPDATES, LENGTH), generator=draw).tolist()
        rows = EncodedSet([[Encoded(row[:8], row[8:], [True] * (LENGTH - 8))] for row in ids])
        state = Offline(
            SFT(policy, rows, None, 512), OfflineConfig(batch_size=ROWS), OptimizerConfig(),
            ManyRunConfig(micro_tokens=512),
        )  # fmt: skip
        most, clear = 0, state.optimizer.zero_grad

        def noting() -> None:
            nonlocal most
            most = max(most, held(state))
            clear()

        state.optimizer.zero_grad = noting
        order, began = state.batches.forever(), 0.0
        for update in range(UPDATES):
            if update == 1:
                began = time.monotonic()
            state.step(next(order))
        seconds = time.monotonic() - began
        tokens = ROWS * LENGTH * (UPDATES - 1)
        told = {"rank": ranks().rank, "held": most, "tokens": tokens, "seconds": seconds}
        told["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print("RESULT " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

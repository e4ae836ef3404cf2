"""What one rank looks at while policies lie in DeepSpeed's pieces, one after the other.

`python zero_worker.py CASES.json` takes cases of `{"model": FOLDER, "checkpointing": BOOL, "lora": BOOL}` and leaves
what it saw in CASES.json.RANK.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional

from steersman.distributed.launch import as_rank
from steersman.distributed.parallel import ParallelConfig
from steersman.distributed.pieces import full_tensor, local_shard, whole_shape
from steersman.distributed.ranks import ranks
from steersman.model import LoraConfig, load_policy, place, whole_weights
from steersman.model.modes import checkpoint_activations
from steersman.model.shard import layers
from steersman.types import Tokens

OWN = functional.linear


def whole_now(policy) -> list[int]:
    """The layers whose attention's weights are all there; what comes after it a backward pass is through with."""
    found = [list(layer.self_attn.parameters()) for layer in layers(policy.model)]
    return [i for i, weights in enumerate(found) if all(p.shape == whole_shape(p) for p in weights)]


def look(case: dict) -> dict:
    policy = load_policy(case["model"], dtype="float32", lora=LoraConfig(r=2) if case["lora"] else None)
    if case["checkpointing"]:
        checkpoint_activations(policy.model)
    tokens = Tokens.from_ids([[3, 4], [5]], [[6, 7, 8], [9, 10]])
    numbers, alone = sum(p.numel() for p in policy.parameters()), policy.logp(tokens).logp.detach()
    place(policy)
    parameters, seen = list(policy.parameters()), {"forward": [], "backward": []}
    for number, layer in enumerate(layers(policy.model)):
        attention = layer.self_attn.o_proj

        def forward(_m, _i, out, number=number):
            seen["forward"].append((number, whole_now(policy)))
            if out.requires_grad:
                out.register_hook(lambda _g: seen["backward"].append((number, whole_now(policy))))

        attention.register_forward_hook(forward)
    told = {
        "numbers": numbers,
        "whole": sum(whole_shape(p).numel() for p in parameters),
        "held": sum(p.numel() for p in parameters),
        "pieces": sum(local_shard(p).numel() for p in parameters),
        "most": len(parameters) * ranks().world,
    }
    logp = policy.logp(tokens).logp
    told["gap"] = float((logp - alone).abs().max())
    told |= {"forward": list(seen["forward"]), "between": whole_now(policy)}
    logp.sum().backward()
    told |= {"backward": seen["backward"], "after": sum(p.numel() for p in parameters)}
    with whole_weights(policy):
        told["sampling"] = sum(p.numel() for p in parameters)
        policy.logp(tokens)
        told["still"] = sum(p.numel() for p in parameters)
    told["again"] = sum(p.numel() for p in parameters)
    first = parameters[-1]
    told["one"] = [list(full_tensor(first).shape) == list(whole_shape(first)), first.numel()]
    told["linear"] = functional.linear is OWN
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    with as_rank(ParallelConfig(mode="zero3")):
        told = [look(case) for case in json.loads(Path(sys.argv[1]).read_text())]
        Path(f"{sys.argv[1]}.{ranks().rank}").write_text(json.dumps(told))

"""The one place that makes what samples from a policy, as a recipe's `rollout` section asks for it."""

from __future__ import annotations

from steersman.data import end_ids as template_ends
from steersman.model import Policy
from steersman.rollout import Engine, Generator
from steersman.rollout.engine import end_ids
from steersman.train.sections import RolloutConfig


def open_generator(rollout: RolloutConfig, policy: Policy) -> Generator:
    """What samples from this policy. A response ends with the recipe's ids, or else with the model's own end tokens
    and the chat template's end of turn."""
    ends = rollout.eos_token_id
    if not ends:
        ends = sorted({*end_ids(policy.model, policy.tokenizer, None), *template_ends(policy.tokenizer)})
    if rollout.engine == "inside":
        return Engine(policy.model, policy.tokenizer, max_batch=rollout.max_batch, eos_token_id=ends or None)
    from steersman.rollout.remote import Wanted, open_process, open_vllm  # here: most runs have no other process

    wanted = Wanted(
        ends=end_ids(policy.model, policy.tokenizer, ends or None), max_batch=rollout.max_batch,
        servers=rollout.servers, urls=tuple(rollout.url), timeout=rollout.timeout, tolerance=rollout.tolerance,
        python=rollout.python, arguments=tuple(rollout.arguments), top_k=rollout.top_k,
    )  # fmt: skip
    return open_process(policy, wanted) if rollout.engine == "process" else open_vllm(policy, wanted)

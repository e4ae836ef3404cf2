"""Opens the generator (what samples from a policy) that a recipe's `rollout` section asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from steersman.data import DataConfig, layout, template_ends
from steersman.distributed.micro import share_out
from steersman.distributed.ranks import ranks
from steersman.distributed.waiting import WaitedInVainError
from steersman.environments.config import EnvironmentConfig
from steersman.environments.port import Environment
from steersman.environments.runner import Episodes
from steersman.model import Policy, context_length, whole_weights
from steersman.recipe.sections import RolloutConfig
from steersman.rollout import Engine, Generator, Sampling
from steersman.rollout.engine import end_ids
from steersman.rollout.port import Limits
from steersman.types import Prompt, Sample, Stats, SteersmanError

S = TypeVar("S", bound=Generator)


def open_generator(rollout: RolloutConfig, policy: Policy) -> Generator:
    """What samples from this policy. A response ends with the recipe's ids, or else with the model's own end tokens
    and the chat template's end of turn."""
    if rollout.engine == "inside":
        return open_engine(rollout, policy)
    from steersman.rollout.remote import (  # here: most runs have no other process
        ServerSettings,
        open_process,
        open_vllm,
    )

    ends = ends_of(rollout, policy)
    wanted = ServerSettings(
        ends=end_ids(policy.model, policy.tokenizer, ends or None), max_batch=rollout.max_batch,
        servers=rollout.servers, urls=tuple(rollout.url), timeout=rollout.timeout, tolerance=rollout.tolerance,
        python=rollout.python, arguments=tuple(rollout.arguments), sampling=rollout.sampling(),
        adapter=rollout.sync == "adapter", folder=rollout.folder,
    )  # fmt: skip
    opener = open_process if rollout.engine == "process" else open_vllm
    return opener(policy, wanted) if ranks().world == 1 else MainRankGenerator(lambda: opener(policy, wanted), policy)


def open_engine(rollout: RolloutConfig, policy: Policy) -> Engine:
    """The engine inside this process, whatever `rollout.engine` says."""
    ends = ends_of(rollout, policy)
    with whole_weights(policy):  # an encoder-decoder is tried once
        return Engine(policy.model, policy.tokenizer, max_batch=rollout.max_batch, eos_token_id=ends or None)


class MainRankGenerator:
    """A generator that rank 0 alone has: it samples for the prompts of all ranks, and each gets its own samples.

    Every rank must call it as often as the others. Raises rank 0's errors on every rank. The policy's weights may lie
    in pieces; they are gathered whenever they are sent.
    """

    def __init__(self, opener: Callable[[], Generator], policy: Policy) -> None:
        self._engine: Generator | None = None
        self._policy, self._sent = policy, False
        error: SteersmanError | None = None
        try:
            self._engine = opener() if ranks().main else None
        except SteersmanError as raised:
            error = raised
        ranks().agree(error, "the start of what samples")

    def wrap_engine(self, wrap: Callable[[Any], S]) -> S | None:
        """On rank 0: `wrap` of its generator, which answers in its place from now on; elsewhere None."""
        if self._engine is None:
            return None
        self._engine = wrapped = wrap(self._engine)
        return wrapped

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, **how: Any) -> list[Sample]:
        here = ranks()
        self.send_first()
        shares = here.gather(list(prompts), "prompts")

        def ask() -> list[Sample]:
            assert self._engine is not None
            return self._engine.generate([prompt for share in shares for prompt in share], sampling, n=n, **how)

        before = n * sum(len(share) for share in shares[: here.rank])
        return here.from_main(ask, "samples")[before : before + n * len(prompts)]

    def joinable(self, sampling: Sampling, **room: Any) -> None:
        """Servers make up their batches themselves."""

    def prepare(self, longest: int) -> None:
        self.send_first()

        def ready() -> None:
            assert self._engine is not None
            self._engine.prepare(longest)

        ranks().from_main(ready, "what samples")

    def send_first(self) -> None:
        """Sends the weights that the run begins with, unless some were sent already."""
        if not self._sent:
            self.update_weights(0)

    def update_weights(self, version: int) -> Stats:
        def send() -> Stats:
            assert self._engine is not None
            return self._engine.update_weights(version)

        self._sent = True
        with whole_weights(self._policy):
            if ranks().sharded and not ranks().main:  # every rank runs each layer as often as rank 0 for its receipt
                from steersman.rollout.remote.snapshot import canaries

                canaries(self._policy, context_length(self._policy.model))
            return ranks().from_main(send, "the weights' receipt")

    def limits(self, sequences: int) -> Limits:
        """The memory of servers is their own."""
        return Limits(1, 1, 1)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


BATCHES = 8
"""Batches of one call where many samples are kept call by call: few enough that little is lost with one, enough that
its end, where few sequences are left, is a small part of it."""


def piece_size(rollout: RolloutConfig, n: int) -> int:
    """Prompts, `n` samples each, that are sampled in one call where there are many. A vLLM server makes up batches of
    256 sequences."""
    places = ranks().world if rollout.engine == "inside" else len(rollout.url) or rollout.servers
    batch = 256 if rollout.engine == "vllm" else rollout.max_batch
    return max(1, BATCHES * places * batch // n)


def ends_of(rollout: RolloutConfig, policy: Policy) -> list[int]:
    """The ids that end a response: the recipe's, or else the model's own and the chat template's end of turn."""
    own = end_ids(policy.model, policy.tokenizer, also=template_ends(policy.tokenizer))
    return rollout.eos_token_id or sorted(own)


def open_episodes(
    config: EnvironmentConfig,
    environment: Environment,
    data: DataConfig,
    rollout: RolloutConfig,
    policy: Policy,
    generator: Generator,
) -> Episodes:
    """The same, playing whole episodes in the recipe's environment."""
    laid = layout(policy, data)
    ends = ends_of(rollout, policy)
    return Episodes(generator, environment, laid, ends, config, context_length(policy.model))


def sample_on_all_ranks(
    generator: Generator, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, **how: Any
) -> list[Sample]:
    """The generator's samples, each made on one rank and known to all, those of the first prompt first.

    A prompt that stands in the list several times stays on one rank, since its repeats are counted for their random
    streams: so every sample is the one that a process alone would draw.
    """
    here = ranks()
    if here.world == 1:
        return generator.generate(prompts, sampling, n=n, **how)
    same = torch.tensor([prompt.index for prompt in prompts]).unique(return_inverse=True)[1]
    cost = torch.zeros(int(same.max()) + 1, dtype=torch.long).index_add(
        0, same, torch.tensor([len(p.ids) + sampling.max_new_tokens for p in prompts])
    )
    owner = torch.zeros(len(cost), dtype=torch.long)
    for rank, units in enumerate(share_out(cost, here.world)):
        owner[units] = rank
    of_prompt = owner[same].tolist()
    mine = [prompt for prompt, rank in zip(prompts, of_prompt, strict=True) if rank == here.rank]
    made: list[Sample] = []
    error: Exception | None = None
    try:
        made = generator.generate(mine, sampling, n=n, **how)
    except WaitedInVainError:  # names the call; there is nobody left to agree with
        raise
    except SteersmanError as raised:
        error = raised
    here.agree(error, "the end of sampling")
    found = [iter(samples) for samples in here.gather(made, "samples")]
    return [next(found[rank]) for rank in of_prompt for _ in range(n)]

"""A generator whose model runs elsewhere: weights travel to servers with a receipt, prompts out, samples back."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steersman.guards.terminal import say
from steersman.model import Policy
from steersman.rollout.port import Limits
from steersman.rollout.remote.dialects import Call
from steersman.rollout.remote.replies import Reply, SampleRequest
from steersman.rollout.remote.shared_folder import SharedFolder
from steersman.rollout.remote.snapshot import (
    ADAPTER,
    Receipt,
    Snapshot,
    canaries,
    known_ids,
    table_rows,
    weights_of,
    write_adapter,
    write_weights,
)
from steersman.rollout.remote.station import Station
from steersman.rollout.remote.traffic import Traffic, share_out
from steersman.rollout.remote.wire import ServerGoneError
from steersman.rollout.sampling import Sampling, banned_support
from steersman.rollout.text import Texts
from steersman.types import Finish, Progress, Prompt, Sample, Stats, SteersmanError


@dataclass(slots=True)
class PendingResponse:
    """A response while it grows; `prompt.ids + ids` is what it goes on from after a cut."""

    prompt: Prompt
    occurrence: int
    index: int
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    support: list[Tensor] = field(default_factory=list)
    finish: Finish | None = None
    cuts: list[int] = field(default_factory=list)


class RemoteGenerator:
    """Samples from the policy's weights on servers.

    `publish` writes the policy's weights as they are now, `load` puts them onto the servers; `update_weights` does
    both. What is under way when weights are loaded is finished before them, or with `cut` it is cut and goes on
    under the new ones: its tokens then have several versions. `ends` are the ids that end a response, and
    `withheld` those that servers do not sample before `min_new_tokens`: vLLM adds the tokenizer's own end.
    """

    def __init__(
        self, policy: Policy, stations: Sequence[Station], folder: SharedFolder, *,
        ends: Sequence[int], withheld: Sequence[int], context: int | None, max_batch: int, returns_support: bool,
        adapter: bool,
    ) -> None:  # fmt: skip
        self.policy, self.stations = policy, list(stations)
        self.ends, self.context, self.max_batch = tuple(ends), context, max_batch
        self._withheld = torch.tensor(withheld, dtype=torch.long)
        self.returns_support, self.adapter = returns_support, adapter
        self.vocabulary, self._rows = known_ids(policy), table_rows(policy)
        self.receipts: list[Receipt] = []
        self._folder = folder
        self._loaded: Snapshot | None = None
        self._first = threading.Lock()
        self._traffic = Traffic()
        self._gone = ServerGoneError("no server is there")

    # -- weights ---------------------------------------------------------------------------------------------

    def publish(self, version: int) -> Snapshot:
        """The policy's weights (or its adapters, where servers have the base) as they are now, as `version`, with
        what proves their arrival."""
        home = self._folder.path
        if self.adapter:
            path = home / f"adapter-{version}" / ADAPTER
            shutil.rmtree(path.parent, ignore_errors=True)
            digests = write_adapter(self.policy, path.parent)
        else:
            path = home / f"weights-{version}.safetensors"
            digests = write_weights(weights_of(self.policy), path)
        return Snapshot(version, path, digests, canaries(self.policy, self.context), self.adapter)

    def load(self, snapshot: Snapshot, *, cut: bool = False) -> Stats:
        """Puts the snapshot onto every server; what was there before is dropped. Returns the receipts' numbers."""
        began = time.monotonic()
        with self._traffic.paused(self._pause if cut else None), ThreadPoolExecutor(len(self.stations)) as pool:
            given = list(pool.map(lambda station: self._load(station, snapshot), self.stations))
        receipts = [receipt for receipt in given if receipt is not None]
        if not receipts:
            raise self._gone
        if self._loaded is not None and self._loaded.path != snapshot.path:
            self._loaded.drop()
        self._loaded = snapshot
        self.receipts = receipts
        return {
            "sync/gap": max(r.gap for r in receipts),
            "sync/seconds": time.monotonic() - began,
            "sync/bytes": float(snapshot.path.stat().st_size),
            "sync/version": float(snapshot.version),
            "sync/servers": float(len(receipts)),
        }

    def _load(self, station: Station, snapshot: Snapshot) -> Receipt | None:
        """The station's receipt; None of a server of an address that was there before, and is gone. One that was gone
        already is asked only whether it is well, so that it costs seconds and not the whole time limit."""
        if station.gone and not station.answers():
            return None
        try:
            receipt = station.load(snapshot)
        except ServerGoneError as error:
            if self._loaded is None:
                raise
            self._without(station, error)
            return None
        station.gone = False
        return receipt

    def joinable(self, sampling: Sampling, **room: Any) -> None:
        """Servers make up their batches themselves."""

    def update_weights(self, version: int) -> Stats:
        return self.load(self.publish(version))

    def prepare(self, longest: int) -> None:
        """Waits until the servers answer and have the weights. Raises SteersmanError for one that can not be used or
        has no room for `longest` tokens."""
        with self._first:
            if self._loaded is None:
                self.update_weights(0)
        for station in self.stations:
            station.require_room(longest)

    def _pause(self) -> None:
        """Cuts what is under way. What arrives behind the cut is begun, and cut by the next one."""
        for station in (one for one in self.stations if not one.gone):
            with suppress(ServerGoneError):  # whoever waits for its answers starts it again
                station.server.pause()
                station.server.resume()

    # -- samples ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        record_support: bool = False,
        progress: Progress | None = None,
    ) -> list[Sample]:
        """`n` samples of each prompt, those of the first prompt first; several threads may ask at a time.

        Raises SteersmanError for what `Engine.generate` refuses, for an action mask, and for truncation whose support
        the server can not return.
        """
        self._check(prompts, sampling, record_support)
        if not prompts:
            return []
        self.prepare(max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens)
        words = (seed,) if isinstance(seed, int) else tuple(seed)
        texts = Texts(self.policy.tokenizer, sampling.stop)
        call = Call(sampling, words, self.ends, self.vocabulary, texts.skip, record_support and sampling.truncates)
        growing = _started(prompts, n)
        self._wave(growing, call, n)
        while any(g.finish is None for group in growing for g in group):
            self._wave([[g] for group in growing for g in group if g.finish is None], call, 1)
        done = [self._sample(g, sampling, texts, record_support) for group in growing for g in group]
        if progress is not None:
            progress(len(done), len(done), sum(len(s.ids) for s in done))
        return done

    def _wave(self, groups: list[list[PendingResponse]], call: Call, n: int) -> None:
        """Asks once for each group, a prompt's samples or one that goes on; cut answers stay unfinished.

        What a server of an address leaves unanswered because it is gone, the others are asked for.
        """
        while groups:
            there = [station for station in self.stations if not station.gone]
            if not there:
                raise self._gone
            shares = share_out(groups, [group[0].prompt.index for group in groups], len(there))
            with ThreadPoolExecutor(len(there)) as pool:
                left = list(pool.map(lambda station, share: self._ask(station, share, call, n), there, shares))
            groups = [group for share in left for group in share]

    def _ask(
        self, station: Station, share: list[list[PendingResponse]], call: Call, n: int
    ) -> list[list[PendingResponse]]:
        """Lets the station answer its share; gives back the share where it is gone for good."""
        if not share:
            return []
        with self._traffic.under_way():
            asked = [self._asked(group[0], call.sampling, n) for group in share]
            try:
                answers = station.complete(asked, call)
            except ServerGoneError as error:
                self._without(station, error)
                return share
            for group, found in zip(share, answers, strict=True):
                for one, reply in zip(group, found, strict=True):
                    self._grow(one, reply, station, call)
        return []

    def _without(self, station: Station, error: ServerGoneError) -> None:
        """Goes on without a server of an address, until new weights find it there again; raises the error of one that
        steersman started, which was started again as often as it may be."""
        if station.process is not None or len(self.stations) == 1:
            raise error
        if not station.gone:
            say(f"steersman: {error}. The other servers take its prompts")
        station.gone, self._gone = True, error

    def _asked(self, first: PendingResponse, sampling: Sampling, n: int) -> SampleRequest:
        have = len(first.ids)
        key = (first.prompt.index, first.occurrence)
        if first.cuts:
            key = (*key, first.index, len(first.cuts))
        return SampleRequest(
            [*first.prompt.ids, *first.ids], key, n, sampling.max_new_tokens - have,
            max(sampling.min_new_tokens - have, 0),
        )  # fmt: skip

    def _grow(self, one: PendingResponse, reply: Reply, station: Station, call: Call) -> None:
        assert station.snapshot is not None
        one.ids += reply.ids
        one.logp += reply.logp
        told = None if self.adapter else reply.version  # a server tells its base's
        one.version += told or [station.snapshot.version] * len(reply.ids)
        one.support += reply.support or []
        if reply.finish == "abort":
            one.cuts.append(len(one.ids))
        elif reply.finish == "stop":
            one.finish = "eos" if one.ids[-1] in self.ends else "stop"
        else:
            one.finish = "length"

    def _sample(self, one: PendingResponse, sampling: Sampling, texts: Texts, record: bool) -> Sample:
        assert one.finish is not None
        text = self._missed_stop(one, texts, sampling.min_new_tokens)
        if text is None and one.finish == "stop":
            text = texts.stopped(one.prompt.ids, one.ids)
        if text is None:
            ids = one.ids[: len(one.ids) - (one.finish == "eos")]
            text = texts.response(one.prompt.ids, ids)
        support = self._support(one, sampling) if record else None
        return Sample(
            one.prompt, one.ids, one.logp, one.finish, text, one.index, support, version=one.version
        )  # fmt: skip

    def _missed_stop(self, one: PendingResponse, texts: Texts, shortest: int) -> str | None:
        """Ends a response at a stop string that the server did not look for; its text then.

        That is one that began before a cut and ended behind it, or, at vLLM, one that the token number `shortest`
        (the least that a response has) completed: vLLM looks from the token behind it on.
        """
        least = [shortest] if 0 < shortest <= len(one.ids) else []
        over_cuts = [range(max(cut + 1, shortest), min(cut + texts.window, len(one.ids)) + 1) for cut in one.cuts]
        for ends in [least, *over_cuts] if texts.stop else ():
            for end in ends:
                text = texts.stopped(one.prompt.ids, one.ids[:end])
                if text is not None:
                    one.ids, one.logp, one.version = one.ids[:end], one.logp[:end], one.version[:end]
                    one.support, one.finish = one.support[:end], "stop"
                    return text
        return None

    def _support(self, one: PendingResponse, sampling: Sampling) -> list[Tensor] | None:
        """What could be sampled at each token, where that was not the whole vocabulary of the policy."""
        padding = torch.arange(self.vocabulary, self._rows)
        if sampling.truncates:  # where a server lists what it forbids, it does not know of the padding
            return [ids if len(ids) and ids[0] >= 0 else torch.cat([ids, ~padding]) for ids in one.support]
        if not len(padding) and not sampling.min_new_tokens:
            return None
        always, short = banned_support(padding, self._withheld)
        return [short if t < sampling.min_new_tokens else always for t in range(len(one.ids))]

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling, record: bool) -> None:
        if sampling.limit is not None:
            raise SteersmanError(
                "rollout.engine: an action mask (NLPO) needs both models in one process; use rollout.engine: inside"
            )
        if record and sampling.truncates and not self.returns_support and not sampling.top_k:
            raise SteersmanError(
                "rollout: vLLM tells which tokens top_p and min_p left only beside a top_k, and the loss needs them; "
                "set rollout.top_k (such as 100) too, or rollout.engine: process"
            )
        for prompt in prompts:
            if not prompt.ids:
                raise SteersmanError(f"prompt {prompt.index} is empty; a model needs at least one token")
            length = len(prompt.ids) + sampling.max_new_tokens
            if self.context is not None and length > self.context:
                raise SteersmanError(
                    f"prompt {prompt.index} has {len(prompt.ids)} tokens, which with max_new_tokens="
                    f"{sampling.max_new_tokens} makes {length}; the model's context is {self.context}"
                )
            if min(prompt.ids) < 0 or max(prompt.ids) >= self.vocabulary:
                raise SteersmanError(
                    f"prompt {prompt.index} has a token id outside the tokenizer's {self.vocabulary}; it belongs to "
                    "another model"
                )

    def limits(self, sequences: int) -> Limits:
        """A server's memory is its own: next to nothing of this process's."""
        return Limits(1, 1, 1)

    def close(self) -> None:
        """Ends the servers that steersman started, and removes what lay in shared memory."""
        for station in self.stations:
            station.close()
        self._folder.remove()


def _started(prompts: Sequence[Prompt], n: int) -> list[list[PendingResponse]]:
    met: dict[int, int] = {}
    out = []
    for prompt in prompts:
        occurrence = met[prompt.index] = met.get(prompt.index, -1) + 1
        out.append([PendingResponse(prompt, occurrence, j) for j in range(n)])
    return out

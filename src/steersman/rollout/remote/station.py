"""One server with what keeps it going: its process, where steersman started it, and the weights it should have."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from steersman.guards.terminal import say
from steersman.rollout.remote.dialects import LOGPROBS_MODE, Call, Dialect, Requirements, ServerLimits
from steersman.rollout.remote.launch import ServerProcess
from steersman.rollout.remote.ray_servers import PlacedByRay
from steersman.rollout.remote.replies import Reply, SampleRequest
from steersman.rollout.remote.snapshot import Canary, Receipt, ReceiptError, Snapshot, first_difference
from steersman.rollout.remote.wire import Server, ServerGoneError
from steersman.rollout.sampling import Sampling
from steersman.types import SteersmanError

T = TypeVar("T")
RESTARTS = 3
"""How often one call may start a dead server again."""
AGAIN = "the same command (with --resume where the verb keeps a run folder)"
"""What a user can do once a server of an address is there again."""
CANARY_SAMPLES = 8
"""Next tokens drawn after each canary (a fixed prompt); a token that comes twice is compared twice."""


class Station:
    """One sampling server: either a `process` that we started, or one that runs at an address already.

    `owner` is the first part of the name under which weights are sent, so that two runs on one server notice each
    other. `tolerance` is the largest difference of log-probabilities that a receipt allows, in nats at temperature 1.
    The policy has `vocabulary` ids; the server must have what is `wanted`. A receipt also asks for tokens that are
    `drawn` otherwise than from the whole distribution at temperature 1. `gone` says that a server at an address did
    not answer when it was last asked.
    """

    def __init__(
        self, server: Server | None, process: ServerProcess | PlacedByRay | None, dialect: Dialect, *, owner: str,
        tolerance: float, vocabulary: int, wanted: Requirements, drawn: Sampling,
    ) -> None:  # fmt: skip
        self._server, self.process, self.dialect = server, process, dialect
        self.owner, self.tolerance, self.vocabulary = owner, tolerance, vocabulary
        self.wanted, self.drawn = wanted, drawn
        self.snapshot: Snapshot | None = None
        self.restarts, self.gone = 0, False
        self._adapter = ""
        self._limits: ServerLimits | None = None  # of a server that was looked at
        self._answered = self._closed = False
        self._repair = threading.Lock()

    @property
    def server(self) -> Server:
        """The server; its first use waits until it answers and looks at what it is."""
        if self._limits is None:
            server = self._server if self.process is None else self.process.wait()
            assert server is not None
            self._server, self._answered = server, True
            self._limits = self.dialect.check(server, self.wanted)
        assert self._server is not None
        return self._server

    def answers(self) -> bool:
        """Whether a server that was used before says, within two seconds, that it can work."""
        return self._server is not None and self._server.healthy()

    @property
    def limits(self) -> ServerLimits:
        """What the server said of itself when it was first used."""
        _ = self.server
        assert self._limits is not None
        return self._limits

    def require_room(self, tokens: int) -> None:
        """Raises SteersmanError where the server, as it was when it was last looked at, has no room for a prompt and
        its answer of so many tokens together."""
        window = None if self._limits is None else self._limits.window
        if window is not None and tokens > window:
            raise SteersmanError(
                self.server.message(
                    f"its window (--max-model-len) is {window} tokens, and a prompt with its answer, or an episode, "
                    f"may have {tokens}; start it with --max-model-len {tokens} or more (rollout.arguments, where "
                    "steersman starts it), or lower rollout.max_new_tokens, data.max_prompt_tokens or "
                    "environment.max_tokens"
                )
            )

    def complete(self, asked: Sequence[SampleRequest], call: Call) -> list[list[Reply]]:
        """Answers to all; what a server that died had not answered is asked again of the one started in its place."""
        done: dict[int, list[Reply]] = {}
        restarts = 0

        def ask() -> None:
            nonlocal restarts
            with self._repair:  # a server that another thread's call starts again has no weights yet
                restarts, server = self.restarts, self.server
                here = replace(call, adapter=self._adapter, most=self.limits.most, rows=self.limits.rows)
            self.dialect.complete(server, {i: one for i, one in enumerate(asked) if i not in done}, here, done)

        self._outliving("over the same prompts", ask, lambda error: self._mend(error, restarts))
        if not self._still_ours():
            raise ServerGoneError(
                self.server.message(f"it was started anew, and has lost the run's weights; {AGAIN} loads them again")
            )
        return [done[i] for i in range(len(asked))]

    def load(self, snapshot: Snapshot) -> Receipt:
        """Sends the weights and returns the receipt; tries once more where it fails, and starts a dead server again.

        Raises ReceiptError naming the first tensor that differs.
        """
        if not self._still_ours():
            self._adapter, self._limits = "", None
        receipt = self._outliving("over weights", lambda: self._send_twice(snapshot), self._restart)
        self.snapshot = snapshot
        return receipt

    def close(self) -> None:
        self._closed = True
        if self.process is not None:
            self.process.stop()
        elif self._server is not None:
            if self._adapter and self._server.healthy():
                with suppress(SteersmanError):  # a run ends as it does, whatever stays on a server of the user's
                    self._server.unload_adapter(self._adapter)
            self._server.close()

    def _outliving(self, when: str, work: Callable[[], T], revive: Callable[[ServerGoneError], None]) -> T:
        """What `work` returns, done again after each death of the server, at most RESTARTS times."""
        deaths = 0
        while True:
            try:
                return work()
            except ServerGoneError as error:
                if (deaths := deaths + 1) > RESTARTS:
                    raise self._died(f"{deaths} times {when}", error) from error
                revive(error)

    def _send_twice(self, snapshot: Snapshot) -> Receipt:
        try:
            return self._send(snapshot)
        except ReceiptError:
            return self._send(snapshot)

    def _send(self, snapshot: Snapshot) -> Receipt:
        name, server = self._weights_name(snapshot), self.server
        if snapshot.adapter:
            self._send_adapter(snapshot, name)
        else:
            server.load(str(snapshot.path), name)
        confirmed = server.models() if snapshot.adapter else [server.weights()]
        if name not in confirmed:
            raise ReceiptError(server.message(f"it says that its weights are {confirmed}, and was sent {name!r}"))
        held = server.digests(str(snapshot.path))
        wrong = first_difference(snapshot.digests, held)
        if wrong:
            raise ReceiptError(server.message(f"the weights of version {snapshot.version} are not there: {wrong}"))
        canaries = self._with_room(snapshot.canaries)
        gap = self._gap(snapshot.version, canaries, Sampling(1))
        if not gap <= self.tolerance:
            raise ReceiptError(
                server.message(
                    f"its log-probabilities differ from the policy's by up to {gap:.3g} nats, and {self.tolerance:g} "
                    f"is allowed (rollout.tolerance), though every tensor of version {snapshot.version} arrived: "
                    + _causes(snapshot)
                )
            )
        self._require_logp_as_drawn(snapshot.version, canaries)
        return Receipt(snapshot.version, gap, len(held["live"]), len(snapshot.digests))

    def _send_adapter(self, snapshot: Snapshot, name: str) -> None:
        """The new adapters beside the base, in the place of those before."""
        server, before = self.server, self._adapter
        if before:
            server.unload_adapter(before)
            self._adapter = ""
        server.load_adapter(str(snapshot.path.parent), name)
        self._adapter = name

    def _with_room(self, canaries: Sequence[Canary]) -> list[Canary]:
        """The canaries that the server has room for. Raises SteersmanError where there are none."""
        window = self.limits.window
        found = [one for one in canaries if window is None or len(one.ids) < window]
        if not found:
            shortest = min(len(one.ids) for one in canaries)
            raise SteersmanError(
                self.server.message(
                    f"its window (--max-model-len) is {window} tokens, and a receipt for weights asks it for the "
                    f"token behind a prompt of {shortest}; give it {shortest + 1} at least"
                )
            )
        return found

    def _require_logp_as_drawn(self, version: int, canaries: Sequence[Canary]) -> None:
        """Raises ReceiptError where a server whose weights are right tells of `drawn` tokens other log-probabilities
        than those of the distribution that they come from."""
        drawn = self.drawn
        gap, allowed = self._gap(version, canaries, drawn), self.tolerance / min(drawn.temperature, 1.0)
        if not gap <= allowed:
            cuts = {"top_k": drawn.top_k, "top_p": drawn.top_p, "min_p": drawn.min_p} if drawn.truncates else {}
            said = "".join(f", {name} {value:g}" for name, value in cuts.items())
            raise ReceiptError(
                self.server.message(
                    f"the log-probabilities that it tells are not those of the distribution that it draws from: with "
                    f"temperature {drawn.temperature:g}{said} they differ from the policy's by up to {gap:.3g} nats, "
                    f"and {allowed:g} is allowed (rollout.tolerance), though its weights are right. Start vLLM with "
                    f"--logprobs-mode {LOGPROBS_MODE}, and without logits processors of its own"
                )
            )

    def _gap(self, version: int, canaries: Sequence[Canary], drawn: Sampling) -> float:
        """Largest |log pi(server) - log pi(policy)| over next tokens of the canaries that are `drawn` so; of a
        truncated distribution over the tokens that the server says it allowed."""
        asked = [SampleRequest(one.ids, (i, 0), CANARY_SAMPLES, 1, 0) for i, one in enumerate(canaries)]
        call = Call(
            drawn, (version,), (), self.vocabulary, True, drawn.truncates, self._adapter, self.limits.most,
            self.limits.rows,
        )  # fmt: skip
        found: dict[int, list[Reply]] = {}
        self.dialect.complete(self.server, dict(enumerate(asked)), call, found)
        return max(
            abs(reply.logp[0] - canary.logp_of(reply.ids[0], drawn.temperature, reply.support))
            for i, canary in enumerate(canaries)
            for reply in found[i]
        )

    def _weights_name(self, snapshot: Snapshot) -> str:
        return f"{self.owner}:{snapshot.version}"

    def _still_ours(self) -> bool:
        """Whether the server has the run's weights, or none of any run's because it was started anew.

        Raises SteersmanError where another run has put its own onto the server.
        """
        if self.snapshot is None or self.process is not None:
            return True
        found = self.server.models() if self.snapshot.adapter else [self.server.weights()]
        if self._weights_name(self.snapshot) in found:
            return True
        if others := [name for name in found if ":" in name]:
            raise SteersmanError(
                self.server.message(
                    f"another run has loaded its weights ({', '.join(others)}); give each run a server of its own "
                    "(rollout.url)"
                )
            )
        return False

    def _mend(self, error: ServerGoneError, restarts: int) -> None:
        """The server as it should be: started again after the error, with the weights that it had, unless that was
        done already since there were so many `restarts`."""
        with self._repair:
            if self.restarts > restarts:
                return
            self._restart(error)
            if (snapshot := self.snapshot) is not None:
                again = lambda: self._send_twice(snapshot)  # noqa: E731
                self._outliving("when it was to get its weights again", again, self._restart)

    def _restart(self, error: ServerGoneError) -> None:
        """Starts a process of steersman's again, one that never answered a single time: it may have been killed
        while it started. Raises the error of a server that is none of steersman's."""
        if self.process is None or self._closed:
            raise ServerGoneError(
                f"{error}; steersman did not start it: see that it runs; {AGAIN} goes on"
            ) from error
        self.restarts += 1
        self._limits, self._adapter = None, ""
        if not self._answered:
            if self.restarts > 1:
                raise SteersmanError(
                    f"{self.process.name}: ended twice before it ever answered. {self.process.trouble()}"
                ) from error
            say(f"steersman: {error}. It is started once more")
        if self.restarts > RESTARTS * 4:
            raise self._died(f"{self.restarts} times in this run", error) from error
        self.process.start()

    def _died(self, when: str, error: ServerGoneError) -> SteersmanError:
        """The error of a process that is not started again: what was noticed of its last end, and its own words,
        which a further start would lose."""
        assert self.process is not None  # any other is given up at its first
        root, told = self.process.trouble(), str(error)
        return SteersmanError(f"{self.process.name} died {when}. {told}{'' if root in told else f'. {root}'}")


def _causes(snapshot: Snapshot) -> str:
    """What may make a server answer otherwise than the policy though it has what it was sent."""
    if snapshot.adapter:
        return (
            "only adapters were sent, so the base below them is not the policy's (another --model, or another run's "
            "sync: weights has replaced it), or is of another precision"
        )
    return "another architecture or precision, a stale cache, or weights that it tied or left out"

"""One server with what keeps it going: its process, where steersman started it, and the weights it should have."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from steersman.rollout.remote.dialects import Call, Dialect
from steersman.rollout.remote.launch import ServerProcess
from steersman.rollout.remote.ray_servers import PlacedByRay
from steersman.rollout.remote.replies import Reply, SampleRequest
from steersman.rollout.remote.snapshot import Receipt, ReceiptError, Snapshot, first_difference
from steersman.rollout.remote.wire import Server, ServerGoneError
from steersman.rollout.sampling import Sampling
from steersman.types import SteersmanError

RESTARTS = 3
"""How often one call may start a dead server again."""
CANARY_SAMPLES = 8
"""Next tokens drawn after each canary; a token that comes twice is looked at twice."""


class Station:
    """A server: of a `process` that was started here, or of an address. `owner` names the run in the name of the
    weights, so that another run's are told apart; `tolerance` is the largest gap of a receipt, in nats. `gone` says
    that the server of an address did not answer when it was last asked."""

    def __init__(
        self, server: Server | None, process: ServerProcess | PlacedByRay | None, dialect: Dialect, *, owner: str,
        tolerance: float, vocabulary: int,
    ) -> None:  # fmt: skip
        self._server, self.process, self.dialect = server, process, dialect
        self.owner, self.tolerance, self.vocabulary = owner, tolerance, vocabulary
        self.snapshot: Snapshot | None = None
        self.restarts, self.gone = 0, False
        self._adapter = ""
        self._ready = self._closed = False
        self._repair = threading.Lock()

    @property
    def server(self) -> Server:
        """The server; its first use waits until it answers and looks at what it is. One that ends while it starts is
        started once more: it may have been killed."""
        if not self._ready:
            server = self._server if self.process is None else self._started(self.process)
            assert server is not None
            self._server = server
            self.dialect.check(server, self.vocabulary)
            self._ready = True
        assert self._server is not None
        return self._server

    def _started(self, process: ServerProcess | PlacedByRay) -> Server:
        try:
            return process.wait()
        except ServerGoneError:
            if self._closed:
                raise
            self.restarts += 1
            process.start()
            return process.wait()

    def complete(self, asked: Sequence[SampleRequest], call: Call) -> list[list[Reply]]:
        """Answers to all; what a server that died had not answered is asked again of the one started in its place."""
        done: dict[int, list[Reply]] = {}
        for _ in range(RESTARTS + 1):
            with self._repair:  # a server that another thread's call starts again has no weights yet
                server, restarts, named = self.server, self.restarts, replace(call, adapter=self._adapter)
            left = {i: one for i, one in enumerate(asked) if i not in done}
            try:
                self.dialect.complete(server, left, named, done)
            except ServerGoneError as error:
                self._mend(error, restarts)
                continue
            if not self._still_ours():
                raise ServerGoneError(
                    server.message("it was started anew, and has lost the run's weights; --resume loads them again")
                )
            return [done[i] for i in range(len(asked))]
        raise SteersmanError(f"{self._name()} died {RESTARTS + 1} times over the same prompts. {self._trouble()}")

    def load(self, snapshot: Snapshot) -> Receipt:
        """Sends the weights and returns the receipt; tries once more where it fails, and starts a dead server again.

        Raises ReceiptError naming the first tensor that differs.
        """
        if not self._still_ours():
            self._adapter = ""
        for _ in range(RESTARTS + 1):
            try:
                receipt = self._send_twice(snapshot)
            except ServerGoneError as error:
                self._restart(error)
                continue
            self.snapshot = snapshot
            return receipt
        raise SteersmanError(f"{self._name()} died {RESTARTS + 1} times over weights. {self._trouble()}")

    def close(self) -> None:
        self._closed = True
        if self.process is not None:
            self.process.stop()
        elif self._server is not None:
            self._server.close()

    def _send_twice(self, snapshot: Snapshot) -> Receipt:
        try:
            return self._send(snapshot)
        except ReceiptError:
            return self._send(snapshot)

    def _send(self, snapshot: Snapshot) -> Receipt:
        name, server = self._weights_name(snapshot), self.server
        began = time.monotonic()
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
        gap = self._gap(snapshot)
        if not gap <= self.tolerance:
            raise ReceiptError(
                server.message(
                    f"its log-probabilities differ from the policy's by up to {gap:.3g} nats, and {self.tolerance:g} "
                    f"is allowed (rollout.tolerance), though every tensor of version {snapshot.version} arrived: "
                    "another architecture or precision, a stale cache, or weights that it tied or left out"
                )
            )
        return Receipt(snapshot.version, gap, len(held["live"]), len(snapshot.digests), time.monotonic() - began)

    def _send_adapter(self, snapshot: Snapshot, name: str) -> None:
        """The new adapters beside the base, in the place of those before."""
        server, before = self.server, self._adapter
        if before:
            server.unload_adapter(before)
            self._adapter = ""
        server.load_adapter(str(snapshot.path.parent), name)
        self._adapter = name

    def _gap(self, snapshot: Snapshot) -> float:
        """Largest |log pi(server) - log pi(policy)| over next tokens of the canaries."""
        asked = [SampleRequest(one.ids, (i, 0), CANARY_SAMPLES, 1, 0) for i, one in enumerate(snapshot.canaries)]
        call = Call(Sampling(1), (snapshot.version,), (), self.vocabulary, True, False, self._adapter)
        found: dict[int, list[Reply]] = {}
        self.dialect.complete(self.server, dict(enumerate(asked)), call, found)
        return max(
            abs(reply.logp[0] - float(canary.logp[reply.ids[0]]))
            for i, canary in enumerate(snapshot.canaries)
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
            for attempt in range(RESTARTS + 1):
                self._restart(error)
                try:
                    if self.snapshot is not None:
                        self._send_twice(self.snapshot)
                    return
                except ServerGoneError as again:
                    if attempt == RESTARTS:
                        raise
                    error = again

    def _restart(self, error: ServerGoneError) -> None:
        """Starts a process of steersman's again; raises the error of a server that is none."""
        if self.process is None or self._closed:
            raise ServerGoneError(f"{error}; steersman did not start it: see that it runs, then --resume") from error
        self.restarts += 1
        self._ready, self._adapter = False, ""
        if self.restarts > RESTARTS * 4:
            raise SteersmanError(f"{self._name()} died {self.restarts} times in this run. {self._trouble()}")
        self.process.start()

    def _name(self) -> str:
        return self.process.name if self.process is not None else self.server.message("it")

    def _trouble(self) -> str:
        return self.process.trouble() if self.process is not None else ""

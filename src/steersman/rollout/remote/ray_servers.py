"""Servers that a Ray cluster places, beside the run's ranks or on other machines."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from steersman.distributed.ray_cluster import connected
from steersman.rollout.remote.launch import ServerProcess
from steersman.rollout.remote.wire import Server, ServerGoneError
from steersman.types import SteersmanError


class Host:
    """In a Ray worker: a server's process as `ServerProcess` keeps it, whose keeper ends it with the worker."""

    def __init__(self, name: str, command: Callable[[int], Sequence[str]], environment: Mapping[str, str],
                 timeout: float, key: str) -> None:  # fmt: skip
        home = Path(mkdtemp(prefix="steersman-server-"))
        self.process = ServerProcess(
            name, command, home / "server.log", timeout=timeout, environment=environment, key=key, folders=[home]
        )
        self.process.start()

    def pid(self) -> int:
        return self.process.pid

    def wait(self) -> tuple[str, str]:
        """The server's address, or why there is none."""
        try:
            return self.process.wait().url, ""
        except SteersmanError as error:
            return "", str(error)

    def machine(self) -> str:
        """This machine's address in the cluster's network."""
        import ray

        return ray.util.get_node_ip_address()

    def trouble(self) -> str:
        return self.process.trouble()

    def stop(self) -> None:
        self.process.stop()


class PlacedByRay:
    """A server's process like `ServerProcess`, on a machine that Ray chooses anew whenever it is started, or on this
    one where `anywhere` is False."""

    def __init__(
        self, name: str, command: Callable[[int], Sequence[str]], environment: Mapping[str, str], *, timeout: float,
        key: str, anywhere: bool, cores: int, on_gpu: bool,
    ) -> None:  # fmt: skip
        self.name, self.timeout, self.key, self.pid = name, timeout, key, 0
        self._made = (name, command, dict(environment), timeout, key)
        self._anywhere, self._resources = anywhere, {"num_cpus": cores, "num_gpus": int(on_gpu)}
        self._ray, self._host = connected(), None

    def start(self) -> None:
        """Asks for a place; `wait` says when the server answers."""
        self._drop()
        options: dict[str, Any] = {**self._resources, "max_concurrency": 3}
        if not self._anywhere:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            node = self._ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        self._host = self._ray.remote(Host).options(**options).remote(*self._made)

    def wait(self) -> Server:
        """The server once it answers. Raises SteersmanError where Ray has no place for it, ServerGoneError with the
        root of the trouble where it ends instead."""
        try:
            self.pid = self._ask("pid", self.timeout)
        except self._ray.exceptions.GetTimeoutError as error:
            raise SteersmanError(
                f"{self.name}: the Ray cluster has no place for it within {self.timeout:g} s (rollout.timeout): "
                f"it needs {self._resources}, and {self._ray.available_resources()} is free"
            ) from error
        url, why = self._ask("wait", self.timeout)
        if not url:
            raise ServerGoneError(why)
        if self._anywhere:
            url = url.replace("127.0.0.1", self._ask("machine", 10.0))
        return Server(url, self.timeout, restartable=True, key=self.key)

    def stop(self) -> None:
        """Ends the server; a second call does nothing."""
        self._drop()

    def trouble(self) -> str:
        """The root of a failure, as far as its machine is there to tell."""
        try:
            return self._ask("trouble", 10.0)
        except Exception:
            return "Its machine, or Ray's worker on it, is gone"

    def _ask(self, what: str, seconds: float) -> Any:
        try:
            return self._ray.get(getattr(self._host, what).remote(), timeout=seconds)
        except self._ray.exceptions.RayActorError as error:
            raise ServerGoneError(f"{self.name}: its machine, or Ray's worker on it, is gone") from error

    def _drop(self) -> None:
        if self._host is not None:
            host, self._host = self._host, None
            self._ray.wait([host.stop.remote()], timeout=20.0)
            self._ray.kill(host)

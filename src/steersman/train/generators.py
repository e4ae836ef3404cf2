"""The one place that makes what samples from a policy, as a recipe's `rollout` section asks for it."""

from __future__ import annotations

from steersman.data import DataConfig, layout
from steersman.data import end_ids as template_ends
from steersman.environments.config import EnvironmentConfig
from steersman.environments.port import Environment
from steersman.environments.runner import Episodes
from steersman.model import Policy
from steersman.rollout import Engine, Generator
from steersman.rollout.engine import end_ids
from steersman.train.models import context_length
from steersman.train.sections import RolloutConfig
from steersman.types import SteersmanError


def open_generator(rollout: RolloutConfig, policy: Policy) -> Generator:
    """What samples from this policy. A response ends with the recipe's ids, or else with the model's own end tokens
    and the chat template's end of turn."""
    ends = ends_of(rollout, policy)
    return Engine(policy.model, policy.tokenizer, max_batch=rollout.max_batch, eos_token_id=ends or None)


def ends_of(rollout: RolloutConfig, policy: Policy) -> list[int]:
    """The ids that end a response: the recipe's, or else the model's own and the chat template's end of turn."""
    own = {*end_ids(policy.model, policy.tokenizer, None), *template_ends(policy.tokenizer)}
    return rollout.eos_token_id or sorted(own)


def open_episodes(
    config: EnvironmentConfig,
    environment: Environment,
    data: DataConfig,
    rollout: RolloutConfig,
    policy: Policy,
    generator: Generator,
) -> Episodes:
    """The same, playing whole episodes in the recipe's environment.

    Raises SteersmanError for an encoder-decoder, whose decoder can't be shown what the environment says.
    """
    if policy.model.config.is_encoder_decoder:
        raise SteersmanError(
            f"environment: {policy.model.config.model_type} reads prompts with an encoder, which sees nothing of "
            "later turns; episodes need a causal model"
        )
    laid = layout(policy, data, asks=True)
    ends = ends_of(rollout, policy)
    return Episodes(generator, environment, laid, ends, config, context_length(policy.model))

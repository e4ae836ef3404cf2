"""The models of an on-policy run: actor, critic, reward and reference, and what samples from the actor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import torch

from steersman.environments.config import open_environment
from steersman.environments.port import Environment
from steersman.model import (
    Policy,
    SharedBase,
    SharedCritic,
    as_local_shards,
    keep_away,
    place_head,
    whole_weights,
)
from steersman.recipe.on_policy import CriticConfig, OnPolicyRecipe
from steersman.reward import Scores, ScoreShaping, WeightedSum, build_reward
from steersman.rollout import Generator, Sampling
from steersman.rollout.sampling import ActionLimit
from steersman.run.device import device_apart
from steersman.setup.generators import open_episodes, open_generator, sample_on_all_ranks
from steersman.setup.models import lora_of, policy_from, scalar_from, shared_from
from steersman.setup.reference import Reference, reference_from, same_tokens
from steersman.train.model_optimizer import model_optimizer
from steersman.train.offline import load_trainable, put_back, trainable
from steersman.train.policy_update import Critic, Learner
from steersman.train.session import kept_state
from steersman.types import Prompt, Sample, SteersmanError


@dataclass
class Roles:
    """Everything with weights, and what uses them to sample and to judge."""

    learner: Learner
    reference: Reference | None
    reward: WeightedSum
    shaping: ScoreShaping
    engine: Generator
    sampling: Sampling
    device: torch.device
    mask: Policy | None = None
    environment: Environment | None = None
    _judging: Lock = field(default_factory=Lock)

    @property
    def policy(self) -> Policy:
        return self.learner.policy

    @property
    def number(self) -> torch.dtype:
        """Precision of rewards, log-probabilities and values: float32 at least."""
        return torch.promote_types(torch.float32, next(self.policy.parameters()).dtype)

    def generate(self, prompts: Sequence[Prompt], *, seed: Any, n: int, greedy: bool = False) -> list[Sample]:
        """Samples from the actor as it is now, under the algorithm's mask where it has one."""
        sampling = self.sampling.as_greedy() if greedy else self.sampling
        with whole_weights(self.policy), nullcontext() if self.mask is None else whole_weights(self.mask):
            return sample_on_all_ranks(self.engine, prompts, sampling, n=n, seed=seed, record_support=not greedy)

    def score(self, samples: list[Sample]) -> Scores:
        """What the reward says of samples. It is never called twice at a time, whatever threads ask: functions of
        users need not bear that."""
        with self._judging:
            return self.reward.score(samples)

    def frozen(self) -> list[torch.nn.Module]:
        """Models of weights of their own that do not learn and are read in one phase only: reference and reward
        models."""
        reference = None if self.reference is None else self.reference.separate
        judges = [part.model for _, part in self.reward.parts.values()]
        return [model for model in (reference, *judges) if model is not None]

    def refresh(self, iteration: int) -> None:
        """Copies the actor into the masking policy when it is due."""
        limit = self.learner.algorithm.sampling_mask()
        if limit is not None and iteration % limit.every == 0:
            put_back(self._masking(), trainable(self.policy))

    def _masking(self) -> dict[str, torch.Tensor]:
        """The masking policy's weights that the actor trains, by name."""
        assert self.mask is not None
        trained = trainable(self.policy)
        as_local_shards(self.mask)
        return {name: p for name, p in self.mask.named_parameters() if name in trained}

    def state_dict(self) -> dict[str, Any]:
        learner = self.learner
        state = {"policy": kept_state(trainable(learner.policy)), "actor": learner.actor.state_dict()}
        state["shaping"] = self.shaping.norm.state_dict()
        if learner.critic is not None:
            state["critic"] = kept_state(_own(learner.critic))
        if learner.critic_optimizer is not None:
            state["critic_optimizer"] = learner.critic_optimizer.state_dict()
        if self.mask is not None:
            state["mask"] = kept_state(self._masking())
        return state

    def load_policy(self, state: dict[str, Any]) -> None:
        """Takes from a `state_dict` the actor's weights alone."""
        load_trainable(self.policy, state["policy"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        learner = self.learner
        self.load_policy(state)
        learner.actor.load_state_dict(state["actor"])
        self.shaping.norm.load_state_dict(state["shaping"])
        if learner.critic is not None:
            put_back(_own(learner.critic), state["critic"])
        if learner.critic_optimizer is not None:
            learner.critic_optimizer.load_state_dict(state["critic_optimizer"])
        if self.mask is not None:
            put_back(self._masking(), state["mask"])


def _own(critic: Critic) -> dict[str, torch.Tensor]:
    """What a critic has to be trained beside the actor's weights."""
    own = trainable(critic)
    return {n: p for n, p in own.items() if not n.startswith("policy.")} if critic.shares_trunk else own


def build_roles(recipe: OnPolicyRecipe, device: torch.device) -> Roles:
    """Loads and wires all models that the recipe's algorithm needs."""
    algorithm, rollout = recipe.algorithm, recipe.rollout
    apart = device_apart(device) if recipe.frozen_apart else None
    policy, base = _policy(recipe, device)
    reward = build_reward(recipe.reward, policy.tokenizer, apart or device, base, apart=apart is not None)
    critic = _critic(recipe, policy, base, reward, device) if algorithm.critic else None
    config = recipe.critic or CriticConfig()
    per_iteration = algorithm.epochs * algorithm.minibatches
    updates = recipe.iterations * per_iteration
    shared = critic is not None and critic.shares_trunk
    actor = policy if critic is None or not shared else critic
    learner = Learner(
        algorithm,
        policy,
        model_optimizer(actor, recipe.optimizer, updates - config.warmup * per_iteration),
        critic,
        None if critic is None or shared else model_optimizer(critic, config.optimizer, updates),
        temperature=rollout.temperature,
        length_limit=float(rollout.max_new_tokens),
        micro_tokens=recipe.run.micro_tokens,
        value_clip=config.value_clip,
        vf_coef=config.vf_coef,
        correction=rollout.correction.correction(),
    )
    sampling, limit, mask = rollout.sampling(), algorithm.sampling_mask(), None
    if limit is not None:
        mask = _policy(recipe, device)[0].requires_grad_(False)
        sampling = replace(sampling, limit=ActionLimit(mask.model, limit.top_p, limit.min_tokens))
    engine, environment = open_generator(rollout, policy), None
    if recipe.environment is not None:
        environment = open_environment(recipe.environment)
        if environment.pays and not any(part.environment for part in recipe.reward.parts.values()):
            raise SteersmanError(
                "environment: it has rewards, which no part of reward.parts takes; add one such as "
                "`play: {environment: turn}`"
            )
        engine = open_episodes(recipe.environment, environment, recipe.data, rollout, policy, engine)
    roles = Roles(
        learner, _reference(recipe, policy, apart), reward, ScoreShaping(recipe.reward), engine, sampling, device,
        mask, environment,
    )  # fmt: skip
    roles.refresh(0)
    if recipe.offload:
        for model in roles.frozen():
            keep_away(model)
    return roles


def _policy(recipe: OnPolicyRecipe, device: torch.device) -> tuple[Policy, SharedBase | None]:
    """The actor, and the base for the others to stand on, which is taken before the actor has its adapters."""
    lora = lora_of(recipe.model)
    if recipe.share == "none" or lora is None:
        return policy_from(recipe.model, recipe.run, device), None
    policy = policy_from(recipe.model, recipe.run, device, adapt=False)
    base = SharedBase(policy)
    policy.adapt(lora)
    return policy, base


def _reference(recipe: OnPolicyRecipe, policy: Policy, apart: torch.device | None) -> Reference | None:
    """The frozen policy that KL is measured to, on a device `apart` where one is given: the start, by default; with
    LoRA the actor without adapters."""
    if recipe.reference == "none":
        if recipe.algorithm.beta > 0:
            raise SteersmanError("reference is none, but algorithm.beta is above 0: KL needs a reference")
        return None
    return reference_from(recipe.reference, recipe.model, recipe.run, policy, apart=apart)


def serves_as_critic(attributes: int, *, same_tokens: bool, on_the_base: bool) -> bool:
    """Whether `critic.init: auto` begins a critic from a reward model: one that gives one number, as a critic does,
    reads the policy's token ids, and stands `on_the_base` where models share one."""
    return attributes < 2 and same_tokens and on_the_base


def _critic(
    recipe: OnPolicyRecipe, policy: Policy, base: SharedBase | None, reward: WeightedSum, device: torch.device
) -> Critic:
    init = (recipe.critic or CriticConfig()).init
    if init == "shared":
        critic = SharedCritic(policy)
        place_head(critic.value_head)
        return critic
    if init == "auto":
        judges = (
            recipe.reward.parts[name].model
            for name, (_, part) in reward.parts.items()
            if part.model is not None
            and serves_as_critic(
                len(part.model.meaning.attributes), same_tokens=part.reads_ids,
                on_the_base=base is None or part.model.has_adapters,
            )
        )  # fmt: skip
        init = next((path for path in judges if path is not None), "policy")
    if base is not None:
        return shared_from(recipe.model, recipe.run, base, None if init == "policy" else init)
    if init == "policy":
        return scalar_from(recipe.model, recipe.run, device)
    critic = scalar_from(recipe.model, recipe.run, device, init)
    same_tokens("critic.init", init, critic, policy)
    return critic

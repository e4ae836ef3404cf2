"""The on-policy verbs: `steersman ppo`, `grpo`, `rloo`, ... differ in their algorithm's section alone."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from steersman import native
from steersman.data import Batches, Mixture, encode_prompts, episode_rows, layout, mixture, prompts, wrapped
from steersman.data.needed import loaded_with_needed
from steersman.data.rows import BadRows
from steersman.data.tokenize import smallest
from steersman.environments.check import try_one_episode
from steersman.evaluation import Evaluation
from steersman.guards.user_code import user_code
from steersman.model import at_hand, bytes_to_come, context_length
from steersman.ops.masked import masked_sum
from steersman.ops.text import distinct_n, perplexity
from steersman.plan.memory import Load, Model, SamplingLoad, announce, largest_load
from steersman.recipe.on_policy import CriticConfig, OnPolicyRecipe
from steersman.run.device import device_text
from steersman.run.held_out import NONE_HELD_OUT, holds_out
from steersman.run.preflight import Preflight
from steersman.run.seed import SamplingStream
from steersman.setup.generators import piece_size
from steersman.setup.models import rate_text, save_model
from steersman.setup.reference import Reference
from steersman.statistics.intervals import Z
from steersman.train.ahead import Ahead
from steersman.train.experience import behaviour_logp, length_said, tokens_of
from steersman.train.looks import answer_row, before_and_after, first_and_last, standard_error
from steersman.train.on_policy import OnPolicy, begun
from steersman.train.optimal_values import prepare_values
from steersman.train.roles import Roles, build_roles
from steersman.train.segments import SegmentRows
from steersman.train.session import Session
from steersman.train.stopping import Stopping
from steersman.types import Prompt, Sample, Stats, SteersmanError


def run(recipe: OnPolicyRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves the policy in `<run folder>/model`; returns the summary that the run folder holds."""
    session = Session(
        recipe.algorithm.name, recipe, resume=resume,
        metric="held_out/reward/total" if recipe.stop is None else "held_out/judge",
        headline=("reward/total", "kl", "entropy", "length/mean"), health=recipe.health,
    )  # fmt: skip
    with ExitStack() as stack, session:  # what samples is still there when an error has the last step saved
        roles = build_roles(recipe, session.device)
        stack.callback(roles.engine.close)
        asked = _prompts(recipe, roles)
        train, held_out = asked.train, asked.held_out
        _require_one_batch(recipe, len(train))
        lengths = [len(p.ids) for p in train]
        batches = Batches(
            len(train),
            recipe.rollout.prompts,
            recipe.run.seed,
            shuffle=recipe.data.shuffle,
            drop_last=True,
            mix=asked.mix,
        )
        state = (Ahead if recipe.rollout.ahead else OnPolicy)(recipe, roles, train, batches)
        looks = RewardLooks(roles, held_out, recipe)
        evaluation = Evaluation(roles.policy, recipe.evaluation, session)
        _preflight(session, recipe, roles, evaluation, asked, longest=max(lengths))
        longest = max([*lengths, *(len(p.ids) for p in held_out)])
        roles.engine.prepare(longest + recipe.rollout.max_new_tokens)
        session.begin(state, recipe.iterations)
        if not prepare_values(state, session):
            return session.summary({})
        if not session.metrics():
            session.observe(0, {**looks.look(session, 0), **evaluation.look()})
            if recipe.stop is not None:
                session.keep_start()

        def look() -> Stats:
            return {**looks.look(session, session.step), **evaluation.look()}

        session.make_up(look)
        early = EarlyEnd(recipe, session)
        for step in session.steps():
            seen = state.iteration()
            for note in seen.notes:
                session.log.note(note, style="yellow")
            due = step % recipe.run.eval_every == 0 or step == recipe.iterations
            texts = [s.text for s in seen.samples]
            logged = session.observe(step, seen.stats, texts, publish=state.publish, look=look if due else None)
            early.look(logged)
        if session.stopped:
            return session.summary({})
        before, after = first_and_last(session)
        after = early.take_best(roles, after)
        save_model(roles.policy, recipe.model, session.path / "model")
        measured = evaluation.of_saved(again=recipe.stop is not None)
        if before and after:
            held = holds_out(dict(recipe.data))
            what = "held-out reward" if held else "reward at the prompts of the looks, which were trained on"
            session.log.note(f"{what}, with its 95% interval: {_interval(before)} -> {_interval(after)}")
            if not held:
                session.log.note(NONE_HELD_OUT, style="yellow")
        return session.summary(
            {
                "model": str(session.path / "model"),
                **before_and_after(before, after),
                **measured,
                "findings": [f"{f.code} at step {f.step}" for f in session.watch.findings],
            }
        )


class EarlyEnd:
    """Ends the session as the section `stop` says, and takes up the weights of the best look then."""

    def __init__(self, recipe: OnPolicyRecipe, session: Session) -> None:
        self.session, self.stopping = session, Stopping(recipe.stop)
        for row in session.metrics():
            self.look(row)

    def look(self, stats: Stats) -> None:
        """Counts an iteration in if there was a look in it."""
        if self.stopping.config is None or "held_out/reward/total" not in stats:
            return
        kl = stats.get("held_out/kl", 0.0)
        self.stopping.add(stats[f"held_out/reward/{self.stopping.config.judge}"], kl)
        if (why := self.stopping.reason) is not None:
            self.session.end(why)

    def take_best(self, roles: Roles, after: Stats) -> Stats:
        """Loads the best look's weights, and returns what was measured there; `after` where nothing was asked for."""
        found = None if self.stopping.config is None else self.session.best()
        if found is None:
            return after
        roles.load_policy(found.state["state"]["roles"])
        row = next(r for r in self.session.metrics() if r["step"] == found.step and "held_out/judge" in r)
        return {k: v for k, v in row.items() if k.startswith("held_out/")}


class RewardLooks:
    """The same held prompts, answered again and again with the same random streams."""

    def __init__(self, roles: Roles, prompts: list[Prompt], recipe: OnPolicyRecipe) -> None:
        self.roles, self.prompts, self.recipe = roles, prompts, recipe

    def look(self, session: Session, step: int) -> Stats:
        """Samples and scores the held prompts; writes them to samples.jsonl; returns `held_out/...` numbers.

        `held_out/reward_se` is the standard error of the mean `held_out/reward/total` over the prompts: 1.96 of it
        to each side are a 95% interval. `held_out/kl` is nats per response, of the policy as sampled from to the
        whole reference, and `held_out/perplexity` that of the responses under the whole reference.
        """
        if not self.prompts:
            return {}
        roles = self.roles
        drawn = roles.generate(self.prompts, seed=(self.recipe.run.seed, SamplingStream.TRAINING_LOOK), n=1)
        every = roles.score(drawn)
        samples, scores = begun(drawn, every)
        stats: Stats = {"held_out/reward/total": float(scores.total.mean())}
        stats |= {f"held_out/reward/{name}": float(x.mean()) for name, x in scores.parts.items()}
        stats |= standard_error("held_out/reward_se", scores.total)
        stats["held_out/distinct2"] = distinct_n([s.text for s in samples], 2)
        stats["held_out/length"] = length_said(samples)
        if roles.reference is not None:
            with at_hand(roles.reference.separate):
                stats |= self._distance(roles.reference, samples)
        stop = self.recipe.stop
        if stop is not None and stats.get("held_out/kl", 0.0) <= (stop.max_kl or math.inf):
            stats["held_out/judge"] = stats[f"held_out/reward/{stop.judge}"]
        rows = [
            {
                **answer_row(s),
                "reward": {name: float(part[i]) for name, part in every.parts.items()},
                **_episode(s),
            }
            for i, s in enumerate(drawn)
        ]
        session.log.samples(step, rows)
        return stats

    @torch.no_grad()
    def _distance(self, reference: Reference, samples: list) -> Stats:
        rows = SegmentRows(samples)
        whole = tokens_of(samples)
        tokens = rows.tokens(whole).untruncated()
        ref = reference.logp(tokens, temperature=self.recipe.rollout.temperature).logp.cpu()
        logp = rows.split(behaviour_logp(samples, whole.mask.shape[1]))
        plain = ref if self.recipe.rollout.temperature == 1 else reference.logp(tokens).logp.cpu()
        mean = float(masked_sum(plain, tokens.mask)) / max(int(tokens.mask.sum()), 1)
        return {
            "held_out/kl": float(masked_sum(logp - ref, tokens.mask)) / len(samples),
            "held_out/perplexity": perplexity(-mean),
        }


def _episode(sample: Sample) -> dict[str, Any]:
    """An episode's turns as they were said, answered and paid; nothing for a single answer."""
    if sample.turns is None:
        return {}
    turns = [{"said": t.reply, "heard": t.observation, "reward": t.reward} for t in sample.turns]
    talk = {"asked": sample.opening, "talk": sample.talk} if sample.talk else {}
    return {"begin": sample.prompt.text, "turns": turns, "outcome": sample.outcome, **talk}


def _interval(look: Stats) -> str:
    """A look's mean reward and half the width of its 95% interval, where several prompts give one."""
    mean, error = look["held_out/reward/total"], look.get("held_out/reward_se")
    return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {Z * error:.2g}"


@dataclass(frozen=True, slots=True)
class AskedPrompts:
    """Training prompts, those of the looks, how sets of the former are mixed, whether plain texts among them became a
    user's turn, and the rows that were left out."""

    train: list[Prompt]
    held_out: list[Prompt]
    mix: Mixture | None
    in_turns: bool
    left_out: BadRows


def _prompts(recipe: OnPolicyRecipe, roles: Roles) -> AskedPrompts:
    """The prompts of the rows that have what the reward needs. Without held-out rows the looks are at the last few
    training prompts, which stay in training too."""
    policy = roles.policy
    loaded = prompts(recipe.data) if recipe.environment is None else episode_rows(recipe.data)
    loaded = loaded_with_needed(loaded, roles.reward.needs)
    laid = layout(policy, recipe.data)
    context, new = context_length(policy.model), recipe.rollout.max_new_tokens
    train, _, _ = encode_prompts(loaded.train, laid, recipe.data, context, new)
    if loaded.held_out:
        held_out, _, _ = encode_prompts(loaded.held_out, laid, recipe.data, context, new)
    else:
        held_out = train[-recipe.rollout.held_out :] if recipe.rollout.held_out else []
    mix = mixture(recipe.data, [loaded.train[p.index].row.part for p in train])
    held_out = held_out[: recipe.rollout.held_out]
    return AskedPrompts(train, held_out, mix, wrapped(loaded.train, laid), loaded.left_out)


def _require_one_batch(recipe: OnPolicyRecipe, size: int) -> None:
    """Raises SteersmanError where there are too few prompts for one iteration, with flags that would do."""
    rollout, minibatches = recipe.rollout, recipe.algorithm.minibatches
    if rollout.prompts <= size:
        return
    whole = [n for n in range(size, 0, -1) if n * rollout.samples % minibatches == 0]
    flags = f"--rollout.prompts {whole[0]}" if whole else f"--rollout.prompts {size} --algorithm.minibatches 1"
    raise SteersmanError(
        f"rollout.prompts: an iteration takes {rollout.prompts} prompts, and the data have {size} to train on; "
        f"type {flags}, or give more data"
    )


def _preflight(
    session: Session, recipe: OnPolicyRecipe, roles: Roles, evaluation: Evaluation, asked: AskedPrompts,
    *, longest: int,
) -> None:  # fmt: skip
    train, held = asked.train, asked.held_out
    algorithm, rollout, run = recipe.algorithm, recipe.rollout, recipe.run
    pre = Preflight(f"steersman {algorithm.name}: {algorithm.title} ({algorithm.paper})")
    samples = rollout.prompts * rollout.samples
    length = longest + rollout.max_new_tokens
    if recipe.environment is not None and roles.environment is not None:  # an episode may fill what it is given
        length = smallest(recipe.environment.max_tokens, context_length(roles.policy.model)) or length
        pre.fact("environment", roles.environment.describe())
        with user_code("environment: one episode before the run", 10 * recipe.environment.time_limit):
            for finding in try_one_episode(roles.environment, train[0]):
                pre.fact("environment, note", finding)
    pre.fact("run folder", str(session.path))
    pre.fact("device", device_text(session.device, next(roles.policy.parameters()).dtype))
    if recipe.frozen_apart:
        pre.fact("frozen models", f"on {next(roles.frozen()[0].parameters()).device}")
    apart = len(held) if holds_out(dict(recipe.data)) else 0
    pre.fact("data", f"{len(train):,} prompts, {apart} held out; the longest has {longest} tokens")
    if held and not apart:
        pre.fact("looks", f"at the last {len(held)} training prompts: {NONE_HELD_OUT}")
    if asked.left_out.counts:
        pre.fact("left out", asked.left_out.sentence)
    if asked.in_turns:
        pre.fact("plain-text prompts", "become a user's turn in the chat template (data.wrap_in_chat)")
    pre.fact("reward", roles.reward.describe())
    if session.device.type == "cpu" and native.why_not() is not None:
        pre.fact("rollout", f"without its compiled loops, so slower: {native.why_not()}")
    pre.fact("per iteration", f"{rollout.prompts} prompts x {rollout.samples} = {samples} samples")
    pre.fact(
        "updates",
        f"{algorithm.epochs} epochs x {algorithm.minibatches} minibatches of {samples // algorithm.minibatches}",
    )
    if (wanted := algorithm.optimal_value()) is not None:
        pre.fact(
            "before training",
            f"{wanted.samples} responses of the reference to each of {len(train):,} prompts, for optimal values",
        )
    pre.fact("optimizer updates", recipe.iterations * algorithm.epochs * algorithm.minibatches)
    pre.fact("micro-batches", f"of up to {run.micro_tokens:,} padded tokens, sorted by length")
    if algorithm.update == "gradient":
        pre.fact("optimizer.lr", rate_text(roles.policy, recipe.optimizer.lr))
    sampled = evaluation.larger(_sampled(recipe, roles, length, len(train)))
    announce(pre, session.device, _models(recipe, roles), _load(recipe, roles, length), sampled)
    step = max(1, len(train) // 3)
    for prompt in train[::step][:3]:
        pre.sample([(prompt.text, False)])
    for note in roles.policy.notes:
        pre.fact("model", note)
    pre.check()
    pre.show()


def _models(recipe: OnPolicyRecipe, roles: Roles) -> list[Model]:
    """Everything with weights; what shares the actor's is counted with it."""
    found = [Model("actor", roles.policy.model, recipe.model.path, roles.policy, recipe.optimizer)]
    critic, own = roles.learner.critic, (recipe.critic or CriticConfig()).optimizer
    if critic is not None and critic.shares_trunk is False:
        found.append(Model("critic", critic.model, critic.model.name_or_path, critic, own))
    reference = None if roles.reference is None else roles.reference.separate
    frozen = partial(Model, apart=recipe.frozen_apart)
    if reference is not None:
        name = reference.model.name_or_path
        found.append(frozen("reference", reference.model, name, coming=bytes_to_come(reference)))
    for name, (_, part) in roles.reward.parts.items():
        if part.model is not None:
            judge = part.model.model
            found.append(frozen(f"reward {name}", judge, judge.name_or_path, coming=bytes_to_come(part.model)))
    if roles.mask is not None:
        found.append(Model("masking policy", roles.mask.model, "the actor, copied now and then"))
    return found


def _load(recipe: OnPolicyRecipe, roles: Roles, length: int) -> Load:
    """The largest micro-batch. A critic is read beside the actor's gradients."""
    minibatch = recipe.rollout.prompts * recipe.rollout.samples // recipe.algorithm.minibatches
    load = largest_load([length] * minibatch, length, recipe.run.micro_tokens, minibatch)
    if recipe.algorithm.update == "trust_region":
        load = replace(
            load, distributions=recipe.rollout.prompts * recipe.rollout.samples * recipe.rollout.max_new_tokens
        )
    return load if roles.learner.critic is None else replace(load, alone=False)


def _sampled(recipe: OnPolicyRecipe, roles: Roles, length: int, prompts: int) -> SamplingLoad:
    """The largest call of what samples: an iteration's, or one of the passes over all `prompts` before training."""
    rollout, wanted = recipe.rollout, recipe.algorithm.optimal_value()
    longest = max(length - rollout.max_new_tokens, 1)
    sequences = rollout.prompts * rollout.samples
    if wanted is not None:
        sequences = max(sequences, min(prompts, piece_size(rollout, wanted.samples)) * wanted.samples)
    limits, per_prompt = roles.engine.limits(sequences), rollout.samples if wanted is None else 1
    return SamplingLoad(roles.policy, sequences, longest, rollout.max_new_tokens, limits, per_prompt)

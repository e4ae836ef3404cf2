"""Is an estimator unbiased? Its expectation over every batch that could be drawn, beside the exact gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steersman.distributed.micro import my_micro_batches
from steersman.distributed.ranks import ranks
from steersman.tabular.token_mdp import TokenMDP
from steersman.types import SteersmanError, Trajectory

Table = Tensor | Callable[[], Tensor]
"""A policy: a leaf of logits [S, V], or a function that makes them anew from parameters with gradients."""

LARGEST = 2_000_000
CHUNK = 8192


@dataclass(slots=True)
class OracleBatch:
    """One or many batches that a method could have drawn.

    `trajectory` has B rows, `logp` [B, T] is the policy's log-probability of their tokens, with gradient, and
    `rows` [B] numbers their sequences in the language. `logits` [S, V] carries the same gradient, for losses
    that need whole distributions: `mdp.along(logits, rows)` lays them out.
    `batches` says how many draws are stacked; draw i owns the rows i * B / batches and following.
    """

    trajectory: Trajectory
    logp: Float[Tensor, "B T"]
    rows: Int[Tensor, " B"]
    logits: Float[Tensor, "S V"]
    batches: int = 1


Loss = Callable[[OracleBatch], Tensor]


def take(trajectory: Trajectory, rows: Int[Tensor, " B"]) -> Trajectory:
    """The given rows of a trajectory, repeats allowed."""
    parts = {f.name: getattr(trajectory, f.name) for f in fields(trajectory)}
    return replace(trajectory, **{name: x[rows] for name, x in parts.items() if x is not None})


def groups(
    mdp: TokenMDP, logits: Float[Tensor, "S V"], size: int = 1, count: int = 1
) -> tuple[Int[Tensor, "M count*size"], Float[Tensor, " M"]]:
    """Every batch of `count` prompts with `size` answers each, and its probability.

    A batch lists the numbers of its sequences, groups side by side: prompts are drawn independently from rho,
    the answers of one group independently from pi(.|x). Probabilities add up to 1 and carry no gradient.

    Raises SteersmanError when there are too many batches to list.
    """
    own = [torch.nonzero(mdp.prompt == k).flatten() for k in range(len(mdp.prompts))]
    total = sum(len(rows) ** size for rows in own) ** count
    if total * size * count > LARGEST:
        raise SteersmanError(
            f"{total} batches of {size * count} are too many to list: use fewer tokens, steps or prompts"
        )
    one = torch.cat([torch.cartesian_prod(*[rows] * size).reshape(-1, size) for rows in own])
    logp = mdp.sequence_logp(logits.detach()).sum(-1)
    prob = mdp.prompt_prob[mdp.prompt[one[:, 0]]] * logp[one].sum(-1).exp()
    pick = torch.cartesian_prod(*[torch.arange(len(one))] * count).reshape(-1, count)
    return one[pick].flatten(1), prob[pick].prod(-1)


def exact_gradient(
    mdp: TokenMDP, policy: Table, params: Sequence[Tensor] | None = None, gamma: float = 1.0
) -> Float[Tensor, " D"]:
    """The gradient of J with respect to `params` (default: the logits themselves), flattened."""
    logits, params = _open(policy, params)
    return _flat(torch.autograd.grad(mdp.objective(logits, gamma), params, materialize_grads=True))


def expected_gradient(
    mdp: TokenMDP,
    policy: Table,
    loss: Loss,
    params: Sequence[Tensor] | None = None,
    *,
    size: int = 1,
    count: int = 1,
    behaviour: Tensor | None = None,
    gamma: float = 1.0,
    kl: bool = True,
    value: Tensor | None = None,
    stacked: bool = True,
) -> Float[Tensor, " D"]:
    """E[ grad loss(batch) ] over all batches of `count` prompts with `size` answers, flattened.

    A method is unbiased exactly when this is minus `exact_gradient`, because a loss is descended.

    The batch is drawn from the policy, or from `behaviour` logits [S, V], which then also stand in `logp_old`,
    the KL term and V. `gamma`, `kl` and `value` are those of `TokenMDP.trajectory`.

    Of several ranks all call it, each takes its share of the batches, and all get the sum.

    - `stacked=True`: `loss` sees many draws at once, `trajectory.group` numbering all groups apart, and
      returns what each row or each step adds, [B] or [B, T], or one number per draw, [batches]. Right for
      whatever never mixes groups; fast.
    - `stacked=False`: `loss` sees one draw at a time, as in training, and returns one number. Needed for what
      acts on a whole batch, such as whitening or a batch-wide denominator.
    """
    made, params = _open(policy, params)
    # Everything a loss knows of the policy passes through its logits: differentiate to there, draw by draw, and
    # through the model once.
    logits = made.detach().requires_grad_()
    source = logits.detach() if behaviour is None else behaviour
    index, prob = groups(mdp, source, size, count)
    index, prob = index[prob > 0], prob[prob > 0]  # what is never drawn has no ratio, and 0 * NaN is NaN
    everything = mdp.trajectory(source, gamma=gamma, kl=kl, value=value)

    def draw(index: Tensor) -> OracleBatch:
        rows = index.flatten()
        trajectory = take(everything, rows)
        trajectory.group = torch.arange(len(rows) // size).repeat_interleave(size)
        return OracleBatch(trajectory, mdp.sequence_logp(logits)[rows], rows, logits, len(index))

    total = torch.zeros_like(logits)
    for micro in my_micro_batches(torch.ones(len(index), dtype=torch.long), CHUNK):
        part = index[micro.rows]
        if stacked:
            each = loss(draw(part)).reshape(len(part), -1).sum(-1)
        else:
            each = torch.stack([loss(draw(one[None])) for one in part])
        total += torch.autograd.grad((micro.weight * prob[micro.rows] * each).sum(), logits)[0]
    total = ranks().sum(total, "an exact gradient")
    return _flat(torch.autograd.grad(made, params, total, materialize_grads=True))


def relative_deviation(estimate: Float[Tensor, " D"], exact: Float[Tensor, " D"]) -> float:
    """max |estimate - exact| / max |exact|."""
    return float((estimate - exact).abs().max() / exact.abs().max())


def _open(policy: Table, params: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    if isinstance(policy, Tensor):
        leaf = policy.detach().requires_grad_() if params is None else policy
        # one more step in the graph, so that the leaf is never the output itself
        return leaf.clone(), [leaf] if params is None else list(params)
    if params is None:
        raise SteersmanError("a policy given as a function needs its params named")
    return policy(), list(params)


def _flat(grads: Sequence[Tensor]) -> Float[Tensor, " D"]:
    return torch.cat([g.detach().double().flatten() for g in grads])

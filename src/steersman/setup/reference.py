"""The frozen model that a policy is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steersman.data import Encoded, collate
from steersman.distributed.micro import in_order, my_micro_batches
from steersman.model import Logp, Policy, ScalarModel, at_hand
from steersman.ops.logprob import Head
from steersman.ops.masked import masked_sum
from steersman.recipe.sections import ModelConfig
from steersman.run.progress import with_progress
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from
from steersman.types import SteersmanError, Tokens, send


class AdaptersOff:
    """The reference of a LoRA policy: the same module with its adapters off, so no second copy of the weights."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def separate(self) -> None:
        """It has no weights of its own."""
        return None

    def head(self) -> Head:
        return self.policy.head()

    def hidden(self, tokens: Tokens) -> Float[Tensor, "N H"]:
        with self.policy.reference() as frozen:
            return frozen.hidden(tokens)

    def logp(self, tokens: Tokens, *, temperature: float = 1.0) -> Logp:
        with self.policy.reference() as frozen:
            return frozen.logp(tokens, temperature=temperature)

    def logp_from(self, tokens: Tokens, hidden: Float[Tensor, "N H"], *, temperature: float = 1.0) -> Logp:
        with self.policy.reference() as frozen:
            return frozen.logp_from(tokens, hidden, temperature=temperature)


Reference = Policy | AdaptersOff


def reference_from(
    path: str, config: ModelConfig, run: RunConfig, policy: Policy, *, apart: torch.device | None = None
) -> Reference:
    """`path` is "start", the policy before training, or a folder. Weights of its own go to the policy's device, laid
    as the policy's are, or whole to a device `apart`.

    Raises SteersmanError where a folder's model reads other token ids than the policy.
    """
    if path == "start" and config.lora is not None:
        return AdaptersOff(policy)
    folder = config.path if path == "start" else path
    there, alike = policy.device if apart is None else apart, config.model_copy(update={"path": folder})
    reference = policy_from(alike, run, there, trainable=False, whole=apart is not None)
    same_tokens("reference", folder, reference, policy)
    return reference


def same_tokens(key: str, path: str, model: Policy | ScalarModel, policy: Policy) -> None:
    """Raises SteersmanError where a model that reads the policy's own ids has another vocabulary."""
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise SteersmanError(
            f"{key}: the tokenizer of {path} ({len(model.tokenizer)} tokens) is not the policy's "
            f"({len(policy.tokenizer)} tokens), but it reads the policy's token ids; use a model of the same family"
        )


@torch.no_grad()
def answer_logp(model: Reference, rows: Sequence[Encoded], micro_tokens: int) -> Float[Tensor, " N"]:
    """log pi of whole answers, over the tokens that count (nats), on the CPU. A model that waits elsewhere comes for
    as long as that takes."""
    found = []
    parts = my_micro_batches(torch.tensor([len(e) for e in rows]), micro_tokens)
    with at_hand(model.separate):
        for part in with_progress(parts, "log-probabilities of the data"):
            tokens = collate([rows[i] for i in part.rows.tolist()])
            logp = model.logp(tokens).logp.cpu()
            sums = torch.where(tokens.mask, logp, torch.zeros_like(logp)).sum(-1)
            if part.counts:
                found.append((part.rows, sums))
    return in_order(found)


def group_logp(
    models: Sequence[tuple[Reference, float]], groups: Sequence[Sequence[Encoded]], rows: Sequence[int],
    micro_tokens: int,
) -> Float[Tensor, "N K"]:  # fmt: skip
    """The weighted sum of several models' log pi of each answer of the groups `rows`, which all have K answers (nats,
    over the tokens that count); NaN for the other groups."""
    told = torch.full((len(groups), len(groups[0])), torch.nan)
    if rows:
        answers = [e for i in rows for e in groups[i]]
        read = torch.stack([share * answer_logp(model, answers, micro_tokens) for model, share in models]).sum(0)
        told = told.to(read)
        told[list(rows)] = read.view(len(rows), -1)
    return told


@torch.no_grad()
def answer_logp_now(models: Sequence[tuple[Reference, float]], tokens: Tokens) -> Float[Tensor, " B"]:
    """The weighted sum of several models' log pi of a batch's answers, over the tokens that count (nats)."""
    found = [share * model.logp(tokens).logp for model, share in models]
    return masked_sum(torch.stack(found).sum(0), send(tokens.mask, found[0].device), dim=-1)


def divergence(hidden_p: Tensor, head_p: Head, hidden: Tensor, head: Head, rows: int = 256) -> Float[Tensor, " N"]:
    """KL(p || q) (nats) at each position, q from `hidden` and `head`; `rows` positions' logits live at once."""

    def part(h_p: Tensor, h: Tensor) -> Tensor:
        logp = head_p.log_softmax(h_p)
        return (logp.exp() * (logp - head.log_softmax(h))).sum(-1)

    pieces = zip(hidden_p.split(rows), hidden.split(rows), strict=True)
    return torch.cat([checkpoint(part, a, b, use_reentrant=False) for a, b in pieces])


@torch.no_grad()
def collision(hidden: Tensor, head: Head, rows: int = 256) -> Float[Tensor, " N"]:
    """log sum_v p(v)^2 at each position: of two draws, the log-probability that they are the same token."""
    return torch.cat([(2 * head.log_softmax(part)).logsumexp(-1) for part in hidden.split(rows)])

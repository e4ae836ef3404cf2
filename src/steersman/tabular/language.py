"""A language small enough that every prefix and every complete sequence of it can be listed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steersman.tabular.markov import stochastic
from steersman.types import SteersmanError, Tokens

LARGEST = 200_000
"""The most complete sequences that are listed: beyond it enumeration is the wrong tool."""


class Language:
    """All prefixes ("states") and all complete sequences of `vocab` tokens in at most `horizon` steps.

    A sequence ends with the end token or is cut after `horizon` tokens without one. `prompts` is a number (the
    prompts are then the single tokens 0, 1, ...) or a list of token id lists, `prompt_prob` [K] how often each
    is asked (default: equally often). Prompts do not limit what may follow; they only name separate trees.

    With S prefixes, N sequences, V tokens and T the horizon:

    - `states`: S pairs (prompt number, tokens so far), shorter prefixes first.
    - `next_state` [S, V]: the state after a token, S where the token ends the sequence.
    - `sequences` [N, T] tokens, 0 in the padding; `length` [N], `mask` [N, T], `terminated` [N] (the end token
      came, no cut), `prompt` [N].
    - `path` [N, T+1]: the state before each step, S from the end on. `ending` [S, V]: the sequence that a
      token completes, -1 where it completes none.

    A tabular policy is a tensor of logits [S, V] in float64; -inf forbids a token.

    Raises SteersmanError for a vocabulary, horizon or prompt that makes no language, or one too large to list.
    """

    def __init__(
        self,
        vocab: int,
        horizon: int,
        *,
        eos: int = 0,
        prompts: int | Sequence[Sequence[int]] = 1,
        prompt_prob: Tensor | None = None,
    ):
        self.vocab, self.horizon, self.eos = vocab, horizon, eos
        count = range(prompts) if isinstance(prompts, int) else prompts
        self.prompts = [(p,) if isinstance(p, int) else tuple(p) for p in count]
        self._validate()
        self._list_states()
        self._list_sequences()
        K = len(self.prompts)
        if prompt_prob is None:
            prompt_prob = torch.full((K,), 1 / K, dtype=torch.float64)
        if prompt_prob.shape != (K,):
            raise SteersmanError(f"prompt_prob must have shape [{K}], got {list(prompt_prob.shape)}")
        self.prompt_prob = stochastic(prompt_prob, "prompt_prob")

    def _validate(self) -> None:
        if self.vocab < 2 or self.horizon < 1 or not 0 <= self.eos < self.vocab:
            raise SteersmanError(
                f"no language: vocab {self.vocab} must be at least 2, horizon {self.horizon} at least 1 and "
                f"eos {self.eos} one of the tokens"
            )
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise SteersmanError("prompts must be at least one, all different")
        if any(not p or min(p) < 0 or max(p) >= self.vocab for p in self.prompts):
            raise SteersmanError(f"every prompt must hold at least one token, all in 0..{self.vocab - 1}")
        size = sum((self.vocab - 1) ** t for t in range(self.horizon + 1)) * len(self.prompts)
        if size > LARGEST:
            raise SteersmanError(f"{size} sequences are too many to list (at most {LARGEST}): shorten the horizon")

    def _list_states(self) -> None:
        words = [token for token in range(self.vocab) if token != self.eos]
        level: list[tuple[int, tuple[int, ...]]] = [(k, ()) for k in range(len(self.prompts))]
        self.states: list[tuple[int, tuple[int, ...]]] = []
        self.levels: list[slice] = []
        for _ in range(self.horizon):
            self.levels.append(slice(len(self.states), len(self.states) + len(level)))
            self.states += level
            level = [(k, (*tokens, word)) for k, tokens in level for word in words]
        number = {state: s for s, state in enumerate(self.states)}
        end = len(self.states)
        self.next_state = torch.tensor(
            [[number.get((k, (*tokens, a)), end) for a in range(self.vocab)] for k, tokens in self.states]
        )
        self.state_prompt = torch.tensor([k for k, _ in self.states])
        self.state_length = torch.tensor([len(tokens) for _, tokens in self.states])

    def _list_sequences(self) -> None:
        S, T = len(self.states), self.horizon
        number = {state: s for s, state in enumerate(self.states)}
        last, token = torch.nonzero(self.next_state == S, as_tuple=True)
        N = len(last)
        self.sequences = torch.zeros(N, T, dtype=torch.long)
        self.path = torch.full((N, T + 1), S)
        for n, (s, a) in enumerate(zip(last.tolist(), token.tolist(), strict=True)):
            k, prefix = self.states[s]
            self.sequences[n, : len(prefix) + 1] = torch.tensor((*prefix, a))
            self.path[n, : len(prefix) + 1] = torch.tensor([number[k, prefix[:t]] for t in range(len(prefix) + 1)])
        self.length = self.state_length[last] + 1
        self.mask = torch.arange(T) < self.length[:, None]
        self.terminated = token == self.eos
        self.prompt = self.state_prompt[last]
        self.ending = torch.full((S, self.vocab), -1)
        self.ending[last, token] = torch.arange(N)
        # where step t's entry stands in a flattened [S, V] table that is followed by one zero for the padding
        self._edge = torch.where(self.mask, self.path[:, :T] * self.vocab + self.sequences, S * self.vocab)

    def __len__(self) -> int:
        return len(self.sequences)

    def gather(self, table: Float[Tensor, "S V"]) -> Float[Tensor, "N T"]:
        """The entries of a table over (state, token) that each sequence walks through; 0 in the padding."""
        if table.shape != self.next_state.shape:
            raise SteersmanError(
                f"a table over (state, token) of this language has shape {list(self.next_state.shape)}, "
                f"got {list(table.shape)}"
            )
        return torch.cat([table.flatten(), table.new_zeros(1)])[self._edge]

    def along(self, table: Float[Tensor, "S ..."], rows: Int[Tensor, " B"]) -> Float[Tensor, "B T+1 ..."]:
        """The entries of a table over states before each step of the given sequences; 0 from the end on."""
        return torch.cat([table, torch.zeros_like(table[:1])])[self.path[rows]]

    def sequence_logp(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, "N T"]:
        """log pi(y_t | x, y_<t) in nats for every sequence; its sum over time is log pi(y|x)."""
        return self.gather(torch.log_softmax(logits, -1))

    def sequence_prob(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, " N"]:
        """rho(x) pi(y|x): how often each sequence occurs, prompt included; adds up to 1."""
        return self.prompt_prob[self.prompt] * self.sequence_logp(logits).sum(-1).exp()

    def state_prob(self, logits: Float[Tensor, "S V"]) -> Float[Tensor, " S"]:
        """Probability that an episode passes through each prefix; adds up to the expected length."""
        prob = self.sequence_prob(logits)
        visited = prob.new_zeros(len(self.states) + 1)
        return visited.index_add(0, self.path.flatten(), prob.repeat_interleave(self.horizon + 1))[:-1]

    def factor(self, weight: Float[Tensor, " N"]) -> Float[Tensor, "S V"]:
        """The per-token logits of the policy with pi(y|x) proportional to exp(weight) over the sequences of x.

        logits(s, a) = log sum of exp(weight) over the sequences that continue prefix s with token a. A prefix
        that cannot occur is given the uniform distribution.
        """
        logits = torch.where(self.ending >= 0, weight[self.ending], weight.new_tensor(-torch.inf))
        for level in reversed(self.levels[:-1]):
            mass = torch.logsumexp(torch.cat([logits, logits.new_full((1, self.vocab), -torch.inf)]), -1)
            inner = torch.logaddexp(logits[level], mass[self.next_state[level]])
            logits = torch.cat([logits[: level.start], inner, logits[level.stop :]])
        # a prefix that cannot occur still needs a distribution
        return torch.where(logits.isneginf().all(-1, keepdim=True), 0.0, logits)

    def greedy(self, logits: Float[Tensor, "S V"]) -> Int[Tensor, " K"]:
        """The sequence of most probable tokens for every prompt, as numbers of sequences."""
        choice = logits.argmax(-1)
        rows = []
        for state in range(len(self.prompts)):
            s = state
            while int(self.ending[s, choice[s]]) < 0:
                s = int(self.next_state[s, choice[s]])
            rows.append(int(self.ending[s, choice[s]]))
        return torch.tensor(rows)

    def sample(
        self, logits: Float[Tensor, "S V"], n: int, generator: torch.Generator | None = None, size: int = 1
    ) -> Int[Tensor, " n*size"]:
        """Draw `n` prompts and `size` sequences for each; the numbers of the sequences, groups side by side."""
        prompt = torch.multinomial(self.prompt_prob, n, replacement=True, generator=generator)
        prob = self.sequence_logp(logits.detach()).sum(-1).exp()
        own = torch.where(self.prompt == prompt[:, None], prob, prob.new_zeros(()))
        return torch.multinomial(own, size, replacement=True, generator=generator).flatten()

    def tokens(self, rows: Int[Tensor, " B"] | None = None) -> Tokens:
        """The given sequences (default: all) as the batch that every model role reads."""
        rows = torch.arange(len(self)) if rows is None else rows
        lengths = torch.tensor([len(p) for p in self.prompts])
        width = int(lengths.max())
        prompts = torch.tensor([[*p, *[0] * (width - len(p))] for p in self.prompts])
        prompt = self.prompt[rows]
        return Tokens(prompts[prompt], lengths[prompt], self.sequences[rows], self.length[rows], self.mask[rows])

    def logits_of(self, model: Any) -> Float[Tensor, "S V"]:
        """The logits, in float64, that a Hugging Face causal model (of a `Policy`: its `model`) gives after every
        prefix, with gradients to its parameters. Cast the model to float64 for answers that are exact to rounding.

        Raises SteersmanError when the model's vocabulary is not this language's.
        """
        self._same_vocabulary(model.config.vocab_size)
        return self.logits_from(lambda ids: model(ids).logits)

    def logits_from(self, read: Callable[[Int[Tensor, "S L"]], Float[Tensor, "S L V"]]) -> Float[Tensor, "S V"]:
        """As `logits_of`, for any function from token ids to the logits after each of them."""
        texts = [(*self.prompts[k], *tokens) for k, tokens in self.states]
        width = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
        logits = read(ids)
        self._same_vocabulary(logits.shape[-1])
        last = torch.tensor([len(text) - 1 for text in texts])
        return logits[torch.arange(len(texts)), last].double()

    def _same_vocabulary(self, size: int) -> None:
        if size != self.vocab:
            raise SteersmanError(f"the model has {size} tokens and the language {self.vocab}: they must be the same")

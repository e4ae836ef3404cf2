"""The policy as lm-evaluation-harness asks a model. Imported where the package is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from steersman.distributed.micro import in_order, my_micro_batches
from steersman.model import Policy, context_length, whole_weights
from steersman.recipe.sections import RolloutConfig
from steersman.rollout.sampling import Sampling
from steersman.run.progress import ProgressLine, with_progress
from steersman.setup.generators import open_generator, sample_on_all_ranks
from steersman.types import Prompt, Tokens, send

UNBOUNDED = 2048
"""The context of a model that names none, as in the package's own model class."""
NEW_TOKENS = 256
"""The longest answer where a task names none, as there."""
ROWS = 256
"""Positions whose logits live at once."""


class PolicyModel(TemplateLM):
    """Answers the package's three questions with the policy's own passes and engine. Every rank asks the same, and
    does its share of the work.

    Tokens are those of the package's class for Hugging Face models, with its defaults; a text longer than the context
    loses its beginning.
    """

    def __init__(self, policy: Policy, micro_tokens: int) -> None:
        super().__init__()
        self.policy, self.micro_tokens, self.tokenizer = policy, micro_tokens, policy.tokenizer
        self.max_length = context_length(policy.model) or UNBOUNDED
        self.engine = open_generator(RolloutConfig(max_new_tokens=NEW_TOKENS), policy)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **chosen)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log-probability (nats) of whole texts, in windows of the context's length."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1):
                windows.append(make_disjoint_window(window))
                owner.append(number)
        sums, _ = self._scores(windows)
        total = torch.zeros(len(requests), dtype=torch.float64)
        return total.index_add(0, torch.tensor(owner), sums).tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of a request's stop strings, its end tokens or its limit."""
        wanted = [self._wanted(*request.args) for request in requests]
        texts = [""] * len(requests)
        for sampling in dict.fromkeys(sampling for _, sampling in wanted):
            prompts = [
                Prompt(ids[-(self.max_length - sampling.max_new_tokens) :], "", index=number)
                for number, (ids, own) in enumerate(wanted)
                if own == sampling
            ]
            with whole_weights(self.policy):
                samples = sample_on_all_ranks(
                    self.engine, prompts, sampling, seed=0, progress=ProgressLine("harness: answers")
                )
            for sample in samples:
                texts[sample.prompt.index] = sample.text
        return texts

    def _wanted(self, context: str, given: dict[str, Any]) -> tuple[list[int], Sampling]:
        kwargs: Any = normalize_gen_kwargs(dict(given), NEW_TOKENS)
        until = handle_stop_sequences(kwargs.get("until"), eos=self.tokenizer.decode(self.eot_token_id))
        sampling = Sampling(
            min(int(kwargs["max_gen_toks"]), self.max_length - 1),
            temperature=float(kwargs.get("temperature", 0.0)) if kwargs.get("do_sample") else 0.0,
            top_p=float(kwargs.get("top_p", 1.0)), top_k=int(kwargs.get("top_k", 0)),
            stop=tuple(dict.fromkeys(text for text in until if text)),
        )  # fmt: skip
        return self.tok_encode(context), sampling

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sums, greedy = self._scores([(context, continuation) for _, context, continuation in requests])
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    @torch.no_grad()
    def _scores(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """Each continuation's log-probability (nats, float64), and whether each of its tokens is the likeliest."""
        cut = [_last(context, continuation, self.max_length) for context, continuation in rows]
        lengths = torch.tensor([len(prompt) + len(response) for prompt, response in cut])
        found = []
        for part in with_progress(my_micro_batches(lengths, self.micro_tokens), "harness: log-probabilities"):
            some = [cut[i] for i in part.rows.tolist()]
            tokens = Tokens.from_ids([prompt for prompt, _ in some], [response for _, response in some])
            sums = self._sums(tokens)
            if part.counts:
                found.append((part.rows, sums))
        both = in_order(found)
        return both[:, 0], both[:, 1] > 0

    def _sums(self, tokens: Tokens) -> Tensor:
        """`[B, 2]`: log-probability of each response, and 1 where all of it is what is likeliest."""
        hidden, head, counts = self.policy.hidden(tokens), self.policy.head(), tokens.response_length.tolist()
        ids = send(torch.cat([row[:n] for row, n in zip(tokens.response, counts, strict=True)]), hidden.device)
        logp, likeliest = [], []
        for states, wanted in zip(hidden.split(ROWS), ids.split(ROWS), strict=True):
            logits = head.logits(states)
            logp.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].double())
            likeliest.append(logits.argmax(-1) == wanted)
        sums = [part.sum() for part in torch.cat(logp).cpu().split(counts)]
        greedy = [part.all().double() for part in torch.cat(likeliest).cpu().split(counts)]
        return torch.stack([torch.stack(sums), torch.stack(greedy)], 1)


def _last(context: list[int], continuation: list[int], longest: int) -> tuple[list[int], list[int]]:
    """The last `longest` tokens of both, with a token of context at least."""
    response = continuation[-(longest - 1) :]
    return context[-(longest - len(response)) :], response

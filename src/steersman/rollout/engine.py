"""The generation engine: samples from a live model, whose own weights it reads at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any

from steersman.rollout.batch import RunningBatch
from steersman.rollout.decoder import Decoder
from steersman.rollout.joining import joinable
from steersman.rollout.port import Joinable, Limits, Stepper
from steersman.rollout.responses import ActionMask
from steersman.rollout.sampling import ActionLimit, Sampling
from steersman.rollout.seq2seq import PairDecoder
from steersman.types import Progress, Prompt, Sample, Stats, SteersmanError

ROWS = {"cpu": 64, "accelerator": 256}
"""Sequences that are decoded together, where nothing else is said."""
PREFILL = 2048
"""Tokens of one prefill, padding counted, where nothing else is said: enough for large products, while its keys and
values, which are there beside the live cache, stay few."""


class Engine:
    """Continuous batching over one cache written in place, for any model of the ecosystem's own classes.

    `model` is a live `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` (with adapters or not), which then reads a
    prompt with its encoder and keeps what its decoder looks at in it; weights are read anew by every call, which
    sees whatever an optimiser did to them. `max_batch` is the number of sequences decoded together (64 on a CPU, 256
    on an accelerator). `eos_token_id` overrides the end tokens, which are otherwise the generation config's, or
    the tokenizer's where it names none. Ids beyond the tokenizer's, with which a vocabulary is padded, are
    never sampled. The cache has memory for as long as a call lasts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_batch: int | None = None,
        prefill_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch = max_batch or ROWS["cpu" if model.device.type == "cpu" else "accelerator"]
        self.prefill_tokens = prefill_tokens or PREFILL
        if self.max_batch < 1 or self.prefill_tokens < 1:
            raise SteersmanError("Engine: max_batch and prefill_tokens must be at least 1")
        self.end_ids = end_ids(model, tokenizer, eos_token_id)
        self.decoder = decoder_for(model, tokenizer)
        self.vocabulary = None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
        self._mask_decoder: Stepper | None = None
        self.version = 0
        self._busy = Lock()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        record_support: bool = False,
        progress: Progress | None = None,
        cut: Callable[[], bool] | None = None,
    ) -> list[Sample]:
        """`n` samples of each prompt, those of the first prompt first.

        A sample depends on the weights, its prompt's ids, `seed`, `prompt.index` and its number among the
        prompt's samples, and on nothing else that is generated with it (but for float rounding). A prompt index
        that comes twice gets a second set of streams. `logp` is that of the distribution drawn from; when greedy,
        that of the untempered, untruncated distribution (minus banned end tokens). With `record_support` every
        sample lists the tokens that were allowed at each step, where anything was cut away. `cut` is asked between
        steps: once it is true, every response is returned as far as it is, finish "length", shorter than the limit.

        Raises SteersmanError for an empty prompt, one that does not fit the context together with
        `max_new_tokens`, an id outside the vocabulary, stop strings without a tokenizer, and logits that are not
        finite; all but the last before anything is generated. So is a call while another thread's is going on.
        """
        with self.alone():
            self.check(prompts, sampling, n)
            if not prompts:
                return []
            batch = RunningBatch(
                self,
                sampling,
                self.limits(len(prompts) * n),
                record_support=record_support,
                progress=progress,
                cut=cut,
            )
            with batch.opened():
                return batch.run(prompts, n, seed)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While open this thread alone samples. Raises SteersmanError where another does."""
        if not self._busy.acquire(blocking=False):
            raise SteersmanError(
                "rollout: another thread is sampling with this engine, or its own `progress` calls it; its cache has "
                "room for one call: wait for it, or give each thread an engine and a model of its own"
            )
        try:
            yield
        finally:
            self._busy.release()

    def joinable(
        self, sampling: Sampling, *, rows: int, longest: int, sequences: int, record_support: bool
    ) -> AbstractContextManager[Joinable]:
        """A batch that prompts join while it decodes. Raises SteersmanError where another thread samples."""
        return joinable(
            self, sampling, rows=min(rows, self.max_batch), longest=longest, sequences=sequences,
            record_support=record_support,
        )  # fmt: skip

    def prepare(self, longest: int) -> None:
        """It is always ready; prompts that do not fit the model are refused when they are read."""

    def update_weights(self, version: int) -> Stats:
        """The engine runs the policy itself, so it has the weights; samples carry `version` from now on."""
        self.version = version
        return {}

    def close(self) -> None:
        """Nothing is held between calls."""

    def limits(self, sequences: int) -> Limits:
        """Rows, prefill and refill of a call that samples so many sequences."""
        rows = min(self.max_batch, sequences)
        return Limits(rows, self.prefill_tokens, refill=max(1, rows // 8))

    def action_mask(self, limit: ActionLimit) -> ActionMask:
        """What reads the masking policy; kept from call to call. Raises SteersmanError for another vocabulary."""
        ours, theirs = (m.config.get_text_config().vocab_size for m in (self.model, limit.model))
        if ours != theirs:
            raise SteersmanError(
                f"rollout: the masking policy has {theirs} tokens and the policy {ours}; use one family"
            )
        if self._mask_decoder is None or self._mask_decoder.model is not limit.model:
            self._mask_decoder = decoder_for(limit.model, self.tokenizer)
        return ActionMask(self._mask_decoder, limit.top_p, limit.min_tokens)

    def check(self, prompts: Sequence[Prompt], sampling: Sampling, n: int) -> None:
        """Raises SteersmanError, as `generate` does, for what can not be sampled."""
        if n < 1:
            raise SteersmanError(f"rollout: n (samples per prompt) is {n}; it must be at least 1")
        if sampling.stop and self.tokenizer is None:
            raise SteersmanError("rollout: stop strings need a tokenizer; give the engine one or drop sampling.stop")
        config = self.model.config.get_text_config()
        for prompt in prompts:
            if not prompt.ids:
                raise SteersmanError(
                    f"prompt {prompt.index} is empty; a model needs at least one token, such as BOS or EOS"
                )
            self.decoder.check(prompt, sampling.max_new_tokens)
            if min(prompt.ids) < 0 or max(prompt.ids) >= config.vocab_size:
                raise SteersmanError(
                    f"prompt {prompt.index} has a token id outside the model's vocabulary of {config.vocab_size}; "
                    "the tokenizer belongs to another model"
                )


def decoder_for(model: Any, tokenizer: Any) -> Stepper:
    """What reads prompts and steps through responses, by the model's style."""
    return PairDecoder(model, tokenizer) if model.config.is_encoder_decoder else Decoder(model)


def end_ids(
    model: Any, tokenizer: Any, override: int | Sequence[int] | None = None, also: Sequence[int] = ()
) -> tuple[int, ...]:
    """The ids that end a response: the override, else the generation config's, else the tokenizer's; may be none.

    `also` are those of a chat template, which end it as well where nothing is overridden. Raises SteersmanError where
    the generation config gives something else than ids.
    """
    if override is None and also:
        return tuple(dict.fromkeys((*end_ids(model, tokenizer), *also)))
    settings = getattr(model, "generation_config", None)
    for found in (override, getattr(settings, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if found is None:
            continue
        ids: tuple[Any, ...] = tuple(found) if isinstance(found, list | tuple) else (found,)
        if not all(type(i) is int for i in ids):
            raise SteersmanError(
                f"{model.name_or_path}: eos_token_id is {found!r}; give an id or a list of ids in the "
                "model's generation_config.json"
            )
        return ids
    return ()

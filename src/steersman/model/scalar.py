"""Models that give numbers: reward models and critics, which share one architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steersman.model.adapters import write_adapters
from steersman.model.encoder_decoder import is_pair, pair_reader, read
from steersman.model.fast.fused import quicken
from steersman.model.layout import in_groups, masked_indices, response_slots, spread
from steersman.model.lora import LoraConfig, add_lora_to_trunk, go_on
from steersman.model.meaning import Meaning
from steersman.model.policy import Logp, Policy
from steersman.model.probe import close, model_name, probe_ids, quiet, require_causal
from steersman.model.reader import CausalReader, Reader
from steersman.ops.style import FEATURES, style_counts
from steersman.types import SteersmanError, Tokens


class Headed(nn.Module):
    """A trunk with a head; where a row ends is known by its length.

    Wraps `AutoModelForSequenceClassification`. The model's own search for the last token that is not padding is
    not used. Of an encoder-decoder the head reads the decoder's states of the response, while the encoder reads
    the prompt. `meaning` says what the head's numbers are; it is kept in the config, so that saving keeps it.

    Raises SteersmanError if the head does not give `outputs` numbers, or later tokens or padding show.
    """

    speaks: ClassVar[bool] = False
    """Whether its output layer gives tokens, and so may share weights with its embedding."""
    runs: tuple[str, ...] = ("outputs",)
    """Methods that read the weights; sharded ones are gathered around them (`model.shard`)."""

    shift: Tensor
    scale: Tensor

    def __init__(self, model: Any, tokenizer: Any, outputs: int, *, max_tokens: int | None = 8192) -> None:
        super().__init__()
        require_outputs(model, outputs)
        quicken(model)
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.trunk_name = model.base_model_prefix
        self.notes: list[str] = []
        self.stored_dtype: torch.dtype | None = None
        self.has_adapters = False
        self.reader: Reader = pair_reader(self.trunk, tokenizer) if is_pair(model) else CausalReader(self.trunk)
        self.means(Meaning.of(model.config))
        self._probe()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def score(self, tokens: Tokens) -> Float[Tensor, " B"]:
        """One number for each response; each kind of model says which."""
        raise NotImplementedError

    def attribute(self, tokens: Tokens, name: str) -> Float[Tensor, " B"]:
        """The number of one attribute in the units of its ratings; the score where the model has one number."""
        return self.score(tokens)

    def value(self, tokens: Tokens) -> Float[Tensor, "B T+1"]:
        """A number before each response token and after the last one; a head of several outputs has none."""
        raise NotImplementedError

    def bound(self, tokens: Tokens, pessimism: float = 0.0) -> Float[Tensor, " B"]:
        """`score`, less `pessimism` times the deviation of the heads where there are several (`EnsembleModel`)."""
        return self.score(tokens)

    def style(self, tokens: Tokens) -> Float[Tensor, "B F"]:
        """Words, headers, list items and bold spans of each response's text (`ops.style.FEATURES`)."""
        responses = [r[:n].tolist() for r, n in zip(tokens.response, tokens.response_length, strict=True)]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        return torch.tensor([style_counts(text) for text in texts], dtype=torch.get_default_dtype())

    def leads(self, first: Float[Tensor, "*B K"], second: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
        """Log-odds that the first answer beats the second, from their `outputs`."""
        return (first - second).mean(-1)

    @property
    def trunk(self) -> nn.Module:
        return getattr(self.model, self.trunk_name)

    @property
    def decoder_start(self) -> tuple[int, ...]:
        """What an encoder-decoder's decoder reads before a response; nothing for a causal model."""
        return self.reader.start

    @property
    def output(self) -> nn.Linear:
        """The layer that gives the numbers."""
        return output_layer(self.model)

    def adapt(self, lora: LoraConfig) -> None:
        """Puts adapters on the trunk, whose own weights are frozen; the head is trained as it is. Saved ones that it
        has already go on as they are: of `lora` dropout alone acts then, and a note says what else differs.

        Saving adds them in, so that what is saved is a model like any other. Raises SteersmanError where the
        targets match no layer.
        """
        if self.has_adapters:
            trunk: Any = self.trunk
            self.notes += go_on(trunk, trunk.peft_config["default"], lora)
            return
        add_lora_to_trunk(self.trunk, lora)
        self.has_adapters = True

    def write_adapters(self, folder: Path) -> None:
        """Writes adapters, head and meaning, which peft loads on a sequence classifier. All ranks call it, and rank 0
        writes."""
        write_adapters(self, folder)

    def files_beside(self) -> dict[str, dict[str, Tensor]]:
        """Weights that lie in files of their own beside the model's, by file name."""
        return {}

    def read_beside(self, folder: Path) -> None:
        """Takes up what `files_beside` wrote."""

    def means(self, meaning: Meaning) -> None:
        """Says what the head's numbers are from now on."""
        self.meaning = meaning
        meaning.write(self.model.config)
        outputs = self.model.config.num_labels
        for name, given, plain in (("shift", meaning.shift, 0.0), ("scale", meaning.scale, 1.0)):
            units = torch.tensor(given or [plain] * outputs, device=self.device)
            self.register_buffer(name, units, persistent=False)

    def outputs(self, tokens: Tokens) -> Float[Tensor, "B A"]:
        """The head's numbers at the last token of prompt + response, before their units."""
        tokens = tokens.to("cpu")

        def run(part: Tokens) -> tuple[Tensor, ...]:
            return (self._head(self.reader.ends(part)[1]),)

        return in_groups(tokens, self.max_tokens, run, self.model.config.num_labels)[0]

    def _head(self, hidden: Tensor) -> Float[Tensor, "N A"]:
        numbers = scalar_head(self.model)(hidden)
        return numbers.to(torch.promote_types(numbers.dtype, torch.float32))

    def _in_units(self, numbers: Float[Tensor, "*s A"]) -> Float[Tensor, "*s A"]:
        return numbers * self.scale + self.shift if self.meaning.scale else numbers

    def _probe(self) -> None:
        ids, name = probe_ids(self.model)[:1], model_name(self.model)
        with quiet(self.model):
            if is_pair(self.model):  # the class's own forward gives its input to both sides, so it shows nothing
                read(self.trunk, ids.flip(1), ids)
                return
            require_causal(lambda some: self.trunk(input_ids=some, use_cache=False).last_hidden_state, ids, name)
            seen: list[Tensor] = []
            handle = self.model.score.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
            try:
                self.model(input_ids=ids, use_cache=False)
            finally:
                handle.remove()
            trunk = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
        if not seen or not close(seen[0], trunk):
            raise SteersmanError(
                f"{name}: its score head does not read the trunk's last hidden state as it is; this model family "
                "is not supported as reward model or critic yet"
            )


class ScalarModel(Headed):
    """A head of one output: V of a state, or the score of a whole response, in the units of its `meaning`."""

    runs = ("value", "outputs", "score")
    shares_trunk: ClassVar[Literal[False]] = False
    """Whether it is a head on another model, and learns with it."""

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int | None = 8192) -> None:
        super().__init__(model, tokenizer, 1, max_tokens=max_tokens)

    def value(self, tokens: Tokens) -> Float[Tensor, "B T+1"]:
        """V before each response token, and after the last one in the column of the row's length; 0 beyond."""
        tokens = tokens.to("cpu")

        def run(part: Tokens) -> tuple[Tensor, ...]:
            hidden = self.reader.hidden(part, extra=1)
            return (spread(self._in_units(self._head(hidden))[:, 0], response_slots(part, extra=1)),)

        return in_groups(tokens, self.max_tokens, run, tokens.response.shape[1] + 1)[0]

    def score(self, tokens: Tokens) -> Float[Tensor, " B"]:
        """The number at the last token of prompt + response, less what its style is worth where it is debiased."""
        score = self._in_units(self.outputs(tokens))[:, 0]
        debiased = self.meaning.debiased
        if not debiased:
            return score
        worth = score.new_tensor([debiased.get(name, 0.0) for name in FEATURES])
        return score - self.style(tokens).to(score) @ worth


class SharedCritic(nn.Module):
    """A critic that is a linear head on the policy's own trunk; its gradient reaches the trunk too.

    The head starts at zero, in float32 at least: the first values are 0 for every state.
    """

    shares_trunk: ClassVar[Literal[True]] = True

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        size = policy.model.get_output_embeddings().in_features  # the weight itself may lie in pieces
        dtype = torch.promote_types(policy.head().weight.dtype, torch.float32)
        self.value_head = nn.Linear(size, 1, bias=False, device=policy.device, dtype=dtype)
        nn.init.zeros_(self.value_head.weight)

    def value(self, tokens: Tokens) -> Float[Tensor, "B T+1"]:
        """V before each response token, and after the last one in the column of the row's length; 0 beyond."""
        tokens = tokens.to("cpu")

        def run(part: Tokens) -> tuple[Tensor, ...]:
            return (self._value(part, self.policy.hidden(part, extra=1)),)

        return in_groups(tokens, self.policy.max_tokens, run, tokens.response.shape[1] + 1)[0]

    def logp_value(
        self, tokens: Tokens, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Logp, Float[Tensor, "B T+1"]]:
        """The policy's `logp` and this critic's `value` from one run of the trunk."""
        tokens = tokens.to("cpu")

        def run(part: Tokens) -> tuple[Tensor, ...]:
            hidden = self.policy.hidden(part, extra=1)
            value = self._value(part, hidden)
            acts = (torch.arange(value.shape[1]) < part.response_length[:, None])[response_slots(part, extra=1)]
            acting = hidden[masked_indices(acts, hidden.device)]
            out = self.policy.logp_from(part, acting, temperature=temperature, entropy=entropy)
            return (value, out.logp) if out.entropy is None else (value, out.logp, out.entropy)

        T = tokens.response.shape[1]
        value, *logp = in_groups(tokens, self.policy.max_tokens, run, T + 1)
        return Logp(*(x[:, :T] for x in logp)), value

    def _value(self, tokens: Tokens, hidden: Tensor) -> Tensor:
        value = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
        return spread(value, response_slots(tokens, extra=1))


def require_outputs(model: Any, outputs: int) -> None:
    """Raises SteersmanError unless the model is a sequence classifier whose head gives so many numbers."""
    path, labels = model.name_or_path, model.config.num_labels
    if labels != outputs:
        raise SteersmanError(
            f"{path}: config.num_labels is {labels}, but {_needed(outputs)}; load it with num_labels={outputs} and "
            "train its head again, or start from the language model that it was made from"
        )
    head = output_layer(model)
    if head.out_features != outputs:
        raise SteersmanError(
            f"{path}: the weight of its `score` head is {tuple(head.weight.shape)}, but config.num_labels is "
            f"{outputs}; {_needed(outputs)}, so it needs [{outputs}, {head.in_features}]; train the head again with "
            f"num_labels={outputs}"
        )


def _needed(outputs: int) -> str:
    if outputs == 1:
        return "a reward model or critic must give exactly one number"
    return f"a reward model of {outputs} attributes must give {outputs} numbers"


def scalar_head(model: Any) -> nn.Module:
    """The module between states and numbers: a linear layer, or T5's and BART's dense layer, tanh, linear layer."""
    head = getattr(model, "classification_head", None) if is_pair(model) else None
    head = getattr(model, "score", None) if head is None else head  # causal models, and T5Gemma
    return nn.Identity() if head is None else head


def output_layer(model: Any) -> nn.Linear:
    """The last layer of the head. Raises SteersmanError where there is none."""
    head = scalar_head(model)
    layer = getattr(head, "out_proj", head)
    if not isinstance(layer, nn.Linear):
        raise SteersmanError(
            f"{model.name_or_path}: {type(model).__name__} has no linear `score` head on a causal trunk (nor a "
            "`classification_head` on an encoder-decoder), so it can not be a reward model or critic; use a decoder "
            "model's ForSequenceClassification"
        )
    return layer


def fresh_head(model: Any) -> None:
    """A head of zeros; a dense layer before it starts as the identity, so that nothing is drawn at random."""
    layer, dense = output_layer(model), getattr(scalar_head(model), "dense", None)
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    if dense is not None:
        nn.init.eye_(dense.weight)
        nn.init.zeros_(dense.bias)

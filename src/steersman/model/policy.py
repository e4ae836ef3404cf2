"""The policy: a live language model that gives log-probabilities of responses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steersman.distributed.pieces import full_tensor
from steersman.distributed.ranks import ranks
from steersman.model.encoder_decoder import is_pair, output_bias, pair_reader, probe_pair
from steersman.model.fast.fused import quicken
from steersman.model.layout import in_groups, response_slots, spread
from steersman.model.lora import LoraConfig, add_lora, go_on, tie_notes
from steersman.model.probe import device_of, model_name, naming_family, packs_exactly, probe_causal, probe_ids
from steersman.model.reader import CausalReader, Reader
from steersman.model.routers import Routers
from steersman.ops.logprob import Head, Support, linear_logp
from steersman.types import SteersmanError, Tokens, send

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(slots=True)
class Logp:
    """Log-probabilities (nats) of response tokens, and entropies if asked for; 0 at and after a row's length."""

    logp: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None = None


class Policy(nn.Module):
    """log pi(response token | prompt and response before it) under any model of the ecosystem, causal or
    encoder-decoder.

    The model is used as it is, without a copy; how it reads a batch is its `reader`'s business. Only the states
    that predict response tokens go through the output layer, and their logits never stand whole in memory
    (`ops.logprob.linear_logp`).

    `pack`: lay several rows into one of up to so many tokens, with the same results. `max_tokens`: without
    gradients, run in groups of like length of at most so many tokens with their padding. `notes` say what
    loading found or changed, `stored_dtype` in which precision the weights lay on disk (None: unknown), and
    `starts_adapted` whether it began with saved adapters, so that without them it is not what it was at the start.

    Raises SteersmanError if the model's own logits are not what trunk and output layer give, if later tokens or
    padding show in its states, if an encoder-decoder names no start token, or if it can not pack where packing is
    asked for.
    """

    speaks: ClassVar[bool] = True
    """Whether its output layer gives tokens, and so may share weights with its embedding."""
    runs = ("logp", "hidden", "logp_from")
    """Methods that read the weights; sharded ones are gathered around them (`model.shard`)."""

    def __init__(self, model: Any, tokenizer: Any, *, pack: int | None = None, max_tokens: int | None = 8192) -> None:
        super().__init__()
        quicken(model)
        self.model = model
        self.tokenizer = tokenizer
        self.pack, self.max_tokens = pack, max_tokens
        self.notes: list[str] = []
        self.stored_dtype: torch.dtype | None = None
        self.starts_adapted = False
        self.routers: Routers | None = None
        self.reader: Reader
        with naming_family(model):
            if is_pair(model):
                self.reader, self.form = pair_reader(model, tokenizer), probe_pair(model)
            else:
                self.form = probe_causal(model)
                self.reader = CausalReader(self.form.trunk, pack)
        if pack is not None and (is_pair(model) or not packs_exactly(self.form.trunk, probe_ids(model))):
            raise SteersmanError(
                f"{type(model).__name__} does not keep packed sequences apart with attention "
                f"'{model.config._attn_implementation}'; leave packing off for this model"
            )

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def decoder_start(self) -> tuple[int, ...]:
        """What an encoder-decoder's decoder reads before a response; nothing for a causal model."""
        return self.reader.start

    @property
    def adapters(self) -> PeftModel | None:
        """The LoRA adapters on the model, if it has any."""
        return self.__dict__.get("_adapters")

    def adapt(self, lora: LoraConfig) -> None:
        """Puts adapters on the model, whose own weights are frozen. Saved ones that it has already go on as they are:
        of `lora` dropout alone acts then, and a note says what else differs.

        Raises SteersmanError where they do not fit."""
        if self.adapters is None:
            self.register_adapters(add_lora(self.model, lora))
            self.notes += tie_notes(self.model)
        else:
            self.notes += go_on(self.model, self.adapters.peft_config["default"], lora)

    def register_adapters(self, adapters: PeftModel) -> None:
        """Knows these adapters, which are on the model already, as its own."""
        # past nn.Module, which would count every weight twice
        object.__setattr__(self, "_adapters", adapters)

    @property
    def has_adapters(self) -> bool:
        """Whether it has adapters."""
        return self.adapters is not None

    def watch_routers(self) -> Routers:
        """Its routers, as `routers` from now on, to which its reads are open.

        Raises SteersmanError where it has none that can be read, or nothing that is trained leads to one."""
        self.routers = routers = Routers(model_name(self.model), self.model)
        self.reader.listen_to(routers)
        with torch.enable_grad(), routers.listening():
            self.hidden(Tokens.from_ids([[0, 1]], [[2]]))
            balance = routers.loss()
        if not balance.requires_grad:
            raise SteersmanError(
                f"train.router_loss: nothing that is trained in {model_name(self.model)} leads to a router, so it "
                "would change nothing; let model.lora.targets name layers before a router (or routers), or remove it"
            )
        return routers

    def write_adapters(self, folder: Path) -> None:
        """Writes the adapters, and what is trained whole beside them, as peft loads them. All ranks call it, and
        rank 0 writes. Raises SteersmanError where there are none."""
        adapters = self.adapters
        if adapters is None:
            raise SteersmanError("this policy has no adapters to write")
        state = {
            n: full_tensor(x) for n, x in adapters.state_dict().items() if ".lora_" in n or ".modules_to_save." in n
        }
        ranks().from_main(lambda: adapters.save_pretrained(str(folder), state_dict=state), "the adapters")

    def files_beside(self) -> dict[str, dict[str, Tensor]]:
        """Weights that lie in files of their own beside the model's, by file name."""
        return {}

    @property
    def separate(self) -> Policy | None:
        """As a reference: the model with weights of its own, which is this one."""
        return self

    def head(self) -> Head:
        """The output layer."""
        layer = self.model.get_output_embeddings()
        scale = self.form.logit_scale * self.form.input_scale
        return Head(layer.weight, output_bias(self.model, self.form), scale, self.form.softcap)

    def hidden(self, tokens: Tokens, extra: int = 0) -> Float[Tensor, "N H"]:
        """States that predict each response token, packed row by row.

        With `extra` 1 each row also has the state after its last token. A row without response gives none (one).
        """
        return self.reader.hidden(tokens.to("cpu"), extra)

    def logp(self, tokens: Tokens, *, temperature: float = 1.0, entropy: bool = False) -> Logp:
        """Log-probability of every response token, under softmax(logits / temperature) restricted to the
        tokens' support where they have one. Holes in the mask are computed like the rest."""
        tokens = tokens.to("cpu")

        def run(part: Tokens) -> tuple[Tensor, ...]:
            out = self.logp_from(part, self.hidden(part), temperature=temperature, entropy=entropy)
            return (out.logp,) if out.entropy is None else (out.logp, out.entropy)

        return Logp(*in_groups(tokens, self.max_tokens, run, tokens.response.shape[1]))

    def logp_from(
        self, tokens: Tokens, hidden: Float[Tensor, "N H"], *, temperature: float = 1.0, entropy: bool = False
    ) -> Logp:
        """`logp` where the states of `hidden` are already there."""
        tokens = tokens.to("cpu")
        slots, head = response_slots(tokens), self.head()
        logp, entropies = linear_logp(
            hidden,
            head.weight,
            head.bias,
            send(tokens.response[slots], hidden.device),
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            entropy=entropy,
            support=_support(tokens),
        )
        return Logp(spread(logp, slots), None if entropies is None else spread(entropies, slots))

    @contextmanager
    def reference(self) -> Iterator[Policy]:
        """This same module with its adapters off and without gradients: the policy before training, unless it
        `starts_adapted`.

        Raises SteersmanError where there are no adapters, because the weights themselves are trained then.
        """
        if self.adapters is None:
            raise SteersmanError(
                "a policy without LoRA adapters holds no reference: its own weights are trained; load a second "
                "policy from the same path with trainable=False"
            )
        with self.adapters.disable_adapter(), torch.no_grad():
            yield self


def _support(tokens: Tokens) -> Support | None:
    if tokens.support is None:
        return None
    everything = torch.zeros(0, dtype=torch.long)
    flat: list[Tensor] = []
    for row, n in zip(tokens.support, tokens.response_length.tolist(), strict=True):
        if row and len(row) != n:
            raise ValueError(f"a response of {n} tokens has a support for {len(row)}")
        flat += row or [everything] * n
    return Support.pack(flat)

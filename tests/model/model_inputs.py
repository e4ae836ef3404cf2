"""A tokenizer of 97 words, ragged batches and their states read plainly, for the tests of the model room."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steersman.model.layout import join, response_slots
from steersman.model.reader import states
from steersman.types import Tokens


def word_tokenizer(vocab: int = 97, eos: str | None = "</s>", pad: str | None = None) -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token=eos,
                                   pad_token=pad)  # fmt: skip


def ragged(prompts=(3, 7, 1, 5, 2), responses=(4, 9, 6, 0, 1), vocab: int = 97, seed: int = 5) -> dict[str, Any]:
    """Lists of ids of the given lengths; ids of eos and pad occur among them."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(0, vocab, (n,), generator=generator).tolist()

    out = {"prompts": [ids(n) for n in prompts], "responses": [ids(n) for n in responses]}
    out["responses"][1][2:5] = [2, 0, 2]
    out["prompts"][1][1] = 2
    return out


def logits_alone(model: Any, tokens: Tokens, b: int) -> torch.Tensor:
    """Logits [T, V] that predict row b's response, through the model's own forward, without padding."""
    P, T = int(tokens.prompt_length[b]), int(tokens.response_length[b])
    prompt, response = tokens.prompt[b, :P], tokens.response[b, :T]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            shifted = torch.cat([torch.tensor([model.config.decoder_start_token_id]), response])[None, :T]
            return model(prompt[None], decoder_input_ids=shifted).logits[0] if T else torch.zeros(0, 97)
        return model(input_ids=torch.cat([prompt, response])[None]).logits[0, P - 1 : -1]


def batch(seed: int = 0, vocab: int = 97) -> Tokens:
    """Three prompts of unlike length, shuffled over nine rows; responses of very unlike length, one empty."""
    draw = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=draw).tolist()

    prompts = [ids(n) for n in (13, 9, 11)]
    prompts[1] = [*prompts[1], 0]  # ends in the id that padding has
    which, lengths = [2, 0, 1, 0, 0, 2, 1, 1, 0], [20, 1, 3, 19, 2, 0, 18, 4, 1]
    tokens = Tokens.from_ids([prompts[i] for i in which], [ids(n) for n in lengths])
    tokens.prompt[2, tokens.prompt_length[2] :] = 55  # what stands in the padding is never read
    return tokens


def plainly(trunk: Any, tokens: Tokens, extra: int) -> torch.Tensor:
    """All rows in one padded batch."""
    layout = join(tokens)
    slots = response_slots(tokens, extra)
    where = (layout.start + tokens.prompt_length - 1)[:, None] + torch.arange(slots.shape[1])
    return states(trunk, layout)[where[slots]]


def gradients(trunk: Any, out: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    trunk.zero_grad()
    (out * weight).sum().backward()
    return [p.grad.clone() for p in trunk.parameters() if p.grad is not None]

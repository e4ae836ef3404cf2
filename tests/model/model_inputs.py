"""A tokenizer of 97 words and a ragged batch, for the tests of the model room."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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

"""Small tokenizers of the kinds that differ at the edges of a text, trained on the spot."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "User: What is two and three? Assistant: It is five. Human: thanks\n\n  indented line\n",
    "He goes to the park every day; they're happy, aren't they? 0123456789 <|im_end|> </s>",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS_CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level(special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """GPT-2's and Qwen's kind: nothing is put in front."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tok, **names)


@pytest.fixture(scope="session")
def chatml():
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def gpt2like():
    return byte_level(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def bos_and_eos():
    """Puts a BOS in front and an EOS behind every text by itself, and has a template that writes its BOS."""
    tokenizer = byte_level(["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    backend = tokenizer.backend_tokenizer
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.chat_template = BOS_CHAT
    return made


@pytest.fixture(scope="session")
def spaced():
    """SentencePiece's kind (Llama 2): a BOS and a space are put in front of every text, bytes as a fallback."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)]]
    words = [piece for line in CORPUS for piece in line.replace("\n", "").split(" ")]
    tok.train_from_iterator(words, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    for b in range(256):  # bytes are ordinary tokens, not special ones
        assert tok.token_to_id(f"<0x{b:02X}>") == b + 3
    import json

    saved = json.loads(tok.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]
    tok = Tokenizer.from_str(json.dumps(saved))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def stories(shared):
    return AutoTokenizer.from_pretrained(shared / "stories260k" / "hf")


@pytest.fixture(params=["chatml", "gpt2like", "bos_and_eos", "spaced", "stories"])
def tokenizer(request):
    return request.getfixturevalue(request.param)

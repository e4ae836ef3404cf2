"""What a request to `serve` may ask: bounds, neutral values, and the log-probabilities of parts of characters."""

from __future__ import annotations

import json

import httpx2
import pytest
import torch
from letter_models import save_chat_mini
from tiny_models import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("uvicorn", reason="needs steersman[people]")
from serve_kit import running, served_from

from steersman.people.serve.app import Server

PLAIN = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
OTHERS = [b for b in range(256) if b not in PLAIN]
LETTERS = [chr(b) if b in PLAIN else chr(256 + OTHERS.index(b)) for b in range(256)]


def save_bytes(folder, style):
    """A model each of whose tokens is one byte: a letter, as GPT-2's vocabulary writes it, or <0xE2>, as Llama's."""
    entries = LETTERS if style == "letters" else [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {entry: i for i, entry in enumerate([*entries, "</s>"])}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=style != "letters"))
    if style == "letters":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    else:
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = tiny_config("llama", vocab=257)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 256, None
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Posts to a server of three models, and gives the status and the body, or a stream's events."""
    served = {"mini": served_from(save_chat_mini(tmp_path_factory.mktemp("mini"), context=256))}
    served |= {style: served_from(save_bytes(tmp_path_factory.mktemp(style), style)) for style in ("letters", "hex")}

    with running(Server(served, load=served_from, hosts=("127.0.0.1",))) as address:

        def post(route, **body):
            told = httpx2.post(f"{address}/v1/{route}", json={"model": "mini", "max_tokens": 3, **body}, timeout=60)
            if not body.get("stream") or told.status_code != 200:
                return told.status_code, told.json()
            lines = [line.removeprefix("data: ") for line in told.text.splitlines() if line.startswith("data: {")]
            return 200, [json.loads(line) for line in lines]

        yield post


def chat(ask, content="hm", role="user", **body):
    return ask("chat/completions", messages=[{"role": role, "content": content}], **body)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "said"),
    [("x" * 257, "257 characters; at most 256"), (["a"] * 17, "17 stop strings; at most 16"), ([""], "none empty")],
)
def test_what_is_looked_for_behind_every_token_is_bounded(ask, stream, stop, said):
    status, told = chat(ask, stop=stop, stream=stream)
    assert status == 400
    assert said in told["error"]["message"]
    assert chat(ask, stop=["x" * 256] * 16, stream=stream)[0] == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"top_logprobs": 3}, "logprobs: true"),
        ({"stream_options": {"include_usage": True}}, "stream: true"),
        ({"max_completion_tokens": 4}, "one limit under two names"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias"),
    ],
)
def test_what_would_do_nothing_is_refused(ask, body, said):
    status, told = chat(ask, **body)
    assert status == 400
    assert said in told["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [{"frequency_penalty": 0}, {"presence_penalty": 0.0}, {"logit_bias": {}}, {"frequency_penalty": None}],
)
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_values_that_ask_for_nothing_are_taken(ask, route, body):
    asked = {"messages": [{"role": "user", "content": "hm"}]} if route.startswith("chat") else {"prompt": "hm"}
    plain, same = ask(route, seed=1, **asked), ask(route, seed=1, **asked, **body)
    assert plain[0] == same[0] == 200
    assert plain[1]["choices"] == same[1]["choices"]


def test_parts_of_text_and_the_developers_role_are_read(ask):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "m"}]
    assert chat(ask, parts, seed=1)[1]["choices"] == chat(ask, "hm", seed=1)[1]["choices"]
    assert chat(ask, "hm", "developer", seed=1)[1]["choices"] == chat(ask, "hm", "system", seed=1)[1]["choices"]
    status, told = chat(ask, [{"type": "image_url", "image_url": {"url": "a"}}])
    assert status == 400
    assert "text" in told["error"]["message"]


@pytest.mark.parametrize("style", ["letters", "hex"])
@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_characters_are_told_by_their_bytes_and_place(ask, style, stream):
    """Random bytes, of which some make characters and most do not."""
    body = {"model": style, "prompt": "a", "max_tokens": 60, "seed": 5, "logprobs": 5}
    found = ask("completions", **body, stream=stream)[1]
    choices = [e["choices"][0] for e in (found if stream else [found])]
    listed = [c["logprobs"] for c in choices if c["logprobs"]]
    text = "".join(c["text"] for c in choices)
    tokens = [t for part in listed for t in part["tokens"]]
    raw = [bytes.fromhex(t[6:].replace("\\x", "")) if t.startswith("bytes:") else t.encode() for t in tokens]
    assert b"".join(raw).decode("utf-8", "replace") == text
    assert any(t.startswith("bytes:") for t in tokens)
    assert all(len(top) == 5 for part in listed for top in part["top_logprobs"]), "no token hides another"
    offsets = [o for part in listed for o in part["text_offset"]]
    assert offsets == sorted(offsets)
    assert all(text[o : o + len(t)] == t for o, t in zip(offsets, tokens, strict=True) if len(t) == 1)


@pytest.mark.parametrize("style", ["letters", "hex"])
def test_bytes_put_together_are_the_text(ask, style):
    told = ask("chat/completions", model=style, max_tokens=60, seed=5, logprobs=True, top_logprobs=2,
               messages=[{"role": "user", "content": "a"}])  # fmt: skip
    choice = told[1]["choices"][0]
    raw = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert len(raw) == 60
    assert raw.decode("utf-8", "replace") == choice["message"]["content"]

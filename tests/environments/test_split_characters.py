"""Characters whose bytes a turn's end cuts apart: ids stay as sampled, and text shows the pieces as U+FFFD."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny_models import tiny_config
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from train_kit import merge, recipe, rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from steersman.rollout.text import Texts
from steersman.train.experience import tokens_of
from steersman.train.roles import build_roles
from steersman.train.segments import SegmentRows
from steersman.verbs import rl
from steersman.verbs.rl import _prompts

CHAT = (
    "{% for m in messages %}{{ m.role[0] + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
)
LISTENS = '''
class Listens:
    """Keeps what it hears, and says what spells characters of several bytes; pays for every whole euro sign."""

    def __init__(self, says=" é€😀"):
        self.says, self.heard = says, []

    def begin(self, row):
        self.heard.clear()
        return None

    def step(self, text):
        self.heard.append(text)
        assert text.encode().decode() == text
        return self.says, float(text.count("€")), len(self.heard) == 4
'''
PROGRAM = """
import json, os, sys, urllib.request

talk = json.loads(sys.stdin.readline())["prompt"]
for _ in range(3):
    body = json.dumps({"model": "m", "messages": talk}).encode()
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions", body,
        {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"},
    )
    said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]
    talk += [{"role": "assistant", "content": said["content"]}, {"role": "user", "content": "go on €"}]
"""


def byte_level():
    """GPT-2's way: a letter of its own for every byte, and each token is one."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    letters = [
        chr(b) if b in plain else chr(256 + [x for x in range(256) if x not in plain].index(b)) for b in range(256)
    ]
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<s>", "</s>", *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return made(inner), {2 + byte: bytes([byte]) for byte in range(256)}


def byte_fallback():
    """Llama's way: letters, and tokens of one byte for all that they do not spell."""
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz:"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    said = {i: tokens[i].replace("▁", " ").encode() for i in range(258, len(tokens))}
    return made(inner), {2 + byte: bytes([byte]) for byte in range(256)} | said


def made(inner):
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=CHAT)


STYLES = {"byte level": byte_level, "byte fallback": byte_fallback}


def as_text(spelt, ids):
    """The oracle: the bytes of the ids, in which each piece that is no character is one U+FFFD."""
    return b"".join(spelt.get(i, b"") for i in ids).decode("utf-8", "replace")


@pytest.fixture(params=STYLES)
def style(request, tmp_path):
    """A model on disk that says bytes in no order, and what each token of it spells."""
    tokenizer, spelt = STYLES[request.param]()
    config = tiny_config("gpt2" if request.param == "byte level" else "llama", vocab=len(tokenizer))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", tokenizer, spelt


@pytest.fixture
def listening(base, style, tmp_path):
    (tmp_path / "listens.py").write_text(LISTENS)
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {"path": f"{tmp_path / 'listens.py'}:Listens", "max_turns": 5}
    return merge({**base, "environment": environment}, {"model.path": str(style[0]), "rollout.max_new_tokens": 3})


@pytest.mark.parametrize("name", STYLES)
def test_whole_characters_beside_a_cut_one_are_kept(name):
    tokenizer, _ = STYLES[name]()
    texts, (euro, smile) = Texts(tokenizer), ("€".encode(), "😀".encode())
    said = [2 + byte for byte in euro + smile]
    asked = tokenizer.encode("ab", add_special_tokens=False)
    shown = [texts.response(asked, said[:end]) for end in range(1, 8)]
    assert shown == ["�", "�", "€", "€�", "€�", "€�", "€😀"]
    # what one turn cut is not completed by the next, though nothing was said between
    assert texts.response([*asked, *said[:1]], [*said[1:3], *said]) == "��€😀"
    assert texts.response([*asked, *said[:1]], said[1:2]) == "�"
    stopped = Texts(tokenizer, stop=("€",))
    assert stopped.stopped(asked, [*said[3:5], *said[:2]]) is None
    assert stopped.stopped(asked, [*said[3:5], *said[:3]]) == "�"


PLAIN = {"data.wrap_in_chat": False}


@pytest.mark.parametrize(
    ("changes", "says"),
    [(PLAIN, " é€😀"), (PLAIN, ""), ({}, " é€😀"), ({"environment.history": "segments"}, " é€😀")],
    ids=["plain", "plain, silent", "chat", "segments"],
)
def test_ids_stay_and_text_is_what_they_spell(listening, style, changes, says):
    spelt = style[2]
    made = recipe("rloo", merge(listening, {"environment.args": {"says": says}, **changes}))
    roles = build_roles(made, torch.device("cpu"))
    train = _prompts(made, roles).train
    samples = roles.generate(train[:4], seed=(0, 0), n=4)
    replies = [t for s in samples for t in s.turns]
    cut = [t for t in replies if t.reply.endswith("�")]
    assert len(cut) > len(replies) / 4  # the model's replies break characters, or nothing is tried
    for s in samples:
        assert s.outcome == "done"
        for turn in s.turns:
            assert turn.reply == as_text(spelt, s.ids[turn.begin : turn.end])
            assert turn.reward == turn.reply.count("€")
        if says and not s.segments:
            between = [s.ids[a.end : b.begin] for a, b in zip(s.turns, s.turns[1:], strict=False)]
            assert all(says.strip() in as_text(spelt, ids) for ids in between)
    whole, parts = tokens_of(samples), SegmentRows(samples)
    logp = parts.join(roles.policy.logp(parts.tokens(whole)).logp, whole.mask.shape[1])
    recorded = torch.tensor([x for s in samples for x, m in zip(s.logp, s.mask, strict=True) if m])
    torch.testing.assert_close(logp[whole.mask], recorded, atol=2e-5, rtol=0)


def test_a_cut_character_is_replayed_and_goes_on_in_an_agents_conversation(listening, tmp_path):
    """A record knows replies by their text, and an agent gives back the text that it was given."""
    record = str(tmp_path / "record.jsonl")
    first, again = (
        played(merge(listening, {"environment": listening["environment"] | {"record": record, "replay": replay}}))
        for replay in (False, True)
    )
    assert [s.ids for s in first] == [s.ids for s in again]
    program = {"agent": [sys.executable, str(tmp_path / "program.py")], "max_turns": 5, "time_limit": 60}
    values = {**listening, "environment": program, "reward": {"parts": {"l": {"builtin": "length"}}}}
    samples = played(values)
    assert any(t.reply.endswith("�") for s in samples for t in s.turns)
    for s in samples:
        assert len(s.turns) == 3
        assert s.segments is None  # each request went on from what was sampled


def played(values):
    made = recipe("rloo", values)
    roles = build_roles(made, torch.device("cpu"))
    train = _prompts(made, roles).train
    return roles.generate(train[:2], seed=(0, 0), n=2)


def test_a_run_trains_on_cut_characters(listening, tmp_path):
    rl.run(recipe("grpo", listening))
    seen = rows(tmp_path / "run")[-1]
    assert seen["ratio_gap"] < 1e-4
    assert seen["episode/done"] == 1
    kept = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert any("�" in turn["said"] for row in kept for turn in row["turns"])

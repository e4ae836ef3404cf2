"""Plain-text rows for a chat model: trained as they will be asked, through its template; said, and switched off."""

from __future__ import annotations

import pytest
from letter_models import letters, write_jsonl
from train_kit import save_tiny

from steersman.cli import main
from steersman.data import DataConfig, Query, Row, encode, encode_prompts, layout
from steersman.data.examples import Demonstration, Message
from steersman.judge.scored import Scorer
from steersman.reward import RewardPart

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}u {{ m.content }}\n{% else %}a {{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
ROWS = {
    "sft": {"prompt": "hm", "completion": "oh"},
    "dpo": {"prompt": "hm", "chosen": "oh", "rejected": "ah"},
    "kto": {"prompt": "hm", "completion": "oh", "label": True},
    "reward": {"prompt": "hm", "chosen": "oh", "rejected": "ah"},
}


def chats():
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("chatty"))
    chats().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("wrap", [None, True, False])
@pytest.mark.parametrize("make", [letters, chats])
def test_training_and_asking_lay_a_plain_prompt_out_alike(make, wrap):
    config, row = DataConfig(path="x", wrap_in_chat=wrap), Row({}, "x", 1)
    laid = layout(make(), config)
    [trained] = encode([Demonstration("hm", "oh", row)], laid, config).first
    [asked], _, _ = encode_prompts([Query("hm", row)], laid, config)
    assert trained.prompt == asked.ids
    through = {None: make is chats, True: True, False: False}[wrap]
    assert (laid.codec.decode(trained.prompt) != "hm") == through


def test_text_alone_meets_no_template():
    config = DataConfig(path="x")
    [text] = encode([Demonstration("", "hm oh", Row({}, "x", 1))], layout(chats(), config), config).first
    [plain] = encode([Demonstration("", "hm oh", Row({}, "x", 1))], layout(letters(), config), config).first
    assert (text.prompt, text.response) == (plain.prompt, plain.response)


def test_a_prompt_inside_a_template_is_not_open():
    config, rows = DataConfig(path="x"), [Demonstration("hm ", "oh", Row({}, "x", 1))]
    assert encode(rows, layout(letters(), config), config).open_prompts == 1
    assert encode(rows, layout(chats(), config), config).open_prompts == 0


@pytest.mark.parametrize("verb", list(ROWS))
@pytest.mark.parametrize("off", [False, True])
def test_every_verb_says_that_it_wraps(verb, off, chatty, tmp_path, capsys):
    others = [{**ROWS[verb], "prompt": word, **({"label": False} if verb == "kto" else {})} for word in ("the", "we")]
    data = write_jsonl(tmp_path / "rows.jsonl", [ROWS[verb], *others])
    args = [verb, "--model.path", str(chatty), "--data.path", str(data), "--run.dir", str(tmp_path / "run")]
    args += ["--train.max_steps", "1", "--train.batch_size", "2", "--run.threads", "1"]
    assert main([*args, *(["--data.wrap_in_chat", "false"] if off else [])]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("plain-text prompts become a user's turn" in said) != off
    assert ("[[u hm" in said) != off


def test_a_reward_model_judges_rows_as_it_was_trained_on_them(chatty, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", [ROWS["reward"], {**ROWS["reward"], "prompt": "we"}])
    run = tmp_path / "run"
    args = ["reward", "--model.path", str(chatty), "--data.path", str(data), "--run.dir", str(run)]
    assert main([*args, "--train.max_steps", "1", "--run.threads", "1"]) == 0
    scorer = Scorer({"people": RewardPart(model=str(run / "model"))})
    text, turns = scorer(["hm", [Message(role="user", content="hm")]], ["oh", "oh"])["people"]
    assert text == turns

"""A local model as judge: its log-probabilities are the model's own, and its text is read like an endpoint's."""

from __future__ import annotations

import math
import string

import pytest
import torch
from letter_models import LETTERS, letters
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from steersman.assets import story_model
from steersman.judge import Judge, JudgeConfig
from steersman.judge.config import LocalConfig
from steersman.judge.local import Local, expected, likeliest
from steersman.judge.writer import Writer, WriterConfig
from steersman.types import SteersmanError

SHORT = {"compare": "{prompt} A: {first} B: {second} Best:", "grade": "{prompt} {answer} Grade:", "scale": [1, 3]}
ITEMS = [("A cat", "sat.", "ran away and was sad."), ("A dog", "was happy.", "x")]


def judge(tmp_path, **local) -> Judge:
    section = {"local": {"path": str(story_model()), **local}, **SHORT}
    return Judge(JudgeConfig.model_validate(section), tmp_path / "judge.jsonl")


def logp_by_hand(question: str, verdict: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(story_model())
    model = AutoModelForCausalLM.from_pretrained(story_model(), dtype=torch.float64)
    ids = tokenizer(question)["input_ids"]
    whole = tokenizer(question + verdict)["input_ids"]
    assert whole[: len(ids)] == ids
    with torch.no_grad():
        logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logp[t - 1, whole[t]]) for t in range(len(ids), len(whole)))


def test_the_weighed_verdicts_are_the_models_own_log_probabilities(tmp_path):
    opened = judge(tmp_path)
    outcomes = opened.compare(ITEMS)
    replies = {tuple(r["logp"].values()) for r in opened.cache.replies.values()}
    for prompt, a, b in ITEMS:
        by_hand = [logp_by_hand(f"{prompt} A: {a} B: {b} Best:", f" {v}") for v in "ABC"]
        assert any(all(math.isclose(x, y, abs_tol=1e-4) for x, y in zip(r, by_hand, strict=True)) for r in replies)
    assert all(o is not None for o in outcomes)


def test_a_model_here_says_whether_the_limit_ended_what_it_wrote(tmp_path):
    """The story model ends a story by itself, given the room."""
    opening = "Once upon a time, there was a little girl named Lily."
    for limit in (5, 400):
        config = WriterConfig.model_validate({"local": {"path": str(story_model()), "max_tokens": limit}})
        writer = Writer(config, tmp_path / str(limit))
        (whole,), (any_,) = writer.write([opening]), writer.write([opening], cut=True)
        assert any_
        assert (whole is None) == (limit == 5) == bool(writer.warning())


def test_a_grade_is_the_expected_one(tmp_path):
    got = judge(tmp_path).grade([("A cat", "sat.")])
    weight = [math.exp(logp_by_hand("A cat sat. Grade:", f" {g}")) for g in (1, 2, 3)]
    wanted = sum(g * w for g, w in zip((1, 2, 3), weight, strict=True)) / sum(weight)
    assert got == [pytest.approx(wanted, abs=1e-4)]


def test_a_grade_that_another_begins_with_is_only_itself(tmp_path):
    """Many tokenizers spell 10 as "1", "0": what the model gives to "1" is not all given to the grade 1."""
    model, tokenizer = save_digits(tmp_path)
    section = {"local": {"path": str(tmp_path)}, **SHORT, "scale": [0, 100]}
    got = Judge(JudgeConfig.model_validate(section)).grade([("a cat", "sat")])
    question = tokenizer("a cat sat Grade: ")["input_ids"]

    def share(ids):
        """p(ids | question) by the chain rule, in float64."""
        with torch.no_grad():
            logp = model(torch.tensor([question + ids])).logits[0].log_softmax(-1)
        return math.exp(sum(float(logp[len(question) + i - 1, x]) for i, x in enumerate(ids)))

    weight = {}
    for grade in range(101):
        ids = tokenizer(str(grade))["input_ids"]
        longer = [10 * grade + digit for digit in range(10) if 0 < grade <= (100 - digit) // 10]
        weight[grade] = share(ids) - sum(share(tokenizer(str(x))["input_ids"]) for x in longer)
    wanted = sum(g * w for g, w in weight.items()) / sum(weight.values())
    assert got == [pytest.approx(wanted, abs=1e-3)]


def save_digits(folder):
    """A random model that writes letters and digits one by one, in float64 here and as files."""
    tokenizer = letters(vocabulary=[*LETTERS, *string.digits, ":"])
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None,
            initializer_range=0.5,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.double(), tokenizer


def test_a_scale_is_part_of_what_is_kept(tmp_path):
    """Two judges that share a file of replies do not read each other's grades of another scale."""
    first = {"local": {"path": str(story_model())}, **SHORT, "scale": [5, 9], "cache": str(tmp_path / "kept.jsonl")}
    assert 5 <= Judge(JudgeConfig.model_validate(first)).grade([("A cat", "sat.")])[0] <= 9
    assert 1 <= Judge(JudgeConfig.model_validate(first | {"scale": [1, 3]})).grade([("A cat", "sat.")])[0] <= 3


def test_a_model_that_writes_stories_writes_no_verdict_and_that_is_counted(tmp_path):
    opened = judge(tmp_path, read="text", max_tokens=6)
    assert opened.compare(ITEMS) == [None, None]
    assert opened.stats()["judge/unparsable"] == 1


def test_a_question_longer_than_the_context_is_refused(tmp_path):
    with pytest.raises(SteersmanError, match="more than the model's context"):
        judge(tmp_path).compare([("word " * 3000, "a", "b")])


def test_reading_of_log_probabilities():
    assert likeliest({"A": -1.0, "B": -2.0, "C": -3.0}, 0.0) == 1.0
    assert likeliest({"A": -3.0, "B": -2.0, "C": -3.0}, 0.0) == 0.0
    assert likeliest({"A": -1.0, "B": -1.5, "C": -9.0}, 0.6) == 0.5
    assert likeliest({"A": -2.0, "B": -1.5, "C": -1.0}, 0.0) == 0.5
    assert expected({"1": math.log(0.25), "3": math.log(0.75)}) == pytest.approx(2.5)


def test_a_judge_stops_at_every_end_that_its_model_names(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(story_model())
    tokenizer = AutoTokenizer.from_pretrained(story_model())
    ends = [tokenizer.eos_token_id, tokenizer.encode(".", add_special_tokens=False)[-1]]
    model.generation_config.eos_token_id = ends
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert list(Local(LocalConfig(path=str(tmp_path / "model"))).engine.end_ids) == ends

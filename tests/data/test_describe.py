import pytest
from letter_models import write_jsonl

from steersman.data import DataConfig, LargeDataConfig, Layout, Order, Row, describe, encode, layout, training
from steersman.data.describe import spans
from steersman.data.examples import Demonstration
from steersman.data.formats import CONVENTIONAL
from steersman.data.load import LoadedExamples
from steersman.data.rows import BadRows
from steersman.data.shapes import recognise

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def summary(tokenizer, examples, **given):
    config = DataConfig(path="unused", **given)
    laid = Layout(tokenizer, append_eos=config.append_eos, allow_special_tokens=config.allow_special_tokens)
    shape = recognise([Row({"prompt": "a", "completion": "b"}, "f", 1)], "demonstration", CONVENTIONAL)
    return describe(LoadedExamples(examples, [], shape, BadRows()), encode(examples, laid, config), laid)


def demo(prompt, completion):
    return Demonstration(prompt, completion, Row({}, "f", 1))


def test_samples_show_what_counts(tokenizer):
    e = demo("Once upon a time", ", there was")
    (sample,) = summary(tokenizer, [e]).samples
    assert [counts for _, counts in sample] == [False, True]
    prompt, completion = (text for text, _ in sample)
    assert prompt.endswith("Once upon a time")
    assert completion == ", there was" + tokenizer.eos_token


def test_holes_of_a_conversation_are_shown(chatml):
    e = demo(TALK[:1], [TALK[1], *TALK])
    laid = Layout(chatml)
    pieces = spans(laid, encode([e], laid, DataConfig(path="unused")).first[0])
    assert pieces == [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes<|im_end|>", True),
        ("\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes<|im_end|>", True),
    ]


def test_numbers_and_warnings(bos_and_eos):
    examples = [demo("x", " y"), demo("x ", " </s> y"), demo("x", " y" * 40)]
    s = summary(bos_and_eos, examples, max_length=30, on_too_long="truncate")
    assert (s.rows, s.end_share) == (3, 2 / 3)
    assert s.lengths["max"] == 30
    text = "\n".join(s.lines)
    for said in (
        "1 cut (33.3%)",
        "only 66.7% of the answers",
        "1 examples spell a special token",
        "1 prompts end in",
    ):
        assert said in text
    assert summary(bos_and_eos, examples[:1]).end_share == 1
    assert summary(bos_and_eos, examples[:1], append_eos=False).end_share == 0
    e = demo(TALK[:1], TALK[1:])
    assert any("own chat template" in line for line in summary(bos_and_eos, [e]).lines)


@pytest.mark.parametrize("allowed", [False, True])
def test_what_becomes_of_special_tokens_in_the_data_is_told_as_it_is(tokenizer, tmp_path, allowed):
    """In memory and from disk: one more special id is in the row exactly where the run says so."""
    told = "as that token, since" if allowed else "as ordinary text unless"
    end = tokenizer.eos_token
    s = summary(tokenizer, [demo("x", f" y {end} z")], allow_special_tokens=allowed)
    said = [line for line in s.lines if "special token" in line]
    assert said == [f"1 examples spell a special token; it is read {told} data.allow_special_tokens is true"]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "x", "completion": f" y {end} z"}])
    config = LargeDataConfig.model_validate({
        "path": str(file), "cache": str(tmp_path / "cache"), "allow_special_tokens": allowed
    })  # fmt: skip
    kept = training(config, "demonstration", layout(tokenizer, config), context=70, order=Order(1, 1))
    assert said[0] in kept.summary.lines
    assert kept.train.groups[0][0].response.count(tokenizer.eos_token_id) == 1 + allowed

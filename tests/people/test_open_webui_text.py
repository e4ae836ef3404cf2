"""What of a message of Open WebUI is its text."""

from __future__ import annotations

import pytest
from people_kit import REASONING, TOOL

from steersman.people.store.open_webui_text import WITH_FILES, WITH_TOOLS, read_message, without_blocks


@pytest.mark.parametrize(
    "text",
    [
        f"So:\n```html\n{REASONING}\n```\nsays it. ",
        'It is `<details type="reasoning">`, they say.',
        "<details>\n<summary>More</summary>x</details>",
    ],
)
def test_what_looks_like_a_block_and_is_the_answers_own_stays(text):
    assert read_message({"role": "assistant", "content": text}) == (text, "")


def test_blocks_are_cut_from_answers_alone():
    assert read_message({"role": "user", "content": REASONING}) == (REASONING, "")
    assert read_message({"role": "assistant", "content": f"{REASONING}\nYes."}) == ("Yes.", "")
    assert read_message({"role": "assistant", "content": f"Well.\n{TOOL}\nYes."}) == ("Well.\n\nYes.", WITH_TOOLS)
    code = "```py\nx\n```"
    assert read_message({"role": "assistant", "content": f"{code}\n{REASONING}\n```"}) == (f"{code}\n\n```", "")


def test_the_text_of_an_answer_may_stand_in_its_output_alone():
    said = {"type": "message", "content": [{"type": "output_text", "text": "Yes."}]}
    output = [{"type": "reasoning", "summary": []}, said]
    assert read_message({"role": "assistant", "content": "", "output": output}) == ("Yes.", "")
    assert read_message({"role": "assistant", "content": "No.", "output": output}) == ("No.", "")
    called = [*output, {"type": "function_call", "call_id": "1"}]
    assert read_message({"role": "assistant", "content": "Yes.", "output": called}) == ("Yes.", WITH_TOOLS)


def test_parts_are_lines_and_what_is_no_text_is_told():
    parts = [{"type": "text", "text": "Look."}, {"type": "text", "text": "What is it?"}]
    assert read_message({"role": "user", "content": parts}) == ("Look.\nWhat is it?", "")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert read_message({"role": "user", "content": [*parts, image]}) == ("Look.\nWhat is it?", WITH_FILES)
    assert read_message({"role": "user", "content": "Look.", "files": [{"type": "file"}]}) == ("Look.", WITH_FILES)
    assert read_message({"role": "user", "content": None, "files": []}) == ("", "")
    with pytest.raises(ValueError, match="neither text nor a list of parts"):
        read_message({"role": "user", "content": {"text": "x"}})


@pytest.mark.parametrize(
    ("piece", "kinds"),
    [
        ('<details type="reasoning"', set()),
        ('<details type="reasoning">', {"reasoning"}),
        ("<details ", set()),
        ("```", set()),
        ("`", set()),
        ("</details>", set()),
    ],
)
def test_blocks_are_cut_in_time_linear_in_the_text(piece, kinds):
    """In quadratic time this would take hours."""
    text = piece * 300_000
    assert without_blocks(text) == ("" if kinds else text, kinds)

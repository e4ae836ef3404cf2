import json

import pytest

from steersman.data import DataConfig, demonstrations, feedback, preferences, prompts, rankings, ratings, steps
from steersman.data.examples import answers, pairs
from steersman.types import SteersmanError

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BOT2 = {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
HH = "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:"
TURNS = [USER, {"role": "assistant", "content": "x"}, {"role": "user", "content": "r"}]


def load(tmp_path, fn, rows, **given):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return fn(DataConfig(path=str(path), **given))


def only(tmp_path, fn, row, **given):
    (example,) = load(tmp_path, fn, [row], **given).train
    return example


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "said"),
    [
        ({"text": "t"}, "", "t", "plain text"),
        ({"prompt": "q", "completion": "a"}, "q", "a", "prompt and completion"),
        ({"question": "q", "answer": "a"}, "q", "a", "prompt is the column 'question'"),
        ({"prompt": [USER], "completion": "a"}, [USER], [BOT], "prompt and completion"),
        ({"messages": [USER, BOT, USER]}, [USER], [BOT], "role and content"),
        ({"messages": [*TURNS, BOT]}, [USER], [*TURNS[1:], BOT], "role and content"),
        ({"conversations": [HUMAN, GPT]}, [USER], [BOT], "ShareGPT"),
        ({"conversations": [HUMAN, GPT], "system": "s"}, [{"role": "system", "content": "s"}, USER], [BOT], "Share"),
        ({"instruction": "q", "input": "", "output": "a"}, [USER], [BOT], "Alpaca"),
        ({"instruction": "q", "input": "i", "output": "a"},
         [{"role": "user", "content": "q\n\ni"}], [BOT], "Alpaca"),
        ({"instruction": "r", "output": "a", "history": [["q", "x"]]}, [USER], [*TURNS[1:], BOT], "Alpaca"),
        ({"instruction": "q", "output": "a", "history": []}, [USER], [BOT], "Alpaca"),
        ({"instruction": "q", "output": "a", "history": None}, [USER], [BOT], "Alpaca"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a", "the chosen answers"),
        ({"prompt": "q", "completion": "a", "label": True}, "q", "a", "the rows with thumbs up"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, BOT]}, [USER], [BOT], "role"),
    ],
)  # fmt: skip
def test_demonstrations(tmp_path, row, prompt, completion, said):
    loaded = load(tmp_path, demonstrations, [row])
    (example,) = loaded.train
    assert (example.prompt, example.completion) == (prompt, completion)
    assert said in loaded.shape.sentence


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a", "b")),
        ({"prompt": "q", "chosen": [BOT], "rejected": [BOT2]}, ([USER], [BOT], [BOT2])),
        ({"prompt": "q", "chosen": [USER, BOT], "rejected": [USER, BOT2]}, ([USER], [BOT], [BOT2])),
        ({"chosen": [*TURNS, BOT], "rejected": [*TURNS, BOT2]}, (TURNS, [BOT], [BOT2])),
        ({"chosen": HH + " a", "rejected": HH + " b"}, (TURNS, [BOT], [BOT2])),
        ({"instruction": "q", "input": "", "output": "z", "chosen": "a", "rejected": "b"}, ([USER], [BOT], [BOT2])),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, ([USER], [BOT], [BOT2])),
        ({"instruction": "r", "chosen": "a", "rejected": "b", "history": [["q", "x"]]}, (TURNS, [BOT], [BOT2])),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}},
         ([USER], [BOT], [BOT2])),
        ({"#id": "1", "label": "a2", "a1": "b", "a2": "a<br/>c"}, ("rows: ", "a\nc", "b")),
        ({"prompt": "q", "responses": ["b", "a"], "ranks": [1, 0]}, ("q", "a", "b")),
        ({"prompt": "q", "responses": ["b", "a"], "scores": [1, 3.5]}, ("q", "a", "b")),
    ],
)  # fmt: skip
def test_preferences(tmp_path, row, expected):
    e = only(tmp_path, preferences, row)
    assert (e.prompt, e.chosen, e.rejected) == expected
    assert (e.margin, e.agreement, e.weight) == (None, 1.0, 1.0)


@pytest.mark.parametrize("answered", [{}, {"output": "a"}])
def test_alpaca_rows_ask_behind_their_history(tmp_path, answered):
    row = {"instruction": "r", "history": [["q", "x"]], "system": "s"} | answered
    assert only(tmp_path, prompts, row).prompt == [SYSTEM, *TURNS]


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ("we spoke before", "field 'history': must be a list, not str"),
        ([["q"]], "field 'history': item 1 must be a list of two texts"),
        ([["q", "x"], ["q", 3]], "field 'history': item 2 must be a list of two texts"),
        ([["q", " "]], "field 'history': the answer of item 1 is empty"),
    ],
)
def test_a_history_that_is_no_pairs_of_texts_is_a_bad_row(tmp_path, history, said):
    for fn, row in ((demonstrations, {"output": "a"}), (preferences, {"chosen": "a", "rejected": "b"})):
        with pytest.raises(SteersmanError, match=said):
            load(tmp_path, fn, [{"instruction": "r", "history": history} | row])


SYSTEM, OTHER = {"role": "system", "content": "s"}, {"role": "system", "content": "t"}
WITH_PROMPTS = [
    (preferences, {"prompt": "q", "chosen": "a", "rejected": "b"}),
    (preferences, {"prompt": "q", "chosen": [USER, BOT], "rejected": [USER, BOT2]}),
    (preferences, {"prompt": [USER], "chosen": "a", "rejected": "b"}),
    (preferences, {"question": "q", "chosen": "a", "rejected": "b"}),
    (preferences, {"chosen": [USER, BOT], "rejected": [USER, BOT2]}),
    (preferences, {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}}),
    (preferences, {"instruction": "q", "chosen": "a", "rejected": "b"}),
    (preferences, {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
    (preferences, {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1}),
    (demonstrations, {"prompt": "q", "completion": "a"}),
    (demonstrations, {"conversations": [HUMAN, GPT]}),
    (demonstrations, {"instruction": "q", "output": "a"}),
    (rankings, {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1]}),
    (ratings, {"prompt": "q", "completion": "a", "score": 1}),
    (steps, {"prompt": "q", "steps": ["a"], "labels": [1]}),
    (prompts, {"prompt": "q"}),
    (prompts, {"messages": [USER, BOT]}),
    (prompts, {"instruction": "q"}),
]


@pytest.mark.parametrize(("fn", "row"), WITH_PROMPTS)
def test_the_column_system_is_the_first_turn_of_every_prompt(tmp_path, fn, row):
    example = only(tmp_path, fn, row | {"system": "s"})
    assert example.prompt == [SYSTEM, USER]
    assert all(answer in ([BOT], [BOT2]) for answer in answers(example))
    assert only(tmp_path, fn, row | {"system": ""}).prompt in ("q", [USER])
    with pytest.raises(SteersmanError, match="field 'system': must be text, not int"):
        load(tmp_path, fn, [row | {"system": 3}])


def test_thumbs_and_grouped_ratings_have_their_system_turn(tmp_path):
    row = {"prompt": "q", "completion": "a", "system": "s"}
    loaded = load(tmp_path, feedback, [row | {"label": True}, row | {"label": False}])
    assert [e.prompt for e in loaded.train] == [[SYSTEM, USER]] * 2
    rated = [row | {"completion": c, "system": s, "good": i} for i, (c, s) in enumerate(["as", "bs", "at", "bt"])]
    loaded = load(tmp_path, rankings, rated, rank_by=["good"])
    assert [e.prompt for e in loaded.train] == [[SYSTEM, USER], [OTHER, USER]]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [OTHER, USER], "chosen": "a", "rejected": "b"},
        {"prompt": [OTHER, USER], "chosen": "a", "rejected": "b"},
        {"chosen": [OTHER, USER, BOT], "rejected": [OTHER, USER, BOT2]},
        {"prompt": [OTHER], "chosen": [USER, BOT], "rejected": [USER, BOT2]},
        {"prompt": [OTHER, USER], "chosen": [USER, BOT], "rejected": [USER, BOT2]},
        {"prompt": [SYSTEM, USER], "chosen": [OTHER, USER, BOT], "rejected": [OTHER, USER, BOT2]},
    ],
)
def test_a_conversations_own_system_turn_stands(tmp_path, row):
    for more in ({}, {"system": "s"}):
        assert only(tmp_path, preferences, row | more).prompt == [OTHER, USER]


def test_turns_beside_whole_conversations_are_theirs_or_a_bad_row(tmp_path):
    whole = {"chosen": [*TURNS, BOT], "rejected": [*TURNS, BOT2]}
    for turns in ([USER], TURNS, [SYSTEM, *TURNS[:2]]):
        given = only(tmp_path, preferences, whole | {"prompt": turns}).prompt
        assert given == [m for m in turns if m is SYSTEM] + TURNS
    with pytest.raises(SteersmanError, match="field 'prompt': the conversations in chosen and rejected do not begin"):
        load(tmp_path, preferences, [whole | {"prompt": [{"role": "user", "content": "before"}]}])


def test_margins_and_agreement_are_kept(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "agreement": 0.75}
    e = only(tmp_path, preferences, row)
    assert (e.margin, e.agreement) == (2.0, 0.75)


def test_votes_become_a_soft_label(tmp_path):
    row = {"instruction": "q", "input": "", "response1": "b", "response2": "a"}
    votes = lambda *v: row | {f"annotator{i + 1}": x for i, x in enumerate(v)}  # noqa: E731
    e = only(tmp_path, preferences, votes(2, 2, 0))
    assert (e.chosen, e.rejected, e.agreement) == ([BOT], [BOT2], pytest.approx(2.5 / 3))
    with pytest.raises(SteersmanError, match=r"line 1: the answers are tied"):
        load(tmp_path, preferences, [votes(1, 2, 0)])
    assert only(tmp_path, preferences, votes(1, 2, 0), ties="keep").agreement == 0.5
    loaded = load(tmp_path, preferences, [votes(1, 2, 0), votes(1, 1, 0)], ties="drop")
    assert (len(loaded.train), loaded.left_out.counts) == (1, {"tie": 1})
    with pytest.raises(SteersmanError, match=r"field 'annotator2': a vote must be 1, 2 or 0"):
        load(tmp_path, preferences, [votes(1, 3, 0)])


def test_demonstrations_of_pairs_are_what_most_raters_preferred(tmp_path):
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b", "agreement": share} for share in (1, 0.6, 0.5, 0.4, 0)]
    assert [e.completion for e in load(tmp_path, demonstrations, pairs).train] == ["a", "a", "b", "b"]


def test_feedback(tmp_path):
    up, down = {"messages": [*TURNS, BOT], "label": True}, {"messages": [*TURNS, BOT2], "label": False}
    loaded = load(tmp_path, feedback, [up, down])
    assert [(e.prompt, e.completion, e.label) for e in loaded.train] == [(TURNS, [BOT], True), (TURNS, [BOT2], False)]
    rows = [{"prompt": "q", "completion": "a", "label": v} for v in ("1", "false", 0, 1.0, "True", -1)]
    assert [e.label for e in load(tmp_path, feedback, rows).train] == [True, False, False, True, True, False]
    pair = load(tmp_path, feedback, [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert [(e.completion, e.label) for e in pair.train] == [("a", True), ("b", False)]
    weighed = {"prompt": "q", "chosen": "a", "rejected": "b", "votes": [0, 0, 1], "weight": 0.25}
    pair = load(tmp_path, feedback, [weighed])
    assert [(e.completion, e.label, e.weight) for e in pair.train] == [("b", True, 0.25), ("a", False, 0.25)]
    with pytest.raises(SteersmanError, match="evenly split, so neither answer has a thumb up"):
        load(tmp_path, feedback, [{"prompt": "q", "chosen": "a", "rejected": "b", "agreement": 0.5}])


def test_a_tree_gives_a_ranking_per_branching(tmp_path):
    leaf = lambda text, rank: {"role": "assistant", "text": text, "rank": rank, "replies": []}  # noqa: E731
    second = {"role": "prompter", "text": "r", "replies": [leaf("b", 1), leaf("a", 0), leaf("c", None)]}
    root = {"role": "prompter", "text": "q", "replies": [leaf("x", 0) | {"replies": [second]}, leaf("y", 1)]}
    first, other = load(tmp_path, rankings, [{"prompt": root}]).train
    assert (first.prompt, [c[0]["content"] for c in first.completions], first.ranks) == ([USER], ["x", "y"], [0, 1])
    assert (other.prompt, other.ranks) == (TURNS, [1, 0])
    assert [(p.chosen, p.rejected) for p in pairs(other)] == [([BOT], [BOT2])]


def test_repeated_ranks_are_refused_kept_or_left_out(tmp_path):
    tied = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [0, 0, 1]}
    with pytest.raises(SteersmanError, match=r"line 1.*tied.*data.ties"):
        load(tmp_path, rankings, [tied])
    e = only(tmp_path, rankings, tied, ties="keep")
    assert [(p.chosen, p.rejected) for p in pairs(e)] == [("a", "c"), ("b", "c")]
    with pytest.raises(SteersmanError, match=r"no usable row \(1 rows left out: 1 tie\)"):
        load(tmp_path, rankings, [tied], ties="drop")


def test_ratings(tmp_path):
    row = {"mr": "q", "ref": "a", "natural": "5", "quality": 2}
    given = {"columns": {"prompt": "mr", "completion": "ref"}, "scores": ["natural", "quality"]}
    e = only(tmp_path, ratings, row, **given)
    assert (e.prompt, e.completion, e.scores) == ("q", "a", {"natural": 5.0, "quality": 2.0})
    with pytest.raises(SteersmanError, match=r"field 'quality': must lie between 3 and 6, not 2"):
        load(tmp_path, ratings, [row], score_range=(3, 6), **given)
    with pytest.raises(SteersmanError, match=r"field 'natural': must be a finite number"):
        load(tmp_path, ratings, [row | {"natural": float("nan")}], **given)
    assert only(tmp_path, ratings, {"text": "t", "score": 1.5}).scores == {"score": 1.5}
    mixed = [{"text": "t", "scores": {"x": 1}}, {"text": "t", "scores": {"y": 1}}]
    assert [e.scores for e in load(tmp_path, ratings, mixed).train] == [{"x": 1}, {"y": 1}]


def test_prompts_keep_the_other_columns(tmp_path):
    row = {"Body": "Two cats.", "Question": "How many?", "Answer": 2.0}
    e = only(tmp_path, prompts, row, prompt_template="{Body} {Question}\nAnswer:")
    assert e.prompt == "Two cats. How many?\nAnswer:"
    assert e.columns["Answer"] == 2.0
    assert only(tmp_path, prompts, {"messages": [*TURNS, BOT]}).prompt == TURNS
    assert only(tmp_path, prompts, {"messages": TURNS}).prompt == TURNS
    assert only(tmp_path, prompts, {"chosen": HH + " a", "rejected": HH + " b"}).prompt == TURNS
    assert only(tmp_path, prompts, {"instruction": "q"}).prompt == [USER]
    assert only(tmp_path, prompts, {"text": "Once upon  a time there"}, opening_words=3).prompt == "Once upon  a"


def test_prefix_is_put_before_plain_answers(tmp_path):
    e = only(tmp_path, preferences, {"prompt": "q", "chosen": "a", "rejected": " b"}, completion_prefix=" ")
    assert (e.chosen, e.rejected) == (" a", " b")


GOOD = {"prompt": "q", "completion": "a"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1]}
RATED = {"prompt": "q", "completion": "a", "score": 1}
LABELLED = {"prompt": "q", "completion": "a", "label": True}
CHAT = {"messages": [USER, BOT]}
TRANSCRIPT = {"chosen": HH + " a", "rejected": HH + " b"}
BAD_ROWS = [
    (demonstrations, GOOD, {"prompt": "q", "completoin": "a"}, "missing field",
     "'completion'.*did you mean 'completoin'"),
    (demonstrations, GOOD, {"prompt": "q", "completion": None}, "missing value", "'completion': the field is null"),
    (demonstrations, GOOD, {"prompt": "q", "completion": 3}, "wrong type", "'completion': must be text or a list"),
    (demonstrations, GOOD, {"prompt": "q", "completion": " \n"}, "empty completion", "'completion': the completion"),
    (demonstrations, GOOD, {"prompt": " ", "completion": "a"}, "empty prompt", "'prompt': the prompt is empty"),
    (demonstrations, {"text": "t"}, {"text": ""}, "empty completion", "'text': the text is empty"),
    (demonstrations, CHAT, {"messages": []}, "empty conversation", "'messages': the conversation has no turn"),
    (demonstrations, CHAT, {"messages": [USER]}, "no assistant turn", "no turn of the conversation is"),
    (demonstrations, CHAT, {"messages": [BOT]}, "empty prompt", "begins with the assistant"),
    (demonstrations, CHAT, {"messages": [USER, {"role": "assistnt", "content": "a"}]}, "unknown role",
     "turn 2 has the role 'assistnt'.*did you mean 'assistant'"),
    (demonstrations, CHAT, {"messages": [USER, {"role": "assistant", "content": ""}]}, "empty completion", "turn 2"),
    (demonstrations, CHAT, {"messages": [USER, {"role": "assistant"}]}, "missing value", "turn 2 has no content"),
    (demonstrations, CHAT, {"messages": ["hi"]}, "wrong type", "turn 1 must be an object, not str"),
    (demonstrations, CHAT, {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "wrong type",
     "a part that is not text"),
    (preferences, PAIR, PAIR | {"rejected": "a "}, "chosen equals rejected", "'chosen': the chosen answer equals"),
    (preferences, PAIR, PAIR | {"rejected": ""}, "empty completion", "'rejected': the answer is empty"),
    (preferences, PAIR, PAIR | {"agreement": 1.5}, "out of range", "'agreement': must lie between 0 and 1"),
    (preferences, PAIR, PAIR | {"margin": float("inf")}, "number not finite", "'margin': must be a finite number"),
    (preferences, TRANSCRIPT, TRANSCRIPT | {"rejected": HH + " "}, "empty completion", "'rejected'"),
    (preferences, TRANSCRIPT, TRANSCRIPT | {"rejected": HH.replace("x", "z") + " b"},
     "transcripts differ before the last reply", "these part earlier"),
    (preferences, TRANSCRIPT, TRANSCRIPT | {"rejected": HH + " b\n\nHuman: bye"},
     "no reply at the end", "'rejected'"),
    (preferences, TRANSCRIPT, TRANSCRIPT | {"chosen": "plain"}, "no transcript", "'chosen'"),
    (preferences, {"chosen": [USER, BOT], "rejected": [USER, BOT2]},
     {"chosen": [USER, BOT], "rejected": [{"role": "user", "content": "z"}, BOT2]},
     "conversations differ before the reply", "part at turn 1"),
    (rankings, RANKED, RANKED | {"responses": ["a"], "ranks": [0]}, "single-item ranking", "two responses at least"),
    (rankings, RANKED, RANKED | {"ranks": [0]}, "wrong number of ranks", "2 responses but 1 ranks"),
    (rankings, RANKED, RANKED | {"ranks": [0, float("nan")]}, "number not finite", "'ranks'"),
    (rankings, RANKED, RANKED | {"ranks": "0 1"}, "wrong type", "'ranks': must be a list, not str"),
    (ratings, RATED, RATED | {"score": "much"}, "wrong type", "'score': must be a number, not 'much'"),
    (ratings, RATED, RATED | {"score": True}, "wrong type", "'score': must be a number, not bool"),
    (feedback, LABELLED, LABELLED | {"label": "maybe"}, "wrong type", "'label': must be true or false"),
    (prompts, {"prompt": "q"}, {"prompt": ""}, "empty prompt", "'prompt': the prompt is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "good", "bad", "reason", "message"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, fn, good, bad, reason, message):
    rows = [good, bad, good | {"label": False} if fn is feedback else good]
    with pytest.raises(SteersmanError, match=rf"rows.jsonl, line 2.*{message}.*on_bad_row: skip"):
        load(tmp_path, fn, rows)
    loaded = load(tmp_path, fn, rows, on_bad_row="skip")
    assert (len(loaded.train), loaded.left_out.counts) == (2, {reason: 1})


@pytest.mark.parametrize("value", [True, False])
def test_feedback_with_one_label_only(tmp_path, value):
    rows = [{"prompt": "q", "completion": "a", "label": value}] * 3
    with pytest.raises(SteersmanError, match=rf"rows.jsonl: all 3 labels are {str(value).lower()}"):
        load(tmp_path, feedback, rows)


def test_unknown_columns_are_named_with_the_nearest_known(tmp_path):
    with pytest.raises(SteersmanError, match=r"line 1: the columns 'promt', 'xyz'.*'promt' looks like 'prompt'"):
        load(tmp_path, demonstrations, [{"promt": "q", "xyz": "a"}])


@pytest.mark.parametrize("value", ["yes", "good", 3])
def test_a_label_that_is_none_is_named_where_no_row_has_one(tmp_path, value):
    rows = [{"prompt": "q", "completion": "a", "label": value}] * 3
    with pytest.raises(SteersmanError, match=rf"field 'label': must be true or false .*not '{value}'"):
        load(tmp_path, feedback, rows)


def test_a_shape_that_can_not_serve(tmp_path):
    wanted = r"these rows are prompt and completion.*preference pairs, which need.*Name your columns in data.columns"
    with pytest.raises(SteersmanError, match=wanted):
        load(tmp_path, preferences, [GOOD])
    with pytest.raises(SteersmanError, match=r"can not serve as ratings.*data.scores"):
        load(tmp_path, ratings, [GOOD])


def test_columns_are_renamed_and_a_misspelt_one_is_named(tmp_path):
    row = {"frage": "q", "antwort": "a"}
    e = only(tmp_path, demonstrations, row, columns={"prompt": "frage", "completion": "antwort"})
    assert (e.prompt, e.completion) == ("q", "a")
    with pytest.raises(SteersmanError, match=r"line 1, field 'fraeg': .*did you mean 'frage'"):
        load(tmp_path, demonstrations, [row], columns={"prompt": "fraeg", "completion": "antwort"})
    with pytest.raises(SteersmanError, match=r"line 1, field 'antwort': the completion is empty"):
        load(tmp_path, demonstrations, [row | {"antwort": ""}], columns={"prompt": "frage", "completion": "antwort"})


def test_prompt_template_names_what_is_missing(tmp_path):
    with pytest.raises(SteersmanError, match=r"line 1, field 'quest'.*did you mean 'question'"):
        load(tmp_path, prompts, [{"question": "q"}], prompt_template="{quest}")
    with pytest.raises(SteersmanError, match=r"data.prompt_template"):
        load(tmp_path, prompts, [{"question": "q"}], prompt_template="{question")


def test_a_prompt_template_writes_values_by_their_format_and_columns_by_their_whole_name(tmp_path):
    row = {"name": "fox", "price": 3.25, "a.b": "x", "n[0]": 7}
    for template, prompt in (
        ("{name} costs {price:.1f}", "fox costs 3.2"),
        ("{a.b}{n[0]:03}", "x007"),
        ("{name!r:>6} {{x}}", " 'fox' {x}"),
    ):
        assert only(tmp_path, prompts, row, prompt_template=template).prompt == prompt


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{name!z}", r"\{name!z\} asks for the conversion 'z'.*!s, !r and !a"),
        ("{name:{width}}", r"\{name:\{width\}\} has a column inside a format"),
        ("{name.title}", r"\{name.title\} is no column name"),
        ("{}", r"\{\} is no column name"),
        ("{0}", r"\{0\} is no column name"),
    ],
)
def test_a_prompt_template_that_no_row_could_fill_is_refused_whatever_is_done_with_bad_rows(tmp_path, template, said):
    with pytest.raises(SteersmanError, match=f"^data.prompt_template: {said}"):
        load(tmp_path, prompts, [{"name": "fox"}], prompt_template=template, on_bad_row="skip")


@pytest.mark.parametrize("value", ["dear", [3], {"x": 3}])
def test_a_value_that_the_prompt_templates_format_does_not_fit_is_a_bad_row(tmp_path, value):
    rows = [{"name": "fox", "price": 3}, {"name": "hen", "price": value}]
    message = r"line 2, field 'price': data.prompt_template writes it with the format '.2f'.*write \{price\}"
    with pytest.raises(SteersmanError, match=message):
        load(tmp_path, prompts, rows, prompt_template="{name} costs {price:.2f}")
    loaded = load(tmp_path, prompts, rows, prompt_template="{name} costs {price:.2f}", on_bad_row="skip")
    assert ([e.prompt for e in loaded.train], loaded.left_out.counts) == (["fox costs 3.00"], {"wrong type": 1})


def test_all_rows_bad_is_an_error(tmp_path):
    with pytest.raises(SteersmanError, match=r"no usable row \(2 rows left out: 2 chosen equals rejected\); for ex"):
        load(tmp_path, preferences, [PAIR | {"rejected": "a"}] * 2, on_bad_row="skip")


def test_limit_takes_the_first(tmp_path):
    rows = [{"text": str(i)} for i in range(10)]
    assert [e.completion for e in load(tmp_path, demonstrations, rows, limit=3).train] == ["0", "1", "2"]


def test_config_refuses_unknown_keys_and_bad_values():
    from pydantic import ValidationError

    for given in ({"pth": "x"}, {"on_bad_row": "ignore"}, {"held_out": -1}, {"held_out": 1.5}, {"limit": 0}):
        with pytest.raises(ValidationError):
            DataConfig(**({"path": "x"} | given))

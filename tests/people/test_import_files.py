"""Exports of other programs, in the form in which these write them."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
from people_kit import REASONING, SQLITE, TOOL
from sqlalchemy import select

from steersman.data import DataConfig, demonstrations, feedback, preferences, rankings, ratings
from steersman.people.collect.verb import CollectRecipe, fill
from steersman.people.sources import open_judgements
from steersman.people.store.imported import ImportCounts
from steersman.people.store.imports import import_file
from steersman.people.store.open_webui import read_record
from steersman.people.store.open_webui_text import WITH_FILES, WITH_TOOLS
from steersman.people.store.raters import forget
from steersman.people.store.schema import Forgotten, Person, Turn
from steersman.types import SteersmanError

MESSAGES = {
    "m1": {"id": "m1", "parentId": None, "childrenIds": ["m2", "m3"], "role": "user", "content": "Name a colour.",
           "timestamp": 1760000000, "models": ["llama3:8b", "qwen2:7b"]},
    "m2": {"id": "m2", "parentId": "m1", "childrenIds": ["m4"], "role": "assistant", "content": "Blue.",
           "model": "llama3:8b", "modelIdx": 0, "timestamp": 1760000001,
           "annotation": {"rating": 1, "reason": "accurate_information", "comment": "short", "tags": ["colour"]}},
    "m3": {"id": "m3", "parentId": "m1", "childrenIds": [], "role": "assistant", "content": "A spoon.",
           "model": "qwen2:7b", "modelIdx": 1, "timestamp": 1760000001},
    "m4": {"id": "m4", "parentId": "m2", "childrenIds": ["m5"], "role": "user", "content": "Another?",
           "timestamp": 1760000002},
    "m5": {"id": "m5", "parentId": "m4", "childrenIds": [], "role": "assistant", "content": "Spoon.",
           "model": "llama3:8b", "timestamp": 1760000003, "annotation": {"rating": -1}},
}  # fmt: skip
CHAT = {
    "id": "c1", "user_id": "u1", "title": "Colours",
    "chat": {"title": "Colours", "models": ["llama3:8b"], "history": {"messages": MESSAGES, "currentId": "m5"},
             "messages": []},
    "created_at": 1760000000, "archived": False, "meta": {},
}  # fmt: skip
FEEDBACK = {
    "id": "f1", "user_id": "u2", "version": 0, "type": "rating",
    "data": {"rating": -1, "model_id": "qwen2:7b", "sibling_model_ids": ["llama3:8b"], "reason": "not_factual",
             "comment": "", "tags": [], "details": {"rating": 2}},
    "meta": {"model_id": "qwen2:7b", "message_id": "m3", "message_index": 1, "chat_id": "c1",
             "base_models": {"qwen2:7b": None}},
    "snapshot": {"chat": {"id": "c1", "user_id": "u2", "title": "Colours", "chat": CHAT["chat"]}},
    "created_at": 1760000100, "updated_at": 1760000100,
}  # fmt: skip
LABELLED = {
    "id": 7, "data": {"prompt": "Say hello.", "answer1": "Hello!", "answer2": "What?"},
    "annotations": [
        {"id": 70, "completed_by": {"id": 3, "email": "ada@example.org"}, "was_cancelled": False, "lead_time": 4.2,
         "result": [{"id": "x", "from_name": "pw", "to_name": "pw", "type": "pairwise",
                     "value": {"selected": "left"}}]},
        {"id": 71, "completed_by": 4, "was_cancelled": True, "result": []},
        {"id": 72, "completed_by": 5, "was_cancelled": False,
         "result": [{"id": "y", "from_name": "c", "to_name": "answer1", "type": "choices",
                     "value": {"choices": ["x"]}}]},
    ],
    "predictions": [], "project": 1,
}  # fmt: skip


def task_of(data, selected="left", **more):
    """A task of Label Studio with one choice, as its page writes it: `to_name` is the Pairwise tag's own name."""
    result = {"id": "x", "from_name": "pw", "to_name": "pw", "type": "pairwise", "origin": "manual",
              "value": {"selected": selected}} | more  # fmt: skip
    return {**LABELLED, "data": data, "annotations": [{**LABELLED["annotations"][0], "result": [result]}]}


def write(tmp_path, name: str, value) -> str:
    (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    return str(tmp_path / name)


def test_open_webui_chats(address, store, tmp_path):
    done = import_file(store, write(tmp_path, "chats.json", [CHAT]))
    assert done.stored == {"thumb": 2}
    up, down = feedback(DataConfig(path=address)).train
    assert (up.prompt[-1]["content"], up.completion[0]["content"], up.label) == ("Name a colour.", "Blue.", True)
    assert [m["content"] for m in down.prompt] == ["Name a colour.", "Blue.", "Another?"]
    assert down.label is False
    assert up.row.data["models"] == ["llama3:8b"]
    (shown,) = demonstrations(DataConfig(path=address)).train
    assert shown.completion[0]["content"] == "Blue."


def test_open_webui_feedback_and_that_twice_is_once(address, store, tmp_path):
    file = write(tmp_path, "feedback.json", [FEEDBACK])
    assert import_file(store, file).stored == {"thumb": 1, "compare": 1}
    (pair,) = preferences(DataConfig(path=address)).train
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("Blue.", "A spoon.")
    again = import_file(store, file)
    assert not again.stored
    assert again.left_out == {"there already": 2}
    # The chat that the feedback was about adds its own thumbs to the same conversation.
    assert import_file(store, write(tmp_path, "chats.json", [CHAT])).stored == {"thumb": 2}


def test_open_webui_arena_tells_the_models_that_it_drew(address, store, tmp_path):
    record = json.loads(json.dumps(FEEDBACK))
    for message in record["snapshot"]["chat"]["chat"]["history"]["messages"].values():
        if "model" in message:
            message |= {"model": "arena-model", "arena": True, "selectedModelId": message["model"]}
    assert import_file(store, write(tmp_path, "arena.json", [record])).stored == {"thumb": 1, "compare": 1}
    (pair,) = preferences(DataConfig(path=address)).train
    assert pair.row.data["models"] == ["llama3:8b", "qwen2:7b"]


class Looked(dict):
    """A message that counts how often it is looked at."""

    looks = 0

    def get(self, key, default=None):
        Looked.looks += 1
        return super().get(key, default)

    def __getitem__(self, key):
        Looked.looks += 1
        return super().__getitem__(key)


def looks_of(count: int) -> int:
    """How often the messages of a chat of so many turns are looked at: two models answer each, one gets a thumb."""
    messages: dict[str, Looked] = {}
    for i in range(count):
        above = f"a{i - 1}" if i else None
        messages[f"u{i}"] = Looked(id=f"u{i}", parentId=above, role="user", content=f"q {i}")
        messages[f"a{i}"] = Looked(id=f"a{i}", parentId=f"u{i}", role="assistant", content=f"x {i}", model="m",
                                   annotation={"rating": 1})  # fmt: skip
        messages[f"b{i}"] = Looked(id=f"b{i}", parentId=f"u{i}", role="assistant", content=f"y {i}", model="n")
    record = {"id": f"c{count}", "user_id": "u", "chat": {"history": {"messages": messages}}}
    done, Looked.looks = ImportCounts(), 0
    chat = read_record(record, 0.0, done)
    assert chat is not None
    assert len(chat.told) == count
    return Looked.looks


def test_a_long_chat_takes_work_in_proportion():
    assert looks_of(80) < 5 * looks_of(20)


PAIRS = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]


def lines(path, rows, written: float):
    """A file of rows that was written at this time."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(path, (written, written))
    return path


def test_what_comes_again_in_another_order_is_not_stored_twice(store, tmp_path):
    """Nor is a row that stands twice, and so was said by two."""
    file = lines(tmp_path / "pairs.jsonl", [*PAIRS, PAIRS[1]], 1e9)
    assert import_file(store, file).stored == {"compare": 6}
    rows = [{"prompt": "new", "chosen": "x", "rejected": "y"}, PAIRS[1], *PAIRS[::-1]]
    done = import_file(store, lines(file, rows, 2e9))
    assert (done.stored, done.left_out) == ({"compare": 1}, {"there already": 6})
    done = import_file(store, lines(file, [*rows, PAIRS[1]], 3e9))
    assert (done.stored, done.left_out) == ({"compare": 1}, {"there already": 7})


def test_an_opinion_that_changed_takes_the_place_of_the_old_one(address, store, tmp_path):
    thumbs = [{"prompt": "q", "completion": text, "label": True} for text in "ab"]
    old = lines(tmp_path / "old" / "thumbs.jsonl", thumbs, 1e9)
    import_file(store, old)
    thumbs[0]["label"] = False
    new = lines(tmp_path / "new" / "thumbs.jsonl", thumbs, 2e9)
    done = import_file(store, new)
    assert (done.stored, done.changed, done.left_out) == ({"review": 1}, {"review": 1}, {"there already": 1})
    assert {e.completion: e.label for e in feedback(DataConfig(path=address)).train} == {"a": False, "b": True}
    done = import_file(store, old)  # the later state counts, whichever comes last
    assert (done.stored, done.left_out) == ({}, {"older than what is there": 1, "there already": 1})
    assert import_file(store, new).left_out == {"there already": 2}


def test_a_thumb_and_a_choice_that_changed_at_the_source_are_taken_over(address, store, tmp_path):
    record, task = json.loads(json.dumps(FEEDBACK)), json.loads(json.dumps(LABELLED))
    import_file(store, write(tmp_path, "feedback.json", [record]))
    import_file(store, write(tmp_path, "ls.json", [task]))
    record["data"]["rating"], record["updated_at"] = 1, 1760000200
    task["annotations"][0]["result"][0]["value"]["selected"] = "right"
    assert import_file(store, write(tmp_path, "feedback.json", [record])).changed == {"thumb": 1, "compare": 1}
    assert import_file(store, write(tmp_path, "ls.json", [task])).changed == {"compare": 1}
    chosen = [pair.chosen for pair in preferences(DataConfig(path=address)).train]
    assert {one if isinstance(one, str) else one[0]["content"] for one in chosen} == {"A spoon.", "What?"}


@SQLITE
@pytest.mark.parametrize("length", [40, 63, 99, 200])
def test_files_whose_long_names_begin_alike_are_of_different_raters(address, store, tmp_path, length):
    for who, vote in (("ada", 1), ("bob", 0)):
        file = tmp_path / f"{'n' * length}{who}.jsonl"
        for done in (Counter(compare=1), Counter()):  # known again at the next start
            row = {"prompt": "p", "chosen": "x", "rejected": "y", "votes": [vote]}
            assert import_file(store, lines(file, [row], 1e9)).stored == done
    assert sorted(raters(address).values()) == [1, 1]
    assert sorted(str(one.choice) for one in open_judgements(address)) == ["first", "second"]


@SQLITE
def test_annotators_with_long_addresses_that_begin_alike_are_two(address, store, tmp_path):
    one = LABELLED["annotations"][0]
    asked = [{**one, "id": i, "completed_by": {"email": f"{'a' * 90}.{i}@example.org"}} for i in range(2)]
    import_file(store, write(tmp_path, "ls.json", [{**LABELLED, "annotations": asked}]))
    assert len(raters(address)) == 2


def raters(address) -> Counter[str]:
    """How many judgements each rater has."""
    return Counter(one.user for one in open_judgements(address))


def test_who_was_forgotten_is_known_without_a_name_at_the_next_import(address, store, tmp_path):
    names = ("ada@example.org (label-studio)", "u1 (open-webui)", "pairs.jsonl (file)")
    recipe = CollectRecipe(
        imports=[
            write(tmp_path, "ls.json", [LABELLED]),
            write(tmp_path, "chats.json", [CHAT]),
            str(lines(tmp_path / "pairs.jsonl", PAIRS, 1e9)),
        ]
    )
    fill(store, recipe)
    before = raters(address)
    assert sorted(before.values()) == [1, 2, 5]
    for name in names:
        forget(store, name)
    # A chat more, which says nothing of anybody's, and a task more by the one who was forgotten
    write(tmp_path, "chats.json", [CHAT, {**CHAT, "id": "c2"}])
    other = {**LABELLED, "data": {**LABELLED["data"], "prompt": "Say goodbye."}}
    write(tmp_path, "ls.json", [LABELLED, other])
    fill(store, recipe)
    with store.read() as session:
        assert session.scalars(select(Person.name)).all() == []
        assert len({r.salt for r in session.scalars(select(Forgotten))}) == 1
        assert not any(name in row.digest for row in session.scalars(select(Forgotten)) for name in names)
    after = raters(address)
    assert after.keys() == before.keys()
    assert sorted((after - before).values()) == [1, 2]


def test_votes_come_back_as_they_were_exported(address, store, tmp_path):
    votes = [[1, 1, 0], [1, 0, 0], [0.5, 1], [1]]
    rows = [{"prompt": f"q{i}", "chosen": "x", "rejected": "y", "votes": v} for i, v in enumerate(votes)]
    file = lines(tmp_path / "pairs.jsonl", rows, 1e9)
    assert import_file(store, file).stored == {"compare": 9}
    assert import_file(store, file).left_out == {"there already": 9}
    told = {pair.prompt: (pair.chosen, pair.agreement) for pair in preferences(DataConfig(path=address)).train}
    assert told == {
        "q0": ("x", pytest.approx(2 / 3)), "q1": ("y", pytest.approx(2 / 3)), "q2": ("x", 0.75), "q3": ("x", 1.0),
    }  # fmt: skip
    assert sorted(raters(address).values()) == [2, 3, 4]


def test_what_a_file_says_more_finely_than_a_verdict_is_told(address, store, tmp_path, capsys):
    rows = [{"prompt": "q", "chosen": "x", "rejected": "y", "agreement": a} for a in (0.8,)]
    rows += [{"prompt": "r", "chosen": "x", "rejected": "y", "agreement": 0.2}]
    fill(store, CollectRecipe(imports=[str(lines(tmp_path / "pairs.jsonl", rows, 1e9))]))
    assert "{'an agreement without votes': 2} taken as one whole vote" in capsys.readouterr().out
    assert [pair.chosen for pair in preferences(DataConfig(path=address)).train] == ["x", "y"]
    mean = [{"prompt": "q", "completion": "a", "scores": {"kind": 2.5}}]
    with pytest.raises(SteersmanError, match=r"line 1: ratings .*2\.5.*combine each"):
        import_file(store, lines(tmp_path / "ratings.jsonl", mean, 1e9))


@pytest.mark.parametrize("unit", [1, 1e3, 1e6, 1e9])
@SQLITE
def test_a_time_is_in_seconds_whatever_a_program_counts_in(address, store, tmp_path, unit):
    record = json.loads(json.dumps(FEEDBACK))
    record["updated_at"] = 1760000100 * unit
    for message in record["snapshot"]["chat"]["chat"]["history"]["messages"].values():
        message["timestamp"] *= unit
    import_file(store, write(tmp_path, "feedback.json", [record]))
    assert {one.time for one in open_judgements(address)} == {1760000100}
    with store.read() as session:
        assert max(session.scalars(select(Turn.created))) == 1760000003


def test_two_imports_of_one_name_are_refused(store, tmp_path):
    files = [str(lines(tmp_path / week / "pairs.jsonl", PAIRS, 1e9)) for week in ("week1", "week2")]
    with pytest.raises(SteersmanError, match=r"2 files are called pairs\.jsonl"):
        fill(store, CollectRecipe(imports=files))


def test_label_studio(address, store, tmp_path):
    done = import_file(store, write(tmp_path, "ls.json", [LABELLED]))
    assert done.stored == {"compare": 1}
    assert done.left_out == {"skipped by the annotator": 1, "a result of the type choices": 1}
    (pair,) = preferences(DataConfig(path=address)).train
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Say hello.", "Hello!", "What?")


COUNTED = {"prompt": "q", "answer1": "good", "answer2": "bad"}
MARKED = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@SQLITE
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("data", "more", "sides", "left"),
    [
        (COUNTED, {}, None, "answer1"),
        ({"question": "q", "response_b": "bad", "response_a": "good"}, {}, None, "response_a"),
        (COUNTED, {"to_name": "answer2, answer1"}, None, "answer2"),
        (COUNTED, {"to_name": ["answer2", "answer1"]}, None, "answer2"),
        ({**COUNTED, "answer_model": "gpt-4"}, {"to_name": "answer1,answer2"}, None, "answer1"),
        (MARKED, {"to_name": "rejected,chosen"}, None, "rejected"),
        (MARKED, {}, ("rejected", "chosen"), "rejected"),
        (COUNTED, {"to_name": "answer1,answer2"}, ("answer2", "answer1"), "answer2"),
        ({"prompt": "q", "answer_ours": "good", "baseline": "bad"}, {}, ("baseline", "answer_ours"), "baseline"),
    ],
)
def test_the_left_answer_is_that_of_the_labelling_page_in_whatever_order_the_fields_stand(
    address, store, tmp_path, turned, data, more, sides, left
):
    fields = dict(reversed(data.items())) if turned else data
    for number, selected in enumerate(("left", "right")):
        asked = {**fields, next(iter(data)): f"q{number}"}
        done = import_file(store, write(tmp_path, f"ls{number}.json", [task_of(asked, selected, **more)]), sides)
        assert [of for of, count in done.sides.items() if count == 1 and of[0] == left], done.sides
    chosen = {pair.prompt: pair.chosen for pair in preferences(DataConfig(path=address)).train}
    right = ({"good", "bad"} - {data[left]}).pop()
    assert chosen == {"q0": data[left], "q1": right}


@SQLITE
def test_a_recipe_says_the_sides_and_is_told_how_a_file_was_read(address, store, tmp_path, capsys):
    file = write(tmp_path, "ls.json", [task_of(MARKED), task_of({**MARKED, "prompt": "q2", "chosen": "bad"})])
    fill(store, CollectRecipe(imports=[file], sides={"ls.json": {"left": "rejected", "right": "chosen"}}))
    out = capsys.readouterr().out
    assert "comparisons with rejected on the left and chosen on the right: 1" in out
    assert "'two answers are the same text': 1" in out
    assert [pair.chosen for pair in preferences(DataConfig(path=address)).train] == ["bad"]
    for recipe, message in (
        (CollectRecipe(imports=[file], sides={"other.json": {"left": "a", "right": "b"}}), "sides.other.json: none"),
        (CollectRecipe(imports=[file], sides={"ls.json": {"left": "a", "right": "chosen"}}), "task 1: it has no"),
        (CollectRecipe(imports=[write(tmp_path, "c.json", [CHAT])], sides={"c.json": {"left": "a", "right": "b"}}),
         "`sides` is for Label Studio"),
    ):  # fmt: skip
        with pytest.raises(SteersmanError, match=message):
            fill(store, recipe)


@SQLITE
def test_what_is_odd_in_label_studios_export_is_counted_and_the_rest_is_taken(address, store, tmp_path, capsys):
    good = task_of({"prompt": "q", "answer1": "good", "answer2": "bad"})
    rated = {"from_name": "quality", "to_name": "answer", "type": "rating", "value": {"rating": 4}}
    one = {"prompt": "q", "answer": "a"}
    annotation = LABELLED["annotations"][0]
    tasks = [
        {"id": 1, "data": {"prompt": "q", "answer1": "x", "answer2": "y"}},
        None,
        {"id": 3},
        task_of({"prompt": "\ud83d", "answer1": "x", "answer2": "y"}),
        task_of({"prompt": [{"author": "a", "text": "t"}], "answer1": "x", "answer2": "y"}),
        task_of({"prompt": "q", "answer1": "x", "answer2": ""}),
        task_of({"prompt": "q", "answer1": "x", "answer2": "x"}),
        task_of({"prompt": "q", "answer1": "x", "answer2": "y"}, "middle"),
        {**good, "annotations": [{**annotation, "result": []}, {"result": [{"type": "relation", "from_id": "a"}]}]},
        *(task_of(one, **{**rated, "value": {"rating": r}}) for r in (0, 3.5, 101, "4")),
        task_of(one, **{**rated, "to_name": "prompt"}),
        good,
        task_of(one, **rated),
    ]
    fill(store, CollectRecipe(imports=[write(tmp_path, "ls.json", tasks)]))
    out = capsys.readouterr().out
    assert "{'compare': 1, 'rate': 1} stored" in out
    for reason, count in {
        "a task without annotations": 1, "what can not be read": 5, "an answer is empty": 1,
        "two answers are the same text": 1, "an annotation without a result": 1, "a result of the type relation": 1,
        "a rating that is no whole number from 1 to 100": 4, "a rating of something else than the answer": 1,
    }.items():  # fmt: skip
        assert f"'{reason}': {count}" in out
    assert "ls.json, task 2: not as this program writes it" in out
    assert "ls.json, task 4: field data.prompt: " in out
    assert [pair.chosen for pair in preferences(DataConfig(path=address)).train] == ["good"]


@SQLITE
def test_annotators_without_a_name_are_as_many_as_a_task_has_of_them(address, store, tmp_path):
    task = task_of({"prompt": "q", "answer1": "good", "answer2": "bad"})
    (annotation,) = task["annotations"]
    nameless = {key: value for key, value in annotation.items() if key != "completed_by"}
    file = write(tmp_path, "ls.json", [{**task, "annotations": [nameless, annotation, {**nameless, "id": 2}]}])
    assert import_file(store, file).stored == {"compare": 3}
    assert sorted(raters(address).values()) == [1, 1, 1]
    assert import_file(store, file).left_out == {"there already": 3}


def changed(message_id: str, **more):
    """The feedback with another message."""
    record = json.loads(json.dumps(FEEDBACK))
    record["snapshot"]["chat"]["chat"]["history"]["messages"][message_id] |= more
    return record


@SQLITE
@pytest.mark.parametrize(
    "content",
    [
        f"{REASONING}\nA spoon.",
        f"A {REASONING.upper()}spoon.",
        f"{REASONING}\nA spoon.\n{REASONING[:60]}",
        [{"type": "text", "text": f"{REASONING}\n"}, {"type": "text", "text": "A spoon."}],
    ],
)
def test_what_open_webui_shows_of_reasoning_is_no_part_of_an_answer(address, store, tmp_path, content):
    done = import_file(store, write(tmp_path, "feedback.json", [changed("m3", content=content)]))
    assert done.stored == {"thumb": 1, "compare": 1}
    (pair,) = preferences(DataConfig(path=address)).train
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("Blue.", "A spoon.")
    with store.read() as session:
        assert "A spoon." in session.scalars(select(Turn.content)).all()


@SQLITE
@pytest.mark.parametrize(
    ("message", "more", "reason"),
    [
        ("m1", {"files": [{"type": "image", "url": "data:image/png;base64,AAAA"}]}, WITH_FILES),
        (
            "m1",
            {"content": [{"type": "text", "text": "Which?"}, {"type": "image_url"}]},
            WITH_FILES,
        ),
        ("m3", {"content": f"{REASONING}\n{TOOL}\nA spoon."}, WITH_TOOLS),
        ("m3", {"content": "", "error": {"content": "no server"}}, "an answer is empty"),
        ("m3", {"content": f"{REASONING}\n"}, "an answer is empty"),
        ("m3", {"role": "tool"}, "the message is not in the conversation"),
    ],
)
def test_a_judgement_of_more_or_less_than_text_is_counted_and_left_out(store, tmp_path, message, more, reason):
    good = {**CHAT, "id": "c2"}
    done = import_file(store, write(tmp_path, "mixed.json", [changed(message, **more), good]))
    assert done.stored == {"thumb": 2}
    assert done.left_out[reason] == 1
    assert not done.odd


@SQLITE
@pytest.mark.parametrize(
    ("message", "more", "reason"),
    [
        ("m2", {"content": "", "error": {"content": "no server"}}, "an answer is empty"),
        ("m2", {"content": "A spoon."}, "two answers are the same text"),
        ("m2", {"content": TOOL}, WITH_TOOLS),
        ("m2", {"role": "tool"}, "a comparison with no other answer in the conversation"),
        ("m5", {"parentId": "m1", "model": "third"}, "a comparison with several other answers"),
    ],
)
def test_a_comparison_that_is_none_of_two_texts_leaves_the_thumb(store, tmp_path, message, more, reason):
    done = import_file(store, write(tmp_path, "feedback.json", [changed(message, **more)]))
    assert done.stored == {"thumb": 1}
    assert done.left_out[reason] == 1


@SQLITE
def test_an_odd_record_neither_decides_the_kind_of_a_file_nor_refuses_it(store, tmp_path, capsys):
    hostile = {**FEEDBACK, "user_id": "\x1b[2J\u202e" + "x" * 5000 + "\n"}
    records = [{**FEEDBACK, "snapshot": None}, {"id": "c9", "user_id": "u", "chat": {"messages": []}}, 7, hostile]
    records += [{**FEEDBACK, "meta": {"chat_id": "c1"}}, {**CHAT, "title": "\ud83d"}, FEEDBACK]
    fill(store, CollectRecipe(imports=[write(tmp_path, "feedback.json", records)]))
    out = capsys.readouterr().out
    assert "{'thumb': 1, 'compare': 1} stored" in out
    assert "'no conversation in the record': 2, 'what can not be read': 4" in out
    assert out.count("feedback.json, record ") == 3
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) < 700


@SQLITE
def test_a_rating_may_be_a_text(store, tmp_path):
    record = {**FEEDBACK, "data": {**FEEDBACK["data"], "rating": "1"}}
    assert import_file(store, write(tmp_path, "feedback.json", [record])).stored == {"thumb": 1, "compare": 1}


def test_texts_that_a_database_takes_for_the_same_are_one(store, tmp_path):
    tasks = [task_of({"prompt": "q", "answer1": text, "answer2": "bad"}) for text in ("good", "go\0od")]
    assert import_file(store, write(tmp_path, "ls.json", tasks)).stored == {"compare": 2}


def test_a_rating_of_a_data_file_has_no_endless_scale(store, tmp_path):
    rows = [{"prompt": "q", "completion": "a", "scores": {"kind": 101}}]
    with pytest.raises(SteersmanError, match="line 1: ratings must be whole numbers from 1 to 100"):
        import_file(store, lines(tmp_path / "ratings.jsonl", rows, 1e9))


def test_a_field_of_label_studio_that_only_sounds_like_an_answer_is_none(store, tmp_path):
    task = {**LABELLED, "data": {**LABELLED["data"], "context": "Greetings of the world."}}
    assert import_file(store, write(tmp_path, "ls.json", [task])).stored == {"compare": 1}
    task = {**LABELLED, "data": {**LABELLED["data"], "reference_answer": "Hi!"}}
    file = write(tmp_path, "more.json", [task])
    with pytest.raises(SteersmanError, match=r"task 1, annotation 1: .*sides: .*answer1, answer2, reference_answer"):
        import_file(store, file)
    assert import_file(store, file, ("answer1", "answer2")).stored == {"compare": 1}


def test_files_of_the_data_room(address, store, tmp_path):
    rows = {
        "pairs": {"prompt": "p", "chosen": "c", "rejected": "r"},
        "ranks": {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 3]},
        "rates": {"prompt": "p", "completion": "a", "scores": {"kind": 4, "short": 2}},
        "thumbs": {"prompt": "p", "completion": "up", "label": True},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        assert sum(import_file(store, tmp_path / f"{name}.jsonl").stored.values()) == 1
        assert not import_file(store, tmp_path / f"{name}.jsonl").stored
    config = DataConfig(path=address, ties="keep")
    assert ("c", "r") in {(e.chosen, e.rejected) for e in preferences(config).train}
    assert rankings(config).train[0].ranks == [1.0, 0.0, 0.0]
    assert ratings(config).train[0].scores == {"kind": 4.0, "short": 2.0}
    assert demonstrations(config).train[0].completion == "up"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.json", [{**CHAT, "chat": {"history": {"messages": {"m": 1}}}}], "record 1: not as"),
        ("b.json", [{"id": 1, "data": {"x": "y"}, "annotations": []}], "task 1: no prompt"),
        ("c.json", [{"what": "else"}], "columns 'what' are no shape"),
        ("d.json", "[" * 5000, "d.json"),
        ("e.json", [{**CHAT, "updated_at": -1}], "record 1: not as .* no seconds since 1970"),
        ("f.json", [{**CHAT, "user_id": "line\nbreak"}], r"record 1: 'line\\nbreak \(open-webui\)': a name has"),
        ("g.json", [{**FEEDBACK, "snapshot": None}], "none of its records has a conversation"),
        (
            "h.json",
            [
                {"prompt": "q", "answer1": "x", "answer2": "y", "pw": "left"}
                | {"annotator": 1, "annotation_id": 5, "lead_time": 3.1}
            ],
            'JSON-MIN.*export the project as "JSON"',
        ),
        ("i.json", [task_of({"prompt": "q", "rejected": "x", "chosen": "y"})], r"task 1, annotation 1: .*sides: "),
        ("j.json", [{**CHAT, "id": "\ud83d"}], "record 1: field id: a lone surrogate"),
    ],
)
def test_what_is_no_export_is_refused_and_leaves_nothing(address, store, tmp_path, name, value, message):
    (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(SteersmanError, match=message):
        import_file(store, tmp_path / name)

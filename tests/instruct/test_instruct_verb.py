"""The verb with a real model that answers, and a real server that mends: what it leaves keeps its rules."""

from __future__ import annotations

import json

import pytest
from judge_server import cut, serving
from letter_models import WORDS, rows_of, write_jsonl

from steersman.api import load_recipe
from steersman.flywheel.instruct.constraints import Constraint, again
from steersman.flywheel.instruct.correct import Draft, correct
from steersman.flywheel.instruct.run import InstructRecipe, run
from steersman.metrics import metric
from steersman.types import SteersmanError

KINDS = ["punctuation:no_comma", "startend:end_checker", "detectable_content:postscript", "keywords:existence"]
END = Constraint("startend:end_checker", {"end_phrase": "That is all."}, "End with That is all.")
NO_COMMA = Constraint("punctuation:no_comma", {}, "No commas.")
WORD = Constraint("keywords:existence", {"keywords": ["river"]}, 'Use the word "river".')


def settings(tmp_path, mini, **extra):
    tasks = write_jsonl(tmp_path / "tasks.jsonl", [{"prompt": w} for w in WORDS])
    return InstructRecipe.model_validate(
        {
            "data": {"path": str(tasks)}, "model": {"path": str(mini)},
            "rules": {"least": 1, "most": 2, "kinds": KINDS, "held_out": ["startend:quotation"]},
            "rollout": {"prompts": 8, "samples": 1, "max_new_tokens": 12, "held_out": 4},
            "run": {"dir": str(tmp_path / "run"), "threads": 1},
            **extra,
        }
    )  # fmt: skip


def mender(asked: list[str]):
    """A model that mends what it is asked to: it reads the rule in the request, and changes the answer."""

    def behave(_: int, text: str) -> str:
        asked.append(text)
        answer = text.split("It answered:\n\n")[1].split("\n\nThe answer breaks this rule: ")[0]
        rule = text.split("The answer breaks this rule: ")[1].split("\n")[0]
        if "comma" in rule:
            return answer.replace(",", "")
        if "P.S." in rule:
            return f"{answer}\nP.S. so"
        if "End with" in rule:
            return f"{answer} {rule.split(chr(34))[1]}"
        return f"{' '.join(rule.split(chr(34))[1::2])} {answer}"

    return behave


def endpoint(server) -> dict:
    return {"endpoint": {"url": server.url, "model": "m", "retries": 0}}


def test_answers_are_mended_rule_by_rule_and_every_file_keeps_what_it_says(tmp_path, mini):
    asked: list[str] = []
    with serving(mender(asked)) as server:
        told = run(settings(tmp_path, mini, corrector=endpoint(server)))
        calls = len(asked)
        again_told = run(settings(tmp_path, mini, corrector=endpoint(server)), resume=True)
    assert len(asked) == calls, "a resumed run asks nothing twice"
    assert again_told["data/sft"] == told["data/sft"]
    assert told["whole/after"] > told["whole/before"]
    folder = tmp_path / "run"
    rules = {r["prompt"]: [again(c) for c in r["rules"]] for r in rows_of(folder / "instructions.jsonl")}
    sft, dpo = rows_of(folder / "sft.jsonl"), rows_of(folder / "dpo.jsonl")
    assert len(sft) >= 4
    assert all(r.holds(row["completion"]) for row in sft for r in rules[row["prompt"]])
    assert dpo
    for row in dpo:
        assert all(r.holds(row["chosen"]) for r in rules[row["prompt"]])
        assert not all(r.holds(row["rejected"]) for r in rules[row["prompt"]])
    held = rows_of(folder / "held_out.jsonl")
    assert {name for row in held for name in row["instruction_id_list"]} == {"startend:quotation"}
    assert "startend:quotation" not in json.dumps(rows_of(folder / "grpo.jsonl"))


def test_an_answer_that_keeps_enough_answers_the_instruction_without_the_rest(tmp_path, mini):
    """The one that mends leaves out one kind of rule, so that answers end with one of two rules kept."""
    able = mender([])

    def behave(i: int, text: str) -> str:
        return "nothing" if "P.S." in text.split("The answer breaks this rule: ")[1] else able(i, text)

    rules = {"least": 2, "most": 2, "kinds": KINDS, "kept": 1}
    with serving(behave) as server:
        strict = run(settings(tmp_path, mini, corrector=endpoint(server), rules={**rules, "kept": None}))
        told = run(
            settings(
                tmp_path, mini, corrector=endpoint(server), rules=rules,
                run={"dir": str(tmp_path / "kept"), "threads": 1},
            )
        )  # fmt: skip
    assert told["data/sft"] > strict["data/sft"] >= 1
    asked = rows_of(tmp_path / "kept/instructions.jsonl")
    whole = {row["prompt"] for row in asked}
    cut = [row for row in rows_of(tmp_path / "kept/sft.jsonl") if row["prompt"] not in whole]
    assert cut
    for row in cut:
        (of,) = [
            one for one in asked
            if one["task"].strip() in row["prompt"] and sum(c["text"] in row["prompt"] for c in one["rules"]) == 1
        ][:1]  # fmt: skip
        kept = [again(c) for c in of["rules"] if c["text"] in row["prompt"]]
        assert row["rules"] == 1
        assert kept[0].holds(row["completion"])
    for row in rows_of(tmp_path / "kept/dpo.jsonl"):
        texts = {c["text"]: again(c) for one in asked for c in one["rules"]}
        there = [rule for text, rule in texts.items() if text in row["prompt"]]
        assert all(rule.holds(row["chosen"]) for rule in there)
        assert not all(rule.holds(row["rejected"]) for rule in there)


def test_the_rows_for_grpo_are_what_the_metric_reads(tmp_path, mini):
    with serving(mender([])) as server:
        run(settings(tmp_path, mini, corrector=endpoint(server)))
    rows = rows_of(tmp_path / "run/grpo.jsonl")
    mended = {r["index"]: r for r in rows_of(tmp_path / "run/mended.jsonl")}
    columns = {name: [row[name] for row in rows] for name in ("instruction_id_list", "kwargs")}
    scores = metric("ifeval", {}).score([mended[i]["answer"] for i in range(len(rows))], **columns)
    expected = [1 - len(mended[i]["broken_after"]) / len(rows[i]["kwargs"]) for i in range(len(rows))]
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize(
    ("row", "before", "task"),
    [
        ({"prompt": "the cat"}, [], "the cat"),
        ({"instruction": "the cat", "input": "", "output": "x"}, [], "the cat"),
        (
            {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat"}]},
            [{"role": "system", "content": "be kind"}],
            "the cat",
        ),
    ],
)
def test_a_task_in_turns_keeps_them_and_its_own_words(tmp_path, mini, row, before, task):
    tasks = write_jsonl(tmp_path / "turns.jsonl", [row])
    run(settings(tmp_path, mini, data={"path": str(tasks)}))
    asked = rows_of(tmp_path / "run/instructions.jsonl")
    assert {r["task"] for r in asked} == {task}
    for name in ("grpo", "held_out"):
        for made in rows_of(tmp_path / f"run/{name}.jsonl"):
            turns = made["prompt"] if isinstance(made["prompt"], list) else [{"content": made["prompt"]}]
            assert [(m["role"], m["content"]) for m in turns[:-1]] == [(m["role"], m["content"]) for m in before]
            assert task in turns[-1]["content"]
            assert "User:" not in turns[-1]["content"]


def test_without_a_corrector_only_what_passes_is_kept(tmp_path, mini):
    told = run(settings(tmp_path, mini))
    assert told["data/dpo"] == 0
    assert told["kept/before"] == told["kept/after"]
    assert told["rewrites"] == 0


def test_a_rephrased_instruction_is_kept_only_with_all_its_rules(tmp_path, mini):
    def behave(_: int, text: str) -> str:
        if not text.startswith("Rewrite the instruction"):
            return "no"
        return text.split("\n\n", 1)[1] + " please" if len(text) % 2 else "do something"

    with serving(behave) as server:
        told = run(settings(tmp_path, mini, corrector=endpoint(server), rephrase=True, tries=1))
    rows = rows_of(tmp_path / "run/rephrased.jsonl")
    assert 0 < told["rephrased"] <= 1
    assert all(row["prompt"] != "do something" or not row["rules"][0]["kwargs"] for row in rows)


def test_a_rewrite_that_breaks_what_was_kept_is_not_taken():
    draft = Draft("x", [NO_COMMA, WORD, END], "no river here")
    assert [r.name for r in draft.broken] == [END.name]
    assert not draft.take(END, "a, river. That is all.")
    assert not draft.take(END, "That is all.")
    assert draft.take(END, "no river here. That is all.")
    assert draft.original == "no river here"
    assert not draft.broken


def test_a_rewrite_that_repeats_the_request_is_not_taken():
    """As a small model does: it keeps every rule, and would teach the corrector's prompt."""
    draft = Draft("x", [NO_COMMA, END], "no river here")
    request = draft.request(END)
    assert not draft.take(END, f"{request[request.index('The answer breaks') :]} no river here. That is all.")
    assert draft.answer == "no river here"


def test_a_draft_that_can_not_be_mended_is_given_up_and_the_next_rule_gets_its_turn():
    asked = []

    def write(texts):
        asked.extend(texts)
        return [
            ("a river" if "river" in t.split("breaks this rule: ")[1].split("\n")[0] else "no, no") for t in texts
        ]

    draft = Draft("{answer} x", [END, WORD], "so")
    correct([draft], write, tries=3)
    assert draft.mended == [WORD.name]
    assert [r.name for r in draft.broken] == [END.name]
    assert len(asked) == 4
    assert len(set(asked)) == 4, "a second try is another question"
    assert all("{answer} x" in t for t in asked), "an instruction's own braces stay"


def test_spent_budgets_and_silent_writers_leave_answers_as_they_are(tmp_path, mini):
    with serving(mender([])) as server:
        told = run(settings(tmp_path, mini, corrector={**endpoint(server), "max_calls": 2}))
    assert len(rows_of(tmp_path / "run/replies.jsonl")) <= 2 + 8  # those under way are kept
    assert told["data/answers"] == 8


@pytest.mark.parametrize(
    ("extra", "said"),
    [({"rephrase": True}, "the corrector says the instructions anew"),
     ({"rules": {"least": 3, "most": 2}}, "above most"), ({"corrector": {}}, "exactly one of endpoint and local")],
)  # fmt: skip
def test_refused(tmp_path, mini, extra, said):
    with pytest.raises(ValueError, match=said):
        settings(tmp_path, mini, **extra)


def test_a_rewrite_that_its_limit_cut_is_a_failed_try_and_is_told(tmp_path, mini, capsys):
    able = mender([])
    with serving(lambda n, text: cut(able(n, text))) as server:
        told = run(settings(tmp_path, mini, corrector=endpoint(server)))
        again_told = run(settings(tmp_path, mini, corrector=endpoint(server)), resume=True)
    assert told["data/dpo"] == 0
    assert not any(row["corrected"] for row in rows_of(tmp_path / "run/sft.jsonl"))
    assert told["writer/cut"] == again_told["writer/cut"] == told["writer/replies"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert "were cut by its limit of 512 tokens, and none of these is taught; raise its max_tokens" in said


def test_an_instruction_said_anew_by_a_reply_that_was_cut_stays_as_it_was(tmp_path, mini):
    def behave(_: int, text: str):
        return cut(text.split("\n\n", 1)[1]) if text.startswith("Rewrite the instruction") else "no"

    with serving(behave) as server:
        told = run(settings(tmp_path, mini, corrector=endpoint(server), rephrase=True, tries=1))
    assert told["rephrased"] == 0


def test_a_corrector_may_write_as_much_as_the_model_whose_answers_it_mends(tmp_path, mini):
    def limit(kind: str, corrector: dict, **more: int) -> int:
        given = {"model.path": str(mini), "data.path": "tasks.jsonl", "corrector": {kind: corrector}, **more}
        return getattr(load_recipe("instruct", settings=given).corrector, kind).max_tokens

    local, remote = {"path": "m"}, {"url": "http://x/v1", "model": "m"}
    longer = {"rollout.max_new_tokens": 1000}
    assert (limit("local", local), limit("local", local, **longer)) == (256, 1000)
    assert (limit("endpoint", remote), limit("endpoint", remote, **longer)) == (512, 1000)
    assert limit("local", local | {"max_tokens": 9}) == 9


def test_unknown_kinds_are_refused_before_anything_is_asked(tmp_path, mini):
    with pytest.raises(SteersmanError, match="there is no kind 'x'"):
        run(settings(tmp_path, mini, rules={"kinds": ["x"]}))

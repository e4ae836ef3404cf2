"""What environments, tools and replies do wrong: it ends an episode or is told to the model, and ends no run."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import time
import typing
import uuid
from pathlib import Path

import pytest
import torch
from forked import steersman
from train_kit import merge, recipe

from steersman.environments.calls import read_reply
from steersman.environments.classes import ToolEnvironment, from_class
from steersman.environments.config import EnvironmentConfig
from steersman.environments.gym import GymEnvironment
from steersman.environments.port import Call, Reply
from steersman.environments.text import reward_of
from steersman.environments.tools import tool_of
from steersman.guards.coroutines import await_result
from steersman.train.roles import build_roles
from steersman.types import SteersmanError
from steersman.verbs import rl
from steersman.verbs.rl import _prompts


def episodes(base, what, **extra):
    made = recipe("rloo", merge(base, {"environment.args": {"what": what}}), **extra)
    roles = build_roles(made, torch.device("cpu"))
    train = _prompts(made, roles).train
    return roles.generate(train[:2], seed=0, n=2)


@pytest.fixture
def bad(base, worlds):
    return merge(base, {"environment": {"path": f"{worlds}:Misbehaves", "max_turns": 3, "time_limit": 0.3}})


@pytest.mark.parametrize(
    ("what", "said"),
    [("raise", "RuntimeError: broken \\x1b"), ("hang", "longer than 0.3 s"), ("exit", "SystemExit"),
     ("nan", "reward nan"), ("none", "reward None"), ("two", "2 values"), ("number", "gave int"),
     ("object", "said object"), ("role", "no role 'boss'")],
)  # fmt: skip
def test_a_fault_ends_its_episode_with_what_the_recipe_says(bad, what, said):
    samples = episodes(bad, what, environment__fault_reward=-2.0)
    for s in samples:
        assert s.outcome.startswith("fault at turn 2: ")
        assert said in s.outcome
        assert "\x1b" not in s.outcome
        assert [t.reward for t in s.turns] == [0.5, -2.0]
        assert s.terminated


def test_a_fault_may_truncate_or_stop_the_run(bad):
    for s in episodes(bad, "raise", environment__on_fault="truncate"):
        assert not s.terminated
        assert [t.reward for t in s.turns] == [0.5, 0.0]
    with pytest.raises(SteersmanError, match=r"turn 2: RuntimeError: broken .*\.py, line \d+\)"):
        episodes(bad, "raise", environment__on_fault="stop")


def test_a_fault_keeps_its_traceback_in_the_run_folder(bad, tmp_path):
    made = recipe("rloo", merge(bad, {"environment.args": {"what": "raise"}}), iterations=1)
    with pytest.raises(
        SteersmanError, match="ended by a fault, the first with 'fault at turn 2: RuntimeError: broken"
    ):
        rl.run(made)
    text = (Path(made.run.dir) / "tracebacks.txt").read_text()
    assert text.count("RuntimeError: broken") == 1
    assert "in step" in text


def test_an_environment_in_a_thread_that_ends_the_process_is_named(bad):
    with pytest.raises(SteersmanError, match=r"row 0, turn 2: it asked the process to end, by os\._exit\(3\)"):
        episodes(bad, "leave", environment__workers=1)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_an_exit_asked_for_in_a_coroutine_leaves_the_event_loop_of_all_alive(kind):
    async def leaves():
        raise kind

    async def works():
        return 5

    with pytest.raises(kind):
        await_result(leaves())
    assert await_result(works()) == 5


def test_an_environment_in_a_thread_that_closes_stdout_leaves_it_open(bad, tmp_path):
    recipe_file = tmp_path / "closes.yaml"
    recipe_file.write_text(json.dumps(merge(bad, {"environment.args": {"what": "close"}})))
    run = steersman("rloo", str(recipe_file))
    out, error = run.communicate(120)
    assert run.returncode == 0, error
    assert "with its 95% interval" in out


def test_a_beginning_that_fails_leaves_an_episode_that_counts_for_nothing(bad, tmp_path):
    for s in episodes(bad, "begin", environment__retries=1):
        assert "its beginning: RuntimeError: no board" in s.outcome
        assert not any(s.mask)
    for s in episodes(bad, "long"):
        assert "begins with" in s.outcome
    made = recipe("grpo", merge(bad, {"environment.args": {"what": "begin"}}), iterations=1)
    with pytest.raises(SteersmanError, match="its beginning: RuntimeError: no board"):
        rl.run(made)


def test_a_reset_that_raises_leaves_an_episode_that_counts_for_nothing(bad, tmp_path):
    (tmp_path / "broken.py").write_text(
        "class Broken:\n"
        "    def __init__(self, what):\n        self.what = what\n"
        "    def reset(self, **row):\n        raise RuntimeError(self.what)\n"
        "    def look(self) -> str:\n        return 'Looks.'\n"
    )
    values = merge(bad, {"environment.path": f"{tmp_path / 'broken.py'}:Broken", "environment.tell_tools": True})
    values["reward"] = {"parts": {"length": {"builtin": "length"}}}
    for s in episodes(values, "no board", environment__retries=1):
        assert "its beginning: RuntimeError: no board" in s.outcome
        assert not any(s.mask)


def test_a_megabyte_is_cut_and_control_characters_are_written_out(bad):
    for s in episodes(bad, "megabyte", environment__max_characters=20):
        assert s.turns[1].observation == "b" * 20 + "... (999980 characters left out)"
    for s in episodes(bad, "control"):
        assert s.turns[1].observation == "\\x1b[2J\ufffd"


def test_an_environment_without_end_is_truncated(bad):
    assert {s.outcome for s in episodes(bad, "endless")} == {"turn limit"}
    samples = episodes(bad, "endless", environment__max_turns=100, environment__max_tokens=60)
    assert {s.outcome for s in samples} == {"token limit"}
    assert all(len(s.prompt.ids) + len(s.ids) <= 60 for s in samples)


# Tools ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adder(worlds):
    return ToolEnvironment([f"{worlds}:add", f"{worlds}:slow_add"])


def results(environment, *calls):
    episode = environment.open()
    episode.begin([{"role": "user", "content": "q"}], {}, 0)
    return [m["content"] for m in episode.step(Reply("", "", calls)).messages]


def test_calls_are_checked_and_two_at_once_are_made(adder):
    told = results(
        adder,
        Call("add", {"a": 1, "b": 2}),
        Call("slow_add", {"a": 1, "b": 5}),
        Call("mul", {}),
        Call("add", {"a": "1", "b": 2}),
        Call("add", {"a": 1}),
        Call("add", {"a": 1, "b": 2, "c": 3}),
        Call("", problem="the call is no JSON object"),
    )
    assert told[:2] == ["3", "6"]
    assert "no tool 'mul'; there are: add, slow_add" in told[2]
    assert "add: a: Input should be a valid integer" in told[3]
    assert "b: Field required" in told[4]
    assert "c: Extra inputs are not permitted" in told[5]
    assert told[6] == "error: the call is no JSON object"


class Unit(enum.Enum):
    C = "celsius"


@dataclasses.dataclass
class Place:
    x: int
    y: int


@pytest.mark.parametrize(
    ("kind", "sent", "got"),
    [
        (Unit, "celsius", Unit.C),
        (tuple[int, int], [1, 2], (1, 2)),
        (set[int], [1, 2], {1, 2}),
        (datetime.date, "2024-01-02", datetime.date(2024, 1, 2)),
        (datetime.datetime, "2024-01-02T03:04:05", datetime.datetime(2024, 1, 2, 3, 4, 5)),
        (datetime.timedelta, "PT5S", datetime.timedelta(seconds=5)),
        (uuid.UUID, "12345678-1234-5678-1234-567812345678", uuid.UUID("12345678-1234-5678-1234-567812345678")),
        (decimal.Decimal, "1.5", decimal.Decimal("1.5")),
        (bytes, "abc", b"abc"),
        (dict[int, str], {"1": "a"}, {1: "a"}),
        (Place, {"x": 1, "y": 2}, Place(1, 2)),
        (float, 1, 1.0),
    ],
)
def test_a_call_that_keeps_to_the_schema_is_made_with_the_parameters_type(kind, sent, got):
    def f(a):
        return a

    f.__annotations__ = {"a": kind}
    assert tool_of(f, "t.py:f").check(Call("f", {"a": sent})) == {"a": got}


@pytest.mark.parametrize(("kind", "sent"), [(int, "1"), (int, 1.5), (str, 1), (bool, 1), (Unit, "kelvin")])
def test_a_call_of_another_type_is_refused(kind, sent):
    def f(a):
        return a

    f.__annotations__ = {"a": kind}
    with pytest.raises(ValueError, match="f: a: Input should be"):
        tool_of(f, "t.py:f").check(Call("f", {"a": sent}))


def test_a_tool_that_raises_is_told_or_ends_the_episode(worlds):
    call = Call("buy", {"item": "hat", "count": 9})
    shop = from_class(f"{worlds}:Shop", {}, "tell", 4000)
    episode = shop.open()
    assert episode.begin([{"role": "user", "content": "go"}], {"coins": 5}, 0)[-1]["content"] == "go you have 5"
    assert episode.step(Reply("", "", (call,))).messages[0]["content"] == "error: ValueError: not enough coins"
    episode.step(Reply("", "", (Call("buy", {"item": "hat"}), Call("buy", {"item": "tie", "count": 2}))))
    answer = episode.step(Reply("done", "done"))
    assert (answer.reward, answer.done) == (3.0, True)
    strict = from_class(f"{worlds}:Shop", {}, "end", 4000).open()
    strict.begin([], {}, 0)
    with pytest.raises(Exception, match="buy raised ValueError"):
        strict.step(Reply("", "", (call,)))


def test_a_row_that_lacks_a_column_is_named(base, tmp_path):
    path = tmp_path / "need.py"
    path.write_text("class Need:\n    def reset(self, secret):\n        pass\n    def f(self) -> str:\n        'x'\n")
    changes = {"environment.path": f"{path}:Need", "environment.tell_tools": True}
    values = merge(base, {**changes, "reward.parts": {"l": {"builtin": "length"}}})
    with pytest.raises(SteersmanError, match="needs the column 'secret', which the data lack"):
        rl.run(recipe("rloo", values))


def untyped(a):
    pass


def star(*a: int):
    pass


def print(x: int) -> int:
    return x


def test_functions_that_are_no_tools_are_refused_and_doubtful_ones_named():
    with pytest.raises(SteersmanError, match="parameter a has no type"):
        tool_of(untyped, "t.py:untyped")
    with pytest.raises(SteersmanError, match=r"\*a has no schema"):
        tool_of(star, "t.py:star")
    untyped.__annotations__ = {"a": typing.Iterable[typing.Callable]}
    with pytest.raises(SteersmanError, match="a parameter's type has no schema"):
        tool_of(untyped, "t.py:untyped")
    findings = " ".join(tool_of(print, "t.py:print").findings)
    assert "no docstring" in findings
    assert "Python builtin" in findings
    assert "does not tell what x is" in findings


TWO = [("f", {}, ""), ("g", {}, "")]


def as_text(arguments):
    """A call whose arguments are JSON as text inside JSON, as some templates write them."""
    return f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("tagged", 'a<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>b', [("f", {"x": 1}, "")]),
        ("tagged", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', [("f", {"x": 1}, "")]),
        ("tagged", '<think>so <tool_call>{"name": "f"}</tool_call></think>no', []),
        ("tagged", 'so <tool_call>{"name": "f"}</tool_call></think>no', []),  # the prompt opened the thought
        ("tagged", "<tool_call>{oops</tool_call>", [("", {}, "no JSON object")]),
        ("tagged", "<tool_call>[1]</tool_call>", [("", {}, "an object with")]),
        ("tagged", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [("f", {}, "must be an object")]),
        ("tagged", "<tool_call>" + "[" * 5000, [("", {}, "nested too deeply")]),
        ("tagged", as_text('{"x": "\\ud800"}'), [("f", {}, "field 'x': a lone surrogate")]),
        ("tagged", as_text('{"x": ' + "9" * 400 + "}"), [("f", {}, "more than 300 digits")]),
        ("tagged", as_text('{"x": ' + "[" * 500 + "]" * 500 + "}"), [("f", {}, "nested too deeply")]),
        ("tagged", as_text('{"x": 1, "x": 2}'), [("f", {}, "stands twice")]),
        ("tagged", as_text("{oops"), [("f", {}, "holds no JSON object")]),
        ("tagged", '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>', TWO),
        ("bare", '{"name": "f", "parameters": {"x": "1"}}', [("f", {"x": "1"}, "")]),
        ("bare", "hello", []),
        ("listed", 'x [TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', TWO),
        ("functions", "<tool_call><function=f><parameter=x>\n3\n</parameter></function>", [("f", {"x": 3}, "")]),
    ],
)  # fmt: skip
def test_calls_are_read_in_each_form(form, text, calls):
    found = read_reply(text, form).calls
    assert [(c.name, c.arguments) for c in found] == [(n, a) for n, a, _ in calls]
    for call, (_, _, problem) in zip(found, calls, strict=True):
        assert problem in call.problem
        assert bool(problem) == bool(call.problem)


@pytest.mark.parametrize(
    ("text", "calls"),
    [("<function=" * 10_000, ()), ("<function=f>" + "<parameter=" * 9000, (Call("f", {}),))],
)
def test_marks_without_an_end_are_passed_over_soon(text, calls):
    """10,000 marks took 10 seconds of work and more while each was followed to the end of the text."""
    start = time.process_time()
    assert read_reply(text, "functions").calls == calls
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "value",
    [10**400, 10**5000, float("nan"), "much", [1.0] * 10_000],
    ids=["400 digits", "5000 digits", "nan", "text", "list"],
)
def test_a_reward_that_is_no_number_is_named_shortly(value):
    with pytest.raises(ValueError, match=r"step gave the reward .*; it must be a finite number") as said:
        reward_of(value, "step")
    assert len(str(said.value)) < 200


def test_sections_and_spaces_that_do_not_fit_are_refused(worlds):
    with pytest.raises(ValueError, match="exactly one of tools, path, gym"):
        EnvironmentConfig(gym="FrozenLake-v1", path="x.py:Y")
    with pytest.raises(SteersmanError, match="takes actions of kind Box"):
        GymEnvironment("Pendulum-v1")
    with pytest.raises(SteersmanError, match="2 words for the 4 actions"):
        GymEnvironment("FrozenLake-v1", actions=["a", "b"])
    with pytest.raises(SteersmanError, match="can't be made"):
        GymEnvironment("FrozenPond-v1")
    with pytest.raises(SteersmanError, match="do not fit its constructor"):
        from_class(f"{worlds}:Echo", {"what": 1}, "tell", 100)
    with pytest.raises(SteersmanError, match="is no class"):
        from_class(f"{worlds}:add", {}, "tell", 100)


def test_rewards_that_no_part_takes_are_refused(base):
    made = recipe("rloo", merge(base, {"reward.parts": {"l": {"builtin": "length"}}}))
    with pytest.raises(SteersmanError, match="no part of reward"):
        build_roles(made, torch.device("cpu"))
    del base["environment"]
    with pytest.raises(ValueError, match="the recipe has no section `environment`"):
        recipe("rloo", base)


def test_a_reply_names_its_action_last():
    lake = GymEnvironment("FrozenLake-v1", actions=["left", "down", "right", "up"], invalid_reward=-0.1)
    assert lake.action_of("not left, RIGHT!") == 2
    assert lake.action_of("upper") is None
    episode = lake.open()
    first = episode.begin([{"role": "user", "content": "go\n"}], {}, 7)
    assert "[S]FFF" in first[0]["content"]
    answer = episode.step(Reply("hm", "hm"))
    assert answer.reward == -0.1
    assert not answer.done
    assert "say one of: left" in answer.messages[0]["content"]

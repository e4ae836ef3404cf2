"""Agent programs that ask an OpenAI endpoint: the official client in a process of its own, trained token by token."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from imitations import GEMMA, save_chat
from train_kit import merge, recipe, rows

from steersman.environments.agent import AgentEnvironment
from steersman.environments.agent_server import AgentServer, RequestError, request_of
from steersman.environments.classes import FaultError
from steersman.environments.port import Call, Reply
from steersman.train.experience import tokens_of
from steersman.train.roles import build_roles
from steersman.train.segments import SegmentRows
from steersman.types import SteersmanError
from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.rl import _prompts

pytest.importorskip("openai", reason="needs the official client, of the extra dev")
FOLDER = Path(__file__).parents[2] / "recipes" / "environments"
STDLIB = """
import json, os, sys, urllib.request

def ask(messages, **more):
    body = json.dumps({"model": "m", "messages": messages, **more}).encode()
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions", body,
        {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"},
    )
    return json.load(urllib.request.urlopen(request))["choices"][0]

row = json.loads(sys.stdin.readline())
user = lambda text: {"role": "user", "content": text}
"""
TWO_TALKS = (
    STDLIB
    + """
first = ask([user("hello")])["message"]
second = ask([user("hello"), first, user("go on")])["message"]
other = ask([user("look at " + row["prompt"][0]["content"])])["message"]
said = first["content"] + second["content"] + other["content"]
print(json.dumps({"reward": said.count("a") / 4}))
"""
)


def program(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(text)
    return [sys.executable, str(path)]


@pytest.fixture
def agent(base, tmp_path):
    environment = {
        "agent": program(tmp_path, TWO_TALKS), "agent_pays": True, "max_turns": 5, "time_limit": 60, "overlap": True,
    }  # fmt: skip
    return merge({**base, "environment": environment}, {"reward.parts": {"play": {"environment": "episode"}}})


def played(values, name="rloo", **extra):
    made = recipe(name, values, **extra)
    roles = build_roles(made, torch.device("cpu"))
    train = _prompts(made, roles).train
    return roles, roles.generate(train[:2], seed=(0, 0), n=2)


def test_several_calls_become_the_trajectories_that_they_are(agent):
    roles, samples = played(agent)
    decode = roles.policy.tokenizer.decode
    for s in samples:
        assert s.outcome == "done"
        assert len(s.turns) == 3
        talk, other = s.segments
        assert [t.end for t in s.turns][1:] == [talk.end, other.end]
        assert "hello" in decode(talk.prompt)
        assert "look at" in decode(other.prompt)
        assert decode(s.ids[s.turns[0].end : s.turns[1].begin]).strip().startswith("go on")
        paid = sum(c == "a" for t in s.turns for c in t.reply.strip()) / 4
        assert sum(t.reward for t in s.turns) == pytest.approx(paid)
    tokens, parts = tokens_of(samples), SegmentRows(samples)
    read = parts.tokens(tokens)
    assert len(read) == 2 * len(samples)
    logp = parts.join(roles.policy.logp(read).logp, tokens.mask.shape[1])
    recorded = torch.tensor([x for s in samples for x, m in zip(s.logp, s.mask, strict=True) if m])
    torch.testing.assert_close(logp[tokens.mask], recorded, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_an_agent_trains(agent, tmp_path, name):
    rl.run(recipe(name, agent, iterations=2))
    seen = rows(tmp_path / "run")[-1]
    assert seen["episode/turns"] == 3
    assert seen["episode/done"] == 1
    assert seen["ratio_gap"] < 1e-4


def test_the_recipe_with_the_official_client(tmp_path, mini, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    values = yaml.safe_load((FOLDER / "agent.yaml").read_text())
    values["environment"]["agent"][0] = sys.executable
    small = {
        "rollout.prompts": 2, "rollout.samples": 2, "rollout.held_out": 0, "iterations": 1, "run.threads": 1,
        "environment.max_tokens": 250, "rollout.max_new_tokens": 8, "model.path": str(mini),
        "run.dir": str(tmp_path / "run"), "environment.time_limit": 60.0,
    }  # fmt: skip
    rl.run(RECIPES["grpo"].model_validate(merge(values, small)))
    seen = rows(tmp_path / "run")[-1]
    assert seen["episode/done"] == 1
    assert seen["ratio_gap"] < 1e-4


BROKEN = {
    "import sys; sys.exit(3)": "ended with exit code 3",
    "print('nothing')": "ended without a request",
    "import time; time.sleep(60)": "asked nothing for",
    "raise SystemExit('\\x1b[31m no key')": "no key",
    STDLIB + "ask([user('a')])": "the program's last line of output is not",
    STDLIB + "ask([user('a')]); print('{\"reward\": \"much\"}')": "must be a finite number",
}


def _two_turns(episode):
    episode.begin([], {}, 0)
    episode.step(Reply("b", "b"))


@pytest.mark.parametrize(("text", "fault"), BROKEN.items(), ids=range(len(BROKEN)))
def test_programs_that_fail_end_their_episode(tmp_path, text, fault):
    episode = AgentEnvironment(program(tmp_path, text), pays=True, time_limit=5.0, longest=100).open()
    try:
        with pytest.raises(FaultError, match=fault) as error:
            _two_turns(episode)
        assert "\x1b" not in str(error.value)
    finally:
        episode.close()
    assert episode.process.poll() is not None


def test_tools_go_out_and_calls_come_back(tmp_path):
    text = (
        STDLIB
        + """
tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
talk = [user("2 + 3")]
said = ask(talk, tools=tools)
call = said["message"]["tool_calls"][0]
assert said["finish_reason"] == "tool_calls" and json.loads(call["function"]["arguments"]) == {"a": 2}
talk += [said["message"], {"role": "tool", "tool_call_id": call["id"], "content": "5"}]
ask(talk, tools=tools)
"""
    )
    episode = AgentEnvironment(program(tmp_path, text), pays=False, time_limit=30.0, longest=100).open()
    begun = episode.begin([], {}, 0)
    assert begun[0]["tools"][0]["function"]["name"] == "add"
    answer = episode.step(Reply("", "", (Call("add", {"a": 2}),)))
    assert not answer.new_conversation
    assert [(m["role"], m["content"]) for m in answer.messages] == [("tool", "5")]
    assert episode.step(Reply("five", "five")).done
    episode.close()


def test_a_conversation_that_the_template_refuses_counts_the_reply_once(agent, tmp_path):
    """A verifier with a system prompt, under a template that knows no system."""
    text = """
first = ask([user("hello")])["message"]["content"]
ask([{"role": "system", "content": "check it"}, user(first)])
print(json.dumps({"reward": 1.0}))
"""
    agent["environment"] |= {"agent": program(tmp_path, STDLIB + text), "fault_reward": -1.0, "overlap": False}
    save_chat(tmp_path / "gemma", GEMMA)
    _, samples = played(merge(agent, {"model.path": str(tmp_path / "gemma")}), rollout__min_new_tokens=4)
    for s in samples:
        assert s.outcome.startswith("fault at turn 1: FaultError: the chat template can't show")
        assert [t.reward for t in s.turns] == [-1.0]
        assert len(s.ids) == s.turns[0].end
        assert s.segments is None


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("[]", "JSON object"),
        ("{", "Expecting"),
        ('{"messages": []}', "at least one turn"),
        ('{"messages": [{"role": "boss", "content": "a"}]}', r"messages\[0\].role"),
        ('{"messages": [{"role": "user", "content": 5}]}', r"messages\[0\].content"),
        ('{"messages": [{"role": "user", "content": "a"}], "n": 2}', "n: this endpoint"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}',
            "response_fo",
        ),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 1}', "tools: a list"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "name and arguments"),
    ],
)
def test_requests_that_are_refused(body, fault):
    with pytest.raises(ValueError, match=fault):
        request_of(body)
    assert issubclass(RequestError, ValueError)


def test_strangers_are_not_let_in():
    server = AgentServer()
    for path, key, code in (("/chat/completions", "guess", 401), ("/embeddings", "guess", 404)):
        request = urllib.request.Request(server.url + path, b"{}", {"Authorization": f"Bearer {key}"})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        assert error.value.code == code
        assert "message" in json.load(error.value)["error"]
    server.http.shutdown()


def test_a_program_that_is_not_there_is_refused():
    with pytest.raises(SteersmanError, match="there is no program 'no-such-program'"):
        AgentEnvironment(["no-such-program"], pays=False, time_limit=1.0, longest=9)

"""Simulated users: a script, a model here, a model behind an endpoint; outcomes by rule and by judge."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from letter_models import save_mini
from train_kit import merge, recipe, rows

from steersman.environments.dialogue import THANKS, Dialogue
from steersman.types import SteersmanError
from steersman.verbs import rl

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "results"))

ROW = {
    "opening": "a table", "facts": ["we are four", "at seven"], "values": ["four", "Seven"],
    "character": "someone in a hurry", "goal": "a table for four at seven",
}  # fmt: skip


def test_a_script_tells_what_it_is_asked_and_the_confirmation_is_judged():
    talk = Dialogue()
    assert talk.begin(ROW, 1) == "a table"
    assert talk.step("how many?") == ("we are four", 0.0, False)
    assert talk.step("<think>five? no</think> when?") == ("at seven", 0.0, False)
    assert talk.step("what else?") == (THANKS, 0.0, False)
    assert talk.step("four people at SEVEN") == ("", 1.0, True)


def test_thoughts_name_nothing_and_patience_ends():
    talk = Dialogue(patience=2)
    talk.begin(ROW)
    talk.step("how many?")
    assert talk.step("<think>at seven</think>four, right?") == ("", 0.5, True)


def test_rows_and_sections_that_do_not_fit_are_refused():
    talk = Dialogue()
    talk.begin({"opening": "hm"})
    with pytest.raises(SteersmanError, match="no column 'facts'"):
        talk.step("what?")
    with pytest.raises(SteersmanError, match=r"environment.args.user.pth"):
        Dialogue(user={"pth": "x"})
    with pytest.raises(SteersmanError, match="path or endpoint, not both"):
        Dialogue(user={"path": "x", "endpoint": {"url": "http://localhost:1/v1", "model": "m"}})
    with pytest.raises(SteersmanError, match="rewards have no scale"):
        Dialogue(judge={"reward": {"length": {"builtin": "length"}}})


@pytest.fixture
def endpoint():
    """A server that says what it is told to say, and keeps what it was asked."""
    seen, replies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": replies.pop(0)}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"url": f"http://127.0.0.1:{server.server_address[1]}/v1", "model": "m", "retries": 0}, seen, replies
    server.shutdown()


def test_a_model_behind_an_endpoint_plays_and_a_judge_grades(endpoint):
    section, seen, replies = endpoint
    talk = Dialogue(user={"endpoint": section}, judge={"endpoint": {**section, "temperature": 0.5}})
    talk.begin(ROW)
    replies += ["User: for four\n\nAssistant: fine", "[[END]]", "Grade: 10"]
    assert talk.step("how many?") == ("for four", 0.0, False)
    assert talk.step("done") == ("", 1.0, True)
    asked = seen[0]["messages"][-1]["content"]
    assert "someone in a hurry" in asked
    assert "The assistant: how many?" in asked
    assert "Person: for four" in seen[2]["messages"][-1]["content"]


def test_a_model_here_plays_and_repeats(tmp_path):
    model = save_mini(tmp_path / "model", context=2048)
    said = []
    for seed in (1, 1, 2):
        talk = Dialogue(user={"path": str(model), "max_new_tokens": 12, "device": "cpu"})
        talk.begin(ROW, seed)
        said.append([talk.step("so")[0], talk.step("well")[0]])
    assert said[0] == said[1] != said[2]


def test_a_dialogue_trains(base, tmp_path):
    path = tmp_path / "rows.jsonl"
    facts = {"opening": " so", "facts": ["you", "me"], "values": ["a", "e"]}
    path.write_text("".join(json.dumps({"prompt": w, **facts}) + "\n" for w in ("it is", "look at", "no", "we")))
    values = merge(base, {"data.path": str(path), "rollout.prompts": 2, "environment.max_turns": 4})
    values["environment"]["path"] = "steersman.environments.dialogue:Dialogue"
    rl.run(recipe("grpo", values))
    seen = rows(tmp_path / "run")[-1]
    assert seen["episode/done"] == 1
    assert seen["ratio_gap"] < 1e-4


def test_real_conversations_become_rows(shared, tmp_path):
    from slot_filling import rows as made

    source = shared / "sgd_dialogues" / "dev_dialogues.text_and_acts.jsonl"
    assert made(source, tmp_path / "rows.jsonl") > 400
    for line in (tmp_path / "rows.jsonl").read_text().splitlines()[:50]:
        row = json.loads(line)
        talk = Dialogue(patience=len(row["facts"]) + 2)
        talk.begin(row)
        heard = [talk.step("and?")[0] for _ in row["facts"]]
        assert heard == row["facts"]
        assert talk.step(" ".join([row["opening"], *heard]).replace("?", "")) == ("", 1.0, True)

"""An A/B test as people meet it: pages of collect, a server that shares its traffic out, a server with the models."""

from __future__ import annotations

import json
import re
import uuid

import pytest
from letter_models import save_chat_mini, save_mini

pytest.importorskip("starlette", reason="needs the extra people")

from serve_kit import running, served_from
from sqlalchemy import select
from starlette.testclient import TestClient

from steersman.cli import main
from steersman.model import load_policy
from steersman.people.collect.answering import AnsweringModel, AnsweringSampling, open_answerer
from steersman.people.collect.app import make_app
from steersman.people.collect.visit import Site
from steersman.people.serve.app import Server
from steersman.people.serve.assignment import Assignment
from steersman.people.serve.backend import Backend, BackendSection
from steersman.people.serving import ServedModel, Serving, read_serving
from steersman.people.sources import open_judgements
from steersman.people.store import open_store
from steersman.people.store.schema import Person, Rater

FEWEST, MOST = 4, 60
"""Raters: as many as it takes until both models were met."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models that say different things."""
    old = save_chat_mini(tmp_path_factory.mktemp("old"), context=256)
    new = save_mini(tmp_path_factory.mktemp("new"), seed=1, context=256)
    load_policy(old, trainable=False, device="cpu").tokenizer.save_pretrained(new)
    return {"turn-00": old, "turn-01": new}


def thumb(client: TestClient, name: str) -> str:
    """A new rater says something and gives a thumb up; what the pages showed."""
    token = csrf(client.get("/").text)
    client.post("/name", data={"csrf": token, "name": name})
    token = csrf(client.get("/chat").text)
    chat = client.post("/chat", data={"csrf": token}).url.path
    page = client.post(f"{chat}/say", data={"csrf": token, "key": str(uuid.uuid4()), "text": "oh"})
    action = re.findall(r'action="(/chat/[^"]+/thumb/[^"]+)"', page.text)[0]
    after = client.post(action, data={"csrf": token, "key": str(uuid.uuid4()), "up": "1"})
    return page.text + after.text + str(page.headers)


def csrf(page: str) -> str:
    return re.findall(r'name="csrf" value="([^"]+)"', page)[0]


def test_a_thumb_goes_to_the_model_that_the_wheel_gave_its_rater(folders, tmp_path, capsys):
    address = f"sqlite:///{tmp_path / 'feedback.db'}"
    store, file, asked = open_store(address), tmp_path / "serving.json", []
    arms = [
        ServedModel(name, str(folder), share) for (name, folder), share in zip(folders.items(), (1, 0.5), strict=True)
    ]
    Serving(1, arms[0], arms[1], "salt").write(file)

    async def overheard(request):
        asked.append(json.loads(request.content))

    models = {name: served_from(folder) for name, folder in folders.items()}
    with running(Server(models, load=served_from)) as far:
        behind = Backend(BackendSection(url=f"{far}/v1"), 60.0)
        behind.client.event_hooks["request"] = [overheard]
        assignment = Assignment[str](str(file), lambda one: one.name, lambda name: None)
        with running(Server({}, load=served_from, alias="current", assignment=assignment, backend=behind)) as near:
            model = AnsweringModel(url=f"{near}/v1", name="current")
            site = Site(store, [open_answerer(model, AnsweringSampling(max_new_tokens=16))])
            app = make_app(site)
            seen = ""
            for i in range(MOST):
                client = TestClient(app, "http://127.0.0.1")
                client.get(f"/enter/{site.key}")
                seen += thumb(client, f"rater {i}")
                if i >= FEWEST - 1 and len({body["model"] for body in asked}) == 2:
                    break
    with store.read() as session:
        names = select(Rater.pseudonym).join(Person).where(Person.name.startswith("rater"))
        raters = list(session.scalars(names))
    store.close()
    given = {one.user: one.models for one in open_judgements(address)}
    serving = read_serving(file)
    assert given == {rater: (serving.arm(rater).name,) for rater in raters}
    assert set(given.values()) == {("turn-00",), ("turn-01",)}
    assert sorted(body["model"] for body in asked) == sorted(name for (name,) in given.values())
    assert not any("user" in body for body in asked)  # who it was stays here
    assert "turn-0" not in seen  # and which model it was
    arms = ["--experiment.control", "turn-00", "--experiment.treatment", "turn-01", "--experiment.metric", "thumb"]
    assert main(["ab", address, *arms]) == 0
    assert f"thumb │ {len(raters)}" in " ".join(capsys.readouterr().out.split())

"""Passwords and keys in recipes are refused by every verb that takes an address, and not repeated."""

from __future__ import annotations

import json

import pytest

from steersman.cli import main
from steersman.judge.config import EndpointConfig
from steersman.people.store.database import store_url
from steersman.types import SteersmanError

KEY = "K3Y12345"
ADDRESSES = [
    f"http://user:{KEY}@h/v1",
    f"http://u:p@ss/{KEY}@h/v1",
    f"http://{KEY}@h/v1",
    f"http://h/v1?api-key={KEY}",
]
VERBS = {
    "judge": ("judge", "--data.path", "q.jsonl", "--judge.endpoint.model", "m", "--judge.endpoint.url"),
    "online-dpo": ("online-dpo", "--judge.endpoint.model", "m", "--judge.endpoint.url"),
    "distill": ("distill", "--teacher.endpoint.model", "m", "--teacher.endpoint.url"),
    "collect": ("collect", "--model.name", "m", "--model.url"),
    "serve": ("serve", "--backend.url"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_secret_is_refused_and_not_told(verb, address, capsys):
    assert main([*VERBS[verb], address, "--print-config"]) == 2
    told = capsys.readouterr()
    assert KEY not in told.out + told.err
    assert "an address ends at its version" in told.err
    assert "`key_env` names" in " ".join(told.err.split())


def test_a_secret_is_found_wherever_else_it_may_stand(capsys):
    judge = json.dumps({"judge": {"endpoint": {"url": f"http://u:{KEY}@h/v1", "model": "m"}}})
    lists = ["grpo", "--model.path", "m", "--data.path", "d.jsonl", "--print-config"]
    for given in (
        ["--rollout.url", f"[http://{KEY}@h]"],
        ["--reward.parts", f"{{j: {{function: 'steersman.judge.reward:grade', args: {judge}}}}}"],
    ):
        assert main([*lists, *given]) == 2
        told = capsys.readouterr()
        assert KEY not in told.out + told.err
        assert "environment variable" in told.err
    for extra in ({"api_key": KEY}, {"Authorization": KEY}):
        with pytest.raises(ValueError, match=r"extra\.\w+: it would be sent as a secret") as error:
            EndpointConfig(url="http://h/v1", model="m", extra=extra)
        assert KEY not in str(error.value)
    assert EndpointConfig(url="http://h/v1", model="m", extra={"seed": 0, "max_tokens": 3}).extra
    for store in (f"postgresql://ada:{KEY}@h/n", f"postgresql://ada@h/n?password={KEY}"):
        with pytest.raises(SteersmanError, match="PGPASSWORD") as error:
            store_url(store)
        assert KEY not in str(error.value)


def test_a_value_of_the_wrong_kind_is_quoted_without_the_password_in_it(capsys):
    assert main(["judge", "--data.path", "q.jsonl", "--judge.endpoint", f"http://user:{KEY}@h/v1"]) == 2
    assert KEY not in capsys.readouterr().err

"""What a server that can not be kept alive says before a run ends, and what a receipt asks of a server."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from remote_kit import make_policy
from test_faults import ASKED, CALL, Elsewhere, Stub, opened

from steersman.rollout import Sampling
from steersman.rollout.remote import ServerSettings, open_process, open_vllm
from steersman.rollout.remote.dialects import Batchwise, Requirements
from steersman.rollout.remote.launch import ServerProcess
from steersman.rollout.remote.snapshot import Snapshot
from steersman.rollout.remote.station import Station
from steersman.types import SteersmanError

SAYS = """
print("WARNING: OSError: too few files may be open")
print("ValidationError: 1 validation error for ModelConfig\\n  the window is too long", flush=True)
sys.exit(3)
"""
DIES = """
import http.server, os
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"steersman": true, "data": []}'
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        print("ValueError: no room for it", flush=True)
        os._exit(1)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


@pytest.fixture
def station(tmp_path):
    """Makes the station of a process that runs a script; each of its starts leaves a line in `starts`."""
    made = []

    def make(script: str) -> Station:
        begin = f"import sys\nopen({str(tmp_path / 'starts')!r}, 'a').write('once\\n')\n"
        process = ServerProcess(
            "toy server",
            lambda port: [sys.executable, "-c", begin + script, str(port)],
            tmp_path / "log",
            timeout=20.0,
        )
        process.start()
        station = Station(
            None, process, Batchwise(), owner="a", tolerance=1e-4, vocabulary=35, wanted=Requirements({}),
            drawn=Sampling(1),
        )  # fmt: skip
        made.append(station)
        return made[-1]

    yield make
    for one in made:
        one.close()


def weights(folder: Path) -> Snapshot:
    return Snapshot(1, folder / "weights", {}, [])


def test_a_server_that_never_answers_is_started_twice_and_says_why(station, tmp_path, capsys):
    why = "Its first error: ValidationError: 1 validation error for ModelConfig the window is too long"
    with pytest.raises(SteersmanError, match=f"toy server: ended twice before it ever answered. {why}$") as caught:
        station(SAYS).load(weights(tmp_path))
    assert (tmp_path / "starts").read_text().count("once") == 2
    assert f"{why}. It is started once more" in capsys.readouterr().err
    assert str(tmp_path) not in str(caught.value)  # its log goes with the run


@pytest.mark.parametrize("over", ["weights", "the same prompts"])
def test_a_server_that_dies_again_and_again_says_why(station, tmp_path, over):
    one = station(DIES)
    with pytest.raises(SteersmanError, match=f"toy server died 4 times over {over}.*ValueError: no room for it"):
        one.load(weights(tmp_path)) if over == "weights" else one.complete(ASKED, CALL)
    assert (tmp_path / "starts").read_text().count("once") == 4


@pytest.mark.parametrize("window", [60, 16])
def test_a_receipt_asks_only_for_what_the_server_has_room_for(window):
    """The longer canary has 126 tokens here, and the shorter one 40."""
    server = Elsewhere()
    server.desk.models = lambda _: {"data": [{"id": "policy", "max_model_len": window}]}
    real, lengths = server.desk.generate, []

    def generate(body):
        lengths.extend(len(one["token_ids"]) for one in body["batch"])
        return real(body)

    server.desk.generate = generate
    generator = open_process(make_policy(), ServerSettings((2,), 8, urls=(server.url,), timeout=20.0))
    if window == 60:
        assert generator.update_weights(1)["sync/gap"] < 1e-4
        assert set(lengths) == {40}
    else:
        with pytest.raises(SteersmanError, match=r"its window \(--max-model-len\) is 16 tokens.*give it 41 at least"):
            generator.update_weights(1)
        assert not lengths
    generator.close()
    server.close()


def test_what_a_server_says_of_itself_is_asked_once():
    server = Elsewhere()
    real, asked_for = server.desk.models, []
    server.desk.models = lambda _: asked_for.append("models") or real(None)
    generator = open_process(make_policy(), ServerSettings((2,), 8, urls=(server.url,), timeout=20.0))
    for version in range(4):
        generator.update_weights(version)
    assert asked_for == ["models"]
    generator.close()
    server.close()


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 48}, "vocab_size is 48 there, and must be 35"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True there, and must be False"),
        ({"hidden_size": 33, "num_hidden_layers": 9}, "hidden_size is 33 .*; num_hidden_layers is 9"),
    ],
)
@pytest.mark.parametrize("rows", [35, 48])
def test_a_server_of_another_model_is_named_before_weights_are_sent(rows, change, said, monkeypatch):
    """35 ids, alone or padded to 48 rows: padding is not sent."""
    policy = make_policy(vocab=rows)
    own = policy.model.config.to_dict()
    held = {name: own[name] for name in SIZES} | {"tie_word_embeddings": False, "vocab_size": 35} | change
    began = []
    stub = Stub(
        version={"version": "0.32.0"}, v1__models={"data": [{"id": "policy"}]}, weight_info={"weight_version": ""},
        collective_rpc={
            "results": [
                {"max_num_seqs": 4, "model": held, "logprobs_mode": "processed_logprobs", "max_logprobs": 20,
                 "max_lora_rank": 0}
            ]
        },
        start_weight_update=lambda: began.append(1) or {},
    )  # fmt: skip
    monkeypatch.setattr("test_faults.make_policy", lambda: policy)
    with pytest.raises(SteersmanError, match=f"its model is not the policy's: {said}") as caught:
        opened(open_vllm, stub, timeout=5.0)
    assert """--hf-overrides '{"tie_word_embeddings": false, "vocab_size": 35}'""" in str(caught.value)
    assert not began


def test_the_rows_of_a_table_that_deepspeed_took_apart_are_those_of_all_its_pieces(monkeypatch):
    from steersman.distributed import pieces
    from steersman.rollout.remote import snapshot

    policy = make_policy()
    table = policy.model.get_output_embeddings().weight
    table.ds_shape, table.data = table.shape, table.data.new_empty(0)  # as ZeRO 3 leaves a parameter
    monkeypatch.setattr(pieces.zero_pieces, "is_cut", lambda tensor: tensor is table)
    zero3 = SimpleNamespace(sharded=True, parallel=SimpleNamespace(stage=3))
    monkeypatch.setattr(pieces, "ranks", lambda: zero3)
    assert snapshot.known_ids(policy) == snapshot.table_rows(policy) == 35

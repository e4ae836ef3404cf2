"""Folders that others made: their code is not run, and families that do not fit are refused before anything loads."""

import ast
import contextlib
import json
from pathlib import Path

import pytest
import torch
import transformers as hf

import steersman
from steersman.metrics.encoders import load
from steersman.model import load_policy, load_reward, load_scalar, load_tokenizer
from steersman.model.scratch import fresh_policy
from steersman.recipe.sections import ModelConfig
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from
from steersman.types import SteersmanError

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def foreign(model_folder, tmp_path, monkeypatch):
    """A folder whose config, model and tokenizer are classes in a file of its own; `ran` is there once it was run."""
    folder, marker = model_folder("llama"), tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    return folder, marker


LOADERS = {
    "policy": load_policy,
    "scalar": load_scalar,
    "reward": load_reward,
    "recipe": lambda folder: policy_from(ModelConfig(path=str(folder)), RunConfig(), torch.device("cpu")),
}


@pytest.mark.parametrize("name", list(LOADERS))
def test_code_from_a_folder_is_not_run(foreign, name):
    folder, marker = foreign
    with pytest.raises(SteersmanError, match=r"Python code of its own.*model.trust_remote_code: true"):
        LOADERS[name](folder)
    assert not marker.exists()


def test_every_load_says_whether_code_may_run():
    """What the library is not told it asks on standard input."""
    source, silent = Path(steersman.__file__).parent, []
    for path in source.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                loads = call.func.attr in ("from_pretrained", "from_config")
                other = ast.unparse(call.func).startswith(("peft.", "alembic."))  # these load no code of a folder
                told = any(keyword.arg == "trust_remote_code" for keyword in call.keywords)
                silent += [f"{path.relative_to(source)}:{call.lineno}"] if loads and not other and not told else []
    assert silent == []


def test_nor_by_a_metric(foreign):
    folder, marker = foreign
    with pytest.raises(SteersmanError, match="metric 'perplexity': the model"):
        load(hf.AutoModelForCausalLM, str(folder), "perplexity", "cpu")
    assert not marker.exists()


def test_nor_for_its_tokenizer(foreign):
    folder, marker = foreign
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    for read in (load_tokenizer, lambda at: fresh_policy(str(at), {"model_type": "llama"}, seed=0)):
        with contextlib.suppress(SteersmanError):  # the library may have a class that reads the files
            read(folder)
        assert not marker.exists()


def test_trusted_code_runs(foreign):
    folder, marker = foreign
    policy = policy_from(ModelConfig(path=str(folder), trust_remote_code=True), RunConfig(), torch.device("cpu"))
    assert type(policy.model).__name__ == "OwnModel"
    assert marker.exists()


REFUSED = {
    "rwkv": ({}, "no attention"),
    "bloom": ({}, "ALiBi"),
    "mpt": ({}, "ALiBi"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "minimax": ({}, "no cache of one key and value, or of one state"),
}


@pytest.mark.parametrize("family", list(REFUSED))
def test_a_family_that_does_not_fit_is_refused_by_its_config_alone(tmp_path, family):
    settings, why = REFUSED[family]
    hf.AutoConfig.for_model(family, **settings).save_pretrained(tmp_path)
    for read in (load_policy, load_scalar):
        with pytest.raises(SteersmanError, match=rf"models of type '{family}' are not supported: .*{why}"):
            read(tmp_path)


def test_a_folder_with_a_tokenizer_alone_is_enough_for_fresh_weights(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    made = fresh_policy(str(tmp_path), {"model_type": "llama", **sizes}, seed=0)
    assert made.model.config.vocab_size == len(made.tokenizer)

"""The core verbs need the core dependencies alone, and whatever needs more says which extra to install."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from letter_models import LETTERS, WORDS, letters, write_jsonl
from tiny_models import tiny_model

from steersman import extras
from steersman.metrics.named import METRICS, metric
from steersman.types import SteersmanError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHERS = (
    "pygame", "bitsandbytes", "vllm", "langdetect", "sqlalchemy", "alembic", "starlette", "uvicorn", "argon2", "nh3",
    "markdown_it_py", "psycopg", "tensorboard", "wandb", "openai",
)  # fmt: skip
"""More modules of extras, which the errors of their own rooms name."""

WITHOUT_EXTRAS = '''
import json, sys

class Without:
    """A finder that does not find the modules of REFUSED, as if they were not installed."""

    def __init__(self, inner):
        self.inner = inner

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else self.inner.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.inner, name)

REFUSED = set(json.loads(sys.argv[1]))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from steersman.cli import main

def refused(*words):
    import contextlib, io
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(list(words)) == 2, words
    return said.getvalue()

told = {}
for name, words in json.loads(sys.argv[2]).items():
    told[name] = main(words)
for name, words in json.loads(sys.argv[3]).items():
    told[name] = refused(*words)
assert not REFUSED & {name.partition(".")[0] for name in sys.modules}
print("\\n" + json.dumps(told))
'''


def packages(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", r, maxsplit=1)[0].lower().replace("-", "_") for r in requirements}


def test_extras_hold_what_the_code_says_and_the_core_does_not():
    optional = PROJECT["optional-dependencies"]
    for module, extra in extras.EXTRAS.items():
        assert module in packages(optional[extra]), module
        assert module not in packages(PROJECT["dependencies"]), module
    # who has a cluster has Ray; DeepSpeed is imported by transformers in every process where it is installed
    for extra in set(extras.EXTRAS.values()) - {"ray", "deepspeed"}:
        named = [r for r in optional["dev"] if r.startswith("steersman[")]
        inner = [r for n in named for r in optional[n.removeprefix("steersman[").removesuffix("]")]]
        assert f"steersman[{extra}]" in [*named, *inner], f"`make` does not install {extra}"


def test_core_verbs_run_where_no_package_of_an_extra_can_be_imported(tmp_path):
    model = tmp_path / "model"
    tiny_model("llama", vocab=len(LETTERS)).save_pretrained(model)
    letters().save_pretrained(model)
    said = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": w, "completion": w[::-1]} for w in WORDS])
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": w, "chosen": "a", "rejected": "be"} for w in WORDS])
    thumbs = write_jsonl(
        tmp_path / "thumbs.jsonl",
        [{"prompt": w, "completion": w[:2], "label": i % 2 == 0} for i, w in enumerate(WORDS)],
    )
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def score(prompts, completions):\n    return [float(c.count('a')) for c in completions]\n")
    start = ["--model.path", str(model), "--run.device", "cpu"]
    one = ["--train.epochs", "1", "--train.batch_size", "4"]
    small = ["--rollout.prompts", "4", "--rollout.samples", "2", "--rollout.max_new_tokens", "4", "--iterations", "2"]
    paid = ["--reward.parts", json.dumps({"score": {"function": f"{rewards}:score"}}), *small]
    bleu = ["--reward.parts", json.dumps({"score": {"metric": "bleu", "columns": {"references": "completion"}}})]

    def at(verb: str, data: Path, *more: str) -> list[str]:
        return [verb, *start, "--data.path", str(data), "--run.dir", str(tmp_path / "runs" / verb), *more]

    core = {
        "sft": at("sft", said, *one),
        "reward": at("reward", pairs, *one, "--data.held_out", "4"),
        "dpo": at("dpo", pairs, *one),
        "kto": at("kto", thumbs, *one),
        "grpo": at("grpo", said, *paid),
        "ppo": at("ppo", said, *paid),
        "generate": ["generate", "--model.path", str(model), "--prompts", '["a"]', "--rollout.max_new_tokens", "4"],
        "report": ["report", str(tmp_path / "runs" / "ppo")],
    }
    more = {
        "control": ["control", "--env", "CartPole-v1"],
        "grue": ["grue", "--model.path", str(model), "--run.dir", str(tmp_path / "grue")],
        "bleu": at("rloo", said, *bleu, *small),
        "gym": at("rloo", said, *paid, "--environment", json.dumps({"gym": "FrozenLake-v1"})),
    }
    refused = [*extras.EXTRAS, *OTHERS]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps(refused), json.dumps(core), json.dumps(more)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert {name: told[name] for name in core} == dict.fromkeys(core, 0)
    assert "control needs gymnasium" in told["control"] or "this verb needs gymnasium" in told["control"]
    assert "pip install 'steersman[control]'" in told["control"]
    assert "pip install 'steersman[reports]'" in told["grue"]
    assert "metric 'bleu' needs nltk" in told["bleu"]
    assert "pip install 'steersman[metrics]'" in told["bleu"]
    assert "environment.gym needs gymnasium" in told["gym"]
    page = (tmp_path / "runs" / "ppo" / "report.html").read_text()
    assert "pip install 'steersman[reports]'" in page.replace("&#39;", "'")
    assert "<svg" not in page


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_names_the_extra_that_it_needs(name, monkeypatch):
    """Before it scores anything: what a metric imports when it scores is what `libraries` says."""
    settings = {"classifier": {"model": "x"}, "perplexity": {"model": "x"}}.get(name, {})
    if name in ("meteor1.5", "spice", "bertscore"):
        pytest.skip("needs Java or an encoder, whose error names its own extra")
    libraries = metric(name, settings).libraries if name not in ("classifier", "perplexity") else ()
    assert set(libraries) <= set(extras.EXTRAS)
    monkeypatch.setattr(extras, "installed", lambda module: False)
    if libraries:
        with pytest.raises(SteersmanError, match=r"pip install 'steersman\[metrics\]'"):
            metric(name, settings)

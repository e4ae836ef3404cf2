"""Tasks of lm-evaluation-harness give what its own class for Hugging Face models gives for the same weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from letter_models import WORDS, save_chat_mini, save_mini

from steersman.evaluation.harness import Harness
from steersman.model import load_policy
from steersman.recipe.evaluation import HarnessSection
from steersman.types import SteersmanError

pytest.importorskip("lm_eval")

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "writes": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["e"], max_gen_toks: 7, do_sample: false}
filter_list:
  - name: first
    filter:
      - function: regex
        regex_pattern: "([a-z])"
      - function: take_first
metric_list:
  - metric: exact_match
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tasks of each kind over rows of letters, and two models."""
    folder = tmp_path_factory.mktemp("harness")
    rng = random.Random(0)
    rows = [
        {
            "question": f"{a} {b}", "choices": rng.sample(WORDS, 3), "answer": rng.randrange(3),
            "target": rng.choice("abcdefghij"), "text": " ".join(rng.choices(WORDS, k=rng.choice((1, 4, 30)))),
        }
        for a in WORDS for b in WORDS[:2]
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{files}test_split: test{text}")
    save_mini(folder / "model")
    save_chat_mini(folder / "chat", 64)
    return folder


def section(folder: Path, **given: Any) -> HarnessSection:
    return HarnessSection(tasks=list(TASKS), include=str(folder / "tasks"), **given)


def package_says(folder: Path, model: str, tasks: list[str], **how: Any) -> dict[str, dict[str, Any]]:
    """What lm-evaluation-harness measures with its own class for Hugging Face models.

    That class keeps a place for a token that it never reads, so its context is given as one token less.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=str(folder / model), device="cpu", dtype="float32", batch_size=4, max_length=63)
    known = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    evaluate: Any = simple_evaluate
    return evaluate(theirs, tasks=tasks, task_manager=known, bootstrap_iters=1000, **how)["results"]


@pytest.mark.parametrize(("model", "chat"), [("model", False), ("chat", True)])
def test_equals_the_packages_own_model(folder, model, chat):
    """With the longest texts cut in windows, and asked through a chat template; 24 rows of each kind."""
    expected = package_says(folder, model, list(TASKS), apply_chat_template=chat)
    found = Harness(load_policy(folder / model, device="cpu"), section(folder, chat_template=chat), 256).look()
    names = {
        "choices/acc": "acc,none", "choices/acc_norm": "acc_norm,none", "choices/acc_stderr": "acc_stderr,none",
        "writes/exact_match:first": "exact_match,first", "perplexity/word_perplexity": "word_perplexity,none",
        "perplexity/bits_per_byte": "bits_per_byte,none",
    }  # fmt: skip
    for ours, name in names.items():
        assert found[ours] == pytest.approx(expected[ours.partition("/")[0]][name], rel=1e-5), ours
    assert 0 < found["choices/acc"] < 1


def test_a_look_changes_nothing_in_the_process(folder, capfd):
    harness = Harness(load_policy(folder / "model", device="cpu"), section(folder, limit=4), 256)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = harness.look()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert harness.look() == first
    said = capfd.readouterr()
    assert not said.out + said.err


@pytest.mark.parametrize("shots", [None, 2])
def test_examples_before_a_question_are_the_packages_own(folder, shots):
    expected = package_says(folder, "chat", ["choices"], apply_chat_template=True, num_fewshot=shots)["choices"]
    config = section(folder, chat_template=True, shots=shots).model_copy(update={"tasks": ["choices"]})
    found = Harness(load_policy(folder / "chat", device="cpu"), config, 256).look()
    for name in ("acc", "acc_norm"):
        assert found[f"choices/{name}"] == pytest.approx(expected[f"{name},none"])


def test_examples_come_before_the_question(folder):
    harness = Harness(load_policy(folder / "model", device="cpu"), section(folder, limit=1, shots=1), 256)
    seen: list[str] = []
    ask = harness.model.loglikelihood
    harness.model.loglikelihood = lambda asked, **how: seen.extend(r.args[0] for r in asked) or ask(asked, **how)
    harness.look()
    assert seen
    assert all(text.count("\n\n") == 1 for text in seen)


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("model", {"tasks": ["nosuch"]}, "tasks: there is no task nosuch in .*tasks, nor among the package's own"),
        ("model", {"tasks": ["broken"]}, "broken did not run: .*Error"),
        ("model", {"chat_template": True}, "chat_template: the model has no chat template"),
    ],
)
def test_what_can_not_be_asked_is_refused_before_training(folder, model, given, words):
    files = "dataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
    (folder / "tasks" / "broken.yaml").write_text(f"task: broken\n{files}test_split: test{TASKS['choices']}")
    try:
        config = HarnessSection.model_validate({**section(folder).model_dump(), **given})
        with pytest.raises(SteersmanError, match=f"evaluation.harness.*{words}"):
            Harness(load_policy(folder / model, device="cpu"), config, 256)
    finally:
        (folder / "tasks" / "broken.yaml").unlink()

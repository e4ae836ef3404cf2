"""Where the data hold no prompt out, a run says so wherever it tells of its looks, and of none that are held out."""

from __future__ import annotations

import json

import pytest
from letter_models import WORDS, letters, write_jsonl
from train_kit import save_tiny

from steersman.cli import main
from steersman.recipe.sections import RolloutConfig
from steersman.run.report.card import write_card
from steersman.run.report.page import write_report


@pytest.fixture(scope="module", params=["grpo", "distill"])
def told(request, tmp_path_factory):
    """Runs of a verb by whether data hold rows out: what was printed, and the run folder."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(folder / "model")
    data = write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{WORDS[i]} {WORDS[-i]}"} for i in range(12)])
    words = [request.param, "--model.path", str(model), "--data.path", str(data), "--run.threads", "1"]
    words += ["--rollout.samples", "2", "--rollout.max_new_tokens", "4", "--rollout.held_out", "3"]
    if request.param == "grpo":
        words += ["--rollout.prompts", "4", "--iterations", "3"]
        words += ["--reward.parts", "{score: {builtin: length}}"]
    else:
        words += ["--teacher.path", str(save_tiny(folder / "teacher", seed=1)), "--train.batch_size", "4"]
        words += ["--train.max_steps", "3"]
    return words, folder


@pytest.mark.parametrize("held", [0, 3])
def test_a_run_says_whether_its_looks_are_at_prompts_that_it_trains_on(told, held, capsys):
    words, folder = told
    run = folder / f"run-{held}"
    assert main([*words, "--data.held_out", str(held), "--run.dir", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    asked = {json.loads(line)["prompt"] for line in (run / "samples.jsonl").read_text().splitlines()}
    assert len(asked) == 3
    assert f"{12 - held} prompts, {held} held out" in printed
    nothing = "no prompt is held out: held_out/... are numbers of prompts that are trained on too"
    page, card = write_report(run).read_text(), write_card(run).read_text()
    before, _, after = printed.partition("/3 ")
    for text in (before, after, page, card):
        assert (nothing[1:] in text) == (held == 0)
    assert ("(held out)" in page) == (held > 0)
    assert ("(trained on)" in page) == (held == 0)
    if words[0] == "grpo":
        assert ("held-out reward, with its 95% interval" in after) == (held > 0)


def test_the_key_says_it_too():
    described = RolloutConfig.model_fields["held_out"].description or ""
    assert "the last training prompts" in described
    assert "data.held_out" in described


@pytest.mark.parametrize("in_turns", [True, False])
def test_preflight_says_of_plain_prompts_only_that_they_become_turns(in_turns, tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    tokenizer = letters()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} {% endif %}"
    )
    tokenizer.save_pretrained(model)
    plain = [WORDS[i] for i in range(4)]
    rows = [{"prompt": [{"role": "user", "content": text}] if in_turns else text} for text in plain]
    data = str(write_jsonl(tmp_path / "prompts.jsonl", rows))
    words = ["--model.path", str(model), "--data.path", data, "--rollout.max_new_tokens", "4", "--run.threads", "1"]
    learn = [
        "--iterations",
        "1",
        "--rollout.prompts",
        "4",
        "--rollout.samples",
        "2",
        "--run.dir",
        str(tmp_path / "run"),
    ]
    assert main(["grpo", *words, *learn, "--reward.parts", "{score: {builtin: length}}"]) == 0
    trained = capsys.readouterr().out
    assert main(["generate", *words]) == 0
    generated = capsys.readouterr().err
    assert ("plain-text prompts" in trained) is not in_turns
    assert ("plain-text prompts" in generated) is not in_turns

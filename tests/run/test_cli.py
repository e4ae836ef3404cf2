"""The command line: answers at once, exits with the right code, says what to do."""

from __future__ import annotations

import ast
import errno
import inspect
import os
import shlex
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
from pydantic import Field

from steersman.cli import main
from steersman.config.sections import Section
from steersman.run.files.folder import RunFolder
from steersman.types import SteersmanError
from steersman.verb_table import VERBS, Verb, import_object


class Optim(Section):
    lr: float = Field(default=1e-3, gt=0, description="learning rate")


class Recipe(Section):
    dir: str = Field(default="", description="folder")
    fail: str = Field(default="", description="how to fail")
    train: Optim = Field(default=Optim(), description="training")


class Run(Section):
    dir: str = Field(default="runs/toy", description="folder")


class RecipeOfRun(Recipe):
    run: Run = Field(default=Run(), description="run")


def run(recipe: Recipe, *, resume: bool) -> dict:
    if recipe.dir:
        with RunFolder(Path(recipe.dir), recipe, resume=resume) as folder:
            if recipe.fail == "interrupt in a stage":
                with RunFolder(folder / "stage", recipe):
                    raise KeyboardInterrupt
            if recipe.fail == "interrupt before it began":
                folder.forget()
                raise KeyboardInterrupt
            return act(recipe, resume)
    return act(recipe, resume)


def act(recipe: Recipe, resume: bool) -> dict:
    if recipe.fail == "user":
        raise SteersmanError("data.jsonl, row 3: empty completion")
    if recipe.fail == "bug":
        raise RuntimeError("a bug")
    if recipe.fail in ("EACCES", "ENOSPC", "ENOENT"):
        number = getattr(errno, recipe.fail)
        raise OSError(number, os.strerror(number), "theirs.jsonl")
    if recipe.fail == "interrupt":
        raise KeyboardInterrupt
    if recipe.fail == "interrupt in compiled code":
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 18816 vs 18768")
    print("ran", recipe.train.lr, resume)
    return {"finished": recipe.fail != "signal", **({"run": recipe.dir} if recipe.dir else {})}


@pytest.fixture
def steersman(monkeypatch, capsys):
    """Runs a command line with one verb more, "toy"; gives (exit code, stdout, stderr)."""
    toy = types.ModuleType("toy")
    vars(toy).update(run=run, Recipe=Recipe)
    monkeypatch.setitem(sys.modules, "toy", toy)
    monkeypatch.setitem(VERBS, "toy", Verb("toy:run", "toy:Recipe", "a toy"))

    def command(*args: str) -> tuple[int, str, str]:
        code = main(list(args))
        out = capsys.readouterr()
        return code, out.out, out.err

    return command


def test_help_answers_at_once_and_loads_no_torch():
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'rich' in sys.modules))\n"
        "from steersman.cli import main; sys.exit(main(['--help']))"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - begin
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "False False"
    for verb in ["quickstart", "sft", "reward", "ppo", "generate", "report"]:
        assert f"\n  {verb} " in done.stdout
    assert seconds < 5  # a tenth of a second on an idle machine; the machine that tests need not be one


def test_version_and_no_arguments(steersman):
    assert steersman("--version")[1].startswith("steersman 0.")
    assert steersman()[0] == 0


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_goes_on_with_a_run_or_refuses_to(name, capsys):
    """A verb that reads `resume` says so in the table of verbs, and no other takes --resume."""
    verb = VERBS[name]
    code = ast.parse(textwrap.dedent(inspect.getsource(import_object(verb.run))))
    assert verb.resumes == any(isinstance(part, ast.Name) and part.id == "resume" for part in ast.walk(code))
    if not verb.resumes:
        assert main([name, "some.yaml", "--resume"]) == 2
        assert f"{name} keeps none; leave it out" in capsys.readouterr().err


def test_an_unknown_verb_names_the_nearest(steersman):
    code, _, err = steersman("pppo")
    assert (code, "did you mean ppo?" in err) == (2, True)
    code, _, err = steersman("dance")
    assert (code, "--help lists the verbs" in err) == (2, True)


def test_a_verb_runs_with_recipe_and_overrides(steersman, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train:\n  lr: 1e-5\n")
    assert steersman("toy", str(recipe)) == (0, "ran 1e-05 False\n", "")
    assert steersman("toy", str(recipe), "--train.lr", "3e-4", "--resume") == (0, "ran 0.0003 True\n", "")


def test_a_run_says_where_its_files_are(steersman, tmp_path):
    folder = tmp_path / "run"
    code, out, err = steersman("toy", "--dir", str(folder))
    assert (code, out, err) == (0, f"ran 0.001 False\ntoy: done; its files are in {folder}\n", "")


def test_resume_alone_asks_for_the_folder_of_the_run(steersman):
    assert steersman("toy", "--resume") == (0, "ran 0.001 True\n", "")  # a verb that needs no settings
    code, _, err = steersman("sft", "--resume")
    assert (code, "Name its folder: steersman sft --resume --run.dir FOLDER" in err) == (2, True)


def test_resume_says_that_a_folder_holds_no_run(steersman, monkeypatch, tmp_path):
    """A misspelt folder would otherwise begin a run anew without a word."""
    monkeypatch.setattr(sys.modules["toy"], "Recipe", RecipeOfRun)
    folder = tmp_path / "run"
    words = ("--run.dir", str(folder), "--train.lr", "1", "--resume")
    said = f"--resume: {folder} holds no run to go on with; a new one begins there\n"
    assert steersman("toy", *words)[1] == said + "ran 1.0 True\n"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    assert steersman("toy", *words)[1] == "ran 1.0 True\n"


@pytest.mark.parametrize("words", [["--run.dir", "no/such"], ["--run.dir=no/such"]])
def test_a_run_that_is_not_there_can_not_go_on(steersman, words):
    code, _, err = steersman("toy", "--resume", *words)
    assert code == 2
    assert "no/such: no run is there to go on with" in " ".join(err.split())


def test_print_config_is_a_recipe(steersman, tmp_path):
    code, out, _ = steersman("toy", "--train.lr=1e-5", "--print-config")
    assert code == 0
    assert "# learning rate" in out
    (tmp_path / "r.yaml").write_text(out)
    assert steersman("toy", str(tmp_path / "r.yaml"))[1] == "ran 1e-05 False\n"


def test_help_of_a_verb(steersman, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = steersman("toy", "--help")
    assert code == 0
    assert "--train.lr" in out
    assert "learning rate" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--fail", "user"], "data.jsonl, row 3: empty completion\n"),
        (["--train.rl", "3"], "settings: --train.rl: unknown key; did you mean train.lr?\n"),
        (["none.yaml"], "recipe none.yaml: there is no such file\n"),
    ],
)
def test_what_the_user_can_mend_has_no_traceback(steersman, args, said):
    assert steersman("toy", *args) == (2, "", said)


def test_a_bug_keeps_its_traceback_and_says_where_the_run_is(steersman, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="a bug"):
        steersman("toy", "--fail=bug", "--dir", str(tmp_path / "run"))
    assert f"the run failed; its files are in {tmp_path / 'run'}\n" in capsys.readouterr().err


@pytest.mark.parametrize(("fail", "said"), [("EACCES", "Permission denied"), ("ENOSPC", "No space left on device")])
def test_a_file_that_may_not_be_opened_is_named_without_a_traceback(fail, said, steersman):
    code, _, err = steersman("toy", f"--fail={fail}")
    assert (code, err) == (2, f"theirs.jsonl: it can not be read or written ({said})\n")


def test_a_file_that_the_code_itself_misses_is_a_bug(steersman):
    with pytest.raises(FileNotFoundError):
        steersman("toy", "--fail=ENOENT")


def test_interrupts_are_told_to_the_shell(steersman, tmp_path):
    code, _, err = steersman("toy", "--fail=interrupt", "--dir", str(tmp_path / "run"))
    way_on = "the same command with --resume goes on"
    assert (code, err) == (130, f"interrupted; its files are in {tmp_path / 'run'}; {way_on}\n")
    code, _, err = steersman("toy", "--fail=interrupt in compiled code", "--dir", str(tmp_path / "saving"))
    assert (code, err) == (130, f"interrupted; its files are in {tmp_path / 'saving'}; {way_on}\n")
    told = f"interrupted; its files are in {tmp_path / 'outer'}; {way_on}\n"
    assert steersman("toy", "--fail=interrupt in a stage", "--dir", str(tmp_path / "outer")) == (130, "", told)
    gone = steersman("toy", "--fail=interrupt before it began", "--dir", str(tmp_path / "gone"))
    assert gone == (130, "", "interrupted\n")
    assert steersman("toy", "--fail=signal")[0] == 130


def test_report_verb(steersman, tmp_path):
    assert steersman("report")[0] == 2
    code, _, err = steersman("report", str(tmp_path / "none"))
    assert (code, "no such folder" in err) == (2, True)
    (tmp_path / "summary.json").write_text('{"gold": 1}')
    assert steersman("report", str(tmp_path)) == (0, f"{tmp_path / 'report.html'}\n", "")


def test_an_error_reaches_the_shell_as_exit_code_2():
    command = [sys.executable, "-m", "steersman", "report", "/no/such/folder"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "run folder /no/such/folder: there is no such folder\n"


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_there(name, steersman):
    code, out, _ = steersman(name, "--help")
    assert code == 0
    assert f"steersman {name} [recipe.yaml]" in out


@pytest.mark.parametrize("verb", sorted(v for v, row in VERBS.items() if row.example))
def test_a_verb_typed_alone_says_the_least_that_runs(verb, steersman):
    """What it says is itself a complete recipe."""
    code, _, err = steersman(verb)
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("  steersman ")]
    words = shlex.split(line)
    assert words[:2] == ["steersman", verb]
    code, out, err = steersman(*words[1:], "--print-config")
    named = any(
        word in out
        for word in (
            "path: MODEL",
            "run: RUN",
            "file: FILE",
            "store: feedback.db",
            "recipe: recipes/ppo.yaml",
            "path: FILE",
            "folder: FOLDER",
            "personas:",
        )
    )
    assert (code, named) == (0, True), err

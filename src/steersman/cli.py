"""`steersman <verb> [recipe.yaml] [--section.key value ...]`: read, carried out by the verb, errors told in words.

The verbs are rows of `verb_table.VERBS`.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.verb_table import VERBS, Verb

if TYPE_CHECKING:
    from steersman.config.sections import Section

_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""What the system says of files that the user may not open, and of disks that are full."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and gives its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C, 141 where
    whoever reads its output has gone."""
    args = list(sys.argv[1:] if argv is None else argv)
    _terminal().write_out_unencodable()
    _held().clear()
    if _is_rank():
        _end_at_once_on_ctrl_c()
        _launch().end_with_starter()
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        return _interrupted(str(stop))
    except BrokenPipeError:
        return _output_closed()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich's answer to a closed pipe
            return _output_closed()
        # No code here leaves so: a library or code of the user's did, and that is no run that is done.
        _say_where(f"something called sys.exit({'' if error.code is None else error.code})")
        return 1
    except Exception as error:
        # types.py imports torch; an error of its own kind can only come from a process that did so too.
        types = sys.modules.get("steersman.types")
        mendable = types is not None and isinstance(error, types.SteersmanError)
        if not mendable and _came_of_interrupt(error):
            return _interrupted()
        if _is_rank():
            _launch().leave_error(error)
            return 1
        if mendable:
            _red(str(error))
            return 2
        if isinstance(error, OSError) and error.errno in _CLOSED and error.filename is not None:
            _say_where(f"{error.filename}: it can not be read or written ({error.strerror})")
            return 2
        _say_where("the run failed")
        sys.excepthook = _terminal().say_traceback
        raise


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    if args[0] in ("--version", "-V"):
        print(f"steersman {version('steersman')}")
        return 0
    name, rest = args[0], args[1:]
    if ":" in name:
        from steersman.verbs.on_policy_recipes import own_recipe

        own = own_recipe(name)
        return _verb(name, VERBS["ppo"], rest, own)
    if name not in VERBS:
        near = get_close_matches(name, VERBS, 1)
        hint = f"did you mean {near[0]}?" if near else "steersman --help lists the verbs"
        _red(f"{name}: there is no such verb; {hint}")
        return 2
    return _verb(name, VERBS[name], rest)


def _verb(name: str, verb: Verb, args: list[str], own: type[Section] | None = None) -> int:
    """Runs a verb; `own` is the recipe class of a method that was loaded by its path."""
    flags = {"--help", "-h", "--print-config", "--resume"}
    # A word right after a setting is its value, so only one in front can be the recipe.
    path = Path(args[0]) if args and not args[0].startswith("-") else None
    words = args[1:] if path is not None else args
    if path is not None and verb.file_key and (verb.any_file or path.suffix not in (".yaml", ".yml")):
        path, words = None, [f"--{verb.file_key}", args[0], *words]
    if not args and verb.example:
        _red(f"{name}: it can not start without settings; the least is\n  steersman {name} {verb.example}\n"
             f"every setting: steersman {name} --help; a checkout has recipes to begin from in recipes/")  # fmt: skip
        return 2
    given = {w for w in words if w in flags}
    if "--resume" in given:
        verb.require_resumes(name)
    overrides = [w for w in words if w not in flags]
    if path is None and "--resume" in given:
        if words == ["--resume"] and verb.example:
            _red(f"{name}: which run is to go on? Name its folder: steersman {name} --resume --run.dir FOLDER")
            return 2
        path = _recipe_of_run(overrides)
    recipe_class = own or verb.recipe_class(path, overrides)
    if given & {"--help", "-h"}:
        _verb_help(name, verb, recipe_class)
        return 0
    from steersman.config.load import load_recipe

    recipe: Any = load_recipe(recipe_class, path, overrides)
    if "--print-config" in given:
        return _print_recipe(recipe)
    if "--resume" in given and "run" in recipe_class.model_fields and not _is_rank():
        _say_if_new(Path(recipe.run.dir))
    return _end(name, verb.start(name, recipe, resume="--resume" in given))


def _print_recipe(recipe: Section) -> int:
    from steersman.config.dump import dump_recipe

    text = dump_recipe(recipe)
    if not _terminal().encodes(text):
        _red(f"--print-config: the recipe has characters that {sys.stdout.encoding}, the encoding of standard "
             "output, has not; set PYTHONIOENCODING=utf-8")  # fmt: skip
        return 2
    print(text, end="")
    return 0


def _end(name: str, summary: dict[str, Any]) -> int:
    """Says where the files of a verb that has ended are, and gives the exit code."""
    if _is_rank():
        _launch().leave_summary(summary)
        return 0
    # A run that a signal ended early is whole and can be resumed, but what called it must not take it for done.
    if summary.get("finished") is False:
        return 130
    if "run" in summary:
        state = summary.get("state", "done")  # what a wheel waits for
        print(_terminal().printable(f"{name}: {state}; its files are in {summary['run']}"))
    return 0


def _is_rank() -> bool:
    """Whether another process of steersman started this one as a rank of its run (distributed/launch.py)."""
    return "STEERSMAN_RANKS_FOLDER" in os.environ


def _end_at_once_on_ctrl_c() -> None:
    """Until a rank has joined the others (`launch.as_rank`) there is nothing to save, and an interrupt in the middle
    of a module's import may come out as any error."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _launch() -> Any:
    return importlib.import_module("steersman.distributed.launch")


def _terminal() -> Any:
    return importlib.import_module("steersman.guards.terminal")


def _recipe_of_run(overrides: list[str]) -> Path | None:
    """The recipe in the run folder that `--run.dir` names: with `--resume` and no recipe, the run goes on by it.

    Raises SteersmanError where nothing else is given and no run is there.
    """
    for i, word in enumerate(overrides):
        key, equals, value = word.partition("=")
        if key == "--run.dir":
            folder = value if equals else overrides[i + 1] if i + 1 < len(overrides) else ""
            recipe = Path(folder) / "config.yaml"
            if folder and recipe.is_file():
                return recipe
            if folder and len(overrides) == (1 if equals else 2):
                from steersman.types import SteersmanError

                raise SteersmanError(f"--run.dir {folder}: no run is there to go on with; it has no config.yaml")
            return None
    return None


def _say_if_new(folder: Path) -> None:
    """Says that `--resume` finds no run in the folder, which may be a misspelt name."""
    from steersman.run.files.folder import holds_run

    if not holds_run(folder):
        print(
            _terminal().printable(f"--resume: {folder} holds no run to go on with; a new one begins there"),
            flush=True,
        )


def _usage() -> str:
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{verb.help}" for name, verb in VERBS.items())
    return f"""steersman: reinforcement learning and preference alignment of language models

usage: steersman <verb> [recipe.yaml] [--section.key value ...]

{verbs}

steersman my_method.py:Class ...   an on-policy method of your own
steersman <verb> --help            every setting of the verb, with its default and meaning
steersman <verb> --print-config    the resolved recipe as YAML, ready to be saved and changed
steersman <verb> ... --resume      continue a run from its newest checkpoint; --resume --run.dir FOLDER is enough
steersman --version

Settings on the command line win over the recipe: steersman ppo recipes/ppo.yaml --optimizer.lr 1e-5"""


def _verb_help(name: str, verb: Verb, recipe_class: type[Section]) -> None:
    from steersman.config.help import help_table
    from steersman.run.console import new_console

    console = new_console()
    console.print(f"steersman {name} [recipe.yaml] [--section.key value ...]", style="bold")
    also = "--print-config, --resume, --help" if verb.resumes else "--print-config, --help"
    console.print(f"{verb.help}\n\nAlso: {also}\n")
    console.print(help_table(recipe_class))


def _red(text: str) -> None:
    start, end = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{start}{_terminal().printable(text)}{end}", file=sys.stderr)


def _output_closed() -> int:
    """Ends without words, as a program does that SIGPIPE ends, and gives the shell's exit code for that."""
    _terminal().forget_output()
    return 141


def _interrupted(of_ranks: str = "") -> int:
    """Says how to go on after Ctrl-C, which a rank leaves to its starter (`of_ranks`), and gives the exit code."""
    held = _held()
    how = f"; its files are in {held[0]}; the same command with --resume goes on" if held else of_ranks
    if _is_rank():
        _launch().leave_interrupt(how)
    else:
        _red(f"interrupted{how}")
    return 130


def _came_of_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C came before the error: compiled code that it meets (a module's start, a file being saved) raises
    an error of its own."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return any(isinstance(one, KeyboardInterrupt) for one in seen)


def _say_where(what: str) -> None:
    """Points to the files of a run that ended badly."""
    held = _held()
    where = f"; its files are in {held[-1]}" if held else ""
    _red(f"{what}{where}")


def _held() -> list[Path]:
    """The run folders that this command line has held; none where nothing that holds one was imported."""
    folder = sys.modules.get("steersman.run.files.folder")
    return [] if folder is None else folder.held

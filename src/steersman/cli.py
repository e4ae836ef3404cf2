"""`steersman <verb> [recipe.yaml] [--section.key value ...]`.

A verb is a row of VERBS; its module is imported when it is used, so that `steersman --help` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steersman.config.sections import Section


@dataclass(frozen=True, slots=True)
class Verb:
    """`run` is "module:function" with the signature (recipe, *, resume) -> summary; `recipe` its recipe class.

    `recipe` may also be a function of the recipe's path and the overrides that chooses the class, one of those below
    `base`. With `file_key` a file right after the verb that is no YAML is not a recipe but that setting. `example` is
    the least that runs, told where the verb is typed alone. With `any_file` that setting may be YAML too. `many` says
    that several processes can share a run (`run.devices`), `resumes` that it keeps a run which `--resume` continues.
    """

    run: str
    recipe: str
    help: str
    file_key: str = ""
    example: str = ""
    many: bool = False
    any_file: bool = False
    resumes: bool = True
    base: str = ""

    def recipe_class(self, path: Path | None, overrides: list[str]) -> type[Section]:
        """The class that reads the recipe at `path` with these overrides."""
        from steersman.extras import explain_missing

        with explain_missing("this verb"):
            found = _load(self.recipe)
            return found if isinstance(found, type) else found(path, overrides)

    @property
    def is_loaded(self) -> bool:
        """Whether the module of its recipes was imported, without which none can have been made."""
        return (self.base or self.recipe).partition(":")[0] in sys.modules

    def reads(self, recipe: Any) -> bool:
        """Whether the recipe is one of its own."""
        return isinstance(recipe, _load(self.base or self.recipe))

    def start(self, name: str, recipe: Any, *, resume: bool = False) -> dict[str, Any]:
        """Runs the verb, on as many processes as the recipe asks for, and gives its summary.

        Raises SteersmanError where `resume` is asked of a verb that keeps no run.
        """
        from steersman.extras import explain_missing

        if resume:
            self.require_resumes(name)
        with explain_missing(name):
            if not self.many:
                return self.here(recipe, resume=resume)
            from steersman.distributed import launch, launched

            recipe.parallel.require_engine()
            os.environ.update(launched.from_slurm(os.environ))
            if launch.must_start(recipe.run.devices, recipe.run.launcher):
                start = _load("steersman.distributed.on_ray:start") if recipe.run.launcher == "ray" else launch.start
                return start(name, recipe, recipe.run.devices, resume=resume)
            with launch.as_rank(recipe.parallel):
                return self.here(recipe, resume=resume)

    def here(self, recipe: Any, *, resume: bool = False) -> dict[str, Any]:
        """Runs the verb in this process, as one of its ranks where there are several."""
        run = _load(self.run)
        return run(recipe, resume=resume) if self.resumes else run(recipe)

    def require_resumes(self, name: str) -> None:
        """Raises SteersmanError where the verb keeps no run to go on with."""
        if not self.resumes:
            from steersman.types import SteersmanError

            raise SteersmanError(
                f"{name}: --resume goes on with a run that was ended early, and {name} keeps none; leave it out"
            )


_START = "--model.path MODEL --data.path FILE"
_SCORE = "'{score: {function: my_rewards.py:score}}'"
_ON_POLICY = f"{_START} --reward.parts {_SCORE}"
_JUDGED = f"{_START} --judge.reward {_SCORE}"
VERBS = {
    "quickstart": Verb("steersman.verbs.quickstart:run", "steersman.verbs.quickstart:QuickstartRecipe",
                       "SFT, reward model and PPO on a small model that is included; offline, in minutes"),
    "sft": Verb("steersman.verbs.sft:run", "steersman.verbs.sft:SFTRecipe",
                "supervised fine-tuning on text, prompts with completions, or chats", example=_START, many=True),
    "reward": Verb("steersman.verbs.reward_model:run", "steersman.verbs.reward_model:RewardModelRecipe",
                   "a reward model from pairs, rankings, ratings, thumbs or labelled steps", example=_START,
                   many=True),
    **{name: Verb("steersman.verbs.rl:run", f"steersman.verbs.on_policy_recipes:RECIPES.{name}", text,
                     example=_ON_POLICY, many=True) for name, text in {
        "ppo": "PPO with a critic against reward models, functions, or a weighted sum",
        "ppo-kl": "PPO with an adaptive KL penalty in the place of the clip",
        "trpo": "a natural-gradient step inside a KL ball, with a line search",
        "nlpo": "PPO limited to the likely tokens of a lagging copy of the policy",
        "a2c": "advantage actor-critic: GAE and the plain score-function loss",
        "reinforce": "return-to-go against a moving baseline",
        "reinforce-baseline": "return-to-go against a critic",
        "reinforce++": "batch-normalised return-to-go, clipped, without a critic",
        "rloo": "each response against the mean of its siblings",
        "remax": "each response against the greedy one",
        "grpo": "scores standardised within their group, clipped, KL in the loss",
        "dr-grpo": "GRPO without the divisions that bias it",
        "dapo": "GRPO with an asymmetric clip and dynamic sampling",
        "gspo": "GRPO with one ratio per response",
        "cispo": "GRPO with bounded weights in the place of the clip",
        "reinforce++-baseline": "the lead over the group's mean, normalised over the batch, clipped",
        "gmpo": "GRPO with the geometric mean of ratios that are clipped one by one",
        "sapo": "GRPO with a soft gate in the place of the clip",
        "dppo": "GRPO with a trust region by divergence in the place of the clip",
        "gpg": "the lead over the group's mean with the plain score-function loss",
        "gdpo": "GRPO with several rewards, each standardised on its own",
        "gfpo": "GRPO on the short or efficient responses of each group",
        "clip-cov": "GRPO that leaves out the steps that cost most entropy",
        "kl-cov": "GRPO that holds the steps that cost most entropy to the sampler",
        "luspo": "GSPO whose responses weigh as much as they are long",
        "vespo": "GRPO with a smooth weight on whole responses in the place of the clip",
        "pass-at-k": "the exact gradient of the best of k responses",
        "vc-ppo": "PPO whose critic learns from whole returns",
        "vapo": "PPO with a lambda by length and imitation of correct answers",
    }.items()},
    "control": Verb("steersman.control.run:run", "steersman.control.recipe:recipe_class",
                    "the same methods, DQN and tabular ones on a Gymnasium environment",
                    base="steersman.control.recipe:ControlRecipe"),
    "dpo": Verb("steersman.verbs.preference:run", "steersman.verbs.preference:PreferenceRecipe",
                "offline preferences: DPO, IPO, DPOP, TDPO, SimPO, ORPO, CPO, ... by --loss.name",
                example=_START, many=True),
    **{name: Verb("steersman.verbs.feedback:run", f"steersman.verbs.feedback:RECIPES.{name}", text, example=_START,
                  many=True)
       for name, text in {
        "kto": "single answers with a thumb up or down (or pairs, split in two), by prospect theory",
        "bco": "single answers with a thumb up or down, as a classifier whose logit is the implicit reward",
    }.items()},
    "distill": Verb("steersman.distill.run:run", "steersman.distill.recipe:DistillRecipe",
                    "a student learns a teacher's distributions, on its own answers or on given ones",
                    example=f"{_START} --teacher.path MODEL", many=True),
    "best-of-n": Verb("steersman.flywheel.best_of_n:run", "steersman.flywheel.best_of_n:BestOfNRecipe",
                      "rejection sampling and RAFT: sample, score, keep, fine-tune; rounds", example=_JUDGED,
                      many=True),
    "online-dpo": Verb("steersman.flywheel.online_dpo:run", "steersman.flywheel.online_dpo:OnlineDPORecipe",
                       "iterative DPO on the model's own answers, paired by a judge; rounds", example=_JUDGED,
                       many=True),
    "arena": Verb("steersman.flywheel.arena:run", "steersman.flywheel.arena:ArenaRecipe",
                  "battles against opponents make data for SFT, DPO and PPO; ratings; rounds",
                  example=f"{_JUDGED} --opponents '{{other: MODEL}}'", many=True),
    "feedback": Verb("steersman.flywheel.feedback:run", "steersman.flywheel.feedback:FeedbackRecipe",
                     "praise and complaints in conversations become examples for SFT and KTO",
                     example="--data.path FILE"),
    "step-labels": Verb("steersman.flywheel.steps:run", "steersman.flywheel.steps:StepLabelsRecipe",
                        "labels of an answer's steps by rollouts from each: data for a process reward model",
                        example=_ON_POLICY.replace("--reward.parts", "--reward")),
    "instruct": Verb("steersman.flywheel.instruct.run:run", "steersman.flywheel.instruct.run:InstructRecipe",
                     "instructions with rules that programs check, and answers mended until they keep them",
                     example=_START),
    "judge-lessons": Verb("steersman.flywheel.judge_lessons:run",
                          "steersman.flywheel.judge_lessons:JudgeLessonsRecipe",
                          "pairs as questions with their winners, to train a judge that writes by grpo",
                          example="--data.path FILE --out questions.jsonl", resumes=False),
    "judge": Verb("steersman.judge.label:run", "steersman.judge.label:LabelRecipe",
                  "a judge compares or grades a file of answers: pairs, rankings or ratings come out",
                  example=f"--data.path FILE --judge.reward {_SCORE}"),
    "grue": Verb("steersman.grue.run:run", "steersman.grue.recipe:GrueRecipe",
                 "seven kinds of text x methods x seeds: one table, curves, and what became of every other metric",
                 example="recipes/grue.yaml --data.folder FOLDER"),
    "plan": Verb("steersman.verbs.plan:run", "steersman.verbs.plan:PlanRecipe",
                 "where a recipe's models fit on many devices, and how long an iteration takes there",
                 file_key="recipe", example="recipes/ppo.yaml --devices 8xH100-80GB --size 7b", any_file=True,
                 resumes=False),
    "check-env": Verb("steersman.verbs.check_env:run", "steersman.verbs.check_env:CheckEnvRecipe",
                      "try an environment before it is trained in: one page of findings", file_key="environment.path",
                      example="my_env.py:Env --model.path MODEL --data.path FILE", resumes=False),
    "verify": Verb("steersman.verify.run:run", "steersman.verify.run:VerifyRecipe",
                   "every method against exact answers on a small language, in one table", resumes=False),
    "evaluate": Verb("steersman.verbs.evaluate:run", "steersman.verbs.evaluate:EvaluateRecipe",
                     "metrics with confidence intervals over a file of completions, or over a model's answers",
                     file_key="file", example="FILE --metrics '[rougeL, distinct]'", resumes=False),
    "export": Verb("steersman.verbs.export:run", "steersman.verbs.export:ExportRecipe",
                   "write a model once more: adapters added in or alone, in a precision of choice",
                   file_key="path", example="MODEL --out FOLDER", resumes=False),
    "push": Verb("steersman.verbs.push:run", "steersman.verbs.push:PushRecipe",
                 "a run's model and its card to a model hub; --dry_run true only shows what would go",
                 file_key="run", example="RUN --name USER/MODEL", resumes=False),
    "import-recipe": Verb("steersman.verbs.import_recipe:run", "steersman.verbs.import_recipe:ImportRecipe",
                          "settings of TRL, LLaMA-Factory or OpenRLHF as a recipe, each key mapped or named",
                          file_key="file", example="FILE", any_file=True, resumes=False),
    "chat": Verb("steersman.verbs.chat:run", "steersman.verbs.chat:ChatRecipe",
                 "talk with a model in the terminal: steersman chat MODEL", file_key="model.path", example="MODEL",
                 resumes=False),
    "ab": Verb("steersman.people.ab:run", "steersman.people.ab:ABRecipe",
               "an A/B test that may be looked at any time: steersman ab OUTCOMES", file_key="file",
               example="FILE --experiment.control OLD --experiment.treatment NEW", resumes=False),
    "leaderboard": Verb("steersman.people.leaderboard:run", "steersman.people.leaderboard:LeaderboardRecipe",
                        "models rated by people's choices, as they are and with length and style held equal",
                        file_key="file", example="FILE", resumes=False),
    "simulate-users": Verb("steersman.people.simulated_user:run", "steersman.people.simulated_user:SimulateRecipe",
                           "personas talk with candidates; a judge that is checked against people compares",
                           example="recipes/simulate-users.yaml"),
    "wheel": Verb("steersman.people.wheel.run:run", "steersman.people.wheel.recipe:WheelRecipe",
                  "judgements train a candidate, gates and an A/B test decide whether it stays",
                  example="--model.path MODEL --judgements.folder FOLDER"),
    "collect": Verb("steersman.people.collect.verb:run", "steersman.people.collect.verb:CollectRecipe",
                    "a page on which people chat with a model and judge answers, into a store", resumes=False),
    "export-feedback": Verb("steersman.people.store.export:run", "steersman.people.store.export:ExportRecipe",
                            "people's judgements as a file that sft, reward, dpo or kto reads", file_key="store",
                            example="feedback.db --for dpo --out pairs.jsonl", resumes=False),
    "serve": Verb("steersman.people.serve.run:run", "steersman.people.serve.run:ServeRecipe",
                  "an OpenAI-compatible server on the engine: steersman serve MODEL", file_key="model.path",
                  example="MODEL", resumes=False),
    "generate": Verb("steersman.verbs.generate:run", "steersman.verbs.generate:GenerateRecipe",
                     "sample responses from a model", example="--model.path MODEL --prompts '[\"Once upon\"]'",
                     many=True, resumes=False),
}  # fmt: skip
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""What the system says of files that the user may not open, and of disks that are full."""
REPORT_HELP = "write report.html of a run folder: steersman report FOLDER"


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
    if name == "report":
        return _report(rest)
    if ":" in name:
        from steersman.verbs.on_policy_recipes import own_recipe

        own = own_recipe(name)
        return _verb(name, VERBS["ppo"], rest, own)
    if name not in VERBS:
        near = get_close_matches(name, [*VERBS, "report"], 1)
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
    from steersman.config.dump import dump_recipe
    from steersman.config.load import load_recipe

    recipe: Any = load_recipe(recipe_class, path, overrides)
    if "--print-config" in given:
        text = dump_recipe(recipe)
        if not _terminal().encodes(text):
            _red(f"--print-config: the recipe has characters that {sys.stdout.encoding}, the encoding of standard "
                 "output, has not; set PYTHONIOENCODING=utf-8")  # fmt: skip
            return 2
        print(text, end="")
        return 0
    if "--resume" in given and "run" in recipe_class.model_fields and not _is_rank():
        _say_if_new(Path(recipe.run.dir))
    summary = verb.start(name, recipe, resume="--resume" in given)
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


def _report(args: list[str]) -> int:
    if len(args) != 1 or args[0] in ("--help", "-h"):
        print(REPORT_HELP)
        return 0 if args and args[0] in ("--help", "-h") else 2
    from steersman.run.report.page import write_report

    print(write_report(Path(args[0])))
    return 0


def _load(place: str) -> Any:
    module, _, names = place.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


def _usage() -> str:
    rows = [(name, verb.help) for name, verb in VERBS.items()] + [("report", REPORT_HELP)]
    width = max(len(name) for name, _ in rows) + 2
    verbs = "\n".join(f"  {name:<{width}}{text}" for name, text in rows)
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

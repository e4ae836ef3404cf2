"""The table of verbs: each with its code, its recipe, its help and what may follow it on the command line.

A verb is a row of VERBS. Its module is named by text and imported when the verb is used, so that `steersman --help`
answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
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
            found = import_object(self.recipe)
            return found if isinstance(found, type) else found(path, overrides)

    @property
    def is_loaded(self) -> bool:
        """Whether the module of its recipes was imported, without which none can have been made."""
        return (self.base or self.recipe).partition(":")[0] in sys.modules

    def reads(self, recipe: Any) -> bool:
        """Whether the recipe is one of its own."""
        return isinstance(recipe, import_object(self.base or self.recipe))

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
                starter = "on_ray" if recipe.run.launcher == "ray" else "launch"
                start = import_object(f"steersman.distributed.{starter}:start")
                return start(name, recipe, recipe.run.devices, resume=resume)
            with launch.as_rank(recipe.parallel):
                return self.here(recipe, resume=resume)

    def here(self, recipe: Any, *, resume: bool = False) -> dict[str, Any]:
        """Runs the verb in this process, as one of its ranks where there are several."""
        run = import_object(self.run)
        return run(recipe, resume=resume) if self.resumes else run(recipe)

    def require_resumes(self, name: str) -> None:
        """Raises SteersmanError where the verb keeps no run to go on with."""
        if not self.resumes:
            from steersman.types import SteersmanError

            raise SteersmanError(
                f"{name}: --resume goes on with a run that was ended early, and {name} keeps none; leave it out"
            )


def import_object(place: str) -> Any:
    """What "module:name" names; further names after dots are attributes of it, or keys where it is a mapping."""
    module, _, names = place.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


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
        "a2po": "the log-ratio to the reference fitted to the optimal advantage",
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
    "report": Verb("steersman.verbs.report:run", "steersman.verbs.report:ReportRecipe",
                   "write report.html of a run folder anew: steersman report RUN", file_key="run", example="RUN",
                   resumes=False),
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

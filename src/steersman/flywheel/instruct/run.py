"""The verb: prompts in; instructions with checkable rules, and data that teaches to follow them, out.

Each instruction is a task of the data with some rules that can be kept together. A model answers; answers that break
a rule are mended by another one, rule by rule, and kept where all checks pass. What comes of it:

    sft.jsonl    prompt, completion: answers that keep every rule of their prompt, mended or as they were
    dpo.jsonl    prompt, chosen, rejected: the mended answer over the one that it was made of
    grpo.jsonl   prompt, instruction_id_list, kwargs: what the metric `ifeval` rewards
    held_out.jsonl   the same with kinds of rules that stand in none of the others

Source: arXiv 2404.15846 (complex instructions from answers mended constraint by constraint), with the checks of
arXiv 2311.07911. Departure: there a stronger model also judges whether a rule is kept; here programs do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from steersman.config.sections import Section, key_names
from steersman.data import DataConfig, Query, Row, keys_of_other_kinds, wraps
from steersman.data.examples import Content, Message, user
from steersman.flywheel.instruct.compose import REWRITE, compose, instruction_text, keeps_the_rules, split_kinds
from steersman.flywheel.instruct.constraints import KINDS, again
from steersman.flywheel.instruct.correct import Draft, correct
from steersman.flywheel.players import Player, load_queries
from steersman.judge.config import EndpointConfig, LocalConfig
from steersman.judge.prompts import fill
from steersman.judge.writer import Writer, WriterConfig
from steersman.model import load_tokenizer
from steersman.recipe.sections import LEARNED_ONLY, TRAINED_ONLY, ModelConfig, RolloutConfig
from steersman.run.files.ledger import Ledger, Rows
from steersman.run.run_config import STEPS_ONLY, RunConfig
from steersman.run.seed import sub_seed
from steersman.types import Stats


class RulesConfig(Section):
    """Which rules an instruction has."""

    least: int = Field(default=1, ge=1, description="rules of an instruction, at least")
    most: int = Field(default=3, ge=1, description="rules of an instruction, at most")
    kinds: list[str] = Field(
        default_factory=list, description=f"kinds of rules, by IFEval's names; empty: all {len(KINDS)}"
    )
    held_out: list[str] = Field(default_factory=list, description="kinds that stand in held-out instructions alone")
    kept: int | None = Field(
        default=None, ge=1,
        description="an answer that keeps so many of its rules answers the instruction without those that it breaks "
        "(arXiv 2302.05206); null: answers keep all of their rules",
    )  # fmt: skip

    @model_validator(mode="after")
    def _fits(self) -> RulesConfig:
        for name, count in (("least", self.least), ("kept", self.kept or 1)):
            if count > self.most:
                raise ValueError(f"{name} ({count}) is above most ({self.most})")
        return self


class InstructRecipe(Section):
    """Instructions with rules that programs check, and answers that keep them."""

    data: DataConfig
    model: ModelConfig
    corrector: WriterConfig | None = Field(
        default=None,
        description="the model that mends answers, better a stronger one; null: only what passes is kept",
    )
    rules: RulesConfig = RulesConfig()
    rephrase: bool = Field(
        default=False, description="let the corrector say each instruction in its own words; kept if no rule is lost"
    )
    tries: int = Field(default=2, ge=1, description="failed rewrites of an answer before it is given up")
    rollout: RolloutConfig = Field(
        default=RolloutConfig(prompts=64, samples=1, max_new_tokens=256),
        description="prompts: how many instructions are made, held_out: how many of held-out kinds",
    )
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return keys_of_other_kinds("query") | key_names(
            model=TRAINED_ONLY,
            run=STEPS_ONLY,
            rollout=LEARNED_ONLY,
            data=("cut", "max_length", "mix", "on_too_long", "shuffle"),
        )

    @classmethod
    def dependent_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A corrector may write as much as the model whose answers it writes anew."""
        corrector, rollout = given.get("corrector"), given.get("rollout")
        own = rollout.get("max_new_tokens") if isinstance(rollout, dict) else None
        length = cls.model_fields["rollout"].default.max_new_tokens if own is None else own
        if not isinstance(corrector, dict) or not isinstance(length, int):
            return {}
        kinds = {"endpoint": EndpointConfig, "local": LocalConfig}
        return {
            "corrector": {
                name: {"max_tokens": max(length, kind.model_fields["max_tokens"].default)}
                for name, kind in kinds.items()
                if isinstance(corrector.get(name), dict)
            }
        }

    @model_validator(mode="after")
    def _fits(self) -> InstructRecipe:
        if self.rephrase and self.corrector is None:
            raise ValueError("rephrase: the corrector says the instructions anew; give one")
        return self


def run(recipe: InstructRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Leaves the files in the run folder, and returns the summary."""
    with Ledger("instruct", recipe, resume=resume, rounds=0) as ledger:
        train, held = split_kinds(recipe.rules.kinds, recipe.rules.held_out)
        tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
        tasks, _ = load_queries(recipe.data, 0, wrap=False)
        writer = None
        if recipe.corrector is not None:
            writer = Writer(recipe.corrector, ledger.path, stopping=lambda: bool(ledger.signal))
        about = {"made_from": recipe.data.path, "rules": recipe.rules.model_dump(exclude={"kept"})}
        asked = ledger.table(
            "instructions", lambda: _instructions(recipe, tasks, train, recipe.rollout.prompts, "train"), **about
        )
        stats: Stats = {"data/instructions": len(asked)}
        if recipe.rephrase:
            assert writer is not None
            asked = ledger.table("rephrased", lambda: _rephrased(asked, writer), by=writer.describe())
            stats["rephrased"] = sum(r["rephrased"] for r in asked) / len(asked)
        wrap = wraps(tokenizer, recipe.data)
        answers = _answers(ledger, recipe, asked, wrap)
        by = "nobody" if writer is None else writer.describe()
        mended = ledger.table("mended", lambda: _mended(recipe, asked, answers, writer), by=by)
        stats |= _write(ledger, recipe, asked, mended, wrap)
        if writer is not None:
            stats |= writer.stats()
            if writer.warning():
                ledger.log.note(writer.warning(), style="yellow")
        if held and recipe.rollout.held_out:
            count = recipe.rollout.held_out
            rows = ledger.table(
                "held-out-instructions", lambda: _instructions(recipe, tasks, held, count, "held out")
            )
            ledger.table("held_out", lambda: [_rewarded(r, wrap) for r in rows])
            stats["data/held_out"] = len(rows)
        ledger.finish_round(0, stats, [_shown(asked[r["index"]], r) for r in mended[:40]])
        if not stats["data/sft"]:
            ledger.log.note(
                "no answer keeps its rules: take a stronger model, a corrector, fewer rules or rules.kept"
            )
        files = {name: str(ledger.path / f"{name}.jsonl") for name in ("sft", "dpo", "grpo")}
        return ledger.summary({"data": files, **stats})
    return ledger.summary({})


def _instructions(
    recipe: InstructRecipe, tasks: Sequence[Query], kinds: Sequence[str], count: int, what: str
) -> Rows:
    """So many tasks, the same ones again where there are fewer, each with rules of its own."""
    rules, out = recipe.rules, []
    order = random.Random(sub_seed(recipe.run.seed, "tasks", what))
    places: list[int] = []
    for i in range(count):
        places = places or order.sample(range(len(tasks)), len(tasks))
        before, task = _task(tasks[places.pop()].prompt)
        rng = random.Random(sub_seed(recipe.run.seed, "rules", what, i))
        most = min(rules.most, len(kinds))
        made = compose(kinds, rng.randint(min(rules.least, most), most), rng)
        row = {"index": i, "task": task, "prompt": instruction_text(task, made, rng)}
        out.append(row | {"before": before, "rules": [c.row() for c in made]})
    return out


def _task(prompt: Content) -> tuple[list[Message], str]:
    """The turns before what the user asks last, and that."""
    if isinstance(prompt, str):
        return [], prompt
    *before, last = prompt
    return before, str(last["content"])


def _conversation(row: dict[str, Any], text: str, wrap: bool) -> Content:
    """What a model gets to read for an instruction of the row that is worded so."""
    before = row.get("before") or []
    return [*before, *user(text)] if wrap or before else text


def _rephrased(asked: Rows, writer: Writer) -> Rows:
    """The instructions in the writer's words, where these still have everything that the rules name."""
    told = writer.write([fill(REWRITE, {"instruction": r["prompt"]}) for r in asked])
    out = []
    for row, text in zip(asked, told, strict=True):
        fine = text is not None and keeps_the_rules(text, [again(c) for c in row["rules"]])
        out.append({**row, "prompt": text.strip() if fine and text else row["prompt"], "rephrased": fine})
    return out


def _answers(ledger: Ledger, recipe: InstructRecipe, asked: Rows, wrap: bool) -> Rows:
    """Table: what the model says to each instruction."""
    queries = [
        Query(_conversation(r, r["prompt"], wrap), Row(r, "instructions.jsonl", r["index"] + 1)) for r in asked
    ]
    made_from = ledger.sources("rephrased" if recipe.rephrase else "instructions")
    with Player(recipe.model, recipe.run, ledger.device) as player:
        return player.answers(
            ledger, "answers", queries, range(len(queries)),
            recipe.data.model_copy(update={"wrap_in_chat": False, "on_too_long": "drop"}), recipe.rollout,
            n=recipe.rollout.samples, seed=(recipe.run.seed, 0), made_from=made_from,
        )  # fmt: skip


def _mended(recipe: InstructRecipe, asked: Rows, answers: Rows, writer: Writer | None) -> Rows:
    """Every answer with what became of it, and the rules that it broke before and after."""
    drafts = []
    for row in answers:
        about = asked[row["index"]]
        drafts.append(Draft(about["prompt"], [again(c) for c in about["rules"]], row["completion"]))
    before = [[c.name for c in d.broken] for d in drafts]
    if writer is not None:
        correct(drafts, writer.write, recipe.tries)
    return [
        {
            "index": row["index"], "sample": row["sample"], "original": d.original, "answer": d.answer,
            "broken_before": was, "broken_after": [c.name for c in d.broken], "mended": d.mended,
            "rewrites": d.rewrites, "finish": row["finish"],
        }
        for row, d, was in zip(answers, drafts, before, strict=True)
    ]  # fmt: skip


def _write(ledger: Ledger, recipe: InstructRecipe, asked: Rows, mended: Rows, wrap: bool) -> Stats:
    """The files to train on, and what they hold."""
    made_from = ledger.sources("mended")
    taught = [made for r in mended if (made := _taught(recipe, asked[r["index"]], r)) is not None]
    sft = ledger.table(
        "sft",
        lambda: [
            {"prompt": _conversation(asked[r["index"]], text, wrap), "completion": r["answer"],
             "corrected": bool(r["mended"]), "rules": rules}
            for text, rules, r in taught
        ],
        made_from=made_from,
    )  # fmt: skip
    dpo = ledger.table(
        "dpo",
        lambda: [
            {"prompt": _conversation(asked[r["index"]], text, wrap), "chosen": r["answer"], "rejected": r["original"]}
            for text, _, r in taught
            if r["mended"] and r["original"].strip()
        ],
        made_from=made_from,
    )
    ledger.table("grpo", lambda: [_rewarded(r, wrap) for r in asked])
    rules = sum(len(asked[r["index"]]["rules"]) for r in mended)
    broken = [sum(len(r[f"broken_{when}"]) for r in mended) for when in ("before", "after")]
    worst = Counter(name for r in mended for name in r["broken_after"])
    stats: Stats = {
        "data/answers": len(mended), "data/sft": len(sft), "data/dpo": len(dpo),
        "kept/before": 1 - broken[0] / max(rules, 1), "kept/after": 1 - broken[1] / max(rules, 1),
        "whole/before": sum(not r["broken_before"] for r in mended) / max(len(mended), 1),
        "whole/after": sum(not r["broken_after"] for r in mended) / max(len(mended), 1),
        "rewrites": sum(r["rewrites"] for r in mended),
    }  # fmt: skip
    return stats | {f"broken/{name}": float(count) for name, count in worst.most_common(5)}


def _taught(
    recipe: InstructRecipe, asked: dict[str, Any], row: dict[str, Any]
) -> tuple[str, int, dict[str, Any]] | None:
    """The instruction that an answer keeps whole, its number of rules, and the answer; None where too few are kept.

    A mended answer kept more rules than the one that it was made of, so it is the better one of the pair here too.
    """
    if row["finish"] == "length" and not row["mended"]:
        return None  # the limit's cut is no end to be learned; of what was written anew only whole texts were taken
    rules = [c for c in asked["rules"] if c["name"] not in row["broken_after"]]
    if len(rules) == len(asked["rules"]):
        return asked["prompt"], len(rules), row
    if recipe.rules.kept is None or len(rules) < recipe.rules.kept:
        return None
    rng = random.Random(sub_seed(recipe.run.seed, "without the broken", row["index"], row["sample"]))
    return instruction_text(asked["task"], [again(c) for c in rules], rng), len(rules), row


def _rewarded(row: dict[str, Any], wrap: bool) -> dict[str, Any]:
    """A row for the reward {metric: ifeval}; keyword settings as IFEval's own data have them."""
    names, kwargs = [c["name"] for c in row["rules"]], [c["kwargs"] for c in row["rules"]]
    prompt = _conversation(row, row["prompt"], wrap)
    return {"prompt": prompt, "instruction_id_list": names, "kwargs": kwargs}


def _shown(asked: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    kept = 1 - len(row["broken_after"]) / max(len(asked["rules"]), 1)
    return {"index": row["index"], "prompt": asked["prompt"], "completion": row["answer"], "reward": {"rules": kept}}

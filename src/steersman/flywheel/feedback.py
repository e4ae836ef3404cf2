"""`steersman feedback`: user turns that praise or complain become labelled examples for SFT and KTO.

Source: learning from naturally occurring feedback, arXiv 2407.10944. A praised answer is a thumb up (KTO) and a
demonstration (SFT); a complaint, correction, request for clarification or repeated question is a thumb down.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.config.sections import Section, key_names
from steersman.data import ROWS_TO_EXAMPLES, ROWS_TO_TOKENS, BadRows, DataConfig, Row, RowError, section_rows
from steersman.flywheel.conversations import Exchange, exchanges
from steersman.flywheel.reactions import DOWN, Down, category
from steersman.flywheel.reading import Reading, read, revise
from steersman.flywheel.sections import refuse_idle_stages
from steersman.flywheel.stages import PLACE, WORDS, require_stage, trained_by
from steersman.judge import JudgeConfig, open_judge
from steersman.judge.cache import key_of
from steersman.judge.scored import as_text
from steersman.judge.writer import Writer, WriterConfig
from steersman.objectives.feedback import KTOConfig
from steersman.recipe.sections import ModelConfig, adapter_defaults
from steersman.run.files.ledger import Ledger, Rows
from steersman.run.run_config import RunConfig
from steersman.statistics.agreement import cohen_kappa
from steersman.train.offline import PackedOfflineConfig
from steersman.types import Stats, SteersmanError
from steersman.update.optimizer import OptimizerConfig
from steersman.verbs import feedback as thumbs
from steersman.verbs import sft
from steersman.verbs.sft import SFTConfig, SFTRecipe

MOOD = """A user talks with an assistant. Judge from the user's newest turn alone how pleased the user is with the
assistant's answer before it: {high} praises or thanks for it, {low} complains, corrects it or asks again, a number in
the middle says nothing about it. {rubric}

<conversation {code}>
{prompt}
</conversation {code}>

<newest turn {code}>
{answer}
</newest turn {code}>

End with the number in double brackets, such as [[{low}]].
Grade:"""


HANDED_ON = ("append_eos", "held_out", "max_length", "max_prompt_tokens")
"""Keys of `data` that the verbs in `then` get."""


class KTOStage(Section):
    """Training on thumbs."""

    loss: KTOConfig = KTOConfig()
    train: PackedOfflineConfig = PackedOfflineConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, warmup=0.1, schedule="linear")


class SFTStage(Section):
    """Training on praised answers."""

    train: SFTConfig = SFTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class FeedbackRecipe(Section):
    """Labelled examples out of conversations, and, where asked for, a model trained on them."""

    data: DataConfig
    judge: JudgeConfig | None = Field(
        default=None,
        description="judge that grades each user turn by how pleased the user is, from 1 to 5; null: built-in "
        "patterns of words",
    )
    reader: WriterConfig | None = Field(
        default=None,
        description="instead of judge: a model that names the kind of each turn's reaction, and the words that "
        "show it",
    )
    revise: bool = Field(
        default=False,
        description="let the reader write the answer that a user who complained should have got: revised.jsonl",
    )
    no_prompt: Literal["count", "stop"] = Field(
        default="count",
        description="feedback on an answer that follows no user's turn. count: leave it out and count it; stop: "
        "end with an error",
    )
    down: list[Down] = Field(
        default=list(DOWN),
        description="with rules or a reader: reactions that count as a thumb down (complaint, correction, "
        "clarification, rephrase)",
    )
    model: ModelConfig | None = Field(default=None, description="the model to train; null: only make the data")
    then: list[Literal["sft", "kto"]] = Field(
        default=[], description="training stages, in order: sft, kto. Each starts from the model of the one before"
    )
    sft: SFTStage = SFTStage()
    kto: KTOStage = KTOStage()
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return key_names(data={*ROWS_TO_EXAMPLES, *ROWS_TO_TOKENS} - set(HANDED_ON))

    @model_validator(mode="after")
    def _fits(self) -> FeedbackRecipe:
        if bool(self.then) != (self.model is not None):
            raise ValueError("`model` and `then` belong together: give both to train, or neither to make data only")
        if self.judge is not None and self.reader is not None:
            raise ValueError("`judge` grades the users' turns and `reader` reads them: give one of them")
        if self.revise and self.reader is None:
            raise ValueError("revise: the reader writes the revised answers; give one")
        refuse_idle_stages({"sft": self.sft, "kto": self.kto}, self.then, "then")
        for name in self.then:
            require_stage(name, _VERBS[name][1], self.stage(name, PLACE, PLACE), self.run, WORDS[name])
        return self

    @classmethod
    def dependent_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        return adapter_defaults(given, *trained_by(_VERBS, given.get("then")))

    def stage(self, name: Literal["sft", "kto"], path: str, file: str) -> dict[str, Any]:
        """What a verb in `then` gets: the model at `path`, and the file of its examples."""
        assert self.model is not None
        limits = self.data.model_dump(include=set(HANDED_ON))
        values = {
            "model": self.model.model_dump() | {"path": path, "merge": True},
            "data": {"path": file, "assistant_turns": "last", "on_too_long": "drop"} | limits,
        }
        if name == "kto":
            return values | {"train": self.kto.train, "optimizer": self.kto.optimizer, "loss": self.kto.loss}
        return values | {"train": self.sft.train, "optimizer": self.sft.optimizer}


_VERBS = {"sft": (sft.run, SFTRecipe), "kto": (thumbs.run, thumbs.RECIPES["kto"])}
"""What trains on each kind of examples: the verb, and its recipe."""


def run(recipe: FeedbackRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Leaves reactions.jsonl, kto.jsonl and sft.jsonl, trains what the recipe asks for, returns the summary."""
    with Ledger("feedback", recipe, resume=resume, rounds=0) as ledger:
        writer = None
        if recipe.reader is not None:
            writer = Writer(recipe.reader, ledger.path, stopping=lambda: bool(ledger.signal))
        reactions = ledger.table("reactions", lambda: _reactions(ledger, recipe, writer), **_about(recipe))
        labelled = [r for r in reactions if r["label"] is not None]
        if not labelled:
            raise SteersmanError(f"{recipe.data.path}: none of {len(reactions)} user turns praises or complains")
        made_from = ledger.sources("reactions")
        kto = ledger.table("kto", lambda: labelled, made_from=made_from)
        praised = [{k: r[k] for k in ("prompt", "completion", "file", "row")} for r in labelled if r["label"]]
        ledger.table("sft", lambda: praised, made_from=made_from)
        seen = Counter(r["category"] for r in reactions)
        stats: Stats = {f"reactions/{name}": seen[name] for name in sorted(seen)}
        stats |= {"data/exchanges": len(reactions), "data/kto": len(kto), "data/sft": len(praised)}
        if writer is not None:
            stats |= _agreement(reactions)
            if recipe.revise:
                revised = ledger.table("revised", lambda: _revised(labelled, writer), by=writer.describe())
                stats["data/revised"] = len(revised)
            stats |= writer.stats()
            if writer.warning():
                ledger.log.note(writer.warning(), style="yellow")
        ledger.finish_round(0, stats, [_shown(i, r) for i, r in enumerate(labelled[:40])])
        told: dict[str, Any] = {
            "data": {"kto": str(ledger.path / "kto.jsonl"), "sft": str(ledger.path / "sft.jsonl")}
        }
        if recipe.revise:
            told["data"]["revised"] = str(ledger.path / "revised.jsonl")
        told |= stats | {"yield": len(kto) / max(len(reactions), 1)}
        return ledger.summary(told | _train(ledger, recipe))
    return ledger.summary({})


def _train(ledger: Ledger, recipe: FeedbackRecipe) -> dict[str, Any]:
    """Runs the asked-for verbs, each on the model of the one before."""
    if recipe.model is None:
        return {}
    path = recipe.model.path
    folders = {"sft": "1-sft", "kto": "2-kto"}
    for name in recipe.then:
        run, kind = _VERBS[name]
        values = recipe.stage(name, path, str(ledger.path / f"{name}.jsonl"))
        path = ledger.stage(folders[name], run, kind.model_validate, values)["model"]
    return {"model": path}


def _reactions(ledger: Ledger, recipe: FeedbackRecipe, writer: Writer | None) -> Rows:
    """Every exchange once, with its category and label (True, False, or null where it says nothing)."""
    left_out = BadRows(recipe.data.on_bad_row)
    found = list(_exchanges(recipe, left_out))
    if left_out.counts:
        ledger.log.note(left_out.sentence)
    if not found:
        raise SteersmanError(f"{recipe.data.path}: no answer with a user's turn after it ({left_out.sentence})")
    spans = [""] * len(found)
    if writer is not None:
        readings = [r or Reading("unread") for r in read(found, writer)]
        told, spans = [(r.kind, _label(r.kind, recipe)) for r in readings], [r.span for r in readings]
    elif recipe.judge is None:
        told = [(c, _label(c, recipe)) for c in (category(e.reaction, e.last_question) for e in found)]
    else:
        told = _judged(ledger, recipe.judge, found)
    return [
        {
            "prompt": e.prompt, "completion": e.answer, "label": label, "category": name, "reaction": e.reaction,
            **({"span": span, "rules": category(e.reaction, e.last_question)} if writer is not None else {}),
            "file": e.row.file, "row": e.row.number,
        }
        for e, (name, label), span in zip(found, told, spans, strict=True)
    ]  # fmt: skip


def _agreement(reactions: Rows) -> Stats:
    """How often the reader and the rules say the same: of kinds, and of thumbs (up, down, neither). No kappa where
    both say one and the same throughout."""
    read = [r for r in reactions if r["category"] != "unread"]
    if not read:
        raise SteersmanError(
            "reader: no reply told a kind and the words that say so; is it a model that follows instructions?"
        )
    thumb = {"praise": "up", "mixed": "neither", "none": "neither"}
    kinds = [(r["category"], r["rules"]) for r in read]
    thumbs = [(thumb.get(a, "down"), thumb.get(b, "down")) for a, b in kinds]
    out: Stats = {"reader/unread": 1 - len(read) / len(reactions)}
    for name, pairs in (("kinds", kinds), ("thumbs", thumbs)):
        out[f"agreement/{name}"] = sum(a == b for a, b in pairs) / len(pairs)
        kappa = cohen_kappa(*zip(*pairs, strict=True))
        if math.isfinite(kappa):
            out[f"kappa/{name}"] = kappa
    return out


def _revised(labelled: Rows, writer: Writer) -> Rows:
    """For each answer with a thumb down, the one that the user should have got: demonstrations and pairs."""
    bad = [r for r in labelled if r["label"] is False]
    found = [Exchange(r["prompt"], r["completion"], r["reaction"], Row({}, r["file"], r["row"])) for r in bad]
    return [
        {"prompt": r["prompt"], "chosen": text, "rejected": r["completion"], "file": r["file"], "row": r["row"]}
        for r, text in zip(bad, revise(found, writer), strict=True)
        if text is not None
    ]


def _exchanges(recipe: FeedbackRecipe, left_out: BadRows) -> Iterator[Exchange]:
    seen: set[str] = set()
    data = recipe.data
    for count, row in enumerate(section_rows(data, left_out)):
        if data.limit is not None and count >= data.limit:
            return
        row.data = row.data | {name: row.data[own] for name, own in data.columns.items() if own in row.data}
        row.names = row.names | data.columns
        try:
            for e in exchanges(row):
                key = key_of(e.prompt, e.answer, e.reaction)
                if key in seen:
                    continue
                seen.add(key)
                if not e.last_question.strip() or not e.answer.strip():
                    _without_prompt(recipe, e, left_out)
                    continue
                yield e
        except RowError as error:
            if error.reason == "feedback without prompt":
                raise
            left_out.add(error)


def _without_prompt(recipe: FeedbackRecipe, e: Exchange, left_out: BadRows) -> None:
    what = "an empty answer" if e.last_question.strip() else "an answer that no user's turn precedes"
    error = e.row.fault("feedback without prompt", f"the feedback {e.reaction[:60]!r} is on {what}", "prompt")
    if recipe.no_prompt == "stop":
        raise RowError(error.reason, f"{error} (no_prompt: count leaves such feedback out and counts it)")
    left_out.note(error.reason, str(error))


def _label(name: str, recipe: FeedbackRecipe) -> bool | None:
    return True if name == "praise" else False if name in recipe.down else None


def _judged(ledger: Ledger, config: JudgeConfig, found: list[Exchange]) -> list[tuple[str, bool | None]]:
    """Praise from the second highest grade on, complaint up to the second lowest."""
    settings = {"scale": (1, 5), "grade": config.grade or MOOD}
    if not config.reward:
        config = config.model_copy(update=settings)
    judge = open_judge(config, ledger.path, stopping=lambda: bool(ledger.signal), device=ledger.device)
    items = [(as_text([*e.prompt, {"role": "assistant", "content": e.answer}]), e.reaction) for e in found]
    low, high = (-0.5, 0.5) if config.reward else (2, 4)
    out: list[tuple[str, bool | None]] = []
    for grade in judge.grade(items):
        if grade is None:
            out.append(("unjudged", None))
        else:
            out.append(
                ("praise", True) if grade >= high else ("complaint", False) if grade <= low else ("none", None)
            )
    return out


def _about(recipe: FeedbackRecipe) -> dict[str, Any]:
    by = recipe.judge or recipe.reader
    judge = "rules" if by is None else by.model_dump(mode="json", exclude_defaults=True)
    return {"judge": judge, "made_from": recipe.data.path, "down": list(recipe.down)}


def _shown(index: int, row: dict[str, Any]) -> dict[str, Any]:
    said = f"{row['prompt'][-1]['content']}\n→ {row['completion']}"
    return {"index": index, "prompt": said, "completion": row["reaction"], "reward": {"label": float(row["label"])}}

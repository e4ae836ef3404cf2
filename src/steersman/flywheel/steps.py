"""`steersman step-labels`: how often an answer still ends well from each of its steps, for process reward models.

    label of step k = share of n continuations from steps 1..k whose whole answer scores at least `right_from`

The model answers the prompts, its answers are cut into steps, and it continues from the end of every step; a reward
says of whole answers whether they are right. `steersman reward` trains on the rows (`steps`, `labels`).

An answer stays as the model wrote it: continuations begin behind the answer's own tokens, up to the one that ends the
step (`model.step_ends`, as in training and in rollouts), and the row's steps, joined by the separator, are its text.

Source: arXiv 2312.08935, section 3.3 (soft estimation). Departures: the last step's label is the answer's own score,
for nothing is left to continue; the model that continues is the one that answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import Field, model_validator

from steersman.config.sections import Section, key_names
from steersman.data import DataConfig, Query, encode_prompts, layout
from steersman.data.needed import with_needed
from steersman.data.rows import BadRows
from steersman.flywheel.players import Player, load_queries
from steersman.judge.scored import Scorer
from steersman.model import context_length, step_ends
from steersman.recipe.sections import LEARNED_ONLY, PLACE_ONLY, TRAINED_ONLY, ModelConfig, RolloutConfig
from steersman.reward import RewardPart
from steersman.rollout.text import Texts
from steersman.run.files.ledger import Ledger, Rows
from steersman.run.run_config import STEPS_ONLY, RunConfig
from steersman.run.seed import sub_seed
from steersman.setup.generators import piece_size
from steersman.types import Progress, Prompt, Stats, SteersmanError

MUCH = 0.05
"""The share cut by the length limit above which a run says so."""


class StepLabelsRecipe(Section):
    """Labels of steps by Monte-Carlo rollouts."""

    model: ModelConfig
    data: DataConfig
    reward: dict[str, RewardPart] = Field(description="name: reward of whole answers, summed; rows' columns reach it")
    right_from: float = Field(default=1.0, description="an answer is right from this score on")
    continuations: int = Field(default=8, ge=1, description="rollouts from the end of each step")
    most_steps: int = Field(default=16, ge=1, description="answers of more steps are left out")
    rollout: RolloutConfig = Field(
        default=RolloutConfig(prompts=64, samples=1, max_new_tokens=256), description="prompts, and answers to each"
    )
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return key_names(
            model=TRAINED_ONLY,
            run=STEPS_ONLY,
            rollout=("held_out", *LEARNED_ONLY),
            data=("max_length", "mix", "score_range", "shuffle", "ties"),
        )

    @model_validator(mode="after")
    def _fits(self) -> StepLabelsRecipe:
        if not self.reward:
            raise ValueError("reward: no reward given; for instance {right: {builtin: math_answer, columns: ...}}")
        return self


def run(recipe: StepLabelsRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Leaves steps.jsonl in the run folder, and returns the summary."""
    with Ledger("step-labels", recipe, resume=resume, rounds=0) as ledger:
        queries, _ = load_queries(recipe.data, 0, wrap=False)
        scorer, bad = Scorer(recipe.reward, ledger.device), BadRows(recipe.data.on_bad_row)
        queries = with_needed(queries, scorer.needs, bad)[: recipe.rollout.prompts]
        if bad.counts:
            ledger.log.note(bad.sentence)
        player = Player(recipe.model, recipe.run, ledger.device)
        ledger.at_end(player.release)
        maker = Maker(recipe, player, queries, scorer)
        answers = ledger.parts(
            "answers", len(maker.prompts), maker.answers,
            size=piece_size(recipe.rollout, recipe.rollout.samples), model=ledger.model(recipe.model.path),
            separator=recipe.data.step_separator,
            rollout=recipe.rollout.model_dump(exclude={"held_out", *PLACE_ONLY}),
        )  # fmt: skip
        whole = [a for a in answers if not a.get("cut")]
        if not whole:
            raise SteersmanError(
                f"the length limit cut every answer, and such answers are left out; raise rollout.max_new_tokens "
                f"({recipe.rollout.max_new_tokens}) and choose another --run.dir, since this one keeps the answers"
            )
        kept = [a for a in whole if 1 <= len(a["steps"]) <= min(recipe.most_steps, len(maker.ends(a)))]
        left_out = {
            "cut": len(answers) - len(whole),
            "without_steps": sum(not a["steps"] for a in whole),
            "too_many_steps": sum(len(a["steps"]) > recipe.most_steps for a in whole),
        }
        left_out["steps_within_a_token"] = len(answers) - len(kept) - sum(left_out.values())
        steps = sum(len(a["steps"]) for a in kept)
        rows = ledger.parts(
            "steps", len(kept), lambda span, progress: maker.label_steps(kept, span, progress),
            size=piece_size(recipe.rollout, recipe.continuations * max(1, steps // max(1, len(kept)))),
            made_from=ledger.sources("answers"), continuations=recipe.continuations, right_from=recipe.right_from,
            left_out=left_out,
        )  # fmt: skip
        if not rows:
            raise SteersmanError(
                f"none of {len(whole)} whole answers has 1 to {recipe.most_steps} steps; is data.step_separator "
                f"{recipe.data.step_separator!r} what stands between them?"
            )
        labels = [x for r in rows for x in r["labels"]]
        right = sum(r["labels"][-1] for r in rows) / len(rows)
        continued = (len(labels) - len(rows)) * recipe.continuations
        cut = sum(r["continuations_cut"] for r in rows)
        stats: Stats = {"data/sampled": len(answers), "data/answers": len(whole), "data/rows": len(rows)}
        stats["steps"] = len(labels) / len(rows)
        stats |= {f"data/{name}": count for name, count in left_out.items()}
        stats |= {"label/mean": sum(labels) / len(labels), "right": right}
        stats["continuations/cut"] = cut / continued if continued else 0.0
        _warn(ledger, recipe, left_out["cut"] / len(answers), stats["continuations/cut"])
        ledger.finish_round(0, stats, [_shown(i, r) for i, r in enumerate(rows[:40])])
        return ledger.summary({"data": str(ledger.path / "steps.jsonl"), **stats})
    return ledger.summary({})


class Maker:
    """Answers, and continuations from the steps of answers."""

    def __init__(self, recipe: StepLabelsRecipe, player: Player, queries: Sequence[Query], scorer: Scorer) -> None:
        self.recipe, self.player, self.queries, self.scorer = recipe, player, queries, scorer
        self.separator, self.seed = recipe.data.step_separator, recipe.run.seed

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The questions as the model reads them."""
        policy, data = self.player.policy, self.recipe.data
        if policy.model.config.is_encoder_decoder:
            raise SteersmanError(
                f"model.path {self.recipe.model.path}: an encoder-decoder begins every answer anew and can not "
                "continue one from a step; choose a decoder-only model"
            )
        context, new = context_length(policy.model), self.recipe.rollout.max_new_tokens
        return encode_prompts(self.queries, layout(policy, data), data, context, new)[0]

    @cached_property
    def asked(self) -> dict[int, Prompt]:
        """The prompts by the place of their query."""
        return {prompt.index: prompt for prompt in self.prompts}

    def answers(self, span: range, progress: Progress) -> Rows:
        """Every answer to some of the prompts with its steps; those that the length limit cut say so."""
        rollout, prompts = self.recipe.rollout, self.prompts[span.start : span.stop]
        samples = self.player.engine(rollout).generate(
            prompts, rollout.sampling(), n=rollout.samples, seed=(self.seed, 0), progress=progress
        )
        return [
            {"index": s.prompt.index, "text": s.text, "steps": steps_of(s.text, self.separator), "ids": s.ids}
            | ({} if s.terminated else {"cut": True})
            for s in samples
        ]

    def ends(self, answer: dict[str, Any]) -> list[int]:
        """The places of the answer's tokens that end a step."""
        return step_ends(self.player.policy.tokenizer, answer["ids"], self.separator)

    def label_steps(self, answers: Rows, span: range, progress: Progress) -> Rows:
        """The rows of some of the answers: their steps, and the share of continuations from each that end well; how
        many of them the length limit cut, which are scored as far as they went."""
        begun = [prompt for place in span for prompt in self._begun(answers[place], place)]
        continued: dict[int, list[str]] = {place: [] for place in span}
        cut = dict.fromkeys(span, 0)
        texts = {prompt.index: prompt.text for prompt in begun}
        engine, sampling = self.player.engine(self.recipe.rollout), self.recipe.rollout.sampling()
        seed = sub_seed(self.seed, "continuations")
        n = self.recipe.continuations
        for sample in engine.generate(begun, sampling, n=n, seed=(seed,), progress=progress) if begun else []:
            place = sample.prompt.index // self.recipe.most_steps
            continued[place].append(texts[sample.prompt.index] + sample.text)
            cut[place] += not sample.terminated
        return [self._row(answers[place], continued[place]) | {"continuations_cut": cut[place]} for place in span]

    def _begun(self, answer: dict[str, Any], place: int) -> list[Prompt]:
        """The answer up to the end of each step but the last, to be continued: the ids behind its question's, and as
        text what they add to it."""
        asked = self.asked[answer["index"]].ids
        texts = Texts(self.player.policy.tokenizer, self.recipe.rollout.sampling().stop)
        ids = [answer["ids"][: end + 1] for end in self.ends(answer)[: len(answer["steps"]) - 1]]
        context, new = context_length(self.player.policy.model), self.recipe.rollout.max_new_tokens
        longest = len(asked) + max(map(len, ids), default=0)
        if ids and context is not None and longest + new > context:
            raise self.queries[answer["index"]].row.fault(
                "too long", f"a continuation needs {longest + new} tokens of a context of {context}"
            )
        first = place * self.recipe.most_steps  # the random stream is the step's, whatever it is sampled with
        return [Prompt([*asked, *x], texts.response(asked, x), index=first + k) for k, x in enumerate(ids)]

    def _row(self, answer: dict[str, Any], continued: list[str]) -> dict[str, Any]:
        """Labels from the texts of an answer's continuations, those of the first step first."""
        query, n = self.queries[answer["index"]], self.recipe.continuations
        whole = [answer["text"], *continued]
        scores = self.scorer([query.prompt] * len(whole), whole, [query.columns] * len(whole))["total"]
        last, *right = [float(s >= self.recipe.right_from) for s in scores]
        labels = [sum(right[k : k + n]) / n for k in range(0, len(right), n)]
        return {"prompt": query.prompt, "steps": answer["steps"], "labels": [*labels, last]}


def steps_of(text: str, separator: str) -> list[str]:
    """The steps of an answer, which joined by the separator are the answer: a piece without visible text stays with
    the step before it, or with the first. None where no text is visible."""
    steps: list[list[str]] = []
    seen = False
    for piece in text.split(separator):
        if not steps or (seen and piece.strip()):
            steps.append([])
        steps[-1].append(piece)
        seen = seen or bool(piece.strip())
    return [separator.join(pieces) for pieces in steps] if seen else []


def _warn(ledger: Ledger, recipe: StepLabelsRecipe, answers: float, continuations: float) -> None:
    """Says what the length limit does to the labels, where it does much."""
    limit = f"rollout.max_new_tokens, {recipe.rollout.max_new_tokens}"
    if answers > MUCH:
        ledger.log.note(
            f"the length limit ({limit}) cut {answers:.0%} of the answers, which are left out: the data are the "
            "short answers; raise it",
            style="yellow",
        )
    if continuations > MUCH:
        ledger.log.note(
            f"the length limit ({limit}) cut {continuations:.0%} of the continuations, which are scored as far as "
            "they went, so that early steps of long answers look worse than they are; raise it",
            style="yellow",
        )


def _shown(index: int, row: dict[str, Any]) -> dict[str, Any]:
    said = "\n".join(f"[{label:.2f}] {step}" for step, label in zip(row["steps"], row["labels"], strict=True))
    return {"index": index, "prompt": str(row["prompt"]), "completion": said, "reward": {"right": row["labels"][-1]}}

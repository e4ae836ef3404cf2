"""`steersman generate`: responses of a model to prompts, to read or to train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from steersman.atomic import check_places, write_atomic
from steersman.config.sections import Section, key_names
from steersman.data import DataConfig, Query, Row, encode_prompts, keys_of_other_kinds, layout, prompts, wrapped
from steersman.data.needed import whole_rows
from steersman.data.rows import BadRows
from steersman.distributed.parallel import WithoutZeroConfig
from steersman.distributed.ranks import ranks
from steersman.guards.terminal import printable, say
from steersman.model import context_length, whole_weights
from steersman.recipe.sections import LEARNED_ONLY, PLACE_ONLY, TRAINED_ONLY, ModelConfig, RolloutConfig
from steersman.run.console import new_console
from steersman.run.files.inputs import fingerprints
from steersman.run.files.pieces import Pieces, Rows
from steersman.run.progress import ProgressLine
from steersman.run.run_config import KEPT_ONLY, ManyRunConfig, device_of
from steersman.setup.generators import open_generator, piece_size, sample_on_all_ranks
from steersman.setup.models import policy_from
from steersman.types import Needs, Progress, Prompt, SteersmanError


class GenerateRecipe(Section):
    """Sample responses from a model; prompts come from `prompts` or from `data`."""

    model: ModelConfig
    prompts: list[str] = Field(default_factory=list, description="prompts as text")
    data: DataConfig | None = None
    wrap_in_chat: bool | None = Field(
        default=None,
        description="put `prompts` into the chat template as a user's turn; null: where the model has a template of "
        "its own (rows of `data`: data.wrap_in_chat)",
    )
    rollout: RolloutConfig = RolloutConfig(held_out=0)
    greedy: bool = Field(default=False, description="the likeliest token each time")
    out: str | None = Field(default=None, description="JSONL file to write; null prints the responses")
    run: ManyRunConfig = ManyRunConfig()
    parallel: WithoutZeroConfig = WithoutZeroConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return keys_of_other_kinds("query") | key_names(
            model=TRAINED_ONLY,
            run=KEPT_ONLY,
            rollout=("prompts", "held_out", *LEARNED_ONLY),
            data=("max_length", "shuffle", "mix"),
        )

    @model_validator(mode="after")
    def _has_prompts(self) -> GenerateRecipe:
        if bool(self.prompts) == (self.data is not None):
            raise ValueError("give either prompts, such as --prompts '[\"Once upon a time\"]', or the section data")
        if self.data is not None and self.wrap_in_chat is not None:
            raise ValueError("wrap_in_chat is about prompts; for rows of data set data.wrap_in_chat")
        return self


def run(recipe: GenerateRecipe) -> dict[str, Any]:
    """Samples, and prints the responses or writes them as JSONL rows of prompt, completion, finish and logp.

    A row keeps the other columns of its prompt's data row, so that metrics can read them.
    """
    ranks().from_main(lambda: check_places(recipe.out), "the file of responses")
    made = responses(recipe, recipe.out)
    if recipe.out is None:
        _show(made)
    elif ranks().main:
        say(f"{len(made)} responses written to {recipe.out}")
    return {"samples": len(made), "out": recipe.out}


@dataclass(slots=True)
class Response:
    """A sampled response: `logp` is the sum of its tokens' log-probabilities, in nats."""

    prompt: Prompt
    text: str
    finish: str
    logp: float
    tokens: int


def responses(
    recipe: GenerateRecipe, out: str | None, needs: Needs = lambda rows: [], section: str = ""
) -> list[Response]:
    """The responses that the recipe asks for, those of the first prompt first, written to the file `out` if given.

    `needs` says what the rows must have, `section` where the recipe stands in another one ("generate.").
    Until that is whole they are kept as they come in the folder `<out>.parts`; the same call goes on from there.
    Raises SteersmanError where that folder is of another recipe, data or model.
    """
    device, rollout = device_of(recipe.run), recipe.rollout
    policy = policy_from(recipe.model, recipe.run, device, trainable=False)
    config = recipe.data or DataConfig(path="--prompts", wrap_in_chat=recipe.wrap_in_chat)
    rows = (
        prompts(config).train
        if recipe.data
        else [Query(p, Row({}, "prompts", i + 1)) for i, p in enumerate(recipe.prompts)]
    )
    bad = BadRows(config.on_bad_row, f"{section}data.on_bad_row")
    read = [replace(q.row, data={**q.row.data, "prompt": q.prompt}) for q in rows]
    rows = [rows[place] for place in ranks().from_main(lambda: whole_rows(read, needs, bad), "the rows")]
    if bad.counts:
        say(bad.sentence)
    laid = layout(policy, config)
    if config.wrap_in_chat is None and wrapped(rows, laid):
        off = "data.wrap_in_chat" if recipe.data else "wrap_in_chat"
        say(f"plain-text prompts become a user's turn in the model's chat template (off: --{section}{off} false)")
    asked, _, _ = encode_prompts(rows, laid, config, context_length(policy.model), rollout.max_new_tokens)
    sampling = rollout.sampling().as_greedy() if recipe.greedy else rollout.sampling()
    with closing(open_generator(rollout, policy)) as engine, whole_weights(policy):
        engine.prepare(max(len(p.ids) for p in asked) + rollout.max_new_tokens)
        pieces = None if out is None else _begun(recipe, out, len(asked))

        def make(span: range, progress: Progress) -> Rows:
            samples = sample_on_all_ranks(
                engine, asked[span.start : span.stop], sampling, n=rollout.samples, seed=recipe.run.seed,
                progress=progress,
            )  # fmt: skip
            return [
                {"text": s.text, "finish": s.finish, "logp": round(sum(s.logp), 4), "tokens": len(s.ids)}
                for s in samples
            ]

        line = ProgressLine("responses to prompts", say if ranks().main else _say_nothing)
        if pieces is None:
            found = make(range(len(asked)), line)
        else:
            found = _filled(pieces, piece_size(rollout, rollout.samples), make, line)
    for prompt in asked:
        prompt.row = {**prompt.row, "prompt": rows[prompt.index].prompt}
    made = [Response(asked[i // rollout.samples], **row) for i, row in enumerate(found)]
    if out is not None and pieces is not None:
        ranks().from_main(lambda: write_atomic(Path(out), "".join(map(_line, made))), "the responses")
        pieces.remove()
    return made


def _begun(recipe: GenerateRecipe, out: str, count: int) -> Pieces:
    """The responses so far. Raises SteersmanError where they were made otherwise than this recipe would."""
    folder = Path(f"{out}.parts")
    place = {key: RolloutConfig.model_fields[key].get_default(call_default_factory=True) for key in PLACE_ONLY}
    same = recipe.model_copy(
        update={
            "out": None, "rollout": recipe.rollout.model_copy(update=place), "parallel": WithoutZeroConfig(),
            "run": ManyRunConfig(seed=recipe.run.seed),
        }
    )  # fmt: skip
    read = ranks().from_main(lambda: fingerprints(same, folder), "the digests of what is read")
    pieces = Pieces(folder, count, {"recipe": same.model_dump(mode="json"), "read": read})
    if changes := pieces.changes():
        raise SteersmanError(
            f"{folder}: it keeps the responses of a call that was ended early, and this call is another one "
            f"({'; '.join(changes)}). Repeat that call, which goes on from there; or remove the folder, or name "
            "another file than --out"
        )
    pieces.begin()
    return pieces


def _filled(pieces: Pieces, size: int, make: Callable[[range, Progress], Rows], line: ProgressLine) -> Rows:
    """All responses; the user is told that earlier ones are used, and where those so far are when it ends early."""
    left = sum(len(span) for span in pieces.missing(size))
    if left < pieces.count and ranks().main:
        say(f"{pieces.count - left} of {pieces.count} prompts were answered before; going on from there")
    try:
        return pieces.fill(size, make, line)
    except (KeyboardInterrupt, SteersmanError) as ended:
        if ranks().main and (isinstance(ended, KeyboardInterrupt) or any(pieces.folder.glob("*.jsonl"))):
            say(f"the responses so far are in {pieces.folder}; the same command goes on from there")
        raise


def _say_nothing(_line: str) -> None:
    """What ranks other than 0 say of how far they are."""


def _line(response: Response) -> str:
    row = {
        **response.prompt.row, "completion": response.text, "finish": response.finish, "logp": response.logp,
        "tokens": response.tokens,
    }  # fmt: skip
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _show(made: list[Response]) -> None:
    console = new_console()
    for response in made:
        console.print(printable(response.prompt.text), style="dim", end="", soft_wrap=True)
        console.print(printable(response.text), soft_wrap=True)
        console.print()

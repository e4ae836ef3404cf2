"""The recipe's data section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from steersman.config.sections import Section, key_names
from steersman.data.encoding import check_encoding

ROWS_TO_TOKENS = (
    "allow_special_tokens", "append_eos", "assistant_turns", "cut", "max_length", "max_prompt_tokens", "on_too_long",
    "wrap_in_chat",
)  # fmt: skip
"""Keys of `data` that say how examples become tokens."""
ROWS_TO_EXAMPLES = (
    "completion_prefix", "held_out", "held_out_files", "json_columns", "judgements", "mix", "opening_words",
    "prompt_template", "rank_by", "score_range", "scores", "shuffle", "step_separator", "ties",
)  # fmt: skip
"""Keys of `data` that say which examples rows are, and how these are divided and ordered."""
OF_KINDS = {
    "opening_words": {"query"},
    "score_range": {"rating"},
    "step_separator": {"steps"},
    "ties": {"preference", "ranking", "triple"},
}
"""Keys of `data` that only some kinds of examples have (`shapes.Kind`)."""


def keys_of_other_kinds(*kinds: str) -> frozenset[str]:
    """Keys of `data` that say nothing about examples of these kinds."""
    return key_names(data=[key for key, own in OF_KINDS.items() if own.isdisjoint(kinds)])


class CountingConfig(Section):
    """Which judgements of a store count, and how much."""

    combine: Literal["raters", "each"] = Field(
        default="raters",
        description="raters: one row per item, with the share of the raters' votes as soft label; each: one row "
        "per judgement",
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="weight of a rater by pseudonym; 1 if not given, 0 leaves the rater out"
    )
    min_gold: float = Field(
        default=0.0, ge=0, le=1, description="leave out raters who got less than this share of gold items right"
    )
    queues: list[str] = Field(
        default_factory=list, description="only judgements of these queues (chat: those made in chats); empty: all"
    )

    @field_validator("weights")
    @classmethod
    def _no_negative(cls, value: dict[str, float]) -> dict[str, float]:
        if any(w < 0 for w in value.values()):
            raise ValueError("a weight is 0 or above")
        return value


class DataConfig(Section):
    """Which rows, how they are read, and how they become tokens."""

    path: str | list[str] = Field(
        description="file, folder, glob, list of these (jsonl, json, csv, tsv, parquet, txt; .gz of each), hub "
        "name, or store of judgements (sqlite:///FILE, postgresql://HOST/NAME)"
    )
    mix: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list,
        description="the share of each path among the examples, such as [3, 1]; empty: all rows once an epoch",
    )
    judgements: CountingConfig = Field(
        default=CountingConfig(), description="which judgements of a store count, and how much"
    )
    subset: str | None = Field(default=None, description="configuration of a hub data set")
    hub_split: str = Field(default="train", description="split of a hub data set")
    text_split: str = Field(
        default="auto", description="how .txt becomes rows: lines, blank (at blank lines), a separator line, or auto"
    )
    encoding: str | None = Field(
        default=None, description="encoding of the files, such as gb18030, big5, utf-16 or cp1252; null: UTF-8"
    )
    json_columns: list[str] = Field(
        default_factory=list, description="columns that hold JSON as text, such as messages in a CSV file"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="canonical column: your column, such as {prompt: question}"
    )
    prompt_template: str | None = Field(
        default=None, description='the prompt made from columns, such as "Question: {question}\\nAnswer:"'
    )
    completion_prefix: str = Field(default="", description='put before every plain-text answer, often " "')
    scores: list[str] = Field(default_factory=list, description="columns that hold ratings, one per attribute")
    rank_by: list[str] = Field(
        default_factory=list,
        description="the rows of one prompt become a ranking by this column, or the sum of these; higher is better",
    )
    step_separator: str = Field(default="\n", min_length=1, description="what stands between two steps of an answer")
    score_range: tuple[float, float] | None = Field(
        default=None, description="ratings outside [low, high] are bad rows"
    )
    opening_words: int | None = Field(
        default=None, ge=1, description="for rows of text alone, used as prompts: the first so many words of each"
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)] = Field(
        default=0, description="held-out rows, split by a hash of the prompt: a share below 1 or a count"
    )
    held_out_files: list[str] = Field(
        default_factory=list,
        description="files or globs of held-out rows; if `path` has these files too, they are not trained on",
    )
    limit: int | None = Field(
        default=None, ge=1, description="use only the first so many examples (of each path, with mix)"
    )
    shuffle: bool = Field(default=True, description="a new order every epoch; off: the order of the file")
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop", description="stop: end with an error at a bad row; skip: leave it out and count it"
    )
    ties: Literal["stop", "keep", "drop"] = Field(
        default="stop",
        description="a tied pair, or a ranking with repeated ranks. stop: it is a bad row; keep: it is used as a "
        "tie; drop: it is left out",
    )
    on_too_long: Literal["error", "drop", "truncate"] = Field(
        default="error",
        description="rows longer than the limits. error: stop; drop: leave the row out; truncate: cut it",
    )
    cut: Literal["auto", "left", "right"] = Field(
        default="auto",
        description="which end of a prompt `truncate` takes away; auto: the left one, or the right one of the source "
        "that an encoder reads",
    )
    max_prompt_tokens: int | None = Field(default=None, ge=1, description="longest prompt, in tokens")
    max_length: int | None = Field(
        default=None, ge=2, description="longest prompt + response, in tokens; the model's context if not given"
    )
    wrap_in_chat: bool | None = Field(
        default=None,
        description="put plain-text prompts into the chat template as a user's turn and their answers as the "
        "assistant's; null: where the model has a template of its own",
    )
    assistant_turns: Literal["all", "last"] = Field(
        default="all", description="assistant turns of a conversation that count in the loss: all, or only the last"
    )
    append_eos: bool = Field(
        default=True, description="end every answer with the end token, so that the end is learned"
    )
    allow_special_tokens: bool = Field(
        default=False, description="read special tokens written in the data's text as such; off: as ordinary text"
    )

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        return None if value is None else check_encoding(value)

    @model_validator(mode="after")
    def _mixable(self) -> DataConfig:
        if self.mix and (isinstance(self.path, str) or len(self.mix) != len(self.path)):
            paths = 1 if isinstance(self.path, str) else len(self.path)
            raise ValueError(f"mix has {len(self.mix)} shares, and path names {paths}; give a list of as many paths")
        if self.mix and not self.shuffle:
            raise ValueError("mix draws rows at random; remove shuffle: false")
        return self

"""Files -> rows -> recognised shape -> typed examples -> token ids -> `Tokens`."""

from steersman.data.batches import Batches
from steersman.data.collate import collate, collate_groups, collate_pairs
from steersman.data.config import ROWS_TO_EXAMPLES, ROWS_TO_TOKENS, DataConfig, keys_of_other_kinds
from steersman.data.describe import Summary, describe
from steersman.data.encode import Encoded, EncodedSet, TrainingSet, encode, encode_prompts, layout, wrapped, wraps
from steersman.data.examples import Demonstration, Feedback, Preference, Query, Ranking, Rating, Steps
from steersman.data.large import LargeDataConfig, Training, training
from steersman.data.load import (
    LOADERS,
    LoadedExamples,
    attributes,
    demonstrations,
    episode_rows,
    feedback,
    preferences,
    prompts,
    rankings,
    ratings,
    recognise_kind,
    section_rows,
    steps,
)
from steersman.data.mixing import Mixture, mixture
from steersman.data.read import read_rows
from steersman.data.rows import BadRows, Row, RowError
from steersman.data.streamed import Order, Streamed
from steersman.data.template import template_ends
from steersman.data.tokenize import Codec, Layout

__all__ = [
    "LOADERS",
    "ROWS_TO_EXAMPLES",
    "ROWS_TO_TOKENS",
    "BadRows",
    "Batches",
    "Codec",
    "DataConfig",
    "Demonstration",
    "Encoded",
    "EncodedSet",
    "Feedback",
    "LargeDataConfig",
    "Layout",
    "LoadedExamples",
    "Mixture",
    "Order",
    "Preference",
    "Query",
    "Ranking",
    "Rating",
    "Row",
    "RowError",
    "Steps",
    "Streamed",
    "Summary",
    "Training",
    "TrainingSet",
    "attributes",
    "collate",
    "collate_groups",
    "collate_pairs",
    "demonstrations",
    "describe",
    "encode",
    "encode_prompts",
    "episode_rows",
    "feedback",
    "keys_of_other_kinds",
    "layout",
    "mixture",
    "preferences",
    "prompts",
    "rankings",
    "ratings",
    "read_rows",
    "recognise_kind",
    "section_rows",
    "steps",
    "template_ends",
    "training",
    "wrapped",
    "wraps",
]  # fmt: skip

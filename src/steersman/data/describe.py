"""What a run says about its data before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from steersman.data.encode import COUNTED, Encoded, EncodedSet
from steersman.data.load import LoadedExamples
from steersman.data.template import template_ends
from steersman.data.tokenize import Layout


@dataclass(slots=True)
class Summary:
    """`lines` are sentences to print; `samples` are rendered examples as pieces (text, counts in the loss).

    `lengths` maps p50, p95 and max to tokens. `end_share` is the share of answers whose end token counts in
    the loss (1 is right: where it is less, the model does not learn to stop there), `loss_share` the share of
    all tokens that count. `dropped` rows were too long.
    """

    rows: int
    held_out: int
    dropped: int
    lengths: dict[str, int]
    end_share: float
    loss_share: float
    lines: list[str] = field(default_factory=list)
    samples: list[list[tuple[str, bool]]] = field(default_factory=list)


def describe(loaded: LoadedExamples, encoded: EncodedSet, laid: Layout, samples: int = 3) -> Summary:
    """The summary of a set that is ready to be trained on."""
    sequences = _all(encoded)
    lengths = np.array([len(e) for e in sequences])
    ends = set(template_ends(laid.codec.tokenizer))
    ended = sum(any(m and i in ends for i, m in zip(e.response, e.mask, strict=True)) for e in sequences)
    summary = Summary(
        rows=len(encoded.examples),
        held_out=len(loaded.held_out),
        dropped=encoded.dropped,
        lengths={
            "p50": int(np.percentile(lengths, 50)),
            "p95": int(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        end_share=ended / len(sequences),
        loss_share=sum(sum(e.mask) for e in sequences) / int(lengths.sum()),
    )
    summary.lines = _lines(summary, loaded, encoded, laid)
    step = max(1, len(encoded.groups) // samples)
    summary.samples = [spans(laid, g[0]) for g in encoded.groups[::step][:samples]]
    return summary


def spans(laid: Layout, e: Encoded) -> list[tuple[str, bool]]:
    """A sequence as text in pieces, special tokens shown, each with whether it counts in the loss. Of an
    encoder-decoder both sides are named."""
    if laid.joined:
        return _pieces(laid, e.prompt + e.response, [False] * len(e.prompt) + e.mask)
    source = laid.codec.tokenizer.decode(e.prompt, skip_special_tokens=False)
    return [(f"source: {source}\ntarget: ", False), *_pieces(laid, e.response, e.mask)]


def _pieces(laid: Layout, ids: list[int], counts: list[bool]) -> list[tuple[str, bool]]:
    cuts = [i for i in range(1, len(ids)) if counts[i] != counts[i - 1]]
    pieces: list[tuple[str, bool]] = []
    shown = ""
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        # decoding what precedes too keeps the spaces between pieces as they are
        whole = laid.codec.tokenizer.decode(ids[:end], skip_special_tokens=False)
        pieces.append((whole[len(shown) :], counts[begin]))
        shown = whole
    return pieces


def _lines(summary: Summary, loaded: LoadedExamples, encoded: EncodedSet, laid: Layout) -> list[str]:
    lengths = summary.lengths
    lines = [
        f"{summary.rows} examples, {summary.held_out} held out; {loaded.shape.sentence}",
        f"{lengths['p50']} tokens in the middle, {lengths['p95']} at the 95th percentile, {lengths['max']} at most; "
        f"{summary.loss_share:.0%} of them count in the loss",
    ]
    if not laid.joined:
        source, target = max(len(g[0].prompt) for g in encoded.groups), max(len(e.response) for e in _all(encoded))
        lines.append(
            f"the encoder reads the prompt, {source} tokens at most; the decoder writes the answer, {target} at most"
        )
    if _in_turns(encoded):
        lines.append(f"conversations are laid out by {laid.template.sentence}")
    if _wrapped(encoded, laid):
        lines.append(
            f"plain-text prompts become a user's turn, laid out by {laid.template.sentence} (off: data.wrap_in_chat "
            "false)"
        )
    if loaded.left_out.counts:
        lines.append(loaded.left_out.sentence)
    if loaded.left_out.nulls:
        lines.append(
            f"{loaded.left_out.nulls} nulls inside tool calls left out: the file has one schema for all rows, which "
            "gives each row the names of all others"
        )
    if summary.end_share < 1:
        lines.append(f"only {summary.end_share:.1%} of the answers have their end token in the loss")
    counts = {name: getattr(encoded, name) for name in COUNTED}
    return lines + count_lines(counts, len(encoded.groups), specials_read=laid.codec.allow_special_tokens)


def count_lines(counts: Mapping[str, int], rows: int, *, specials_read: bool) -> list[str]:
    """What is said of the `COUNTED` of a set of `rows` rows; `specials_read` is `data.allow_special_tokens`."""
    lines = []
    if counts["dropped"] or counts["cut"]:
        share = counts["cut"] / rows
        lines.append(f"too long: {counts['dropped']:,} left out, {counts['cut']:,} cut ({share:.1%})")
    if counts["equal"]:
        lines.append(f"{counts['equal']:,} pairs left out: their answers are the same tokens")
    if counts["special"]:
        how = (
            "as that token, since data.allow_special_tokens is true"
            if specials_read
            else "as ordinary text unless data.allow_special_tokens is true"
        )
        lines.append(f"{counts['special']:,} examples spell a special token; it is read {how}")
    if counts["open_prompts"]:
        lines.append(
            f"{counts['open_prompts']:,} prompts end in white space, which splits off a token that models know "
            "joined with the next word; end prompts without it and set data.completion_prefix"
        )
    return lines


def _all(encoded: EncodedSet) -> list[Encoded]:
    return [e for group in encoded.groups for e in group]


def _in_turns(encoded: EncodedSet) -> bool:
    prompts: Sequence = [e.prompt for e in encoded.examples]
    return any(not isinstance(p, str) for p in prompts)


def _wrapped(encoded: EncodedSet, laid: Layout) -> bool:
    """Whether any prompt was plain text that the template was put around; text alone has an empty one."""
    prompts: Sequence = [e.prompt for e in encoded.examples]
    return laid.wrap_in_chat and any(isinstance(p, str) and p for p in prompts)

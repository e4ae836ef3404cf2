"""Batches, collating and the held-out split: what decides which row meets the model when."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.data import (
    Batches,
    DataConfig,
    Demonstration,
    Encoded,
    Row,
    collate,
    collate_groups,
    collate_pairs,
    demonstrations,
    episode_rows,
    prompts,
)
from steersman.data.split import split
from steersman.types import SteersmanError

SIZES = st.integers(1, 60)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(0, 3), st.integers(0, 40), st.booleans(), st.booleans())
def test_a_resumed_run_sees_exactly_the_batches_that_were_left(size, batch, seed, stop, bucketed, shuffle):
    lengths = [(7 * i) % 13 for i in range(size)] if bucketed else None
    make = lambda: Batches(size, batch, seed, lengths, shuffle=shuffle)  # noqa: E731
    whole, broken = make().forever(), make()
    stream = broken.forever()
    for _ in range(stop):
        assert next(stream) == next(whole)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    stream = resumed.forever()
    for _ in range(3 * len(resumed)):
        assert next(stream) == next(whole)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(0, 200), st.integers(0, 5), st.booleans(), st.booleans())
def test_the_rows_of_the_first_batches_are_those_that_come(size, batch, count, gone, bucketed, drop_last):
    if drop_last and size < batch:
        return
    lengths = [(7 * i) % 13 for i in range(size)] if bucketed else None
    coming, asked = (Batches(size, batch, 2, lengths, drop_last=drop_last) for _ in range(2))
    order, stream = coming.forever(), asked.forever()
    for _ in range(gone):
        next(stream)
    assert asked.rows_of(count) == sorted({row for _ in range(count) for row in next(order)})


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.booleans())
def test_every_row_once_per_epoch(size, batch, bucketed):
    batches = Batches(size, batch, 1, [(5 * i) % 11 for i in range(size)] if bucketed else None)
    for _ in range(2):
        epoch = list(batches)
        assert sorted(i for b in epoch for i in b) == list(range(size))
        assert len(epoch) == len(batches)
        assert sorted(len(b) for b in epoch)[1:] == [batch] * (len(epoch) - 1)
    assert batches.epoch == 2


def test_order_depends_on_seed_and_epoch_only():
    a, b = Batches(50, 4, seed=1), Batches(50, 4, seed=1)
    assert a.order(3) == b.order(3) != a.order(4)
    assert a.order(0) != Batches(50, 4, seed=2).order(0)
    assert Batches(5, 2, shuffle=False).order(7) == [[0, 1], [2, 3], [4]]


def test_buckets_save_padding_and_stay_mixed():
    lengths = [(37 * i) % 101 + 1 for i in range(1000)]
    waste = lambda order: sum(len(b) * max(lengths[i] for i in b) for b in order) / sum(lengths)  # noqa: E731
    bucketed = Batches(1000, 8, 0, lengths).order(0)
    assert waste(bucketed) < 1.1 < 1.5 < waste(Batches(1000, 8, 0).order(0))
    means = [sum(lengths[i] for i in b) / len(b) for b in bucketed]
    assert max(means[:20]) > 70
    assert min(means[:20]) < 30


def test_batches_refuse_what_can_not_be():
    for size, batch in ((0, 4), (4, 0)):
        with pytest.raises(SteersmanError):
            Batches(size, batch)
    with pytest.raises(SteersmanError, match="do not fill one batch"):
        Batches(3, 4, drop_last=True)
    assert [len(b) for b in Batches(10, 4, drop_last=True)] == [4, 4]
    with pytest.raises(SteersmanError, match="size 10 -> 11"):
        Batches(11, 4).load_state_dict(Batches(10, 4).state_dict())


A, B, C = Encoded([1, 2], [3], [True]), Encoded([4], [5, 6, 7], [True, False, True]), Encoded([8], [9], [True])


def test_collate_pads_on_the_right():
    t = collate([A, B], pad_id=99)
    assert t.prompt.tolist() == [[1, 2], [4, 99]]
    assert t.prompt_length.tolist() == [2, 1]
    assert t.response.tolist() == [[3, 99, 99], [5, 6, 7]]
    assert t.response_length.tolist() == [1, 3]
    assert t.mask.tolist() == [[True, False, False], [True, False, True]]
    assert t.mask.dtype == torch.bool


def test_pairs_are_chosen_rows_then_rejected_rows():
    t = collate_pairs([[A, B], [C, A]])
    assert t.prompt_length.tolist() == [2, 1, 1, 2]
    assert [r[: int(n)] for r, n in zip(t.response.tolist(), t.response_length, strict=True)] == [
        [3],
        [9],
        [5, 6, 7],
        [3],
    ]
    t, group = collate_groups([[A, B, C], [C, A]])
    assert group.tolist() == [0, 0, 0, 1, 1]
    assert t.prompt[:, 0].tolist() == [1, 4, 8, 8, 1]


def demos(n: int, per_prompt: int = 2) -> list[Demonstration]:
    return [Demonstration(f"p{i // per_prompt}", f"c{i}", Row({}, "f", i)) for i in range(n)]


def test_a_prompt_is_never_on_both_sides_and_the_split_is_stable():
    for held_out in (0.2, 30):
        train, held = split(demos(200), held_out)
        assert len(train) + len(held) == 200
        assert not {e.prompt for e in train} & {e.prompt for e in held}
        again, held_again = split(demos(200)[::-1], held_out)
        assert {e.completion for e in held_again} == {e.completion for e in held}
        assert [e.completion for e in again] == [e.completion for e in train][::-1]
    assert len(split(demos(200), 30)[1]) == 30
    assert 20 <= len(split(demos(200), 0.2)[1]) <= 60
    # rows that come later move nothing
    _, before = split(demos(200), 0.2)
    _, after = split(demos(300), 0.2)
    assert {e.prompt for e in before} <= {e.prompt for e in after}


def test_a_split_that_leaves_one_side_empty():
    with pytest.raises(SteersmanError, match="no training example"):
        split(demos(4), 4)
    with pytest.raises(SteersmanError, match="no held-out example"):
        split(demos(2), 0.0001)
    assert split(demos(4), 0) == (demos(4), [])


def test_held_out_files(tmp_path):
    def write(name, prompts):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": p, "completion": "c"}) + "\n" for p in prompts))

    (tmp_path / "train").mkdir()
    write("train/a.jsonl", ["1", "2", "3"])
    write("train/b.jsonl", ["3", "4"])
    write("apart.jsonl", ["2", "5"])

    def load(*held):
        loaded = demonstrations(DataConfig(path=str(tmp_path / "train"), held_out_files=list(held)))
        return [e.prompt for e in loaded.train], [e.prompt for e in loaded.held_out], loaded.left_out.counts

    assert load("b.*") == (["1", "2"], ["3", "4"], {"prompt is held out": 1})
    assert load(str(tmp_path / "apart.jsonl")) == (["1", "3", "3", "4"], ["2", "5"], {"prompt is held out": 1})
    with pytest.raises(SteersmanError, match="no such file"):
        load("nowhere.jsonl")


def test_rows_of_an_environment_are_held_out_row_by_row(tmp_path):
    """Where every episode has the same system prompt, what differs are the other columns."""
    rows = [{"prompt": "Customer: ", "wish": f"table for {n}"} for n in (1, 2, 3, 3)]
    for name, table in (("train", rows), ("held", rows[2:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    path = str(tmp_path / "train.jsonl")

    def wishes(**more):
        loaded = episode_rows(DataConfig(path=path, **more))
        return [[e.columns["wish"][-1] for e in side] for side in (loaded.train, loaded.held_out)]

    assert wishes(held_out_files=[str(tmp_path / "held.jsonl")]) == [["1", "2"], ["3"]]
    train, held = wishes(held_out=1)
    assert sorted(train + held) == ["1", "2", "3", "3"]
    assert held
    assert not set(train) & set(held)
    with pytest.raises(SteersmanError, match="no training example"):  # one prompt is one question to a single answer
        prompts(DataConfig(path=path, held_out=1))

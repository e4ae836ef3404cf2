"""Sets that are mixed: their shares, their own orders, and a resumed run."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from letter_models import save_mini, write_jsonl

from steersman.data import Batches, DataConfig, demonstrations, encode, layout, mixture
from steersman.types import SteersmanError


@pytest.fixture
def three(tmp_path):
    """20 pairs of prompt and completion, 6 conversations, and 5 preference pairs."""
    plain = [{"prompt": f"a{'?' * i}", "completion": "ok"} for i in range(20)]
    turns = [
        {"messages": [{"role": "user", "content": "c" * (i + 1)}, {"role": "assistant", "content": "b"}]}
        for i in range(6)
    ]
    pairs = [{"prompt": f"d{'!' * i}", "chosen": "e", "rejected": "f"} for i in range(5)]
    named = {"plain": plain, "turns": turns, "pairs": pairs}
    return [str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in named.items()]


def mixed(paths, mix, **more):
    config = DataConfig(path=paths, mix=mix, **more)
    loaded = demonstrations(config)
    mix = mixture(config, [e.row.part for e in loaded.train])
    assert mix is not None
    return loaded, mix


def test_each_set_has_its_share_and_no_row_comes_twice_before_all_came_once(three):
    loaded, mix = mixed(three, [1, 2, 1])
    size = len(loaded.train)
    assert (size, mix.counts) == (31, (8, 15, 8))
    batches = Batches(size, 4, seed=3, mix=mix)
    assert len(batches) == 8
    seen = [i for epoch in range(10) for batch in batches.order(epoch) for i in batch]
    parts = Counter(loaded.train[i].row.part for i in seen)
    assert parts == {0: 80, 1: 150, 2: 80}
    for part, own in enumerate(mix.members):
        counts = Counter(i for i in seen if loaded.train[i].row.part == part)
        assert set(counts) == set(own.tolist())
        assert max(counts.values()) - min(counts.values()) <= 1
    assert batches.order(0) != Batches(size, 4, seed=4, mix=mix).order(0)


def test_sets_of_different_shapes_are_recognised_apart_and_said(three):
    loaded, _ = mixed(three, [1, 1, 1])
    assert [type(e.prompt) for e in (loaded.train[0], loaded.train[20])] == [str, list]
    assert loaded.shape.sentence.count(".jsonl: ") == 3
    assert "the chosen answers" in loaded.shape.sentence


def test_limit_and_held_out_rows_are_of_every_set(three):
    loaded, _ = mixed(three, [1, 1, 1], limit=5)
    assert Counter(e.row.part for e in loaded.train) == {0: 5, 1: 5, 2: 5}
    loaded, mix = mixed(three, [1, 1, 1], held_out=0.3)
    assert {e.row.part for e in loaded.held_out} == {0, 1, 2}
    assert sum(mix.counts) == len(loaded.train)


def test_lengths_are_still_bucketed_and_the_state_names_the_mixture(three):
    loaded, mix = mixed(three, [1, 1, 2])
    lengths = [len(str(e.prompt)) for e in loaded.train]
    make = lambda: Batches(31, 4, 1, lengths, mix=mix)  # noqa: E731
    whole, broken = make().forever(), make()
    stream = broken.forever()
    for _ in range(11):
        assert next(stream) == next(whole)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    stream = resumed.forever()
    assert [next(stream) for _ in range(20)] == [next(whole) for _ in range(20)]
    with pytest.raises(SteersmanError, match=r"mix \[8, 8, 15\] -> \[\]"):
        Batches(31, 4, 1, lengths).load_state_dict(broken.state_dict())
    before = {k: v for k, v in Batches(31, 4, 1, lengths).state_dict().items() if k != "mix"}
    Batches(31, 4, 1, lengths).load_state_dict(before)


def test_what_can_not_be_mixed_is_refused(three):
    for words, message in (
        ({"path": three, "mix": [1, 2]}, "mix has 2 shares, and path names 3"),
        ({"path": three[0], "mix": [1]}, "path names 1"),
        ({"path": three, "mix": [1, 1, 0]}, "greater than 0"),
        ({"path": three, "mix": [1, 1, 1], "shuffle": False}, "remove shuffle: false"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(**words)
    with pytest.raises(SteersmanError, match=r"pairs.jsonl would never be read"):
        mixed(three, [100, 100, 1])


def test_a_set_that_is_too_long_altogether_is_named(three, tmp_path):
    config = DataConfig(path=three[::2], mix=[1, 1], max_length=12, on_too_long="drop")
    data = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a" * 20, "completion": "b"}] * 3)
    config = config.model_copy(update={"path": [three[0], str(data)]})
    from steersman.model import load_tokenizer

    tokenizer = load_tokenizer(save_mini(tmp_path / "mini"))
    encoded = encode(demonstrations(config).train, layout(tokenizer, config), config)
    with pytest.raises(SteersmanError, match=r"no row of .*long.jsonl is left"):
        mixture(config, encoded.parts)

"""Rows that are kept tokenised on disk, and rows that are read as a stream."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
from letter_models import WORDS, save_mini, write_jsonl

from steersman.atomic import locked
from steersman.data import LOADERS, Batches, LargeDataConfig, Order, encode, layout, stored, training
from steersman.data.labels import schema
from steersman.data.stored import CHUNK
from steersman.model import load_tokenizer
from steersman.statistics.reward_report import keys
from steersman.types import SteersmanError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_mini(tmp_path_factory.mktemp("mini")))


@pytest.fixture
def rows(tmp_path):
    data = [
        {"prompt": f"ask{'?' * (i % 40)}", "completion": WORDS[i % 12] + " a" * (i % 7)} for i in range(CHUNK + 90)
    ]
    return write_jsonl(tmp_path / "rows.jsonl", data)


def ready(config, tokenizer, kind="demonstration", context=70):
    return training(config, kind, layout(tokenizer, config), context=context, order=Order(4, 5))


def made(rows, **words):
    return LargeDataConfig.model_validate({"path": str(rows), **words})


def streamed(config, tokenizer, kind="demonstration"):
    stream = ready(config, tokenizer, kind).stream
    assert stream is not None
    return stream


def plain(data):
    return [[(e.prompt, e.response, e.mask) for e in group] for group in data.groups]


@pytest.mark.parametrize("held_out", [0, 0.25, 30])
def test_rows_on_disk_are_the_rows_in_memory(rows, tokenizer, tmp_path, held_out):
    kept = made(rows, cache=str(tmp_path / "cache"), held_out=held_out)
    memory = kept.model_copy(update={"cache": None})
    one, two = ready(memory, tokenizer), ready(kept, tokenizer)
    assert plain(one.train) == plain(two.train)
    assert (one.held_out is None) == (two.held_out is None) == (not held_out)
    assert one.held_out is None or plain(one.held_out) == plain(two.held_out)
    assert list(one.train.lengths) == list(two.train.lengths)
    assert one.summary.lengths == two.summary.lengths
    assert [s.rows for s in (one.summary, two.summary)] == [len(one.train.groups)] * 2
    assert one.summary.held_out == two.summary.held_out


@pytest.mark.parametrize(
    "words",
    [
        {"held_out": 20, "on_too_long": "drop", "max_length": 20},
        {"held_out": 0.3, "on_too_long": "drop", "max_length": 20},
        {"held_out": 20, "held_out_files": ["held.jsonl"]},
        {"held_out": 0.3, "held_out_files": ["held.jsonl"], "on_too_long": "truncate", "max_length": 20},
        {"held_out": 20, "held_out_files": ["held.jsonl"], "on_too_long": "drop", "max_length": 20},
        {"limit": 60, "held_out_files": ["held.jsonl"]},
        {"limit": 60, "held_out_files": ["held.jsonl"], "held_out": 10, "on_too_long": "drop", "max_length": 20},
        {"limit": 60, "held_out": 10, "on_too_long": "drop", "max_length": 20},
    ],
)
def test_what_is_left_out_and_held_out_does_not_depend_on_where_rows_are(tokenizer, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    data = [{"prompt": f"ask{i}", "completion": " a" * (20 if i % 2 else 2) + f" {i}"} for i in range(200)]
    data[150:] = [row | {"completion": ""} if i % 5 == 0 else row for i, row in enumerate(data[150:])]
    write_jsonl(tmp_path / "held.jsonl", [*data[:40], {"prompt": "none", "completion": " "}])
    rows = write_jsonl(tmp_path / "rows.jsonl", data)
    kept = made(rows, cache=str(tmp_path / "cache"), on_bad_row="skip", **words)
    ways = [kept.model_copy(update={"cache": None}), kept, kept]
    if "held_out" not in words:
        ways.append(kept.model_copy(update={"cache": None, "stream": True, "buffer": 200}))
    memory, *others = (ready(c, tokenizer) for c in ways)
    for other in others:
        assert memory.held_out is not None
        assert other.held_out is not None
        assert plain(memory.held_out) == plain(other.held_out)
        size = len(memory.train.groups)
        assert plain(memory.train) == plain(other.train)[:size]
        assert other.stream is not None or len(other.train.groups) == size
        assert other.summary.held_out == memory.summary.held_out
        if other.stream is None:
            assert (other.summary.rows, other.summary.dropped) == (memory.summary.rows, memory.summary.dropped)
            told = [[line for line in one.summary.lines if "left out" in line] for one in (memory, other)]
            assert told[0] == told[1]


def test_what_a_stream_leaves_out_of_its_first_pass_is_told(tokenizer, tmp_path):
    data = [{"prompt": f"ask{i}", "completion": f" a {i}" if i < 100 or i % 10 == 0 else ""} for i in range(1000)]
    rows = write_jsonl(tmp_path / "rows.jsonl", data)
    held = write_jsonl(tmp_path / "held.jsonl", [*data[:3], {"prompt": "b", "completion": ""}])
    left_out = "814 rows left out: 811 empty completion, 3 prompt is held out"
    for buffer in (400, 1200):  # more than one pass is read
        config = made(rows, stream=True, buffer=buffer, on_bad_row="skip", held_out_files=[str(held)])
        assert left_out in ready(config, tokenizer).summary.lines
    for more in ({}, {"cache": str(tmp_path / "cache")}):
        config = made(rows, on_bad_row="skip", held_out_files=[str(held)], **more)
        assert left_out in ready(config, tokenizer).summary.lines


def test_two_runs_that_begin_together_make_one_set(rows, tokenizer, tmp_path, monkeypatch):
    config = made(rows, cache=str(tmp_path / "cache"))
    writing, go_on, writes, write = threading.Event(), threading.Event(), [], stored._write

    def slow(folder, *about):
        writes.append(folder)
        (folder / "begun").write_text("")
        writing.set()
        assert go_on.wait(60)
        (folder / "begun").unlink()
        write(folder, *about)

    monkeypatch.setattr(stored, "_write", slow)
    with ThreadPoolExecutor(2) as runs:
        one = runs.submit(ready, config, tokenizer)
        assert writing.wait(60)
        two = runs.submit(ready, config, tokenizer)
        time.sleep(0.5)
        waited = not two.done()
        go_on.set()
        assert plain(one.result().train) == plain(two.result().train)
    assert waited
    assert len(writes) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_killed_run_locks_nobody_out_of_the_cache(rows, tokenizer, tmp_path):
    config = made(rows, cache=str(tmp_path / "cache"))
    [whole] = ready(config, tokenizer).content
    folder = tmp_path / "cache" / whole
    shutil.rmtree(folder)
    killed = (
        "import sys, time; from pathlib import Path; from steersman.atomic import begin_dir, locked\n"
        "with locked(Path(sys.argv[1])):\n    (begin_dir(Path(sys.argv[1])) / 'rows.arrow').touch()\n"
        "    print('in', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", killed, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        with ThreadPoolExecutor(1) as runs:
            run = runs.submit(ready, config, tokenizer)
            time.sleep(0.5)
            waited = not run.done()
            holder.kill()
            assert len(run.result(60).train.groups) == CHUNK + 90
        assert waited
    finally:
        holder.kill()
        holder.communicate()
    assert [p.name for p in folder.parent.iterdir()] == [whole]


def test_a_set_that_another_run_begins_to_use_is_not_removed(rows, tokenizer, tmp_path):
    config = made(rows, cache=str(tmp_path / "cache"))
    one, two = (ready(c, tokenizer).content[0] for c in (config, config.model_copy(update={"append_eos": False})))
    old, new = tmp_path / "cache" / one, tmp_path / "cache" / two
    with ThreadPoolExecutor(1) as runs:
        with locked(old):
            made_room = runs.submit(stored.make_room, [new], 1e-9)
            time.sleep(0.3)
            (old / "set.json").touch()
        made_room.result(60)
    assert sorted(p.name for p in old.parent.iterdir()) == sorted([one, two])
    stored.make_room([new], 1e-9)
    assert [p.name for p in old.parent.iterdir()] == [two]


def test_a_place_without_locks_is_refused(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    message = r"can not be locked \(No locks available\).*file system with locks"
    with pytest.raises(SteersmanError, match=message), locked(tmp_path / "set"):
        pass


ASKED = [f"ask{'?' * (i % 9)}" for i in range(40)]
TABLES = {
    "preference": [
        {"prompt": ask, "chosen": WORDS[i % 12], "rejected": f"no {i}", "margin": i}
        for i, ask in enumerate(ASKED)
    ],
    "feedback": [
        {"prompt": ask, "completion": f"{WORDS[i % 12]} {i}", "label": i % 3 > 0, "weight": 1 + i / 8}
        for i, ask in enumerate(ASKED)
    ],
    "ranking": [
        {"prompt": ask, "responses": [f"{w} {i}" for w in WORDS[: 2 + i % 3]], "scores": [3, 5, 4, 1][: 2 + i % 3]}
        for i, ask in enumerate(ASKED)
    ],
    "rating": [
        {"prompt": ask, "completion": f"a {i}", "scores": {"kind": i / 4, **({"true": 2.0} if i % 2 else {})}}
        for i, ask in enumerate(ASKED)
    ],
    "steps": [
        {"prompt": ask, "steps": ["a", f"b {i}"], "labels": [1, i / 40]} for i, ask in enumerate(ASKED)
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_of_example_is_on_disk_what_it_is_in_memory(kind, tokenizer, tmp_path):
    kept = made(write_jsonl(tmp_path / "rows.jsonl", TABLES[kind]), cache=str(tmp_path / "cache"), held_out=0.25)
    one, two = (ready(c, tokenizer, kind) for c in (kept.model_copy(update={"cache": None}), kept))
    for a, b in ((one.train, two.train), (one.held_out, two.held_out)):
        assert a is not None
        assert b is not None
        assert plain(a) == plain(b)
        for name in schema(kind):
            assert [getattr(e, name) for e in a.examples] == [getattr(e, name) for e in b.examples]
        same = [np.equal.outer(x, x) for x in (keys(a.examples), keys(b.examples))]
        assert (same[0] == same[1]).all()
    for name in {"margin", "weight", "label"} & set(schema(kind)):
        assert one.train.values(name).tolist() == two.train.values(name).tolist()
    assert one.train.lengths.tolist() == two.train.lengths.tolist()


def test_one_file_read_as_two_kinds_makes_two_sets(tokenizer, tmp_path):
    config = made(write_jsonl(tmp_path / "rows.jsonl", TABLES["preference"]), cache=str(tmp_path / "cache"))
    sizes = [len(ready(config, tokenizer, kind).train.groups) for kind in ("demonstration", "preference", "feedback")]
    assert sizes == [40, 40, 80]
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_rows_of_other_content_are_other_data(rows, tokenizer, tmp_path):
    config = made(rows, cache=str(tmp_path / "cache"))
    order = lambda: Batches(1114, 4, content=ready(config, tokenizer).content)  # noqa: E731
    state = order().state_dict()
    order().load_state_dict(state)
    rows.write_text(rows.read_text().replace("ask", "say", 1))
    with pytest.raises(SteersmanError, match="content"):
        order().load_state_dict(state)


def test_thumbs_that_all_say_the_same_are_refused_wherever_they_are(tokenizer, tmp_path):
    ups = [{"prompt": "a", "completion": f"b {i}", "label": True} for i in range(9)]
    file = write_jsonl(tmp_path / "rows.jsonl", ups)
    for more, where in (({"cache": str(tmp_path / "cache")}, "that fit"), ({"stream": True, "buffer": 8}, "buffer")):
        with pytest.raises(SteersmanError, match=f"{where}.*thumbs up and down are both needed"):
            ready(made(file, **more), tokenizer, "feedback")


def test_pairs_of_equal_answers_are_left_out_and_counted(tokenizer, tmp_path):
    table = [{"prompt": "ask", "chosen": "e" * 30 + "yes", "rejected": "e" * 30 + "no"}, *TABLES["preference"]]
    table[1] = table[1] | {"prompt": "ask "}
    file = write_jsonl(tmp_path / "rows.jsonl", table)
    cut = {"max_length": 20, "on_too_long": "truncate", "on_bad_row": "skip"}
    for more in ({}, {"cache": str(tmp_path / "cache")}, {"stream": True, "buffer": 40}):
        got = ready(made(file, **cut, **more), tokenizer, "preference")
        assert len(got.train.groups) == 40
        assert "1 pairs left out: their answers are the same tokens" in got.summary.lines
        assert "too long: 0 left out, 2 cut (5.0%)" in got.summary.lines
        assert any(line.startswith("1 prompts end in white space") for line in got.summary.lines)


def test_a_set_is_made_anew_where_content_or_settings_changed_and_not_else(rows, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    there = lambda: {p.name for p in cache.iterdir()}  # noqa: E731
    config = made(rows, cache=str(cache))
    ready(config, tokenizer)
    first = there()
    for same in ({"held_out": 0.2}, {"shuffle": False}, {"cache_gb": 3.0}):
        ready(config.model_copy(update=same), tokenizer)
    assert there() == first
    ready(config.model_copy(update={"append_eos": False}), tokenizer)
    ready(config, tokenizer, context=69)
    assert len(there()) == 3
    rows.write_text(rows.read_text().replace("ask", "say", 1))
    ready(config, tokenizer)
    assert len(there()) == 4


BOS = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    "change",
    [
        {"bos_token": "</s>"},
        {"pad_token": "<s>"},
        {"additional_special_tokens": ["<unk>"]},
        {"split_special_tokens": True},
    ],
)
def test_a_set_is_made_anew_where_the_tokenizer_is_another_in_whatever_it_says_of_itself(change, tmp_path):
    """What its configuration alone says decides rows too: a template writes special tokens by name."""
    model, cache = save_mini(tmp_path / "model"), tmp_path / "cache"
    data = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    config = made(write_jsonl(tmp_path / "rows.jsonl", data), cache=str(cache))
    file = model / "tokenizer_config.json"
    told = json.loads(file.read_text()) | {"chat_template": BOS}
    file.write_text(json.dumps(told))
    first = ready(config, load_tokenizer(model)).train.groups
    shutil.copytree(model, tmp_path / "copy")
    again = ready(config, load_tokenizer(tmp_path / "copy"))
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1
    file.write_text(json.dumps(told | change))
    tokenizer = load_tokenizer(model)
    changed = ready(config, tokenizer).train.groups
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 2
    if "bos_token" in change:
        assert [e.prompt[0] for e in (first[0][0], changed[0][0])] == [1, 2]
    assert plain(again.train) == [[(e.prompt, e.response, e.mask) for e in group] for group in first]


def test_the_sets_that_were_used_last_stay(rows, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    config = made(rows, cache=str(cache), cache_gb=1e-9)
    ready(config, tokenizer)
    ready(config.model_copy(update={"append_eos": False}), tokenizer)
    assert len(list(cache.iterdir())) == 1


def test_the_sets_of_a_mixture_are_all_kept_while_they_are_read(rows, tokenizer, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "so it is"}] * 40)
    config = made(rows, path=[str(rows), str(other)], mix=[1, 1], cache=str(tmp_path / "cache"), cache_gb=1e-9)
    got = ready(config, tokenizer)
    assert got.mix is not None
    assert got.mix.counts == (577, 577)
    assert {len(got.train.groups[int(own[0])][0].prompt) for own in got.mix.members} == {3, 1}


def test_a_bad_row_leaves_nothing_in_the_cache(rows, tokenizer, tmp_path):
    rows.write_text(rows.read_text() + "{broken")
    with pytest.raises(SteersmanError, match="line 1115"):
        ready(made(rows, cache=str(tmp_path / "cache")), tokenizer)
    assert not list((tmp_path / "cache").iterdir())


def test_a_stream_gives_every_row_once_a_pass_and_shuffles_in_its_buffer(rows, tokenizer):
    config = made(rows, stream=True, buffer=100)
    stream = streamed(config, tokenizer)
    memory = encode(LOADERS["demonstration"](config).train, layout(tokenizer, config), config, 70)
    size, order = len(memory.groups), stream.forever()
    batches = islice(order, size // 4)
    seen = [(e.prompt, e.response) for batch in batches for e in (stream.groups[i][0] for i in batch)]
    expected = [(g[0].prompt, g[0].response) for g in memory.groups[: size - size % 4]]
    assert seen != expected
    for begin in range(0, len(expected) - 100, 100):
        assert sorted(seen[begin : begin + 100]) == sorted(expected[begin : begin + 100])
    for _ in range(25):  # past the window that holds rows of two passes
        next(order)
    assert stream.state_dict()["sets"][0]["passes"] == 1


def test_a_resumed_stream_gives_the_batches_that_were_left(rows, tokenizer):
    config = made(rows, stream=True, buffer=64)
    make = lambda: streamed(config, tokenizer)  # noqa: E731
    texts = lambda stream, batches: [[stream.groups[i][0].response for i in batch] for batch in batches]  # noqa: E731
    whole, broken = make(), make()
    left = whole.forever()
    texts(whole, islice(left, 300))
    stream = broken.forever()
    for _ in range(300):
        next(stream)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    assert [texts(resumed, [b]) for b in islice(resumed.forever(), 40)] == [
        texts(whole, [b]) for b in islice(left, 40)
    ]
    other = config.model_copy(update={"buffer": 32})
    with pytest.raises(SteersmanError, match="size 64 -> 32"):
        streamed(other, tokenizer).load_state_dict(broken.state_dict())


def test_held_out_files_are_passed_over(rows, tokenizer, tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "ask", "completion": "no"}])
    for more in ({"stream": True, "buffer": 100}, {"cache": str(tmp_path / "cache")}):
        got = ready(made(rows, held_out_files=[str(held)], **more), tokenizer)
        assert got.held_out is not None
        [[held_row]] = got.held_out.groups
        assert all(group[0].prompt != held_row.prompt for group in got.train.groups)


def test_what_can_not_be_is_refused(rows, tokenizer, tmp_path):
    for words, message in (
        ({"stream": True, "cache": "c"}, "give one of both"),
        ({"stream": True, "held_out": 0.1}, "name held_out_files"),
        ({"cache": "c", "rank_by": ["x"]}, "rank_by gathers them"),
    ):
        with pytest.raises(ValueError, match=message):
            made(rows, **words)
    with pytest.raises(SteersmanError, match=r"is a file of data\.path"):
        ready(made(rows, stream=True, held_out_files=[str(rows)]), tokenizer)
    with pytest.raises(SteersmanError, match="no row of set 1 of 1 fits"):
        ready(made(rows, stream=True, max_length=2, on_too_long="drop"), tokenizer)

"""What holds of every metric: order and batch don't matter, holes are named, intervals cover, rewards fit."""

import math
import os
import re
import signal
import sys
import threading
import tracemalloc
from concurrent.futures import Future
from types import ModuleType

import numpy as np
import pytest
from metric_texts import REFERENCES, TEXTS, columns

from steersman.metrics import METRICS, Metric, MetricInput, Scorer, core, metric
from steersman.metrics.core import bootstrap, jackknife
from steersman.metrics.workers import Parallel
from steersman.types import SteersmanError

HEAVY = {"bertscore", "classifier", "perplexity", "meteor1.5", "spice"}
PLAIN = sorted(set(METRICS) - HEAVY)
SETTINGS = {"msttr": {"segment": 1}}


def given(name):
    """A metric with everything it needs, over texts that it can score."""
    made = metric(name, SETTINGS.get(name))
    texts = [t or "x" for t in TEXTS] if name == "msttr" else TEXTS
    return made, texts, columns(made.needs)


@pytest.mark.parametrize("name", PLAIN)
def test_a_texts_score_depends_on_its_own_row_only(name):
    made, texts, extra = given(name)
    assert isinstance(made, Metric)
    assert made.implementation
    if not made.per_sample:
        with pytest.raises(SteersmanError, match="can not be a reward"):
            made.score(texts, REFERENCES, **extra)
        return
    whole = made.score(texts, REFERENCES, **extra)
    assert len(whole) == len(texts)
    back = made.score(texts[::-1], REFERENCES[::-1], **{k: v[::-1] for k, v in extra.items()})
    assert back[::-1] == whole
    one = [
        made.score([t], [r], **{k: [v[i]] for k, v in extra.items()})[0]
        for i, (t, r) in enumerate(zip(texts, REFERENCES, strict=True))
    ]
    assert one == whole
    assert made.score([], [], **{k: [] for k in extra}) == []


@pytest.mark.parametrize("name", PLAIN)
def test_a_set_has_a_value_inside_its_interval(name):
    made, texts, extra = given(name)
    corpus = made.corpus(texts, REFERENCES, **extra)
    assert corpus.count == len(texts)
    assert corpus.low <= corpus.value <= corpus.high
    assert made.corpus(texts, REFERENCES, **extra) == corpus  # the draws are seeded
    with pytest.raises(SteersmanError, match="no text"):
        made.corpus([], [], **{k: [] for k in extra})


@pytest.mark.parametrize("name", sorted(n for n in METRICS if n not in HEAVY and "references" in metric(n).needs))
def test_holes_in_references_are_named(name):
    made, texts, extra = given(name)
    with pytest.raises(SteersmanError, match=f"'{re.escape(made.name)}'.*needs references"):
        made.corpus(texts, **extra)
    with pytest.raises(SteersmanError, match=f"{len(texts)} texts but 2 references"):
        made.corpus(texts, ["a", "b"], **extra)
    with pytest.raises(SteersmanError, match="row 3: the reference is missing"):
        made.corpus(texts, [*REFERENCES[:3], None, *REFERENCES[4:]], **extra)
    with pytest.raises(SteersmanError, match="row 2: the reference is an empty list"):
        made.corpus(texts, [*REFERENCES[:2], [], *REFERENCES[3:]], **extra)
    if not made.empty_reference:  # type: ignore[attr-defined]
        with pytest.raises(SteersmanError, match="row 1: a reference is empty"):
            made.corpus(texts, [REFERENCES[0], ["a", " "], *REFERENCES[2:]], **extra)
    with pytest.raises(SteersmanError, match="row 4: the text is missing"):
        made.corpus([*texts[:4], None, *texts[5:]], REFERENCES, **extra)


def test_scripts_that_a_tokeniser_can_not_read_are_named():
    for name in ("rougeL", "sacrebleu", "ter"):
        with pytest.raises(SteersmanError, match=f"'{name}', row 1.*猫"):
            metric(name).score(["a", "猫が好き"], ["a", "猫が好きだ"])
    readable = {
        "rougeL": {"tokens": "words"},
        "sacrebleu": {"tokenize": "char"},
        "chrf": {},
        "ter": {"asian": True, "normalized": True},
    }
    for name, settings in readable.items():
        score = metric(name, settings).score(["猫が好き"], ["猫が好きだ"])[0]
        assert 0 < score < 100


@pytest.mark.parametrize(
    ("name", "extra", "match"),
    [
        ("parent", {"table": [[]]}, "row 0: the table is empty"),
        ("parent", {"table": [[["a", "b"], ["a", "b", "c"]]]}, r"row 0.*\[2, 3\] parts"),
        ("parent", {"table": [[["a", "--"]]]}, "row 0: the table's values have no words"),
        ("concept_coverage", {"concepts": [[]]}, "row 0: the concepts are empty"),
        (
            "ifeval",
            {"instruction_id_list": [["no:such"]], "kwargs": [[{}]]},
            "row 0: there is no instruction 'no:such'",
        ),
        ("ifeval", {"instruction_id_list": [["startend:end_checker"]], "kwargs": [[{}]]}, "row 0.*'end_phrase'"),
        ("ifeval", {"instruction_id_list": [["a"]], "kwargs": [[]]}, "1 instructions with 0 kwargs"),
        ("cider", {}, "over one row"),
    ],
)
def test_bad_columns_are_named(name, extra, match):
    with pytest.raises(SteersmanError, match=match):
        metric(name).corpus(["a b"], ["a"], **extra)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("rouge", {}, "no metric 'rouge'. Did you mean rougeL"),
        ("zzz", {}, "no metric 'zzz'. There are: rouge1"),
        ("rougeL", {"stemm": True}, "no setting 'stemm'; it has: stem, tokens"),
        ("rougeL", {"stem": "perhaps"}, "stem is 'perhaps'"),
        ("perplexity", {}, "needs the setting path"),
        ("spice", {}, "can't be offered"),
        ("cider", {"corpus_file": 3}, "corpus_file is 3"),
        ("no_such_module:Thing", {}, "no module"),
        ("math:sqrt", {"x": 1}, "no setting 'x'|no metric|sqrt"),
    ],
)
def test_wrong_names_and_settings_are_named(name, settings, match):
    with pytest.raises(SteersmanError, match=match):
        metric(name, settings)


def test_a_corpus_file_that_is_wrong_is_named(tmp_path):
    with pytest.raises(SteersmanError, match="no file"):
        metric("cider", {"corpus_file": str(tmp_path / "x.jsonl")}).score(["a"], ["a"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"references": "a"}\n{"reference": "b"}\n')
    with pytest.raises(SteersmanError, match="line 2: give a JSON object with the column 'references'"):
        metric("cider", {"corpus_file": str(bad)}).score(["a"], ["a"])
    bad.write_text('{"references": "a"}\n')
    with pytest.raises(SteersmanError, match="need 2 or more"):
        metric("cider", {"corpus_file": str(bad)}).score(["a"], ["a"])


def test_a_corpus_file_may_hold_any_line_break(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"references": "a\u2028b"}\n{"references": "c\x85d"}\n', encoding="utf-8")
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"references": "a b"}\n{"references": "c d"}\n')
    of = [metric("cider", {"tokens": "space", "corpus_file": str(path)}) for path in (corpus, plain)]
    assert of[0].score(["a"], ["a b"]) == of[1].score(["a"], ["a b"])


OWN = '''
from dataclasses import dataclass
from steersman.metrics import Scorer

@dataclass
class Vowels(Scorer):
    """Share of vowels."""
    add: float = 0.0
    name = "vowels"

    @property
    def implementation(self):
        return "mine"

    def rows(self, batch):
        return [sum(c in "aeiou" for c in t) / len(t) + self.add if t else float("nan") for t in batch.texts]

class Nothing:
    pass
'''


def test_a_metric_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    own = metric(f"{path}:Vowels", {"add": 1})
    assert own.score(["ab", "zz"]) == [1.5, 1.0]
    assert own.corpus(["ab", "zz"]).value == 1.25
    with pytest.raises(SteersmanError, match="metric 'vowels', row 1: the score is nan"):
        own.score(["ab", ""])
    with pytest.raises(SteersmanError, match="Nothing, which is no metric"):
        metric(f"{path}:Nothing")


def test_too_few_scores_are_named():
    class Short(Scorer):
        name = "short"
        implementation = "mine"  # type: ignore[assignment]

        def rows(self, batch: MetricInput):
            return [1.0]

    with pytest.raises(SteersmanError, match="gave 1 scores for 2 texts"):
        Short().score(["a", "b"])


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        x = rng.normal(1.0, 2.0, size=40)
        found = bootstrap(np.stack([x, np.ones(40)], 1), lambda s: s[:, 0] / s[:, 1], "mean")
        inside += found.low <= 1.0 <= found.high
    assert 0.89 <= inside / 200 <= 0.98
    alone = bootstrap(np.array([[2.0, 1.0]]), lambda s: s[:, 0] / s[:, 1], "mean")
    assert alone.value == 2
    assert math.isnan(alone.low)


def test_a_bootstrap_draws_rows_with_replacement(monkeypatch):
    x, seen = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), []
    monkeypatch.setattr(core, "DRAWS", 30_000)
    bootstrap(x, lambda sums: seen.append(sums) or sums[:, 0], "counts")
    counts = seen[1]
    assert (counts[:, :3].sum(1) == 3).all()
    assert (counts[:, 3] == 3).all()
    for counted, chance in {(1, 1, 1): 6 / 27, (3, 0, 0): 1 / 27, (2, 1, 0): 3 / 27, (0, 1, 2): 3 / 27}.items():
        share = (counts[:, :3] == counted).all(1).mean()
        assert share == pytest.approx(chance, abs=4 * math.sqrt(chance / 30_000))


def test_a_bootstrap_needs_little_memory():
    """All the draws' counts at once would be 160 MB here."""
    x = np.ones((20_000, 2))
    tracemalloc.start()
    bootstrap(x, lambda sums: sums[:, 0] / sums[:, 1], "mean")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_jackknife_is_the_standard_error_of_a_mean():
    texts = [str(x) for x in np.random.default_rng(1).normal(size=20)]
    found = jackknife(MetricInput(texts), lambda part: float(np.mean([float(t) for t in part.texts])), "mean")
    se = np.std([float(t) for t in texts], ddof=1) / math.sqrt(20)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * se, rel=1e-4)


def test_workers_keep_the_order_and_name_rows():
    whole = metric("ter").score(TEXTS, REFERENCES)
    shared = Parallel("ter", {}, workers=2)
    assert shared.better == "lower"
    assert shared.score(TEXTS, REFERENCES) == whole
    assert shared.corpus(TEXTS, REFERENCES) == metric("ter").corpus(TEXTS, REFERENCES)
    with pytest.raises(SteersmanError, match=r"row 0.*counted from row 1 of the batch"):
        shared.score(["a", "b"], ["a", "猫が好き"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_that_died_or_were_interrupted_are_started_anew(monkeypatch, number):
    shared = Parallel("ter", {}, workers=2)
    whole = shared.score(TEXTS, REFERENCES)
    workers, result = list(shared._pool._processes.values()), Future.result

    def ended(task, timeout=None):
        for worker in workers:
            os.kill(worker.pid, number)
            worker.join(20)
        if number == signal.SIGINT:  # as Ctrl-C in a terminal, which goes to all of them
            raise KeyboardInterrupt
        return result(task, timeout)

    monkeypatch.setattr(Future, "result", ended)
    text = ["word " * 2000]  # work for longer than it takes to end it
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SteersmanError):
        shared.score([f"{t} {n}" for n in range(8) for t in text], [["other " * 2000]] * 8)
    monkeypatch.undo()
    assert shared.score(TEXTS, REFERENCES) == whole


def test_an_interrupted_java_program_is_ended_and_the_next_texts_start_another(monkeypatch):
    class Program:
        """Says the score of the last text that it was given, as the program of METEOR 1.5 does line by line."""

        def __init__(self):
            self.lock, self.said, self.meteor_p, self.ended = threading.Lock(), [], self, False
            started.append(self)

        def kill(self):
            self.ended = True

        def compute_score(self, given, texts):
            assert self.lock.acquire(timeout=5)
            self.said += [float(text) for (text,) in texts.values()]
            if self.said[0] == 1:
                raise KeyboardInterrupt
            found = [self.said.pop(0) for _ in texts]
            self.lock.release()
            return sum(found), found

    started, module = [], ModuleType("pycocoevalcap.meteor.meteor")
    monkeypatch.setattr(module, "Meteor", Program, raising=False)
    for name in ("pycocoevalcap", "pycocoevalcap.meteor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("steersman.metrics.java.find_spec", lambda name: module)
    monkeypatch.setattr("steersman.metrics.java.shutil.which", lambda name: name)
    made = metric("meteor1.5")
    with pytest.raises(KeyboardInterrupt):
        made.score(["1"], ["a"])
    assert made.score(["0.5", "0.25"], ["a", "b"]) == [0.5, 0.25]
    first, second = started
    assert (first.ended, first.lock.locked(), second.ended) == (True, False, False)


def test_what_goes_wrong_inside_a_metric_names_it_and_its_line():
    class Own(Scorer):
        name = "own"
        implementation = "a test's"

        def rows(self, batch):
            return [None if text == "none" else 1 / len(text) for text in batch.texts]

    with pytest.raises(SteersmanError, match=r"metric 'own', row 1: the score is None, not a finite number"):
        Own().score(["a", "none"])
    told = r"metric 'own': it raised ZeroDivisionError: division by zero \(.*test_metric_contract\.py, line \d+\)"
    with pytest.raises(SteersmanError, match=told):
        Own().score(["a", ""])
    with pytest.raises(SteersmanError, match=told):
        Own().corpus(["a", ""])

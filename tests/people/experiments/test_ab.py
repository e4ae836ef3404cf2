"""Experiments as a user meets them: rows in any of their forms, verdicts, guards, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import re

import numpy as np
import pytest

from steersman.cli import main
from steersman.people.experiments import Experiment, Guard, is_assigned, report
from steersman.people.judgements import JudgementFiles, plain
from steersman.people.outcomes import Outcome, read_outcomes
from steersman.statistics.sequential import user_scores
from steersman.types import SteersmanError

NAMES = ("old", "new")


def wins(rate: float, users: int, each: int = 1, seed: int = 0) -> list[Outcome]:
    rng = np.random.default_rng(seed)
    rows = [(f"u{u}", float(rng.random() < rate)) for _ in range(each) for u in range(users)]
    return [Outcome(user, float(t), "win", x) for t, (user, x) in enumerate(rows)]


def arms(rates: tuple[float, float], users: int, metric: str, seed: int = 0, scale: float = 1.0) -> list[Outcome]:
    rng = np.random.default_rng(seed)
    out = []
    for u in range(users):
        treated = is_assigned(f"u{u}", "s", 0.5)
        out.append(Outcome(f"u{u}", float(u), metric, scale * float(rng.random() < rates[treated]), treated))
    return out


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_assignment_is_stable_balanced_and_of_its_own_salt():
    users = [f"user-{i}" for i in range(20_000)]
    first, second = (np.array([is_assigned(u, s, 0.3) for u in users]) for s in ("a", "b"))
    assert [is_assigned(u, "a", 0.3) for u in users[:100]] == list(first[:100])
    for drawn in (first, second):
        assert abs(drawn.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20_000)
    assert abs((first & second).mean() - 0.09) < 0.01  # one experiment does not tell of another
    experiment = Experiment(control="old", treatment="new", salt="a", share=0.3)
    assert {experiment.arm(u) for u, t in zip(users, first, strict=True) if t} == {"new"}


def test_a_better_model_is_found_and_stays_found():
    rows = wins(0.65, 400)
    told = report(Experiment(), rows)
    assert told.decision == "treatment"
    assert told.primary.state == "better"
    assert 0 < told.primary.decided_at < 400
    assert told.primary.look.low > 0.5
    at = told.primary.decided_at
    assert report(Experiment(), rows[: at + 40]).decision == "treatment"
    assert report(Experiment(), rows[:20]).decision == "wait"


def test_what_was_decided_is_never_taken_back():
    """Wherever further values end, what was said after so many values stays said, and its place too."""
    rows = wins(0.58, 700, seed=3)
    first = report(Experiment(), rows).primary
    assert first.state == "better"
    assert 200 < first.decided_at < 600
    assert report(Experiment(), rows[: first.decided_at - 1]).decision == "wait"
    for n in (*range(first.decided_at, first.decided_at + 20), *range(first.decided_at + 20, 700, 31)):
        told = report(Experiment(), rows[:n])
        assert (told.decision, told.primary.decided_at) == ("treatment", first.decided_at)
        assert told.primary.look.low > 0.5 - 1e-6


def test_worse_futile_and_used_up():
    assert report(Experiment(), wins(0.3, 300)).primary.state == "worse"
    futile = report(Experiment(margin=0.1), wins(0.5, 1500))
    assert futile.primary.state == "no gain"
    assert futile.decision == "control"
    used = report(Experiment(most_units=50), wins(0.5, 60))
    assert used.primary.state == "undecided"
    assert used.decision == "control"


def test_one_user_with_many_judgements_is_one_user():
    """A user who always prefers the treatment proves nothing about users, however often he says so."""
    rows = [Outcome("keen", float(t), "win", 1.0) for t in range(500)]
    assert report(Experiment(), rows).decision == "wait"
    assert report(Experiment(unit="judgement"), rows).decision == "treatment"
    places, scores = user_scores(["a", "b", "a", "a", "b"], [1.0, 0.0, 0.0, 1.0, 1.0], 2)
    assert places == [2, 4]
    assert scores.tolist() == [0.5, 0.5]
    told = report(Experiment(per_user=3), wins(0.5, 10, each=4))
    assert told.primary.look.n == 10
    assert told.primary.unused == 10


def test_arms_between_users_and_guards():
    thumbs = arms((0.4, 0.6), 1500, "thumb")
    told = report(Experiment(metric="thumb"), thumbs)
    assert told.decision == "treatment"
    assert told.primary.look.low < 0.2 < told.primary.look.high
    slow = arms((0.2, 0.8), 1500, "latency", seed=1, scale=10.0)
    guard = Guard(better="lower", most=10.0, allowed=1.0)
    told = report(Experiment(metric="thumb", guards={"latency": guard}), [*thumbs, *slow])
    assert told.guards[0].state == "hurt"
    assert told.decision == "control"
    assert "latency" in told.reason
    assert told.guards[0].look.low < 6.0 < told.guards[0].look.high
    fine = arms((0.5, 0.5), 1500, "latency", seed=1, scale=10.0)
    told = report(
        Experiment(metric="thumb", guards={"latency": guard.model_copy(update={"allowed": 3.0})}), [*thumbs, *fine]
    )
    assert told.guards[0].state == "safe"
    assert told.decision == "treatment"


def test_a_lower_metric_that_is_good():
    told = report(
        Experiment(metric="latency", better="lower", most=10.0), arms((0.8, 0.4), 800, "latency", scale=10.0)
    )
    assert told.primary.state == "better"
    assert told.primary.look.high < 0


def test_what_is_wrong_with_the_users_is_said():
    lost = [r for r in arms((0.5, 0.5), 1000, "thumb") if not r.treated or int(r.user[1:]) % 2]
    assert any("in the treatment where" in w for w in report(Experiment(metric="thumb"), lost).warnings)
    both = [*arms((0.5, 0.5), 50, "thumb"), Outcome("u1", 99.0, "thumb", 1.0, not is_assigned("u1", "s", 0.5))]
    told = report(Experiment(metric="thumb"), both)
    assert any("both arms" in w for w in told.warnings)
    assert told.primary.look.n == 49
    drift = wins(0.0, 300) + [Outcome(f"v{i}", 1000.0 + i, "win", 1.0) for i in range(2000)]
    assert any("contradict" in w for w in report(Experiment(), drift).warnings)


def test_values_beyond_the_bound_and_guards_without_values_are_said():
    slow = arms((0.5, 0.5), 60, "latency", scale=4.0)
    told = report(Experiment(metric="latency", better="lower", guards={"retained": Guard()}), slow)
    assert any("outside 0 to 1 and count as the nearer" in w for w in told.warnings)
    assert any("retained: this guard was never measured" in w for w in told.warnings)
    assert report(Experiment(metric="latency", most=4.0), slow).warnings == []


def moods(gap: float, users: int) -> list[Outcome]:
    """A metric around -2, which treated users have `gap` more of."""
    rng = np.random.default_rng(5)
    treated = [is_assigned(f"u{u}", "s", 0.5) for u in range(users)]
    return [Outcome(f"u{u}", float(u), "mood", -2 + gap * t + rng.normal(0, 0.3), t) for u, t in enumerate(treated)]


def test_a_metric_below_zero_is_measured_as_it_is():
    rows = moods(-0.6, 1500)
    watched = report(Experiment(), [*wins(0.5, 50), *rows]).others[0]
    assert watched.metric == "mood"
    assert abs(watched.look.mean + 0.6) < 0.1
    assert watched.look.low < -0.6 < watched.look.high < 0
    decides = Experiment(metric="mood", least=-4.0, most=0.0, better="lower")
    told = report(decides, rows)
    assert (told.primary.state, told.warnings) == ("better", [])
    assert told.primary.look.low < -0.6 < told.primary.look.high
    guards = {"mood": Guard(least=-4.0, most=0.0, allowed=0.1)}
    assert report(Experiment(guards=guards), [*wins(0.5, 50), *rows]).guards[0].state == "hurt"
    clipped = report(Experiment(metric="mood"), rows)
    assert "1,500 of 1,500 values are outside 0 to 1" in clipped.warnings[0]
    assert "`least` and `most`" in clipped.warnings[0]
    with pytest.raises(ValueError, match=r"least \(1\) must be below most \(1\)"):
        Guard(least=1.0)


def test_no_gain_is_known_before_worse_and_each_has_its_own_place():
    rows = wins(0.46, 4000, seed=3)
    experiment = Experiment(margin=0.1)
    told = report(experiment, rows).primary
    assert told.state == "worse"
    before = report(experiment, rows[: told.decided_at - 1]).primary
    assert before.state == "no gain"
    assert before.decided_at < told.decided_at / 2
    assert before.look.high > 0.5
    at = report(experiment, rows[: told.decided_at]).primary
    assert (at.state, at.decided_at) == ("worse", told.decided_at)
    assert at.look.high < 0.5
    for n in (before.decided_at, told.decided_at - 1, told.decided_at, 4000):
        assert report(experiment, rows[:n]).decision == "control"


def test_rows_of_every_form(tmp_path):
    rows = [
        {"user": "a", "winner": "new", "time": 3},
        {"user": "b", "winner": "both_bad", "time": "1970-01-01T00:00:01Z"},
        {"user": "c", "prompt": "p", "answers": ["x", "y"], "models": ["new", "old"], "choice": "second", "time": 2},
        {"user": "c", "prompt": "p", "answers": ["x", "y"], "models": ["old", "new"], "choice": 1, "time": 2},
        {"user": "c", "prompt": "p", "answers": ["x", "y"], "models": ["old", "else"], "choice": 1, "time": 2},
        {"user": "d", "prompt": "p", "completion": "x", "model": "new", "label": True, "time": 4},
        {"user": "d", "prompt": "p", "completion": "x", "model": "new", "label": True, "expected": False, "time": 4},
        {"user": "e", "arm": "old", "thumb": "down", "length": 40, "latency": 1.5, "retained": "true", "time": 5},
        {"user": "f", "arm": "new", "metric": "tickets", "value": 2, "time": 6},
    ]
    found = read_outcomes(write(tmp_path / "o.jsonl", rows), *NAMES)
    told = [(o.user, o.metric, o.value, o.treated) for o in found]
    assert told == [
        ("b", "win", 0.5, None), ("c", "win", 0.0, None), ("c", "win", 1.0, None), ("a", "win", 1.0, None),
        ("d", "thumb", 1.0, True), ("e", "thumb", 0.0, False), ("e", "retained", 1.0, False),
        ("e", "length", 40.0, False), ("e", "latency", 1.5, False), ("f", "tickets", 2.0, True),
    ]  # fmt: skip


def test_a_later_judgement_of_the_same_answers_replaces_the_earlier_one(tmp_path):
    pair = {"user": "a", "prompt": "p", "answers": ["x", "y"], "models": ["new", "old"]}
    other_side = {"answers": ["y", "x"], "models": ["old", "new"]}
    thumb = {"user": "a", "prompt": "p", "completion": "x", "model": "new"}
    rows = [
        {**thumb, "label": True, "time": 5},
        {**thumb, "label": False, "time": 3},
        {**thumb, "label": True, "user": "b", "time": 4},
        {**thumb, "label": True, "completion": "z", "time": 4},
        {**pair, "choice": "first", "time": 1},
        {**pair, **other_side, "choice": "first", "time": 2},
    ]
    found = read_outcomes(write(tmp_path / "o.jsonl", rows), *NAMES)
    told = [(o.time, o.user, o.metric, o.value) for o in found]
    assert told == [(2, "a", "win", 0.0), (4, "b", "thumb", 1.0), (4, "a", "thumb", 1.0), (5, "a", "thumb", 1.0)]


def judged(user: str, prompt: str, choice: str, **more) -> dict:
    return {"user": user, "prompt": prompt, "answers": ["x", "y"], "models": ["old", "new"], "choice": choice, **more}


def test_rows_without_a_time_are_in_the_order_of_a_folder(tmp_path):
    """What stands in the second file was said after all of the first one, in whichever row."""
    weeks = [*(judged(f"u{i}", f"q{i}", "tie") for i in range(4)), judged("bob", "q", "second")], [
        {"user": "eve", "winner": "new"}, judged("bob", "q", "first"), judged("bob", "r", "second"),
        {"user": "ann", "winner": "new"},
    ]  # fmt: skip
    for number, rows in enumerate(weeks, 1):
        write(tmp_path / f"week{number}.jsonl", rows)
    found = read_outcomes(str(tmp_path), *NAMES)
    assert [(o.user, o.value) for o in found] == [
        ("u0", 0.5), ("u1", 0.5), ("u2", 0.5), ("u3", 0.5), ("eve", 1.0), ("bob", 0.0), ("bob", 1.0), ("ann", 1.0)
    ]  # fmt: skip
    (tmp_path / "week2.jsonl").unlink()
    write(tmp_path / "week2.jsonl", [row for row in weeks[1] if "choice" in row])
    folder = [(j.user, j.choice) for j in JudgementFiles(tmp_path)]
    assert folder[-3:] == [("bob", "second"), ("bob", "first"), ("bob", "second")]


def test_a_row_without_a_time_is_as_late_as_the_row_before_it(tmp_path):
    rows = [
        {"user": "bob", "winner": "old", "time": "2026-03-01T09:00:00Z"},
        {"user": "ann", "winner": "tie", "time": "2026-03-01T09:02:00Z"},
        {"user": "bob", "winner": "new"},
        {"user": "eve", "winner": "tie", "time": "2026-03-01T09:01:00Z"},
    ]
    found = read_outcomes(write(tmp_path / "mixed.jsonl", rows), *NAMES)
    assert [(o.user, o.value) for o in found] == [("bob", 0.0), ("eve", 0.5), ("ann", 0.5), ("bob", 1.0)]
    assert report(Experiment(control="old", treatment="new"), found).primary.look.mean == pytest.approx(1 / 3)
    path = write(tmp_path / "judged.jsonl", [judged("bob", "q", "second", time=50), judged("bob", "r", "first")])
    assert [j.time for j in JudgementFiles(path)] == [50, 50]


def test_csv_through_the_verb(tmp_path, capsys):
    path = tmp_path / "outcomes.csv"
    rng = np.random.default_rng(4)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["user", "winner", "arm", "latency"])
        for i in range(300):
            table.writerow([f"u{i}", "new" if rng.random() < 0.7 else "old", "", ""])
            table.writerow([f"u{i}", "", NAMES[is_assigned(f"u{i}", "", 0.5)], f"{rng.random():.2f}"])
    words = ["ab", str(path), "--experiment.control", "old", "--experiment.treatment", "new"]
    for _ in range(2):
        assert main([*words, "--out", str(tmp_path / "told.json"), "--log", str(tmp_path / "looks.jsonl")]) == 0
    looks = [json.loads(line) for line in (tmp_path / "looks.jsonl").read_text().splitlines()]
    assert [(look["decision"], look["primary"]["look"]["n"]) for look in looks] == [("treatment", 300)] * 2
    assert looks[0]["experiment"]["treatment"] == "new"
    assert "salt" not in looks[0]["experiment"]
    said = " ".join(capsys.readouterr().out.split())
    assert "take new" in said
    assert "plan: to see a win rate of 0.550 with 80% power" in said
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["decision"] == "treatment"
    assert told["primary"]["look"]["low"] > 0.5
    assert [v["metric"] for v in told["others"]] == ["latency"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"user": "a", "winner": "newer"}, "row 2, field 'winner': must be one of new, old, tie, both_bad, not"),
        ({"user": "a", "winner": "newer"}, "; experiment.control and experiment.treatment name the two arms"),
        ({"user": "a", "arm": "third", "thumb": "up"}, "must be old or new, not 'third'; experiment.control and"),
        ({"user": "a", "arm": "new"}, "none of winner, thumb"),
        ({"user": "", "winner": "new"}, "field 'user'"),
        ({"user": "a", "winner": "new", "time": "soon"}, "must be ISO 8601 or seconds"),
        ({"user": "a", "arm": "new", "latency": "fast"}, "must be a number"),
        ({"user": "a", "arm": "new", "metric": "win", "value": 1}, "give `winner`, not `arm`"),
        ({"user": "a", "prompt": "p", "answers": ["x"], "choice": 0}, "between two answers"),
        ({"user": "a", "prompt": "p", "answers": ["x", "y"], "choice": "left"}, "must be one of first, second"),
        ({"user": "a", "prompt": "p", "answers": ["x", "y"], "models": ["new"], "choice": 0}, "one model for each"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, row, said):
    path = write(tmp_path / "o.jsonl", [{"user": "a", "winner": "new"}, row])
    with pytest.raises(SteersmanError) as error:
        read_outcomes(path, *NAMES)
    assert said.replace("row 2", f"{path}, line 2") in str(error.value) or said in str(error.value)


def test_refusals_of_the_verb(tmp_path, capsys):
    path = write(tmp_path / "o.jsonl", [{"user": "a", "winner": "tie"}])
    assert main(["ab", path, "--experiment.metric", "thumb"]) == 2
    assert "metrics found: win" in capsys.readouterr().err
    assert main(["ab", path, "--experiment.control", "treatment"]) == 2
    assert main(["ab", path, "--out", path]) == 2
    assert main(["ab", path, "--log", path]) == 2
    capsys.readouterr()
    assert main(["ab", "sqlite:///none.db"]) == 2
    assert "sqlite:///none.db" in capsys.readouterr().err
    assert main(["ab", path, "--experiment.unit", "judgement", "--experiment.metric", "thumb"]) == 2


def test_a_plan_for_thumbs(tmp_path, capsys):
    rows = [{"user": o.user, "arm": NAMES[bool(o.treated)], "thumb": o.value} for o in arms((0.5, 0.7), 300, "thumb")]
    path = write(tmp_path / "o.jsonl", rows)
    words = ["--experiment.control", "old", "--experiment.treatment", "new", "--experiment.metric", "thumb"]
    assert main(["ab", path, *words, "--effect", "0.2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"plan: to see 0\.[67]\d\d instead of 0\.[45]\d\d with 80% power", said)


def test_judgements_go_to_a_file_and_back(tmp_path):
    rows = [
        {"id": "2", "user": "a", "time": 9, "prompt": [{"role": "user", "content": "hm"}], "answers": ["x", "y"],
         "models": ["m", "n"], "choice": "tie", "seconds": 3, "expected": "first"},
        {"id": "1", "user": "b", "time": 5, "prompt": "p", "completion": "c", "model": "m", "label": -1,
         "reasons": ["wrong"], "correction": "better"},
        {"id": "1", "user": "b", "time": 6, "prompt": "p", "completion": "c", "model": "m", "label": 1},
    ]  # fmt: skip
    found = list(JudgementFiles(write(tmp_path / "j.jsonl", rows)))
    assert [j.id for j in found] == ["1", "2"]  # by time, the repeated id once
    assert found[0].correction == "better"
    assert found[0].label is False
    assert found[1].gold_failed
    again = list(JudgementFiles(write(tmp_path / "again.jsonl", [plain(j) for j in found])))
    assert again == found


def test_a_missing_folder_of_judgements_is_not_looked_up_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SteersmanError, match="inbox: there is no file or folder of judgements"):
        list(JudgementFiles("inbox"))

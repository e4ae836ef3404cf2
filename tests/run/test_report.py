"""The report: made for any verb from whatever is there, with nothing of the data taken for markup."""

from __future__ import annotations

import base64
import itertools
import json
import random
import re
import xml.etree.ElementTree as ET

import pytest

from steersman.run.report.calibration import calibration_png
from steersman.run.report.charts import Line, line_chart, running_mean, tick_texts
from steersman.run.report.page import (
    charts,
    findings,
    sample_pairs,
    summary_rows,
    summary_tables,
    unmoved,
    write_report,
)
from steersman.types import SteersmanError

EVIL = '<script>alert("x")</script> & $\\frac{'


@pytest.fixture
def run(tmp_path):
    rng = random.Random(0)
    rows = [
        {"step": i, "seconds": i / 2, "reward/total": i + rng.gauss(0, 1), f"reward/{EVIL}": 1.0,
         "kl": i / 9, "loss": -i, "ratio_gap": 1e-6, "held_out/loss": 2.0, "kl/coefficient": 0.1,
         "lr/actor": 0.0, "odd/thing": 3}
        for i in range(1, 61)
    ]  # fmt: skip
    rows[5]["kl"] = "nan"
    lines = [json.dumps(r) for r in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 61, "kl": 1']))
    samples = [
        {"step": s, "index": k, "prompt": EVIL, "completion": f"answer {s} {EVIL}", "finish": "eos",
         "reward": {"model": s * (1 - 2 * k), "gold": 1.0, EVIL: "nan"}}
        for s in (0, 30, 60) for k in (0, 1)
    ]  # fmt: skip
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    seen = [{"step": s, "code": "kl_runaway", "severity": "warning", "text": f"at {s} {EVIL}"} for s in (4, 24)]
    (tmp_path / "health.jsonl").write_text("\n".join(map(json.dumps, seen)))
    summary = {
        "verb": "ppo",
        "seconds": 99.5,
        "gold_before": 0.1,
        "gold_after": 0.5,
        "kl": 3.25,
        "nested": {EVIL: None},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.yaml").write_text(f"model: '{EVIL}'\n")
    return tmp_path


def test_the_picture_of_the_calibration_is_on_the_page(run):
    assert "<img" not in write_report(run).read_text()
    picture = calibration_png(run / "calibration.png", [0.6, 0.9], [0.5, 1.0], [3, 5], low=0.5, error=0.1)
    (found,) = re.findall(r'<img alt="[^"<]+" src="data:image/png;base64,([^"]+)">', write_report(run).read_text())
    assert base64.b64decode(found) == picture.read_bytes()


def test_everything_that_is_there_is_shown_and_escaped(run):
    page = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    for part in [
        "Reward",
        "KL to the reference",
        "Gap between",
        "answer 0",
        "answer 60",
        "99.5",
        "at 24",
        "step 4 to 24",
    ]:
        assert part in page
    assert not re.search(r'(src|href)="(?!#)', page.replace('xlink:href="#', 'href="#'))  # nothing from elsewhere
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ET.fromstring(svg)
        assert "#0102" not in svg  # every colour belongs to the page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_charts_group_by_what_is_measured(run):
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    found = {c.title: [name for name, _ in c.legend] for c in charts(rows)}
    assert list(found) == ["Reward", "KL to the reference", "Losses"]
    assert found["Losses"] == ["loss", "loss (held out)"]
    assert found["Reward"][0] == "total"
    many = [{"step": s, **{f"x/{i}": i * s for i in range(20)}} for s in (1, 2)]
    assert charts(many)[0].left_out == 12


def test_what_never_moves_is_told_and_not_drawn(run):
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert unmoved(rows) == [
        ("Coefficients of the KL penalty", "0.1"), ("Gap between rollout and training", "1e\u22126"),
        ("Learning rates: actor", "0"), ("Odd: thing", "3"),
    ]  # fmt: skip
    page = write_report(run).read_text(encoding="utf-8")
    top, _, curves = page.partition("<h2>Curves</h2>")
    assert "<tr><td>Learning rates: actor</td>" in top
    assert "Learning rates" not in curves
    several = [{"step": s, "lr/actor": 3e-4 * (1 + 1e-15 * s), "lr/critic": 1e-4, "loss/b": 0.5} for s in range(3)]
    assert unmoved(several) == [
        ("Losses: b", "0.5"), ("Learning rates: actor", "3e\u22124"), ("Learning rates: critic", "1e\u22124"),
    ]  # fmt: skip
    assert charts(several) == []
    once = [{"step": 0, "steps": 12.5}]
    assert (unmoved(once), charts(once)) == ([("Steps", "12.5")], [])
    moving = [{"step": s, "finish/eos": s / 9, "finish/stop": 0} for s in range(3)]
    assert unmoved(moving) == []  # a level line beside others says something
    assert [name for name, _ in charts(moving)[0].legend] == ["eos", "stop"]


def test_the_rise_of_the_kl_is_seen_beside_whatever_is_measured_with_it():
    """KL to the policy that sampled is another thing, of another size: rounding, where each sample is used once."""
    rows = [{"step": s, "kl": max(1e-6, 0.1 * s), "kl/old": 3.9e-13 * (1 + s % 2 / 9)} for s in range(21)]
    rows[0]["held_out/kl"], rows[20]["held_out/kl"] = 2.9e-6, 2.2
    reference, sampler = charts(rows)
    assert (reference.title, sampler.title) == ("KL to the reference", "KL to the sampling policy")
    assert [name for name, _ in reference.legend] == ["kl", "kl (held out)"]
    assert [name for name, _ in sampler.legend] == ["kl old"]
    heights = _heights(reference.svg)
    assert sum(abs(b - a) > 5 for a, b in itertools.pairwise(heights)) >= 15  # of 131 points, climbing all the way


def test_a_tiny_line_does_not_press_the_others_flat():
    steps = list(map(float, range(21)))
    tiny = Line("b", steps, [3.9e-13] * 21)
    heights = _heights(line_chart("x", [Line("a", steps, [0.1 + 0.2 * s for s in steps]), tiny]))
    assert max(heights) - min(heights) > 100
    near = line_chart("x", [Line("a", steps, [500.0 + s for s in steps]), Line("b", steps, [0.5] * 21)])
    assert {"1", "10", "100"} <= set(_texts(near))


def test_liked_and_disliked_answers_have_implicit_rewards():
    (chart,) = charts([{"step": s, "reward/liked": s, "reward/disliked": -s} for s in range(3)])
    assert chart.title == "Implicit reward"
    parts = [{"step": s, "reward/liked": s, "reward/disliked": -s, "reward/total": 0} for s in range(3)]
    assert [c.title for c in charts(parts)] == ["Reward"]


def test_words_about_one_thing_share_a_chart():
    rows = [{"step": s, "held_out/distinct2": 0.5 + s, "text/distinct2": 0.25 * s, "clip_fraction": s, "time/step": s}
            for s in range(2)]  # fmt: skip
    found = {c.title: [name for name, _ in c.legend] for c in charts(rows)}
    assert found == {
        "Variety of the text": ["distinct2 (held out)", "distinct2"],
        "Clipping": ["clip fraction"],
        "Where the time goes": ["step"],
    }


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        ([0.0, 0.05, 0.1], ["0", "0.05", "0.10"]),
        ([0.025, 0.03, 0.0325], ["0.0250", "0.0300", "0.0325"]),
        ([-2.0, 0.0, 2.0], ["\u22122", "0", "2"]),
        ([2.95e-4, 3e-4, 3.05e-4], ["2.95e\u22124", "3.00e\u22124", "3.05e\u22124"]),
        ([0.0, 5e-7, 1e-6], ["0", "5e\u22127", "1e\u22126"]),
        ([0.0, 2500.0, 5000.0], ["0", "2,500", "5,000"]),
        ([1e6, 2.5e6], ["1.0e6", "2.5e6"]),
        ([1e12], ["1e12"]),
        ([], []),
    ],
)
def test_numbers_of_axes_are_short_and_told_apart(ticks, texts):
    assert tick_texts(ticks) == texts


@pytest.mark.parametrize("values", [[2.85e-4, 3.15e-4], [0.1, 0.3], [-123456.0, 987654.0], [1 + 1e-8, 1 + 9e-8]])
@pytest.mark.parametrize("label", ["Learning rates", "Standard error of the reward at looks"])
def test_the_name_of_an_axis_stands_beside_its_numbers(values, label):
    svg = ET.fromstring(line_chart("x", [Line("a", [0.0, 1.0], values)], label=label))
    (axis,) = svg.findall(".//*[@id='x-matplotlib.axis_2']")
    texts = [e for e in axis.iter() if e.tag.endswith("}text")]
    numbers = [e for e in texts if "text-anchor: end" in e.attrib["style"]]  # they end at their x
    begin = min(float(e.attrib["x"]) - 5.2 * len(e.text or "") for e in numbers)
    lines = [_across(e) for e in texts if e not in numbers]
    assert len(numbers) >= 3
    assert min(lines) > 8  # of their height are to the left
    assert max(lines) + 2 < begin


def _across(text: ET.Element) -> float:
    """Where the foot of an upright text stands: one line turns about its place, several are moved to theirs."""
    moved = re.match(r"translate\((\S+)", text.attrib["transform"])
    return float(moved[1] if moved else text.attrib["x"])


def test_pairs_are_the_first_and_last_answer_to_a_prompt():
    rows = [
        {"step": s, "index": i, "prompt": f"p{i}", "completion": f"c{s}", "reward": {"a": s, "b": -s, "c": 1}}
        for s in (9, 0, 5) for i in (0, 1)
    ]  # fmt: skip
    pairs = sample_pairs(rows)
    assert [p.prompt for p in pairs] == ["p0", "p1"]
    assert (pairs[0].before["completion"], pairs[0].after["completion"]) == ("c0", "c9")
    assert [r["step"] for r in pairs[0].between] == [5]
    assert pairs[0].rewards == [("a", "0", "9", "up"), ("b", "0", "−9", "down"), ("c", "1", "1", "same")]


def test_summary_and_findings():
    compared, single = summary_rows(
        {"gold_before": 1, "gold_after": 2, "kl": 3, "only_after": 4, "n": {"x_before": 5}}, {}
    )
    assert compared == [("gold", 1, 2)]
    assert single == [("kl", 3), ("only after", 4), ("n x before", 5)]
    summary = {
        "seconds": 9.0, "held_out/loss": 0.5, "text/distinct2": 0.25, "held_out/accuracy": 1.0, "held_out/low": 0.9,
        "steps": 4, "kind": "pairs",
    }  # fmt: skip
    start = {"step": 0, "seconds": 0.1, "held_out/loss": 2.5, "text/distinct2": 0.75, "held_out/accuracy": 0.5}
    compared, single = summary_rows(summary, start, looks="trained on")
    assert compared == [
        ("accuracy (trained on)", 0.5, 1.0), ("text/distinct2", 0.75, 0.25), ("loss (trained on)", 2.5, 0.5),
    ]  # fmt: skip
    assert single == [("seconds", 9.0), ("low (trained on)", 0.9), ("steps", 4), ("kind", "pairs")]
    rows = [
        {"step": 1, "code": "a", "severity": "note", "text": "t1"},
        {"step": 9, "code": "b", "severity": "stop", "text": "t2"},
        {"step": 21, "code": "a", "severity": "note", "text": "t3"},
    ]
    assert [(f["code"], f["first"], f["last"], f["times"], f["text"]) for f in findings(rows)] == [
        ("b", 9, 9, 1, "t2"),
        ("a", 1, 21, 2, "t3"),
    ]


def test_rows_of_a_summary_are_a_table(run):
    players = [{"player": EVIL, "rating": 1000.0, "test": {"n": 3}}, {"player": "b", "rating": 990.0, "low": None}]
    (run / "summary.json").write_text(json.dumps({"verb": "arena", "table": players, "names": ["a"], "none": []}))
    summary = json.loads((run / "summary.json").read_text())
    (table,) = summary_tables(summary)
    assert (table.name, table.columns) == ("table", ["player", "rating", "low"])
    assert table.rows == [[EVIL, 1000.0, None], ["b", 990.0, None]]
    page = write_report(run).read_text(encoding="utf-8")
    assert '<tr><td>b</td><td class="n">990</td><td>\u2013</td></tr>' in page
    assert '<th>player</th><th class="n">rating</th><th>low</th>' in page
    assert "&#39;rating" not in page  # as Python writes it


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "a: 1"),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"step": 1, "a": "nan"}\n{"step": 2, "b": 0.0}\n[1]\n'),
        ("samples.jsonl", '{"step": 1, "completion": "x", "prompt": null, "reward": 0.5}\n{"step": 2}\n'),
        (
            "metrics.jsonl",
            '{"step": "x", "a": 1.0}\n{"step": 1, "a": ' + "7" * 400 + '}\n{"step": 1' + "0" * 400 + "}\n",
        ),
        ("samples.jsonl", '{"step": "x", "completion": "a"}\n{"step": 2, "completion": "b"}\n'),
        ("config.yaml", "model: &a {path: *a}"),
        ("summary.json", "[" * 100_000),
        ("summary.json", "{cut"),
        ("summary.json", '{"a": [{"b": 1}, {"c": [2]}], "d": [{}], "held_out/loss": "nan"}'),
        ("summary.json", "[]"),
    ],
)
def test_parts_of_a_run_make_a_report_too(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert "</html>" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SteersmanError, match="no such folder"):
        write_report(tmp_path / "none")
    with pytest.raises(SteersmanError, match="holds no run"):
        write_report(tmp_path)


def test_running_mean_by_hand():
    smooth = [float(i) for i in range(100)]
    assert running_mean(smooth) is smooth
    noisy = [float(i % 2) for i in range(80)]
    mean = running_mean(noisy)
    assert mean[0] == pytest.approx(1 / 3)  # of 0, 1, 0
    assert mean[10] == pytest.approx(2 / 5)  # of 0, 1, 0, 1, 0
    assert running_mean([1.0, 9.0]) == [1.0, 9.0]


@pytest.mark.parametrize("value", [0.1, 1e-6, 3e-4, -0.3])
def test_a_number_that_never_changes_is_a_flat_line(value):
    level = [value] * 42
    assert running_mean(level) is level  # a mean of sums would be off by rounding
    wobbling = [value * (1 + 1e-15 * (i % 3)) for i in range(42)]
    for values in (level, wobbling):
        heights = _heights(line_chart("lr", [Line("lr", list(map(float, range(42))), values)], log=True))
        assert heights
        assert max(heights) - min(heights) < 0.01  # points, of 180


def test_the_running_mean_of_small_steps_on_a_large_number_stays_among_them():
    values = [1e6 + 1e-6 * (i % 2) for i in range(400)]
    assert all(min(values) <= x <= max(values) for x in running_mean(values))


def _heights(svg: str) -> list[float]:
    """Of the points of the first series, as it is drawn and as its mean is."""
    lines = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--s0\)', svg)
    return [float(y) for line in lines for _, y in re.findall(r"[ML] (\S+) (\S+)", line)]


@pytest.mark.parametrize(
    "lines",
    [
        [[2e-6 + 1e-7 * (i % 9) for i in range(30)]],
        [[6 + 0.1 * (i % 9) for i in range(30)], [0.15] * 30],
        [[1e-6 * 1.5**i for i in range(30)]],
    ],
)
def test_a_log_axis_has_numbers_whatever_it_spans(lines):
    drawn = [Line(str(i), list(map(float, range(30))), values) for i, values in enumerate(lines)]
    ticks = [text for text in _texts(line_chart("ratio_gap", drawn, log=True)) if _is_number(text)]
    assert len(ticks) - len([0, 5, 10, 15, 20, 25]) >= 3, ticks


def _texts(svg: str) -> list[str]:
    return [a or b for a, b in re.findall(r"<text[^>]*>([^<]*)</text>|<tspan[^>]*>([^<]*)</tspan>", svg)]


def _is_number(text: str) -> bool:
    try:
        float(text.replace("\u2212", "-"))
    except ValueError:
        return False
    return True


def test_a_reward_that_is_no_number_goes_neither_up_nor_down():
    rows = [{"step": s, "index": 0, "prompt": "p", "reward": {"total": float("nan")}} for s in (0, 1)]
    (pair,) = sample_pairs(rows)
    assert pair.rewards == [("total", "nan", "nan", "same")]


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-1e30, 1e30], [1e-9, 1e-3, 1e6]])
def test_charts_of_awkward_numbers(values):
    svg = line_chart("x", [Line("a", list(map(float, range(len(values)))), values)], log=True)
    ET.fromstring(svg)
    assert "mathdefault" not in svg


def test_the_setup_stands_at_the_top(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model: {path: some/model, dtype: float32, lora: {r: 4, alpha: 8.0}}\ndata: {path: a.jsonl}\n"
    )
    page = write_report(tmp_path).read_text()
    top = page.split("<details>")[0]
    for text in ("some/model", "adapters of rank 4, alpha 8", "a.jsonl", "torch 2"):
        assert text in top


def test_the_legend_says_which_lines_lie_on_others():
    rows = [
        {"step": i, "reward/total": i / 2, "reward/a": i / 2, "reward/b": 1.0, "reward/c": i / 2} for i in range(3)
    ]
    (chart,) = charts(rows)
    assert chart.legend == [("total", "1"), ("a", "1, lies on total"), ("b", "1"), ("c", "1, lies on total")]


def test_a_long_name_of_an_axis_is_cut_into_lines():
    words = "Standard error of the held-out reward"
    svg = line_chart("x", [Line("a", [0.0, 1.0], [0.0, 1.0])], label=words)
    assert words not in svg
    assert {"Standard error of the", "held-out reward"} <= set(_texts(svg))


def test_axes_are_named_and_lines_that_coincide_are_told_apart():
    same = [Line(name, [0, 1, 2], [1, 2, 3]) for name in "ab"]
    svg = line_chart("reward", same, label="Reward")
    assert ">step<" in svg
    assert ">Reward<" in svg
    assert svg.count("stroke-dasharray") >= 1


def test_no_text_turns_round_what_stands_beside_it(run):
    """Control characters and direction marks are written out, wherever the text stands."""
    marks = "\x1b[31m\u202e\u2066"
    rows = [{"step": s, "index": 0, "prompt": marks, "completion": marks, "finish": marks, "reward": {marks: 1.0}}
            for s in (0, 1, 2)]  # fmt: skip
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 62, f"reward/{marks}": 1.0, f"odd/{marks}": 1.0}).join("\n\n"))
    (run / "health.jsonl").write_text(json.dumps({"step": 1, "code": marks, "severity": "stop", "text": marks}))
    (run / "config.yaml").write_text(f'data: {{path: "{json.dumps(marks)[1:-1]}"}}\n# \u202e\n')
    text = write_report(run).read_text()
    assert not set(marks) - set("[31m") & set(text)
    assert "\\x1b[31m\\u202e\\u2066" in text
    assert "<svg" in text

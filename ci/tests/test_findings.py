"""Findings: the numbers decide the words, whatever the order of the images."""

import random
import re

import IPython.display
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter

from tpt_nb import metrics
from tpt_nb.lessons import findings

SIGN = {1: " gains ", 0: "no difference shown", -1: " loses "}


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: [(markdown, values)]."""
    out = []

    def display(data, raw, metadata):
        out.append((data.get("text/markdown"), metadata.get("tpt_nb", {}).get("values", {})))

    monkeypatch.setattr(IPython.display, "display", display)
    return out


def records(rng, n: int, after: float, before: float = 0.4) -> list[dict]:
    """n images, of which about these shares are right."""
    return [
        {"id": f"{i}", "target": 1, "pred_before": int(b < before), "pred_after": int(a < after)}
        for i, (b, a) in enumerate(zip(rng.random(n), rng.random(n), strict=True))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_sign_and_interval_decide_the_word(seed, shown):
    rng = np.random.default_rng(seed)
    a, b = (records(rng, 20 + 20 * seed, rng.random()) for _ in "ab")
    result = metrics.compare(a, b)
    low, high = result["gain_ci95"]
    word = SIGN[(low > 0) - (high < 0)]
    text = findings.compare(a, b, "crops", "patches")
    assert [w for w in SIGN.values() if w in text] == [word], (text, result)
    [(markdown, values)] = shown
    assert markdown == f"**Finding.** {text}"
    assert values["patches over crops"] == pytest.approx(100 * result["gain"], abs=1e-5)
    assert values["accuracy of patches"] == pytest.approx(100 * result["accuracy_b"], abs=1e-5)
    get = "gets" if result["improved"] == 1 else "get"
    assert f"{result['improved']} {get} better, {result['worsened']} worse" in text
    numbers = [float(x.replace("−", "-")) for x in re.findall(r"[−\d.]*\d", text.split("[")[1])][:2]
    assert numbers == pytest.approx([100 * low, 100 * high], abs=0.051)
    if word != SIGN[0]:  # the other way round, the other word
        assert SIGN[-1 if word == SIGN[1] else 1] in findings.compare(b, a, "patches", "crops")


@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_the_images_changes_nothing(seed, shown):
    rng = np.random.default_rng(seed)
    a, b = records(rng, 60, 0.4), records(rng, 60, 0.5)
    texts = {findings.compare(a, b, "a", "b")}
    for _ in range(3):
        random.Random(seed).shuffle(a)
        random.Random(seed + 1).shuffle(b)
        texts.add(findings.compare(metrics.frame(a), b, "a", "b"))
    assert len(texts) == 1


def test_one_run_is_compared_with_its_own_start(shown):
    rng = np.random.default_rng(0)
    run = records(rng, 200, after=0.8, before=0.3)
    before = [r | {"pred_after": r["pred_before"]} for r in run]
    assert findings.adapted(run, "TPT") == findings.compare(before, run, "zero-shot", "TPT")
    same = findings.compare(run, run, "a", "b")
    assert "no difference shown" in same and "right on the same images" in same


def test_right_or_wrong_is_enough(shown):
    rng = np.random.default_rng(1)
    a, b = records(rng, 80, 0.3), records(rng, 80, 0.7)
    right = [np.array([r["pred_after"] == 1 for r in run]) for run in (a, b)]
    assert findings.compare(*right, "a", "b") == findings.compare(a, b, "a", "b")


def test_a_known_interval(shown):
    text = findings.gain(11.04, 6.8, 15.2, "TPT", "zero-shot")
    assert text == "TPT gains 11.0 points [6.8, 15.2] over zero-shot."
    assert findings.gain(-2.9, -4.0, -1.8, "A", "B").startswith("A loses 2.9 points [−4.0, −1.8]")
    even = findings.gain(0.4, -1.0, 1.8, "A", "B")
    assert even == "A against B: no difference shown, +0.4 points [−1.0, 1.8]."
    # an interval that leaves out 0 never looks as if it did not
    assert "[0.04, 2.00]" in findings.gain(1, 0.04, 2, "A", "B")
    with pytest.raises(ValueError, match="does not hold 3"):
        findings.gain(3, 0, 1, "A", "B")


@pytest.mark.parametrize("lowest", [False, True])
def test_best_next_worst(lowest, shown):
    rng = np.random.default_rng(5)
    for _ in range(20):
        values = {name: float(v) for name, v in zip("PQRST", rng.random(5) * 100, strict=True)}
        order = sorted(values, key=values.get, reverse=not lowest)
        text = findings.best(values, lowest=lowest)
        assert re.findall(r"\b[PQRST]\b", text) == [order[0], order[1], order[-1]]
        assert shown[-1][1] == pytest.approx(values, abs=1e-5)


def test_best_says_whether_the_intervals_overlap(shown):
    near = findings.best({"a": (41.0, 38, 44), "b": (40.2, 37, 43)})
    assert near.endswith("The intervals of a and b overlap.")
    far = findings.best({"a": (41.0, 40, 42), "b": (30.2, 29, 31), "c": 4.0})
    assert "do not overlap" in far and "worst: c with 4.0 %" in far
    assert findings.best({"a": 2.0, "b": 2.0}, unit="s") == "All 2 give the same: 2 s."
    assert "a and b with 2 each; worst: c" in findings.best({"a": 2, "b": 2, "c": 1}, unit="")
    with pytest.raises(ValueError, match="two or more"):
        findings.best({"a": 1.0})


def test_a_trend_needs_a_clear_direction(shown):
    up = findings.trend([1, 4, 16, 64], [30, 33, 39.5, 41], "Accuracy", "%", "views")
    assert up.startswith("Accuracy rises with views, from 30.0 % at 1 to 41.0 % at 64 (")
    assert shown[-1][1] == {"Accuracy at 1": 30, "Accuracy at 64": 41}
    down = findings.trend([64, 1, 16, 4], [1, 4, 2, 3], "ECE", "")
    assert down.startswith("ECE falls, from 4 at 1 to 1 at 64 (rank correlation −1.00")
    assert "no clear direction" in findings.trend([1, 2, 3, 4], [1, 3, 1, 2], "x", "")
    assert "does not change" in findings.trend([1, 2, 3], [0.50001, 0.5, 0.50002], "x", "")
    with pytest.raises(ValueError, match="three or more"):
        findings.trend([1, 2], [1, 2], "x", "")


def test_free_sentences_and_answers(shown):
    assert findings.say("{n} of 500: {share:.1f} %", n=61, share=12.2) == "61 of 500: 12.2 %"
    assert shown[-1] == ("**Finding.** 61 of 500: 12.2 %", {"n": 61, "share": 12.2})
    assert findings.say("{text}", text="any name will do") == "Any name will do"
    assert findings.say("{text} gains", text="hard1") == "hard1 gains"
    with pytest.raises(ValueError, match="no place for m"):
        findings.say("{n}", n=1, m=2)
    findings.answers("One.", "Two.")
    assert shown[-1] == ("**In numbers**\n\n- One.\n- Two.", {})
    assert findings.value("accuracy of TPT", 41.0) == 41.0
    assert shown[-1] == (None, {"accuracy of TPT": 41.0})


def test_a_kernel_keeps_the_values_in_the_output(shown, monkeypatch):
    """As stored in a notebook: Markdown, plain text, and the values in the metadata."""
    stored = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **kw: stored.append((data, kw)))
    findings.say("{n} views", n=64)
    [(data, kw)] = stored
    assert data["text/plain"] == "Finding. 64 views" and kw["raw"]
    assert kw["metadata"] == {"tpt_nb": {"values": {"n": 64.0}}}


def test_a_sentence_at_the_end_of_a_cell_is_not_shown_twice(shown):
    """nbval compares outputs and does not heed a semicolon at the end of a cell."""
    data, _ = DisplayFormatter().format(findings.say("{n} views", n=64))
    assert data == {} and len(shown) == 1


def test_any_name_may_stand_in_a_sentence():
    assert "here: four" in findings.say("{text} and {x}.", text="here: four", x=1)


def test_what_is_no_number_takes_no_part_and_is_named():
    nan = float("nan")
    text = findings.best({"a": 1.0, "b": nan, "c": (3.0, 2.0, 4.0)})
    assert "Best of 2: c" in text and text.endswith("Without a value: b.")
    assert findings.best({"a": 1.0, "b": nan}).endswith("Nothing to compare. Without a value: b.")
    assert "rises" in findings.trend([1, 2, 3, 4], [1, nan, 2, 3], "x", "")
    assert "too few points" in findings.trend([1, 2, 3], [1, nan, 2], "x", "")

"""metrics: against definitions written out, published values, scipy, and simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, binomtest

from tpt_nb import metrics


def make_records(n=200, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        row = {"id": f"img{i}", "target": int(rng.integers(classes))}
        for when in metrics.WHEN:
            p = rng.dirichlet(np.full(classes, 0.4))
            order = np.argsort(-p)
            row[f"pred_{when}"] = int(order[0])
            row[f"conf_{when}"] = float(p.max())
            row[f"prob_target_{when}"] = float(p[row["target"]])
            row[f"entropy_{when}"] = float(-(p * np.log(p)).sum())
            row[f"top5_{when}"] = bool(row["target"] in order[:5])
        rows.append(row)
    return rows


@pytest.mark.parametrize("when", metrics.WHEN)
def test_means_are_the_means(when):
    rows = make_records()
    assert metrics.accuracy(rows, when) == np.mean([r["target"] == r[f"pred_{when}"] for r in rows])
    assert metrics.top5(rows, when) == np.mean([r[f"top5_{when}"] for r in rows])
    assert metrics.mean_entropy(rows, when) == pytest.approx(
        np.mean([r[f"entropy_{when}"] for r in rows])
    )
    assert metrics.cross_entropy(rows, when) == pytest.approx(
        -np.mean([math.log(r[f"prob_target_{when}"]) for r in rows])
    )


@pytest.mark.parametrize("bins", [1, 4, 15, 20])
def test_ece_is_the_textbook_sum(bins):
    rows = make_records()
    rows[0]["conf_after"] = 1.0  # the upper edge
    rows[1]["conf_after"] = 1 / bins  # an edge belongs to the bin below it
    total = 0.0
    for i in range(bins):
        inside = [r for r in rows if i / bins < r["conf_after"] <= (i + 1) / bins]
        if inside:
            acc = np.mean([r["pred_after"] == r["target"] for r in inside])
            conf = np.mean([r["conf_after"] for r in inside])
            total += len(inside) / len(rows) * abs(acc - conf)
    assert metrics.ece(rows, bins=bins) == pytest.approx(total)


def test_changes_add_up_globally_and_per_class():
    rows = make_records()
    change = metrics.changes(rows)
    table = metrics.per_class(rows, [f"class {i}" for i in range(7)])
    assert table["n"].sum() == len(rows)
    assert table["improved"].sum() == change["improved"] > 0
    assert table["worsened"].sum() == change["worsened"] > 0
    gain = metrics.accuracy(rows, "after") - metrics.accuracy(rows, "before")
    assert gain == pytest.approx((change["improved"] - change["worsened"]) / len(rows))
    for target, row in table.iterrows():
        mine = [r for r in rows if r["target"] == target]
        assert row["class"] == f"class {target}"
        assert row["accuracy_after"] == metrics.accuracy(mine)
        assert row["improved"] == metrics.changes(mine)["improved"]
        if "top5_after" in rows[0]:
            assert row["top5_after"] == metrics.top5(mine)


@pytest.mark.parametrize("n", [1, 5, 37, 500])
def test_wilson_is_scipys(n):
    for k in range(0, n + 1, max(1, n // 7)):
        for level in (0.8, 0.95):
            ours = metrics.wilson(k, n, level)
            theirs = binomtest(k, n).proportion_ci(level, method="wilson")
            assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)
            assert 0 <= ours[0] <= k / n <= ours[1] <= 1
    assert metrics.wilson(0, n)[0] == 0 and metrics.wilson(n, n)[1] == 1


def test_mcnemar_is_the_coin():
    assert metrics.mcnemar(0, 0) == 1
    assert metrics.mcnemar(5, 0) == pytest.approx(2 * 0.5**5)
    assert (
        metrics.mcnemar(3, 9) == metrics.mcnemar(9, 3) == pytest.approx(2 * binom.cdf(3, 12, 0.5))
    )
    assert metrics.mcnemar(4, 4) == 1
    assert metrics.mcnemar(661, 196) < 1e-50  # many pairs neither overflow nor take long


def test_gain_interval_covers_the_truth():
    # 400 images, 6 % turn right and 2 % turn wrong: the interval holds the true gain in about 95 of
    # 100 experiments
    rng = np.random.default_rng(1)
    draws = rng.multinomial(400, [0.06, 0.02, 0.92], size=2000)
    held = np.mean(
        [lo <= 0.04 <= hi for lo, hi in (metrics.gain_interval(a, b, 400) for a, b, _ in draws)]
    )
    assert 0.93 < held < 0.98
    low, high = metrics.gain_interval(0, 0, 10)
    assert low == -high and high > 0.1  # nothing changed in 10 images proves little


def test_bootstrap_agrees_with_the_gain_interval_and_repeats():
    rng = np.random.default_rng(0)
    a = rng.random(800) < 0.3
    b = np.where(rng.random(800) < 0.1, ~a, a)
    one = metrics.bootstrap_difference(a, b, seed=3)
    assert one == metrics.bootstrap_difference(a, b, seed=3)
    assert one != metrics.bootstrap_difference(a, b, seed=4)
    wald = metrics.gain_interval(int((~a & b).sum()), int((a & ~b).sum()), 800)
    assert one == pytest.approx(wald, abs=0.004)
    assert metrics.bootstrap_difference(a, a) == (0, 0)


def test_bootstrap_keeps_the_pairs():
    # two runs that vary wildly from image to image but differ by a constant: unpaired resampling
    # would see noise
    a = np.random.default_rng(0).normal(0, 100, 300)
    assert metrics.bootstrap_difference(a, a + 1, 500) == pytest.approx((1, 1))


def test_compare_aligns_by_id_and_counts_the_rest():
    a, b = make_records(seed=1), make_records(seed=1)
    for row in b[:20]:
        row["pred_after"] = row["target"]
    shuffled = [b[i] for i in np.random.default_rng(0).permutation(len(b))]
    only_b = {**b[0], "id": "new"}
    result = metrics.compare(a[10:], [*shuffled[:], only_b])
    assert (result["n"], result["only_a"], result["only_b"]) == (190, 0, 11)
    wrong = sum(r["pred_after"] != r["target"] for r in a[10:20])
    assert wrong and result["improved"] == wrong and result["worsened"] == 0
    assert result["gain"] == pytest.approx(result["accuracy_b"] - result["accuracy_a"])
    assert result["p_value"] == metrics.mcnemar(wrong, 0)
    back = metrics.compare(shuffled, a[10:])
    assert back["gain"] == -result["gain"] and back["only_a"] == 10


def test_compare_refuses_what_cannot_be_compared():
    a = make_records(5)
    with pytest.raises(ValueError, match="share no image"):
        metrics.compare(a, [{**r, "id": "x" + r["id"]} for r in a])
    with pytest.raises(ValueError, match="another target"):
        metrics.compare(a, [{**r, "target": r["target"] + 1} for r in a])
    with pytest.raises(ValueError, match="twice.*img0"):
        metrics.compare(a, [*a, a[0]])


def test_summary_holds_every_number_and_takes_a_table():
    rows = make_records()
    summary = metrics.summarize(rows)
    assert summary == metrics.summarize(pd.DataFrame(rows))
    assert summary["accuracy_after"] == metrics.accuracy(rows)
    assert summary["ece_before"] == metrics.ece(rows, "before")
    assert summary["cross_entropy_after"] == metrics.cross_entropy(rows)
    assert summary["gain_ci95"][0] < summary["gain"] < summary["gain_ci95"][1]
    bare = [{k: r[k] for k in metrics.NEEDED} for r in rows]
    assert metrics.summarize(bare)["accuracy_after"] == summary["accuracy_after"]
    assert "ece_after" not in metrics.summarize(bare)


def test_a_probability_of_zero_is_not_infinite():
    rows = make_records(3)
    rows[0]["prob_target_after"] = 0.0
    assert 30 < metrics.cross_entropy(rows) < 40


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no records"):
        metrics.summarize([])
    with pytest.raises(ValueError, match="pred_after"):
        metrics.accuracy([{"id": "a", "target": 1, "pred_before": 1}])
    with pytest.raises(ValueError, match="'before' or 'after'.*'later'"):
        metrics.accuracy(make_records(2), "later")
    with pytest.raises(ValueError, match="bins"):
        metrics.ece(make_records(2), bins=0)
    with pytest.raises(ValueError, match="3 of 2"):
        metrics.wilson(3, 2)

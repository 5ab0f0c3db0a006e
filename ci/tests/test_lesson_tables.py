"""The tables that lessons print: stored results by variant, paired gains, Holm's correction."""

import itertools

import numpy as np
import pytest

from tpt_nb.lessons import board, tables


def records(right):
    return [
        {"id": i, "target": 0, "pred_before": 0, "pred_after": int(not r)}
        for i, r in enumerate(right)
    ]


@pytest.fixture(scope="module")
def table():
    return board.read("leaderboard")


def test_each_part_of_the_board_says_the_same_as_its_file(table):
    """Whatever numbers the file holds: the tables show them, in every variant and both means."""
    names, found = board.short(table), board.by_kind(table)
    assert sum(len(shown) for shown in found.values()) == len(table["rows"])
    for row in table["rows"]:
        shown = found[row["kind"]].loc[row["row"]]
        for variant, short in names.items():
            told = 100 * row["variants"][variant]["accuracy"]
            assert float(shown[short]) == pytest.approx(told, abs=0.051)
        assert float(shown["RS"]) == pytest.approx(100 * row["mean_shifted_rest"], abs=0.051)
    rest = [names[v] for v in table["rest"]]
    assert rest and "A" not in rest
    assert list(board.above(table).index[-2:]) == ["ARS", "RS"]


def test_places_without_a_are_those_of_the_mean_without_a(table):
    places = board.places(table)
    mean = {r["row"]: r["mean_shifted_rest"] for r in board.rows(table)}
    first = [name for name, place in places["RS"].items() if place == 1]
    assert all(mean[name] == max(mean.values()) for name in first)
    for a, b in itertools.combinations(mean, 2):
        if mean[a] > mean[b]:
            assert places.loc[a, "RS"] < places.loc[b, "RS"]


def test_above_lists_intervals_that_leave_out_0_only(table):
    _, heads, gains = board.against(table, "vote", board.rows(table, "episodic"))
    for head, column in zip(heads, zip(*gains, strict=True), strict=True):
        text = board.above(table).loc[head, "episodic"]
        clear = sum(g is not None and g[1] > 0 for g in column)
        assert len([t for t in text.split(", ") if t]) == clear
    assert all(g is None or g[1] <= g[0] <= g[2] for row in gains for g in row)


def test_a_row_is_not_compared_with_itself(table):
    vote = next(row for row in table["rows"] if row["row"] == "vote")
    assert board.gain_on(vote, "vote", "shifted") is None
    assert board.gain_on(vote, "vote", table["variants"][0]) is None


def test_losses_are_worst_first(table):
    lost = [gain[0] for gain, _, _ in board.losses(table)]
    assert lost == sorted(lost)
    assert len(lost) == (len(board.rows(table)) - 1) * len(table["variants"])


def test_calibration_has_a_sign_and_words_for_it(table):
    for row in board.rows(table):
        words = board.too_sure(row)
        assert ("too unsure" in words) == (row["overconfidence"] <= 0)


def test_streams_and_damages_keep_every_row():
    stored = board.read("streams")
    assert set(board.streams(stored).index) == set(stored["rows"])
    harm = board.read("damage")
    shown, harms, attacks = board.damages(harm)
    assert len(shown) == len(harm["rows"])
    assert harms and attacks
    mean = shown[harms].to_numpy().mean(axis=1)
    np.testing.assert_allclose(shown["mean of damages"], mean)


def test_holm_multiplies_and_never_falls():
    rng = np.random.default_rng(0)
    base = rng.random(200) < 0.4
    results = {"base": records(base)}
    for k, share in enumerate((0.02, 0.1, 0.15, 0.4)):
        results[f"m{k}"] = records(base | (rng.random(200) < share))
    corrected = tables.holm(results, "base")
    plain = {m: tables.holm({"base": results["base"], m: results[m]}, "base")[m] for m in corrected}
    order = sorted(plain, key=plain.get)
    assert corrected[order[0]] == pytest.approx(min(1, 4 * plain[order[0]]))
    assert corrected[order[-1]] >= plain[order[-1]]
    values = [corrected[m] for m in order]
    assert values == sorted(values)
    assert max(values) <= 1


def test_gains_are_paired_and_leave_out_the_baseline():
    base, better = [True, False, False, True], [True, True, True, False]
    found = tables.gains({"a": records(base), "b": records(better)}, "a")
    assert list(found) == ["b"]
    value, low, high = found["b"]
    assert value == pytest.approx(25)
    assert low < value < high
    shown = tables.versus({"a": records(base), "b": records(better)}, "a")
    assert shown.loc["b", "better / worse"] == "2 / 1"


def test_names_of_a_price_figure_lie_over_no_mark_and_no_other_name():
    import matplotlib

    matplotlib.use("Agg")
    from tpt_nb import figures

    rng = np.random.default_rng(1)
    points = {
        f"method {k}": (
            float(10 ** rng.uniform(-1, 2)),
            (g := float(rng.normal()), g - 0.1, g + 0.1),
        )
        for k in range(16)
    }
    fig = figures.price(points, {"all": list(points)}, "ms", "points")
    fig.draw_without_rendering()
    (axis,) = fig.axes
    boxes = [t.get_window_extent() for t in axis.texts if t.get_text()]
    assert len(boxes) == len(points)
    marks = [axis.transData.transform((x, y[0])) for x, y in points.values()]
    over = sum(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    hidden = sum(box.contains(*mark) for box in boxes for mark in marks)
    assert over == hidden == 0

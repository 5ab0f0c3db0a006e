import collections
import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
import torch

from tpt_nb import methods, metrics
from tpt_nb.core.paths import REPO
from tpt_nb.runs import board as tables
from tpt_nb.runs import leaderboard, load_run, run
from tpt_nb.runs.sweep import read_yaml

FEW = ["zero_shot", "vote", "tda"]
SMALL = {"reduced_size": 6, "n_aug": 11}
TWO = ["iconshift-a", "iconshift-r"]


def board(out, variants=TWO[:1], names=FEW, code=0, **options):
    """A small leaderboard as the command line starts it; returns its JSON."""
    options = leaderboard.LeaderboardOptions(
        variants=variants, methods=names, orders=2, json=True, **options
    )
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert leaderboard.leaderboard(options, SMALL | {"out": str(out)}) == code
    return json.loads(text.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A small table of two data sets and two seeds: its folder, its JSON."""
    out = tmp_path_factory.mktemp("board")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPT_NB_CACHE", str(out / "cache"))
        patch.setenv("TQDM_DISABLE", "1")
        return out, board(out / "runs", TWO, seeds=2)


@pytest.fixture
def out(first, monkeypatch):
    monkeypatch.setenv("TPT_NB_CACHE", str(first[0] / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return first[0] / "runs"


def test_the_table(first):
    _, table = first
    rows = {row["row"]: row for row in table["rows"]}
    assert list(rows) == [*FEW, "zero_shot + seven", "vote + seven", "zero_shot + coop",
                          "vote + coop"]  # fmt: skip
    assert table["variants"] == table["decisive"] == TWO and table["seeds"] == 2
    assert table["left_out"] == TWO[:1] and table["rest"] == TWO[1:] and table["failed"] == {}
    for row in rows.values():
        assert row["kind"] == ("online" if row["method"] == "tda" else "episodic")
        assert row["settings"] == "one"
        accuracies = [row["variants"][v]["accuracy"] for v in TWO]
        assert row["mean"] == pytest.approx(np.mean(accuracies)) == row["mean_shifted"]
        assert row["variants"][TWO[0]]["accuracy"] == pytest.approx(
            np.mean(row["variants"][TWO[0]]["by_seed"])
        )
        assert row["mean_rest"] == row["mean_shifted_rest"] == accuracies[1]
        assert list(row["gains"]) == ["zero_shot", "vote"]  # tpt is not among the rows
        for name, gains in row["gains"].items():
            base = rows[name]
            for part, mean in (("shifted", "mean"), ("rest", "mean_rest")):
                gain, low, high = gains[part]
                assert gain == pytest.approx(row[mean] - base[mean])
                assert low <= gain <= high
            for v in TWO:
                gain, low, high = row["variants"][v]["gains"][name]
                both = (r["variants"][v]["accuracy"] for r in (row, base))
                assert gain == pytest.approx(next(both) - next(both)) and low <= gain <= high
        assert sum(row["reliability"]["n"]) == 2 * 2 * 6
        assert row["seconds"] > 0 and row["bytes"] > 0
        assert len(row["runs"]) == 2 * 2 * (2 if row["kind"] == "online" else 1)
    assert table["wins"]["vote"]["tda"][0] == pytest.approx(
        rows["vote"]["mean"] - rows["tda"]["mean"]
    )
    assert len(table["about"]["fingerprint"]) > 8 and "contrast_vote" in table["absent"]


def test_a_row_is_of_runs(first, out):
    """Each number comes from the records of ordinary runs, which the table names."""
    runs = [load_run(path.parent) for path in out.glob("*/config.json")]
    hashes = {run.name.rsplit("_", 1)[1]: run for run in runs}
    row = next(row for row in first[1]["rows"] if row["row"] == "tda")
    mine = [hashes[name] for name in row["runs"]]
    assert [(r.config.dataset, r.config.seed, r.config.options["order"]) for r in mine] == [
        (v, seed, seed * 2 + k) for v in TWO for seed in (0, 1) for k in (0, 1)
    ]
    accuracies = [metrics.accuracy(r.records) for r in mine]
    assert row["mean"] == pytest.approx(np.mean(accuracies))
    vote = next(row for row in first[1]["rows"] if row["row"] == "vote")
    first_run = hashes[vote["runs"][0]]
    assert vote["variants"][TWO[0]]["by_seed"][0] == metrics.accuracy(first_run.records)
    every = [hashes[name] for name in vote["runs"][:2]]
    records = [r | {"id": f"{i} {r['id']}"} for i, run in enumerate(every) for r in run.records]
    assert vote["variants"][TWO[0]]["ece"] == pytest.approx(metrics.ece(records))
    surer = np.mean([r["conf_after"] - (r["pred_after"] == r["target"]) for r in records])
    assert vote["variants"][TWO[0]]["overconfidence"] == pytest.approx(surer)
    assert vote["variants"][TWO[0]]["log_prob"] == pytest.approx(-metrics.cross_entropy(records))


def test_a_second_time_computes_nothing_and_a_new_method_is_in(first, out, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*.json*")}
    assert board(out, TWO, seeds=2)["rows"] == first[1]["rows"]
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/*.json*")} == before

    def always_first(features, prompts, options):
        """A method: one function, one line in the registry."""
        found = methods.get("zero_shot")(features, prompts)
        return dataclasses.replace(found, logits=torch.zeros_like(found.logits))

    new = methods.Method(always_first, methods.get("zero_shot").options)
    monkeypatch.setitem(methods.registry.METHODS, "always_first", new)
    grid = read_yaml(REPO / "notebooks" / "sweeps" / "leaderboard.yaml", leaderboard.KEYS)
    cells, _ = leaderboard.cells_of(grid, TWO[:1], [], 1, 1, SMALL)
    assert "always_first" in [cell.label for cell in cells]


def test_all_and_n_are_as_people_write_them(tmp_path):
    grid = read_yaml(REPO / "notebooks" / "sweeps" / "leaderboard.yaml", leaderboard.KEYS)
    asked = dict(methods=["vote"], seeds=1, orders=1, overrides={"reduced_size": 4})
    found = [leaderboard.cells_of(grid, v, **asked) for v in ([], ["all"])]
    assert found[0] == found[1] and list(found[0][1]) == grid["variants"]
    asked |= dict(methods=[], orders=3)
    counts = collections.Counter(c.label for c in leaderboard.cells_of(grid, TWO[:1], **asked)[0])
    for name in methods.names():
        if not (method := methods.get(name)).needs:  # all images at once: there is no order
            assert counts[name] == (3 if method.kind == "online" else 1), name
    assert counts["tda"] == 3


def test_a_failing_row_costs_only_itself(first, out, monkeypatch):
    def breaks(features, prompts, options):
        raise ValueError("no such thing\nat all")

    bad = methods.Method(breaks, methods.get("zero_shot").options)
    monkeypatch.setitem(methods.registry.METHODS, "breaks", bad)
    monkeypatch.setattr(leaderboard, "run_many", here)
    table = board(out, TWO, [*FEW, "breaks"], code=1, seeds=2)
    assert table["rows"] == first[1]["rows"]
    assert table["failed"] == {"breaks": f"{TWO[0]}, seed 0: no such thing\nat all"}
    assert "FAILED breaks: iconshift-a, seed 0: no such" in tables.text_table(table, {})
    with pytest.raises(ValueError, match="every row failed, the first: breaks: iconshift-a"):
        board(out, TWO[:1], ["breaks"])


def here(configs, logs, jobs):
    """``run_many`` in this process, which knows a method made by a test."""
    for i, config in enumerate(configs):
        try:
            yield i, run(config, progress=False)
        except ValueError as error:
            yield i, error


def test_the_table_for_people_has_a_part_for_each_kind_and_the_tails(first):
    streams = {"tda": {"sorted": {"mean": 0.5, "tail": 0.123}}}
    text = tables.text_table(first[1], streams)
    episodic, online, notes = text.split("\n\n")
    assert episodic.startswith("episodic\n") and online.startswith("online\n")
    assert "tail, sorted" in online and "12.3" in online and "tail" not in episodic
    assert "over vote (rest)" in episodic and "FAILED" not in text
    assert notes.endswith("-iconshift-a: without it, iconshift-r")


def test_what_is_in_depends_on_the_model(tmp_path):
    grid = read_yaml(REPO / "notebooks" / "sweeps" / "leaderboard.yaml", leaderboard.KEYS)

    def labels(**overrides):
        cells, data = leaderboard.cells_of(grid, TWO[:1], [], 1, 1, SMALL | overrides)
        assert list(data) == TWO[:1]
        return {cell.label for cell in cells}

    plain = {name for name in methods.names() if not methods.get(name).needs}
    assert labels() == plain | {f"{m} + {p}" for m in ("zero_shot", "vote")
                                for p in ("seven", "coop")} | {"tpt + coop"}  # fmt: skip
    assert labels(model="RN50") == plain | {f"{m} + seven" for m in ("zero_shot", "vote")} | {
        "zero_shot + eighty"
    }
    assert "vote + coop" in labels(model="RN50", coop="some.pth.tar")


def test_mistakes_are_one_line(out):
    for names, options, message in (
        (["vot"], {}, "did you mean 'vote'"),
        (["ra_tta"], {}, "ra_tta needs "),
        (FEW, {"seeds": 0}, "at least 1"),
        (FEW, {"variants": ["nowhere"]}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            board(out, **{"names": names} | options)


def test_freshness_is_that_of_the_runs(first, out, monkeypatch, tmp_path, capsys):
    stored = tmp_path / "leaderboard.json"
    monkeypatch.setattr(leaderboard, "STORED", stored)
    stored.write_text(json.dumps(first[1]))
    check = leaderboard.LeaderboardOptions(check=True)
    assert leaderboard.leaderboard(check) == 0 and "fresh" in capsys.readouterr().out
    first[1]["rows"][1]["runs"][0] = "12345678"
    stored.write_text(json.dumps(first[1]))
    assert leaderboard.leaderboard(check) == 1
    assert "of today: vote\n" in capsys.readouterr().out


def test_the_stored_table_is_of_the_runs_of_today():
    if "asked" not in json.loads(leaderboard.STORED.read_text())["about"]:
        pytest.skip("it was made before tables named their runs")
    assert leaderboard.leaderboard(leaderboard.LeaderboardOptions(check=True)) == 0


# --- numbers behind the table --------------------------------------------------------------------


def test_mean_gain_weighs_data_sets_equally():
    a = [np.zeros(10), np.zeros(1000)]
    b = [np.ones(10), np.zeros(1000)]
    assert metrics.mean_gain(a, b) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="same images"):
        metrics.mean_gain(a, b[:1])


def test_mean_gain_covers_the_truth():
    """Two sets with true gains 0.1 and 0.0: the 95 % interval holds 0.05 about 95 times of 100."""
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        a = [rng.random(150) < 0.5, rng.random(100) < 0.3]
        b = [rng.random(150) < 0.6, rng.random(100) < 0.3]
        _, low, high = metrics.mean_gain(a, b, resamples=500, seed=trial)
        held += low <= 0.05 <= high
    assert 178 <= held <= 200


def test_mean_gain_is_the_bootstrap():
    rng = np.random.default_rng(1)
    a, b = rng.random(300) < 0.5, rng.random(300) < 0.6
    _, low, high = metrics.mean_gain([a], [b])
    expected = metrics.bootstrap_difference(a, b)
    assert (low, high) == pytest.approx(expected, abs=0.006)


def test_reliability_is_what_ece_is_made_of():
    rng = np.random.default_rng(2)
    confidence = rng.random(500)
    right = rng.random(500) < confidence**2
    bins = metrics.reliability(confidence, right)
    table = [
        {"id": i, "target": 0, "pred_before": 0, "pred_after": int(not r), "conf_after": c}
        for i, (c, r) in enumerate(zip(confidence, right, strict=True))
    ]
    gap = (bins.n * (bins.accuracy - bins.confidence).abs()).sum() / 500
    assert gap == pytest.approx(metrics.ece(table))
    assert bins.n.sum() == 500

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tpt_nb import datasets, metrics
from tpt_nb import methods as adapt
from tpt_nb.datasets import CORRUPTIONS, corrupt, corrupted, registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import leaderboard

FEW = ["zero_shot", "vote", "tda"]


def board(out, *more, methods=FEW, variants=("iconshift-a",)):
    argv = ["--variants", *variants, "--n", "6", "--n_aug", "11", "--orders", "2"]
    return leaderboard.main([*argv, "--methods", *methods, "--out", str(out), *more])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A small table of two data sets and two seeds: its folder, its JSON."""
    out = tmp_path_factory.mktemp("board")
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setenv("TPT_NB_CACHE", str(out / "cache"))
        code = board(out, "--json", "--seeds", "2", variants=("iconshift-a", "iconshift-r"))
    assert code == 0
    return out, json.loads(text.getvalue().splitlines()[-1])


def test_the_table(first):
    _, table = first
    rows = {row["row"]: row for row in table["rows"]}
    assert set(rows) == {"zero_shot", "vote", "tda", *(f"{m} + {p}" for m, p in leaderboard.MORE
                         if m in FEW and p != "eighty")}  # fmt: skip
    assert table["variants"] == table["decisive"] == ["iconshift-a", "iconshift-r"]
    for row in rows.values():
        assert row["online"] == (row["method"] == "tda")
        accuracies = [row["variants"][v]["accuracy"] for v in table["variants"]]
        assert row["mean"] == pytest.approx(np.mean(accuracies)) == row["mean_shifted"]
        gain, low, high = row["gain_over_zero_shot"]
        assert gain == pytest.approx(row["mean"] - rows["zero_shot"]["mean"])
        assert low <= gain <= high
        assert sum(row["reliability"]["n"]) == 2 * 2 * 6
        assert row["seconds"] > 0 and row["bytes"] > 0
    assert table["wins"]["vote"]["tda"][0] == pytest.approx(
        rows["vote"]["mean"] - rows["tda"]["mean"]
    )
    assert len(table["about"]["fingerprint"]) > 8


def test_a_row_is_what_the_method_predicts(first):
    out, _ = first
    raw = [json.loads(p.read_text()) for p in out.glob("iconshift-r-1-*.json")]
    found = next(r for r in raw if r["row"] == "vote")
    from tpt_nb import models
    from tpt_nb.features import encode
    from tpt_nb.models import Prompts
    from tpt_nb.views import RandomViews

    data = datasets.load("iconshift-r", n=6)
    model = models.load("mini")
    views = RandomViews(n_aug=11, size=model.image_size)
    f = encode(data, model, views, seed=1, cache=out / "cache", progress=False)
    assert f.encoded == 0, "encoded once, by the leaderboard"
    logits = adapt.METHODS["vote"](f.features, Prompts(model, data.classnames)).logits
    assert found["predicted"] == logits.argmax(1).tolist()
    assert found["correct"] == [float(x) for x in logits.argmax(1) == f.targets]
    assert found["ids"] == data.ids


def test_no_method_reads_labels(first, monkeypatch, tmp_path):
    """With shuffled targets every row predicts the same; what counts as right differs."""
    out, _ = first
    monkeypatch.setenv("TPT_NB_CACHE", str(out / "cache"))
    load = datasets.load

    def shuffled(name, **kwargs):
        data = load(name, **kwargs)
        data.targets = data.targets[1:] + data.targets[:1]
        return data

    monkeypatch.setattr(registry, "load", shuffled)
    assert board(tmp_path) == 0
    theirs = {
        r["row"]: r for p in out.glob("iconshift-a-0-*.json") for r in [json.loads(p.read_text())]
    }
    mine = {r["row"]: r for p in tmp_path.glob("*-0-*.json") for r in [json.loads(p.read_text())]}
    assert set(mine) == set(theirs)
    for label, row in mine.items():
        assert row["predicted"] == theirs[label]["predicted"]
        assert row["confidence"] == theirs[label]["confidence"]
        assert row["targets"] != theirs[label]["targets"]


def test_a_second_time_computes_nothing_and_a_new_method_is_in(
    first, monkeypatch, tmp_path, capsys
):
    out, table = first
    monkeypatch.setenv("TPT_NB_CACHE", str(out / "cache"))
    measure, calls = leaderboard.measure, []
    monkeypatch.setattr(
        leaderboard, "measure", lambda row, *a: calls.append(row.label) or measure(row, *a)
    )
    variants = ("iconshift-a", "iconshift-r")
    assert board(out, "--json", "--seeds", "2", variants=variants) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not calls and again["rows"] == table["rows"]

    def always_first(features, prompts):
        """A method: one function, one line in the registry."""
        out = adapt.zero_shot(features, prompts)
        out.logits = torch.zeros_like(out.logits)
        return out

    monkeypatch.setitem(adapt.METHODS, "always_first", always_first)
    assert board(out, "--json", methods=[*FEW, "always_first"]) == 0
    assert calls == ["always_first"]
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert "always_first" in [row["row"] for row in rows]


def test_mistakes_are_one_line(capsys, tmp_path):
    assert board(tmp_path, methods=["vot"]) == 2
    assert "did you mean 'vote'" in capsys.readouterr().err
    assert board(tmp_path, "--seeds", "0") == 2
    assert leaderboard.main(["--variants", "nowhere"]) == 2


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


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_grows_with_severity(kind):
    image, _ = datasets.load("iconshift-v2", n=1)[0]
    plain = np.asarray(image.convert("RGB"), float)
    found = [corrupt(image, kind, s, seed=1) for s in (1, 2, 3, 4, 5)]
    change = [np.abs(np.asarray(x, float) - plain).mean() for x in found]
    assert all(x.size == image.size and x.mode == "RGB" for x in found)
    assert change == sorted(change) and change[0] > 0
    again = corrupt(image, kind, 3, seed=1)
    assert np.array_equal(np.asarray(again), np.asarray(found[2]))


def test_a_damaged_data_set_is_another_one():
    clean = datasets.load("iconshift-v2", n=3)
    noisy = corrupted(clean, "noise", 2)
    assert noisy.ids == clean.ids and noisy.targets == clean.targets
    assert noisy.name != clean.name and noisy.fingerprint != clean.fingerprint
    assert len({corrupted(clean, k, s).fingerprint for k in CORRUPTIONS for s in (1, 5)}) == 10
    one, again = (np.asarray(noisy[1][0]) for _ in range(2))
    assert np.array_equal(one, again)
    two = np.asarray(corrupted(clean, "noise", 2)[2][0])
    clean_noise = [np.asarray(noisy[i][0], int) - np.asarray(clean[i][0], int) for i in (1, 2)]
    assert not np.array_equal(*clean_noise) and two.shape == one.shape
    with pytest.raises(ValueError, match="Known: noise"):
        corrupted(clean, "rain", 1)
    with pytest.raises(ValueError, match="severity"):
        corrupted(clean, "noise", 6)

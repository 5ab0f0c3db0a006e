"""Tables of the notebooks: what stands in them are the numbers of ``metrics``."""

from types import SimpleNamespace

import numpy as np
import pytest

from tpt_nb import metrics
from tpt_nb.lessons import tables


def run(right) -> SimpleNamespace:
    rows = [{"id": str(i), "target": 1, "pred_before": 0, "pred_after": r} for i, r in right]
    return SimpleNamespace(records=rows)


def test_versus_compares_the_same_images():
    rng = np.random.default_rng(0)
    right = rng.random((2, 50)) < [[0.3], [0.6]]
    runs = {
        name: run(enumerate(r.astype(int).tolist())) for name, r in zip("ab", right, strict=True)
    }
    table = tables.versus(runs, "a")
    gain = 100 * (right[1].mean() - right[0].mean())
    assert table.loc["b", "against a"] == f"{gain:+.1f}"
    assert table.loc["b", "accuracy (%)"] == f"{100 * right[1].mean():.1f}"
    assert (table.loc["a", "against a":"p"] == "").all()
    up, down = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    assert table.loc["b", "better / worse"] == f"{up} / {down}"
    assert table.equals(tables.versus(dict(zip("ab", right, strict=True)), "a"))
    assert tables.accuracy(runs["b"]) == pytest.approx(tables.share(right[1]))
    assert tables.share(right[1])[1:] == pytest.approx(
        [100 * x for x in metrics.wilson(int(right[1].sum()), 50)]
    )


def test_the_stored_study_has_the_bits_that_its_accuracies_say():
    table = tables.stored_study()
    assert len(table) > 20 and table.file.nunique() == 1
    for row in table.itertuples():
        assert len(row.hits) == row.n and row.hits.mean() == pytest.approx(row.accuracy, abs=1e-6)
    assert tables.stored_study(dataset="no such set") is None
    assert tables.stored_study(SimpleNamespace(fingerprint="of other weights")) is None

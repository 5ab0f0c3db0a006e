"""Orders of the images by kind, what methods make of them, and the table of `streams`."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from test_runs import world  # noqa: F401 (a fixture)

from tpt_nb import __main__ as cli
from tpt_nb import datasets, figures, methods
from tpt_nb.runs import orders as draw
from tpt_nb.runs import streams

TARGETS = torch.arange(8).repeat_interleave(30)[torch.randperm(240)]
KINDS = list(streams.ORDERS)


def neighbours(rows: torch.Tensor, targets: torch.Tensor = TARGETS) -> float:
    """Share of the images that come right behind one of their class."""
    classes = targets[rows]
    return float((classes[:, 1:] == classes[:, :-1]).double().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_orders_are_permutations_that_the_seed_draws(kind):
    rows = streams.ORDERS[kind](TARGETS, 6, 0)
    assert rows.shape == (6, 240)
    assert (rows.sort(1).values == torch.arange(240)).all()
    assert torch.equal(rows, streams.ORDERS[kind](TARGETS, 6, 0))
    assert torch.equal(rows[:2], streams.ORDERS[kind](TARGETS, 2, 0)), "the first of more"
    assert (rows != streams.ORDERS[kind](TARGETS, 6, 1)).any(1).all()
    assert len({tuple(row) for row in rows.tolist()}) == 6


def test_sorted_streams_have_each_class_in_one_piece():
    rows = draw.class_by_class(TARGETS, 5)
    for classes in TARGETS[rows].tolist():
        changes = [c for i, c in enumerate(classes) if not i or c != classes[i - 1]]
        assert len(changes) == 8
    assert len({tuple(TARGETS[row].tolist()) for row in rows}) == 5, "classes in random order"
    within = [row[TARGETS[row] == 0].tolist() for row in rows]
    assert any(a != sorted(a) for a in within), "images in random order too"


def test_dirichlet_streams_lie_between_shuffled_and_sorted():
    between = [draw.dirichlet(TARGETS, 40, gamma=g) for g in (1e3, 0.1, 0.001)]
    loose, middle, tight = (neighbours(rows) for rows in between)
    iid, whole = neighbours(draw.shuffled(TARGETS, 40)), neighbours(draw.class_by_class(TARGETS, 5))
    assert iid == pytest.approx(29 / 239, abs=0.01) and whole == pytest.approx(232 / 239)
    assert loose == pytest.approx(iid, abs=0.035)
    assert iid + 0.1 < middle < tight - 0.05 and tight < whole
    # gamma -> 0: each class is in one of the 8 slots, alone if no other has drawn it
    for row in between[2][:10]:
        place = torch.empty(240)
        place[row] = torch.arange(240.0)
        places = [place[c == TARGETS] for c in range(8)]
        assert np.median([float(p.max() - p.min()) for p in places]) < 120


def test_domains_come_one_after_another():
    rows = draw.one_after_another([5, 3, 9], 4)
    assert (rows.sort(1).values == torch.arange(17)).all()
    for row in rows:
        assert row[:5].max() < 5 and (row[5:8] // 5 == 1).all() and row[8:].min() >= 8
    assert any(row[8:].tolist() != sorted(row[8:].tolist()) for row in rows)


@pytest.mark.parametrize(("low", "high", "size"), [(1, 4, 64), (2, 10, 64), (3, 3, 16), (4, 4, 3)])
def test_batches_have_as_many_classes_as_asked(low, high, size):
    orders = draw.few_classes(TARGETS, 5, low=low, high=high, size=size)
    assert len(orders) == 5
    counts = set()
    for batches in orders:
        assert torch.cat(batches).sort().values.tolist() == list(range(240)), "each image once"
        assert max(map(len, batches)) <= size
        left = set(range(8))
        for number, batch in enumerate(batches):
            classes = set(TARGETS[batch].tolist())
            assert len(classes) <= min(high, size)
            if len(left) >= high and size >= high:
                assert len(classes) >= low
                counts.add(len(classes))
            later = torch.cat(batches[number + 1 :]) if number + 1 < len(batches) else batch[:0]
            left = set(TARGETS[later].tolist())
    if high <= 8 and size >= high:
        assert counts == set(range(low, high + 1))
    again = draw.few_classes(TARGETS, 2, low=low, high=high, size=size)
    assert all(torch.equal(a, b) for x, y in zip(again, orders, strict=False)
               for a, b in zip(x, y, strict=True))  # fmt: skip


def test_the_tail_is_the_mean_of_the_worst_tenth():
    accuracy = [i / 100 for i in range(100)]
    assert streams.tail(accuracy[::-1]) == pytest.approx(np.mean(accuracy[:10]))
    assert streams.tail([0.5, 0.4, 0.6]) == 0.4
    assert streams.tail([0.5]) == 0.5


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def grid(world, tmp_path, monkeypatch):  # noqa: F811
    """A grid over a folder of pictures, and the options of the command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(streams, "STORED", tmp_path / "streams.json")
    rows = [{"method": "zero_shot"}, {"method": "vote", "label": "a vote"}]
    values = {"variants": ["folder"], "domains": ["folder", "folder"], "batch": 8, "rows": rows}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values | {"common": {"n_aug": 3}}))
    return ["--grid=grid.yaml", *(f"--{key}={value}" for key, value in world.items())]


def run(capsys, *arguments: str) -> dict:
    assert cli.main(["streams", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_table_of_streams(grid, capsys, tmp_path):
    chosen = ["--methods", "zero_shot", "vote", "tda", "stata"]
    table = run(capsys, *grid, *chosen, "--orders=4", "--write")
    assert json.loads((tmp_path / "streams.json").read_text()) == table
    rows, labels = table["rows"], table["labels"]
    assert list(rows) == ["zero_shot", "a vote", "tda", "stata", "stata, 8 at a time"]
    for label in ("zero_shot", "a vote"):  # computed once: the line that does not move
        assert not labels[label]["moves"] and labels[label]["loss"] == 0
        values = {(x["mean"], x["tail"]) for kind, x in rows[label].items() if kind != "domains"}
        assert len(values) == 1 and len(*values) == 2 and len(set(*values)) == 1
        assert rows[label]["sorted"]["sets"]["folder"]["orders"] == 1
        assert set(streams.FEW) <= set(rows[label])
    assert not labels["stata"]["moves"] and not set(streams.FEW) & set(rows["stata"])
    for label in ("tda", "stata, 8 at a time"):
        assert labels[label]["moves"]
        for kind in (*KINDS, "domains"):
            found = rows[label][kind]
            assert found["tail"] <= found["mean"] + 1e-9
            assert all(x["orders"] == 4 for x in found["sets"].values())
        loss = rows[label]["shuffled"]["mean"] - rows[label]["sorted"]["mean"]
        assert labels[label]["loss"] == pytest.approx(loss)
    assert set(streams.FEW) <= set(rows["stata, 8 at a time"]) and "domains" in rows["tda"]
    assert set(streams.FEW).isdisjoint(rows["tda"])


def test_finished_cells_are_not_done_again(grid, capsys, monkeypatch):
    chosen = ["--methods", "tda", "stata", "--orders=3"]
    first = run(capsys, *grid, *chosen)

    def no(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(streams, "right_in", no)
    assert run(capsys, *grid, *chosen) == first
    with pytest.raises(AssertionError, match="again"):
        run(capsys, *grid, *chosen[:-1], "--orders=4")


def test_a_cell_is_what_the_method_gives_in_these_orders(world):  # noqa: F811
    """Order by order, as one call for each gives it; batch by batch likewise."""
    made = {"rows": [], "variants": ["folder"], "domains": [], "batch": 5}
    rows = streams.rows_of(made | {"common": world | {"n_aug": 3}}, ["tda", "stata"], 4)
    for row in (rows[0], rows[-1]):
        config = row.configs[0]
        whole = [datasets.load(config.dataset, None, 0, config.root)]
        opened = streams.open_row(row.configs, whole)
        method, options = methods.get(config.method), streams.options_of(config)
        orders = draw.class_by_class(opened.targets, 4, config.seed)
        right = streams.right_in("sorted", opened, 4)
        for o, order in enumerate(orders):
            out = method.adapt(opened.views, opened.prompts, options, orders=order).logits
            assert torch.equal(right[o], out.argmax(-1) == opened.targets)
        assert row.kinds[:5] == tuple(KINDS)
    right = streams.right_in("1-4 classes", opened, 3)
    for o, batches in enumerate(draw.few_classes(opened.targets, 3, config.seed, 1, 4)):
        for batch in batches:
            out = method(opened.views[batch], opened.prompts).logits
            assert torch.equal(right[o, batch], out.argmax(-1) == opened.targets[batch])


def test_what_cannot_be_is_said_in_a_line(grid, capsys):
    for arguments, message in (
        (["--orders=0"], "at least 1"),
        (["--methods", "difftpt"], "needs generated views"),
        (["--grid", "nowhere.yaml"], "nowhere.yaml"),
    ):
        assert cli.main(["streams", *grid, *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.strip().splitlines()) == 1


def test_the_figure_shows_means_tails_and_lines_that_do_not_move():
    values = {f"m{i}": [(50 + i, 48 + i), (math.nan, math.nan), (40 + i, 30 + i)] for i in range(8)}
    fig = figures.streams(["shuffled", "dirichlet", "sorted"], values, {"zero-shot": 45.0})
    (axis,) = fig.axes
    looks = [(line.get_color(), line.get_marker()) for line in axis.lines]
    marks = {look for look in looks if look[1] not in ("", "None", None)}
    assert len(marks) == 8, "no two look the same"
    whiskers = [s for c in axis.collections for s in c.get_segments() if s.ndim == 2]
    assert any(np.allclose(s[:, 1], [30, 40]) for s in whiskers)
    assert any(np.allclose(line.get_ydata(), 45) for line in axis.lines)
    assert [t.get_text() for t in axis.get_xticklabels()] == ["shuffled", "dirichlet", "sorted"]

"""runs/sweep.py: grids, one table, features encoded once, failures that stop nothing, kills."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_runs import world  # noqa: F401 (a fixture)

from tpt_nb import metrics, models
from tpt_nb.core.paths import DATA, REPO
from tpt_nb.runs import RunConfig, load_run, pool, resolve, run, sweep
from tpt_nb.runs.records import Run


def do(path, jobs=2, save="", **overrides):
    """A sweep as the command line starts it; returns the exit code."""
    options = sweep.SweepOptions(jobs=jobs, json=True, save=save)
    return sweep.sweep(path, options, overrides)


ROWS = [
    {"label": "prompt", "method": "zero_shot", "reported": 12.5},
    {"label": "TPT"},
    {"label": "wrong", "loss": "patch_los1"},
    {"label": "steps", "tta_steps": 2},
    {"label": "grid", "augmenter": "patch", "n_aug": 2, "n_patches": 4,
     "overlap": [0.0, 0.4], "loss": ["defaultTPT", "patch_loss2_study"]},
    {"label": "no such file", "model": "/nowhere/model.pt"},
]  # fmt: skip


@pytest.fixture
def grid(world, tmp_path, monkeypatch):  # noqa: F811
    """A grid file over the small world, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    common = {**world, "cache": str(tmp_path / "cache"), "learning_rate": 0.05}
    text = yaml.safe_dump({"baseline": "TPT", "common": common, "rows": ROWS}, sort_keys=False)
    (tmp_path / "small.yaml").write_text(text)
    return tmp_path / "small.yaml"


def test_a_sweep(grid, capsys):
    assert do(grid, reduced_size=12) == 1  # two rows cannot work
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    labels = ["prompt", "TPT", "steps", *(f"grid overlap={o} loss={loss}" for o in (0.0, 0.4)
              for loss in ("defaultTPT", "patch_loss2_study"))]  # fmt: skip
    assert [row["label"] for row in result["rows"]] == labels
    assert {f["label"] for f in result["failed"]} == {"wrong", "no such file"}
    assert "did you mean 'patch_loss1'" in result["failed"][0]["error"]

    runs = {row["label"]: load_run(f"runs/small/{row['run']}") for row in result["rows"]}
    for row in result["rows"]:
        done = runs[row["label"]]
        assert row["n"] + row["failed_images"] == 12 == done.config.reduced_size
        assert row["accuracy"] == metrics.accuracy(done.records)
        assert metrics.changes(done.records) == {k: row[k] for k in ("improved", "worsened")}
        paired = metrics.compare(runs["TPT"].records, done.records)
        assert row["p_vs_baseline"] == paired["p_value"]
        assert row["gain_vs_baseline"] == paired["gain"]
        assert [row["ci_low"], row["ci_high"]] == paired["accuracy_b_ci95"]
    assert result["rows"][0]["reported"] == 12.5 and result["rows"][1]["reported"] is None
    # each of the four sets of views was encoded by one row
    assert sorted(done.summary["encoded"] for done in runs.values()) == [0, 0, 0] + [
        done.summary["n"] for done in list(runs.values())[:4]
    ]

    # a row of a process that did others before is the run that it would be alone
    alone = dataclasses.replace(runs["steps"].config, out="alone")
    assert [x["pred_after"] for x in run(alone).records] == [
        x["pred_after"] for x in runs["steps"].records
    ]

    text = Path("runs/small/table.md").read_text()
    assert text.count("\n| ") == 8 and "- wrong: unknown loss" in text
    with open("runs/small/table.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["label"] for row in table] == labels
    assert float(table[3]["p_vs_baseline"]) == result["rows"][3]["p_vs_baseline"]

    # again: what is there is loaded, what a kill left half done is finished with the same bytes
    records = {path: path.read_bytes() for path in Path("runs/small").glob("*/records.jsonl")}
    half = sorted(records)[-1]
    half.write_bytes(records[half][: len(records[half]) // 2])
    (half.parent / "summary.json").unlink()
    seconds = table.pop(labels.index(by_run(result, half)))["seconds_per_image"]
    assert do(grid, reduced_size=12, save="kept/small") == 1
    captured = capsys.readouterr()
    assert "patch_loss2_study: " in captured.out
    assert {p: p.read_bytes() for p in Path("runs/small").glob("*/records.jsonl")} == records
    with open("runs/small/table.csv") as file:
        again = list(csv.DictReader(file))
    assert again.pop(labels.index(by_run(result, half)))["seconds_per_image"] != seconds
    assert again == table
    assert "rows failed" in captured.out and not Path("kept").exists()

    # a table to keep says what was measured on what, and not when or how fast
    about = {"about": "six  rows", "rows": [ROWS[0], ROWS[1], ROWS[3], ROWS[4]]}
    text = yaml.safe_dump({**yaml.safe_load(grid.read_text()), **about}, sort_keys=False)
    grid.write_text(text)
    assert do(grid, reduced_size=12, save="kept/small") == 0
    with open("kept/small.csv") as file:
        kept = list(csv.DictReader(file))
    assert [row["label"] for row in kept] == labels and "seconds_per_image" not in kept[0]
    assert [float(row["accuracy"]) for row in kept] == [r["accuracy"] for r in result["rows"]]
    for row in kept:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8))[: int(row["n"])]
        assert bits.tolist() == metrics.correct(runs[row["label"]].records).astype(int).tolist()
    model = models.load(yaml.safe_load(grid.read_text())["common"]["model"])
    assert {row["model_fingerprint"] for row in kept} == {model.fingerprint}
    text = Path("kept/small.md").read_text()
    assert text.startswith("six rows\n\n") and model.fingerprint in text
    bytes_ = [Path(f"kept/small.{kind}").read_bytes() for kind in ("csv", "md")]
    do(grid, 1, "kept/small", reduced_size=12, out="elsewhere")
    assert [Path(f"kept/small.{kind}").read_bytes() for kind in ("csv", "md")] == bytes_


def by_run(result: dict, records: Path) -> str:
    return next(row["label"] for row in result["rows"] if row["run"] == records.parent.name)


def test_rows_over_other_images_are_not_kept_in_one_table(tmp_path):
    runs = [Run(tmp_path, RunConfig(reduced_size=n), [], {}) for n in (5, 6)]
    rows = [sweep.Row(str(i), {}, run=done) for i, done in enumerate(runs)]
    with pytest.raises(ValueError, match="differ in reduced_size"):
        sweep.save(tmp_path / "kept", "", rows, [{}, {}], "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # test_a_sweep finishes a half done run, this one ends a real process
def test_a_killed_sweep_leaves_no_process_and_goes_on(grid, capsys):
    few = yaml.safe_load(grid.read_text())
    few["rows"] = [{"label": "TPT"}, {"label": "more", "n_aug": 9}]
    grid.write_text(yaml.safe_dump(few))
    code = "from tpt_nb.runs import sweep as s; o = s.SweepOptions(jobs=1)"
    code += "\ns.sweep('small.yaml', o, {'reduced_size': 24, 'out': 'here'})"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.time() + 300
    while not list(Path("here").glob("*/records.jsonl")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sizes = []
    for _ in range(2):  # nobody writes any more
        time.sleep(1)
        sizes.append([p.stat().st_size for p in Path(".").glob("**/*.*") if p.is_file()])
    assert sizes[0] == sizes[1] and not Path("here/table.csv").exists()
    assert do(grid, 1, reduced_size=24, out="here") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["rows"]) == 2 and all(row["n"] >= 23 for row in result["rows"])


def test_a_run_that_crashes_stops_nothing(grid, monkeypatch, tmp_path):
    common = yaml.safe_load(grid.read_text())["common"] | {"out": str(tmp_path / "out")}
    marks = ["dies", "lives", "raises", "too"]
    configs = [RunConfig.from_dict({**common, "run_name": mark, "n_aug": 2}) for mark in marks]
    logs = [tmp_path / f"{mark}.log" for mark in marks]
    monkeypatch.setattr(pool, "_work", crash)
    results = dict(pool.run_many([*configs, RunConfig(n_aug=-1)], [*logs, logs[0]], jobs=2))
    assert "killed by signal 9" in str(results[0])
    assert str(results[2]) == "RuntimeError: out of luck"
    assert results[1].name.startswith("lives") and results[3].name.startswith("too")
    assert "n_aug is -1" in str(results[4])


def crash(pipe, threads):
    """What a worker does, with accidents."""
    engine_run = pool.run

    def accident(config, session):
        if config.run_name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.run_name == "raises":
            raise RuntimeError("out of luck")
        return engine_run(config, session)

    pool.run = accident
    work(pipe, threads)


work = pool._work


def test_runs_that_share_views_wait_for_the_first():
    a, a2, b, b2 = tasks = list(enumerate("aabb"))
    assert pool.startable(tasks, [], set()) == a
    assert pool.startable([a2, b, b2], [a], set()) == b  # other views at the same time
    assert pool.startable([a2, b2], [a, b], set()) is None
    assert pool.startable([a2, b2], [b], {"a"}) == a2


@pytest.mark.parametrize(
    "text, message",
    [
        ("rows: [", "is not YAML"),
        ("- 1", "a mapping with a list of rows"),
        ("rows: []", "a mapping with a list of rows"),
        ("rows: [3]", "row 1 is 3"),
        ("rows: [{n_aug: 1}]\nbasline: x", "'basline'; did you mean 'baseline'"),
        ("rows: [{label: a}]\nbaseline: b", "unknown baseline 'b'"),
        ("rows: [{label: a}, {label: a}]", "two rows are called 'a'"),
    ],
)
def test_a_file_that_is_no_grid_is_one_line(tmp_path, text, message):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        do(tmp_path / "g.yaml", out=str(tmp_path / "out"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_file_and_no_folder(tmp_path):
    with pytest.raises(OSError, match="g.yaml"):
        do(tmp_path / "g.yaml")
    with pytest.raises(ValueError, match="out must be a folder here"):
        do(tmp_path / "g.yaml", out="s3://bucket/x")


@pytest.mark.parametrize("name, number", [("study", 28), ("corrected", 28)])
def test_the_grids_that_ship_are_right(name, number):
    baseline, rows, about = sweep.read_grid(REPO / "notebooks" / "sweeps" / f"{name}.yaml", {})
    assert baseline == "TPT" and len(rows) == number and about
    for row in rows:
        resolve(RunConfig.from_dict(row.values))
    if name == "study":
        adapted = [row for row in rows if row.values.get("method") != "zero_shot"]
        assert len(adapted) == 27 and all(row.reported for row in rows)
        views = {(r.values.get("augmenter"), r.values.get("n_aug"), r.values.get("n_patches"),
                  r.values.get("overlap"), r.values.get("augmix")) for r in adapted}  # fmt: skip
        assert len(views) == 13
        with open(DATA / "reported" / "imagenet_a_rn50_losses.csv", newline="") as file:
            reported = {row["label"]: float(row["accuracy"]) for row in csv.DictReader(file)}
        crossed = [row for row in rows if "crossentropy" in row.values.get("loss", "")]
        assert reported == {row.label: row.reported for row in crossed}


def test_overrides_win(tmp_path):
    (tmp_path / "g.yaml").write_text("rows: [{n_aug: [1, 2], seed: 3}]\ncommon: {seed: 1, lrr: 2}")
    _, rows, _ = sweep.read_grid(tmp_path / "g.yaml", {"seed": 9})
    assert [row.values for row in rows] == [{"seed": 9, "lrr": 2, "n_aug": n} for n in (1, 2)]
    assert [row.label for row in rows] == ["n_aug=1", "n_aug=2"]
    sweep.do_rows(rows, tmp_path, 1, lambda configs: iter(()))
    assert all("unknown parameter 'lrr'" in row.error for row in rows)


def test_rows_can_be_done_elsewhere(grid, capsys):
    """A cluster gets the configurations, and gives back runs and errors in any order."""

    def spread(configs):
        for i in reversed(range(len(configs))):
            try:
                yield i, run(configs[i], progress=False)
            except (ValueError, OSError) as error:
                yield i, error

    overrides = {"reduced_size": 12, "out": "there"}
    assert sweep.sweep(grid, sweep.SweepOptions(json=True), overrides, spread) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["rows"]) == 7 and result["rows"][0]["label"] == "prompt"
    assert [row["label"] for row in result["failed"]] == ["wrong", "no such file"]

"""ci/sweep.py: grids, one table, features encoded once, failures that stop nothing, kills."""

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
from tpt_nb.core.paths import DATA
from tpt_nb.runs import RunConfig, load_run, run, validate

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))
import sweep  # noqa: E402

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
    command = [str(grid), "--reduced_size", "12", "--json", "--jobs", "2"]
    assert sweep.main(command) == 1  # two rows cannot work
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

    # a row forked from the process that made what they share is the run that it would be alone
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
    assert sweep.main([*command, "--save", "kept/small"]) == 1
    captured = capsys.readouterr()
    assert "patch_loss2_study: " in captured.out
    assert {p: p.read_bytes() for p in Path("runs/small").glob("*/records.jsonl")} == records
    with open("runs/small/table.csv") as file:
        again = list(csv.DictReader(file))
    assert again.pop(labels.index(by_run(result, half)))["seconds_per_image"] != seconds
    assert again == table
    assert "rows failed" in captured.err and not Path("kept").exists()

    # a table to keep says what was measured on what, and not when or how fast
    about = {"about": "six  rows", "rows": [ROWS[0], ROWS[1], ROWS[3], ROWS[4]]}
    text = yaml.safe_dump({**yaml.safe_load(grid.read_text()), **about}, sort_keys=False)
    grid.write_text(text)
    assert sweep.main([*command[:3], "--save", "kept/small"]) == 0
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
    sweep.main([*command[:3], "--out", "elsewhere", "--jobs", "1", "--save", "kept/small"])
    assert [Path(f"kept/small.{kind}").read_bytes() for kind in ("csv", "md")] == bytes_


def by_run(result: dict, records: Path) -> str:
    return next(row["label"] for row in result["rows"] if row["run"] == records.parent.name)


def test_rows_over_other_images_are_not_kept_in_one_table(tmp_path):
    rows = [sweep.Row(str(n), {}, config=RunConfig(reduced_size=n)) for n in (5, 6)]
    lines = [{"label": row.label, "seconds_per_image": 1.0} for row in rows]
    with pytest.raises(ValueError, match="differ in images"):
        sweep.save(tmp_path / "kept", "", rows, lines, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # test_a_sweep finishes a half done run, this one ends a real process
def test_a_killed_sweep_leaves_no_process_and_goes_on(grid, capsys):
    few = yaml.safe_load(grid.read_text())
    few["rows"] = [{"label": "TPT"}, {"label": "more", "n_aug": 9}]
    grid.write_text(yaml.safe_dump(few))
    command = [sys.executable, str(REPO / "ci" / "sweep.py"), str(grid), "--jobs", "1"]
    command += ["--reduced_size", "24", "--out", "here"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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
    assert sweep.main([*command[2:], "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["rows"]) == 2 and all(row["n"] >= 23 for row in result["rows"])


def test_a_row_that_crashes_stops_nothing(tmp_path, monkeypatch, capsys):
    rows = [sweep.Row(label, {}, config=RunConfig(), folder=tmp_path / label, features=label)
            for label in ("dies", "lives", "raises")]  # fmt: skip
    monkeypatch.setattr(sweep, "child", crash)
    sweep.run_rows(rows, tmp_path, jobs=2)
    assert "killed by signal 9" in rows[0].error
    assert rows[1].error == ""
    assert rows[2].error == "RuntimeError: out of luck"
    assert "[3/3]" in capsys.readouterr().out


def crash(values, log, label, threads):
    log.write_text("")
    if label == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if label == "raises":
        log.write_text("Traceback ...\nRuntimeError: out of luck\n")
        raise SystemExit(1)


def test_rows_that_share_views_wait_for_the_first(tmp_path):
    rows = [sweep.Row(str(i), {}, features=f, folder=tmp_path / str(i))
            for i, f in enumerate("aabb")]  # fmt: skip
    a, a2, b, b2 = rows
    assert sweep.startable(rows, [], set()) is a
    assert sweep.startable([a2, b, b2], [a], set()) is b  # other views at the same time
    assert sweep.startable([a2, b2], [a, b], set()) is None
    assert sweep.startable([a2, b2], [b], {"a"}) is a2
    twin = sweep.Row("twin", {}, features="a", folder=a.folder)
    assert sweep.startable([twin], [a], {"a"}) is None  # the same run under another label


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
def test_a_file_that_is_no_grid_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "g.yaml").write_text(text)
    assert sweep.main([str(tmp_path / "g.yaml"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_file_and_no_such_option(tmp_path, capsys):
    assert sweep.main([str(tmp_path / "g.yaml")]) == 2
    assert "g.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        sweep.main(["g.yaml", "--n_augs", "3"])
    assert stop.value.code == 2


@pytest.mark.parametrize("name, number", [("study", 28), ("corrected", 28)])
def test_the_grids_that_ship_are_right(name, number):
    baseline, rows, about = sweep.read_grid(REPO / "notebooks" / "sweeps" / f"{name}.yaml", {})
    assert baseline == "TPT" and len(rows) == number and about
    for row in rows:
        validate(RunConfig.from_dict(row.values))
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
    (tmp_path / "g.yaml").write_text("rows: [{n_aug: [1, 2], seed: 3}]\ncommon: {seed: 1, lr: 2}")
    _, rows, _ = sweep.read_grid(tmp_path / "g.yaml", {"seed": 9})
    assert [row.values for row in rows] == [{"seed": 9, "lr": 2, "n_aug": n} for n in (1, 2)]
    assert [row.label for row in rows] == ["n_aug=1", "n_aug=2"]
    sweep.prepare(rows, tmp_path)
    assert all("unknown parameter 'lr'" in row.error for row in rows)

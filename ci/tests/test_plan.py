"""scale.plan: what a large run takes, by arithmetic."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from tpt_nb import __main__ as cli
from tpt_nb import methods, models
from tpt_nb.features import shards
from tpt_nb.scale import plan as make_plan
from tpt_nb.scale import plan_text, planner, read_costs

MEASURED = [
    {"model": "RN50", "device": "cpu (x86_64, 2 threads)", "classes": 200, "views": 64,
     "floor_s": 4.0, "views_s": 0.08, "fast_s": 1.0, "tflop": {"floor": 0.78, "fast": 0.16}},
    {"model": "RN50", "device": "NVIDIA X", "classes": 200, "views": 64,
     "floor_s": 0.02, "views_s": 0.08, "fast_s": 0.01, "tflop": {"floor": 0.78, "fast": 0.16}},
]  # fmt: skip


def queue(tasks: list[float], workers: int) -> float:
    """The end of a queue from which workers take the next task when they are free."""
    free = [planner.START] * workers
    for seconds in tasks:
        free[free.index(min(free))] += seconds
    return max(free)


@pytest.mark.parametrize("seed", range(8))
def test_hours_are_enough_and_not_many_more(seed):
    draw = np.random.default_rng(seed)
    tasks = draw.exponential(100.0, draw.integers(1, 60)).tolist()
    ends = []
    for workers in range(1, 9):
        ends.append(3600 * planner.hours(sum(tasks), max(tasks), workers))
        real = queue(tasks, workers)
        assert real <= ends[-1] + 1e-6 <= real + max(tasks) + 1e-5
    assert ends[0] == pytest.approx(planner.START + sum(tasks))


def test_bytes_are_those_of_a_shard():
    store = shards.Store([f"iconshift-a/{i:05d}" for i in range(64)])
    for i in range(64):
        store.put(i, torch.rand(16, 256), i, 0.1)
    _, data = shards.pack_shard(store, list(range(64)))
    found = make_plan("iconshift-a", "mini", 16, images=64, classes=200)
    assert found["bytes"] == pytest.approx(len(data), rel=0.01)


def test_widths_are_those_of_the_models():
    assert planner.width("mini") == models.load("mini", device="cpu").embed_dim
    assert planner.width("RN50") == 1024 and planner.width("ViT-B/16") == 512
    with pytest.raises(ValueError, match="RN5O.*did you mean 'RN50'"):
        planner.width("RN5O")


def test_what_is_counted():
    found = make_plan(measured=MEASURED)
    assert found["passes"] == 50_000 * 64
    assert found["bytes"] == pytest.approx(50_000 * 64 * 1024 * 4, rel=0.001)
    more = make_plan(methods=["tpt", "vote", "zero_shot"], seeds=3, measured=MEASURED)
    assert more["passes"] == 3 * 50_000 * 65  # zero_shot has features of its own, of one view
    few = make_plan("iconshift-a", "mini", images=100, classes=200, measured=read_costs())
    assert few["passes"] == 6400 and few["bytes"] == pytest.approx(100 * 64 * 256 * 4, rel=0.01)


def costs(classes=200, views=64, names=("tpt",), device="cpu", measured=MEASURED, rate=None):
    return planner.costs("RN50", classes, views, names, device, measured, rate)


def test_seconds_are_measured_ones_where_there_are_some():
    encode, each, _ = costs()
    assert encode == pytest.approx(4.08) and each == {"tpt": 1.0}
    assert costs(classes=1000, views=16)[1]["tpt"] == 5.0
    assert costs(views=16)[0] == pytest.approx(1.02)
    encode, _, sources = costs(device="cuda")
    assert encode == 0.02 and "measured" in sources[0] and "NVIDIA X" in sources[0]
    encode, _, sources = costs(device="cuda", measured=MEASURED[:1])
    assert encode == pytest.approx(0.78e12 / planner.GPU_FLOPS)
    assert "assumed" in sources[0] and "not measured" in sources[0]
    encode, _, sources = costs(device="cuda", measured=MEASURED[:1], rate=50)
    assert encode == 0.02 and "as given" in sources[0]


def test_gpus_wait_for_views_that_take_longer():
    slow = [{**MEASURED[1], "views_s": 1.6}]
    assert costs(device="cuda", measured=slow)[0] == 1.6 / planner.LOADERS


def test_a_method_is_priced_by_what_it_tunes():
    encode, each, sources = costs(names=methods.names())
    light = [name for name in methods.names() if methods.get(name).tunes in ("nothing", "text")]
    assert max(each[name] for name in light) < each["tpt"] == each["rtpt"] == 1.0
    # 6 of 64 views with a backward pass, view 0 once more, and the views made again
    assert each["tune_encoder"] == pytest.approx(1.0 + 4.0 * (3 * 6 + 1) / 64 + 0.08)
    text = "\n".join(sources)
    assert "tune_encoder: tuning, and 19 passes of the image encoder" in text
    assert "at most 1 ms" in text and "ra_tta: without what it takes to make" in text


def test_more_workers_are_faster_and_cost_no_less():
    found = make_plan(workers=[1, 8, 64], measured=MEASURED, price=3.0)
    hours = [row["hours"] for row in found["rows"]]
    assert hours == sorted(hours, reverse=True)
    for row in found["rows"]:
        assert row["cost"] == pytest.approx(3.0 * row["workers"] * row["hours"])
        seconds, work = 3600 * row["encode_hours"] - planner.START, 50_000 * 0.02
        assert work / row["workers"] <= seconds <= work / row["workers"] + 64 * 0.02 + 1e-6
    worse = make_plan(workers=[8], measured=MEASURED, failures=0.2)["rows"][0]
    # a task that fails ends at any point, half way on average: 0.25 attempts more, each half
    more = 3600 * (worse["encode_hours"] - found["rows"][1]["encode_hours"])
    assert more == pytest.approx(0.125 * 50_000 * 0.02 / 8)


def test_stage_2_is_one_task_per_method_and_seed():
    found = make_plan(workers=[1, 2, 64], measured=MEASURED[:1], device="cpu", seeds=2)
    one, two, many = (3600 * row["adapt_hours"] - planner.START for row in found["rows"])
    each = 50_000 * 5.0
    assert (one, two, many) == pytest.approx((2 * each, 1.5 * each, each * (1 + 1 / 64)))
    rows = make_plan(workers=[64], measured=[{**MEASURED[1], "fast_s": 1.0}])
    assert any("stage 2 is one task per method" in warning for warning in rows["warnings"])


def test_a_disk_that_is_too_small_is_said_beforehand(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2e9, 1e9, 1e9))
    found = make_plan(measured=MEASURED, cache=str(tmp_path / "not" / "there"))
    assert any("13.1 GB" in w and "1.0 GB free" in w for w in found["warnings"])
    assert "warning: the features take" in plan_text(found)
    assert "warning: the features" not in plan_text(make_plan(measured=MEASURED, images=100))
    assert make_plan(measured=MEASURED, cache="s3://bucket/x")["free_bytes"] is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dataset": "imagnet"}, "did you mean 'imagenet'"),
        ({"dataset": "folder"}, "--images"),
        ({"model": "RN101"}, "nobody measured RN101.*ci/bench/tpt.py"),
        ({"methods": ["tptt"]}, "did you mean 'tpt'"),
        ({"views": 0}, "views is 0"),
        ({"workers": [4, 0]}, "workers is 0"),
        ({"failures": 1.0}, "failures is 1.0"),
        ({"images_per_second": 0.0}, "must be positive"),
    ],
)
def test_plans_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**{"measured": MEASURED, **wrong})


def test_costs_are_read_from_the_benchmark(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(MEASURED[0]))
    assert read_costs(path) == [MEASURED[0]]
    path.write_text(json.dumps({"model": "RN50"}))
    with pytest.raises(ValueError, match="ci/bench/tpt.py"):
        read_costs(path)
    with pytest.raises(ValueError, match="no measured costs"):
        read_costs(tmp_path / "none.json")
    assert {m["model"] for m in read_costs()} >= {"RN50", "mini"}  # what ships


def test_the_command(capsys, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(MEASURED[0]))
    command = ["plan", "--dataset", "imagenet-a", "--methods", "tpt", "vote", "--workers", "1", "4",
               "--costs", str(tmp_path / "mine.json"), "--json"]  # fmt: skip
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["passes"] == 7500 * 64 and [r["workers"] for r in found["rows"]] == [1, 4]
    assert "480,000" in out and "assumed" in out and "arithmetic, no simulation" in out
    with pytest.raises(SystemExit):
        raise SystemExit(cli.main(["plan", "--pric", "3"]))
    assert "did you mean '--price'" in capsys.readouterr().err
    assert cli.main(["plan", "--dataset", "imagenet-b"]) == 2

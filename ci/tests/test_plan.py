"""plan: the simulated queue, and what a large run takes."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from tpt_nb import __main__ as cli
from tpt_nb import features, models
from tpt_nb.scale import plan

MEASURED = [
    {"model": "RN50", "device": "cpu (x86_64, 2 threads)", "classes": 200, "views": 64,
     "floor_s": 4.0, "views_s": 0.08, "fast_s": 1.0, "tflop": {"floor": 0.78, "fast": 0.16}},
    {"model": "RN50", "device": "NVIDIA X", "classes": 200, "views": 64,
     "floor_s": 0.02, "views_s": 0.08, "fast_s": 0.01, "tflop": {"floor": 0.78, "fast": 0.16}},
]  # fmt: skip


def some_tasks(seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    return rng.exponential(1.0, rng.integers(1, 40)).tolist()


def greedy(tasks: list[float], workers: int, start: float) -> float:
    """The end of a queue without failures, written down plainly."""
    free = [start] * workers
    for seconds in tasks:
        i = free.index(min(free))
        free[i] += seconds
    return max(f for f in free if f > start) if any(tasks) else start


@pytest.mark.parametrize("seed", range(8))
def test_a_queue_without_failures_ends_when_it_must(seed):
    tasks, ends = some_tasks(seed), []
    for workers in range(1, 9):
        outcome = plan.simulate(tasks, workers, start=2.0)
        ends.append(outcome.seconds)
        assert outcome.seconds == pytest.approx(greedy(tasks, workers, 2.0))
        assert outcome.attempts == len(tasks) and outcome.lost == 0
        assert 0 < outcome.busy <= 1
        assert outcome.seconds >= 2 + max(max(tasks), sum(tasks) / workers) - 1e-9
    assert ends[0] == pytest.approx(2 + sum(tasks))
    assert all(more <= fewer + 1e-9 for fewer, more in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize("seed", range(8))
def test_failures_lose_no_task_and_do_none_twice(seed):
    tasks = some_tasks(seed)
    outcome = plan.simulate(tasks, 3, start=1.0, failures=0.4, seed=seed)
    assert sorted(outcome.order) == list(range(len(tasks)))
    assert outcome.attempts >= len(tasks)
    assert outcome.seconds >= plan.simulate(tasks, 3, start=1.0).seconds - max(tasks)
    assert outcome == plan.simulate(tasks, 3, start=1.0, failures=0.4, seed=seed)


def test_failures_cost_what_they_should_on_average():
    tasks, p = [1.0] * 50, 0.2
    runs = [plan.simulate(tasks, 1, failures=p, seed=s) for s in range(300)]
    # attempts of a task are geometric; a failed one ends at any point, half way on average
    assert np.mean([r.attempts for r in runs]) == pytest.approx(50 / (1 - p), rel=0.02)
    assert np.mean([r.seconds for r in runs]) == pytest.approx(50 + 50 * p / (1 - p) / 2, rel=0.02)
    for r in runs:
        assert r.seconds == pytest.approx(50 + r.lost)


def test_a_worker_that_starts_again_holds_no_task():
    # the first worker dies at once and is away for long: the other one does everything
    seed = next(s for s in range(1000) if first_attempt_alone_fails(s))
    outcome = plan.simulate([1.0, 1.0, 1.0], 2, start=100.0, failures=0.3, seed=seed)
    assert outcome.seconds <= 103 and outcome.attempts == 4


def first_attempt_alone_fails(seed: int) -> bool:
    draw = np.random.default_rng(seed)
    fails = draw.random() < 0.3
    draw.random()
    return fails and all(draw.random() >= 0.3 for _ in range(3))


@pytest.mark.parametrize(
    "wrong", [{"workers": 0}, {"workers": 1, "failures": 1.0}, {"workers": 1, "failures": -0.1}]
)
def test_a_queue_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        plan.simulate([1.0], **wrong)
    with pytest.raises(ValueError, match="takes -1"):
        plan.simulate([-1.0], 1)


def test_shards_take_on_average_what_their_images_take():
    assert plan.durations(130, 64, 0.5) == [32.0, 32.0, 1.0]
    many = plan.durations(64 * 20_000, 64, 0.5, spread=0.3, seed=1)
    assert np.mean(many) == pytest.approx(32, rel=0.01)
    assert np.std(np.log(many)) == pytest.approx(0.3, rel=0.02)


def test_bytes_are_those_of_a_shard():
    store = features.Store([f"iconshift-a/{i:05d}" for i in range(64)])
    for i in range(64):
        store.put(i, torch.rand(16, 256), i, 0.1)
    _, data = features.pack_shard(store, list(range(64)))
    assert plan.shard_bytes(64, 16, 256) == pytest.approx(len(data), rel=0.01)


def test_shapes_are_those_of_the_models():
    mini = models.load("mini", device="cpu")
    assert plan.shape("mini") == (mini.embed_dim, mini.image_size)
    assert plan.shape("RN50") == (1024, 224) and plan.shape("ViT-B/16") == (512, 224)
    with pytest.raises(ValueError, match="RN5O.*did you mean 'RN50'"):
        plan.shape("RN5O")


def test_what_is_counted():
    p = plan.plan(measured=MEASURED)
    assert p["passes"] == 50_000 * 64
    assert p["bytes"] == pytest.approx(50_000 * 64 * 1024 * 4, rel=0.001)
    more = plan.plan(methods=["tpt", "vote", "zero_shot"], seeds=3, measured=MEASURED)
    assert more["passes"] == 3 * 50_000 * 65  # zero_shot has features of its own, of one view
    few = plan.plan("iconshift-a", "mini", images=100, classes=200, measured=plan.read_costs())
    assert few["passes"] == 6400 and few["bytes"] == pytest.approx(100 * 64 * 256 * 4, rel=0.01)


def test_seconds_are_measured_ones_where_there_are_some():
    cpu = plan.costs("RN50", 200, 64, ["tpt"], "cpu", MEASURED)
    assert cpu.encode == pytest.approx(4.08) and cpu.methods == {"tpt": 1.0}
    assert plan.costs("RN50", 1000, 16, ["tpt"], "cpu", MEASURED).methods["tpt"] == 5.0
    assert plan.costs("RN50", 200, 16, ["tpt"], "cpu", MEASURED).encode == pytest.approx(1.02)
    gpu = plan.costs("RN50", 200, 64, ["tpt"], "cuda", MEASURED)
    assert gpu.encode == 0.02 and "measured" in gpu.sources[0] and "NVIDIA X" in gpu.sources[0]
    assumed = plan.costs("RN50", 200, 64, ["tpt"], "cuda", MEASURED[:1])
    assert assumed.encode == pytest.approx(0.78e12 / plan.GPU_FLOPS)
    assert "assumed" in assumed.sources[0] and "not measured" in assumed.sources[0]
    given = plan.costs("RN50", 200, 64, ["tpt"], "cuda", MEASURED[:1], images_per_second=50)
    assert given.encode == 0.02 and "as given" in given.sources[0]


def test_gpus_wait_for_views_that_take_longer():
    slow = [{**MEASURED[1], "views_s": 1.6}]
    assert plan.costs("RN50", 200, 64, ["tpt"], "cuda", slow).encode == 1.6 / plan.LOADERS


def test_more_workers_are_faster_and_cost_no_less():
    p = plan.plan(workers=[1, 8, 64], methods=["tpt"], measured=MEASURED, price=3.0, failures=0.0)
    hours = [r["hours"] for r in p["rows"]]
    assert hours == sorted(hours, reverse=True)
    for r in p["rows"]:
        assert r["cost"] == pytest.approx(3.0 * r["workers"] * r["hours"])
        seconds, work = 3600 * r["encode_hours"] - plan.START, 50_000 * 0.02
        assert 0.95 * work / r["workers"] <= seconds <= 1.1 * work / r["workers"] + 3
    worse = plan.plan(workers=[8], measured=MEASURED, failures=0.2)["rows"][0]
    assert worse["hours"] > p["rows"][1]["hours"] and worse["done_again"] > 0


def test_a_disk_that_is_too_small_is_said_beforehand(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2e9, 1e9, 1e9))
    p = plan.plan(measured=MEASURED, cache=str(tmp_path / "not" / "there"))
    assert any("13.1 GB" in w and "1.00 GB free" in w for w in p["warnings"])
    assert "warning: the features take" in plan.text(p)
    assert "warning: the features" not in plan.text(plan.plan(measured=MEASURED, images=100))
    assert plan.plan(measured=MEASURED, cache="s3://bucket/x")["free_bytes"] is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dataset": "imagnet"}, "did you mean 'imagenet'"),
        ({"dataset": "folder"}, "--images"),
        ({"model": "RN101"}, "nobody measured RN101.*ci/bench/tpt.py"),
        ({"methods": ["tptt"]}, "did you mean 'tpt'"),
        ({"views": 0}, "views is 0"),
        ({"images_per_second": 0.0}, "must be positive"),
    ],
)
def test_plans_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(**{"measured": MEASURED, **wrong})


def test_costs_are_read_from_the_benchmark(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(MEASURED[0]))
    assert plan.read_costs(path) == [MEASURED[0]]
    path.write_text(json.dumps({"model": "RN50"}))
    with pytest.raises(ValueError, match="ci/bench/tpt.py"):
        plan.read_costs(path)
    with pytest.raises(ValueError, match="no measured costs"):
        plan.read_costs(tmp_path / "none.json")
    assert {m["model"] for m in plan.read_costs()} >= {"RN50", "mini"}  # what ships


def test_the_command(capsys, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(MEASURED[0]))
    command = ["plan", "--dataset", "imagenet-a", "--methods", "tpt", "vote", "--workers", "1", "4",
               "--costs", str(tmp_path / "mine.json"), "--json"]  # fmt: skip
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["passes"] == 7500 * 64 and [r["workers"] for r in found["rows"]] == [1, 4]
    assert "480,000" in out and "assumed" in out
    assert cli.main(["plan", "--pric", "3"]) == 2
    assert "did you mean '--price'" in capsys.readouterr().err
    assert cli.main(["plan", "--dataset", "imagenet-b"]) == 2

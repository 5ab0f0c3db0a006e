"""scale: the tasks as plain functions, the driver on a Ray that is not there, folders at addresses.

The tests marked slow start a real Ray and kill what they can: workers, the driver, a node.
"""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from test_runs import BROKEN, world  # noqa: F401 (a fixture)

from tpt_nb import __main__ as cli
from tpt_nb import __version__, scale
from tpt_nb.runs import RunConfig, run
from tpt_nb.scale import cluster

REPO = Path(__file__).resolve().parents[2]
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed (pip install -r ci/requirements-cluster.txt)",
)


@pytest.fixture(autouse=True)
def fresh():
    """What a worker keeps from task to task; a folder of the test before has the same name."""
    cluster._dataset.cache_clear()


@pytest.fixture
def config(world, tmp_path, monkeypatch) -> RunConfig:  # noqa: F811
    """A run of 55 images, one of them damaged, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("TPT_NB_CACHE", str(tmp_path / "near"))
    values = {**world, "cache": str(tmp_path / "cache"), "out": str(tmp_path / "runs")}
    return RunConfig.from_dict({**values, "learning_rate": 0.05})


@pytest.fixture
def plain(config, tmp_path) -> Path:
    """The folder of the same run without a cluster."""
    changes = {"out": str(tmp_path / "plain"), "cache": str(tmp_path / "plain-cache")}
    return run(dataclasses.replace(config, **changes), progress=False).dir


def as_job(config: RunConfig, **changes) -> dict:
    return {"values": dataclasses.asdict(config), "version": __version__, "cwd": os.getcwd(),
            "marks": [], "env": {}, "threads": 1} | changes  # fmt: skip


def do(config: RunConfig, size: int = 7, parts=None) -> dict:
    """All tasks of a job, one after the other."""
    job = cluster.describe(as_job(config))
    missing = job["missing"]
    parts = parts or [missing[k : k + size] for k in range(0, len(missing), size)]
    read = [cluster.encode_part(job, part) for part in parts]
    said = cluster.adapt(job)
    folder = cluster.fetch(config.out, job["name"])
    summary = json.loads((folder / "summary.json").read_text())
    return {"job": job, "read": read, "said": said, "folder": folder, "summary": summary}


def lines(folder: Path | str) -> list[bytes]:
    return (Path(folder) / "records.jsonl").read_bytes().splitlines()


def at(place: str, tmp_path: Path) -> str:
    """A folder, or an address of each kind: one that is a disk, one that is an object store."""
    places = {"folder": str(tmp_path), "file": f"file://{tmp_path}", "store": "memory://bucket"}
    return places[place]


@pytest.fixture(params=["folder", "file", "store"])
def somewhere(request, config, tmp_path) -> RunConfig:
    """The run with cache and out in a folder, at a file address, in an object store."""
    base = at(request.param, tmp_path)
    fsspec.filesystem("memory").store.clear()
    return dataclasses.replace(config, cache=f"{base}/cache", out=f"{base}/runs")


# --- the tasks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["in order", "backwards, one twice"])
def test_the_tasks_leave_the_records_of_a_plain_run(somewhere, plain, order):
    parts = None
    if order != "in order":
        everything = cluster.describe(as_job(somewhere))["missing"]
        parts = [everything[k : k + 5] for k in range(0, len(everything), 5)][::-1]
        parts.insert(3, parts[7])
    done = do(somewhere, parts=parts)
    assert lines(done["folder"]) == lines(plain)
    assert done["job"]["name"] == plain.name and done["summary"]["n"] == len(lines(plain)) == 54
    assert done["summary"]["encoded"] == 0  # stage 2 found all features
    failed = json.loads((plain / "summary.json").read_text())["failed"]
    assert done["summary"]["failed"] == failed and BROKEN in failed["images"][0]["path"]
    header = json.loads((done["folder"] / "config.json").read_text())
    theirs = json.loads((plain / "config.json").read_text())
    assert {**header, "config": 0} == {**theirs, "config": 0}
    again = cluster.describe(as_job(somewhere))
    assert not again["missing"] and not again["key"]
    assert "nothing computed" in cluster.adapt(again)


def test_one_image_that_cannot_be_read_ends_no_task(config):
    job = cluster.describe(as_job(config))
    reads = [cluster.encode_part(job, [i]) for i in job["missing"]]
    assert sorted(reads) == [0] + [1] * 54


def test_nothing_is_left_half_written(somewhere, tmp_path):
    do(somewhere)
    assert not list(tmp_path.glob("**/.tmp-*")) and not list(tmp_path.glob("**/.driver*"))


def test_a_plain_run_goes_on_with_what_a_cluster_left(config, plain):
    job = cluster.describe(as_job(config))
    cluster.encode_part(job, job["missing"][:20])
    assert len(cluster.describe(as_job(config))["missing"]) == 35
    done = run(config, progress=False)
    assert lines(done.dir) == lines(plain) and done.summary["encoded"] == 34


@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("harm", ["flip", "cut"])
@pytest.mark.filterwarnings("ignore:damaged cache shard")
def test_a_damaged_shard_is_made_again(config, plain, place, harm, tmp_path):
    config = dataclasses.replace(config, cache=f"{at(place, tmp_path)}/cache")
    job = cluster.describe(as_job(config))
    for k in range(0, 55, 9):
        cluster.encode_part(job, job["missing"][k : k + 9])
    victim = sorted((tmp_path / "cache" / job["key"]).glob("*.safetensors"))[2]
    whole = victim.read_bytes()
    data = bytearray(whole)
    data[-100] ^= 255
    victim.write_bytes(data if harm == "flip" else data[:-100])
    done = do(config, size=9)
    assert len(done["job"]["missing"]) in (9, 10) and done["summary"]["encoded"] == 0
    assert lines(done["folder"]) == lines(plain)


def test_stage_2_that_died_is_gone_on_with(config, plain):
    job = cluster.describe(as_job(config))
    dead = Path(config.out) / job["name"]
    dead.mkdir(parents=True)
    (dead / "config.json").write_bytes((plain / "config.json").read_bytes())
    torn = (plain / "records.jsonl").read_bytes()
    (dead / "records.jsonl").write_bytes(b"".join(torn.splitlines(keepends=True)[:20]) + b'{"id"')
    done = do(config)
    assert done["summary"]["resumed"] == 20 and lines(done["folder"]) == lines(plain)


def test_machines_that_differ_are_an_error(config):
    job = cluster.describe(as_job(config))
    with pytest.raises(ValueError, match="has other images, weights or versions"):
        cluster.encode_part(job | {"key": "features/other"}, [0, 1])
    with pytest.raises(ValueError, match="does not see .* disk that all machines share"):
        cluster.describe(as_job(config, marks=["/nowhere/.driver-1"]))
    with pytest.raises(ValueError, match="the driver has 9.9"):
        cluster.describe(as_job(config, version="9.9"))


# --- folders at addresses ------------------------------------------------------------------------


def test_only_whole_runs_are_published(config, tmp_path, monkeypatch):
    """A summary says that all of a run is there, so it comes last."""
    written = []
    real = LocalFileSystem.pipe_file
    monkeypatch.setattr(
        LocalFileSystem, "pipe_file",
        lambda fs, path, *a, **k: (written.append(Path(path).name), real(fs, path, *a, **k)),
    )  # fmt: skip
    do(dataclasses.replace(config, out=f"file://{tmp_path}/runs"))
    assert written[-1] == "summary.json" and set(written) >= {"config.json", "records.jsonl"}


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, address = tmp_path / "mine", f"file://{tmp_path}/far"
    folder.mkdir()
    (folder / "x").write_bytes(b"12345")
    (folder / ".hidden").write_bytes(b"1")

    def fails(self, data):
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileOpener, "write", fails)
        with pytest.raises(OSError):
            cluster.publish(folder, address, "run")
    assert list((tmp_path / "far" / "run").iterdir()) == []
    cluster.publish(folder, address, "run")
    assert [p.name for p in (tmp_path / "far" / "run").iterdir()] == ["x"]


def test_only_what_is_new_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("TPT_NB_CACHE", str(tmp_path / "near"))
    address, far = f"file://{tmp_path}/far", tmp_path / "far" / "run"
    assert not cluster.fetch(address, "run").exists() or not any(
        p.suffix for p in cluster.fetch(address, "run").iterdir()
    )
    far.mkdir(parents=True)
    (far / "a").write_bytes(b"1")
    fetched = []
    real = LocalFileSystem.cat_file
    monkeypatch.setattr(
        LocalFileSystem, "cat_file",
        lambda fs, path, *a, **k: (fetched.append(Path(path).name), real(fs, path, *a, **k))[1],
    )  # fmt: skip
    for expected in (["a"], ["a"]):
        assert (cluster.fetch(address, "run") / "a").read_bytes() == b"1" and fetched == expected
    (far / "a").write_bytes(b"12")
    assert (cluster.fetch(address, "run") / "a").read_bytes() == b"12"


def test_an_address_nobody_knows(config):
    with pytest.raises(ValueError, match="no one here knows addresses such as nowhere://"):
        cluster.describe(as_job(dataclasses.replace(config, out="nowhere://bucket/x")))


# --- the driver, on a Ray that is not there ------------------------------------------------------


class FakeRay:
    """Runs tasks where they are handed out, as Ray would; ``dies`` says which attempts die."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause):
                self.cause = cause

    def __init__(self, dies=lambda arguments, attempt: False, cpus: int = 2):
        self.dies, self.cpus = dies, cpus
        self.attempts, self.most, self.flying = Counter(), 0, {}

    def cluster_resources(self) -> dict:
        return {"CPU": self.cpus} if self.cpus else {}

    def remote(self, max_retries, retry_exceptions, num_cpus, num_gpus, max_calls):
        outer = self

        class Remote:
            def __init__(self, function):
                self.function = function

            def remote(self, *arguments):
                number = len(outer.attempts)
                outer.flying[number] = self.attempt, arguments
                outer.attempts[number] = 0
                outer.most = max(outer.most, len(outer.flying))
                return number

            def attempt(self, number, arguments):
                for last in [False] * max_retries + [True]:
                    outer.attempts[number] += 1
                    if outer.dies(arguments, outer.attempts[number]):
                        if last:
                            raise outer.exceptions.RayError("the worker died")
                        continue
                    try:
                        return self.function(*arguments)
                    except Exception as error:
                        if last or not isinstance(error, tuple(retry_exceptions)):
                            raise outer.exceptions.RayTaskError(error) from error

        return Remote

    def wait(self, refs, num_returns):
        return refs[-1:], refs[:-1]

    def get(self, number):
        attempt, arguments = self.flying.pop(number)
        return attempt(number, arguments)


def half(x: int) -> float:
    if x == 5:
        raise ValueError("five")
    if x == 6:
        raise OSError(errno.EIO, "six")
    return x / 2


def test_tasks_are_done_again_and_none_stops_the_rest():
    ray = FakeRay(lambda given, attempt: given == (3,) or (given == (4,) and attempt < 3))
    results = dict(cluster.tasks(ray, False, None, half, [(x,) for x in range(20)]))
    assert sorted(results) == list(range(20))
    assert all(results[x] == x / 2 for x in range(20) if x not in (3, 5, 6))
    assert isinstance(results[3], RuntimeError) and "worker died" in str(results[3])
    assert isinstance(results[5], ValueError) and isinstance(results[6], OSError)
    tries = {3: cluster.RETRIES + 1, 4: 3, 6: cluster.RETRIES + 1}
    assert ray.attempts == Counter({x: tries.get(x, 1) for x in range(20)})


def test_few_workers_means_few_tasks():
    ray = FakeRay(cpus=16)
    assert len(list(cluster.tasks(ray, False, 3, half, [(x,) for x in range(9, 40)]))) == 31
    assert ray.most == 3


def test_parts_are_many_and_not_large():
    for images in (1, 7, 60, 1000, 50_000):
        for workers in (1, 2, 64):
            size = cluster.part_size(images, workers)
            assert 1 <= size <= cluster.SHARD
            assert size in (1, cluster.SHARD) or -(-images // size) >= 8 * workers


@pytest.fixture
def inline(monkeypatch) -> list[FakeRay]:
    """A cluster that runs its tasks in this process, each for the first time in vain."""
    used = []

    @contextlib.contextmanager
    def connect(address, workers=None):
        used.append(FakeRay(lambda arguments, attempt: attempt == 1))
        yield used[-1]

    monkeypatch.setattr(cluster, "connect", connect)
    return used


def test_marks_are_there_while_it_runs_and_then_gone(config, plain, inline, tmp_path, monkeypatch):
    seen = []
    real = cluster.encode_part
    monkeypatch.setattr(
        cluster, "encode_part", lambda job, part: (seen.append(job["marks"]), real(job, part))[1]
    )
    done = scale.evaluate(config, "some address", 2)
    assert lines(done.dir) == lines(plain) and done.config.out == config.out
    assert {Path(mark).parent for mark in seen[0]} == {tmp_path / "runs", tmp_path / "cache"}
    assert not list(tmp_path.glob("*/.driver-*"))


@pytest.mark.parametrize("address", ["here", "local"])
def test_relative_folders_are_those_of_the_driver(config, plain, inline, address):
    done = scale.evaluate(dataclasses.replace(config, out="r", cache="c"), address)
    assert lines(done.dir) == lines(plain) and Path("r", plain.name, "summary.json").is_file()


def test_a_run_at_an_address_comes_back_too(somewhere, plain, inline, capsys):
    done = scale.evaluate(somewhere, "here")
    assert lines(done.dir) == lines(plain) and done.summary["encoded"] == 0
    assert "54 encoded in" in capsys.readouterr().out
    again = scale.evaluate(somewhere, "here")
    assert again.records == done.records and again.summary == done.summary
    assert "encoded in" not in capsys.readouterr().out


def test_features_that_several_runs_need_are_made_once(config, inline, monkeypatch):
    parts = []
    real = cluster.encode_part
    monkeypatch.setattr(
        cluster, "encode_part", lambda job, part: (parts.extend(part), real(job, part))[1]
    )
    changes = ({"method": "vote"}, {"method": "mta"}, {"run_name": "x"}, {"dataset": "no such"})
    configs = [config.replace(**change) for change in changes]
    done = dict(scale.run_all(configs, "here"))
    assert sorted(parts) == list(range(55)) and sorted(done) == [0, 1, 2, 3]
    assert isinstance(done[3], ValueError) and "unknown data set" in str(done[3])
    assert [done[i].summary["method"] for i in range(3)] == ["vote", "mta", "tpt"]


def test_broken_parts_are_named_after_the_others_are_done(config, inline, monkeypatch):
    read = []

    def encode_part(job, positions):
        if 4 in positions:
            raise OSError(errno.EIO, "the disk is ill")
        read.extend(positions)
        return len(positions)

    monkeypatch.setattr(cluster, "encode_part", encode_part)
    with pytest.raises(RuntimeError, match=r"number 4 to 5 failed 4 times: .*the disk is ill"):
        scale.evaluate(config, "here")
    assert sorted(read) == [i for i in range(55) if i not in (4, 5)]


def test_a_full_disk_ends_it_at_once(config, inline, monkeypatch):
    calls = []

    def encode_part(job, positions):
        calls.append(positions)
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(cluster, "encode_part", encode_part)
    with pytest.raises(OSError, match="the disk is full"):
        scale.evaluate(config, "here")
    assert len(set(calls)) == 1


def test_what_cannot_be(config, monkeypatch):
    with pytest.raises(ValueError, match="--cluster-workers is 0; it must be 1 or more"):
        scale.evaluate(config, "local", 0)

    @contextlib.contextmanager
    def connect(address, workers=None):
        yield FakeRay(cpus=0)

    monkeypatch.setattr(cluster, "connect", connect)
    with pytest.raises(ValueError, match="the cluster at here has no CPU"):
        scale.evaluate(config, "here")


# --- the commands --------------------------------------------------------------------------------


def test_the_command(config, world, plain, inline, capsys, tmp_path):  # noqa: F811
    given = {**world, "cache": config.cache, "out": config.out, "learning_rate": 0.05}
    options = [f"--{k}={v}" for k, v in given.items()]
    for says in ("55 images: 54 encoded in", "nothing computed"):
        assert cli.main(["evaluate", *options, "--cluster", "here", "--json"]) == 0
        out = capsys.readouterr().out
        assert says in out
        assert json.loads(out.splitlines()[-1])["n"] == 54
    (folder,) = (tmp_path / "runs").iterdir()
    assert lines(folder) == lines(plain)
    assert min(inline[0].attempts.values()) == 2  # each task was done again


def a_sweep(capsys, common: dict, number: int, place: list[str]) -> list[dict]:
    """A sweep of which two rows cannot work; its table."""
    rows = [{"label": "vote", "method": "vote"}, {"label": "mta", "method": "mta"},
            {"label": "few", "method": "vote", "n_aug": 3}, {"label": "wrong", "method": "votte"},
            {"label": "worse", "methid": "vote"}]  # fmt: skip
    grid = {"common": common, "baseline": "vote", "rows": rows}
    Path("g.yaml").write_text(json.dumps(grid))  # YAML too
    command = ["sweep", "g.yaml", "--json", "--out", f"o{number}", "--cache", f"c{number}"]
    assert cli.main([*command, *place]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "did you mean 'vote'" in result["failed"][0]["error"]
    assert [f["label"] for f in result["failed"]] == ["wrong", "worse"]
    return [{**row, "seconds_per_image": 0} for row in result["rows"]]


def test_a_sweep_is_the_same_on_a_cluster(world, config, inline, capsys, tmp_path):  # noqa: F811
    common = {k: v for k, v in world.items() if k != "cache"}
    tables = [a_sweep(capsys, common, 0, ["--jobs", "1"]),
              a_sweep(capsys, common, 1, ["--cluster", "here"])]  # fmt: skip
    assert tables[0] == tables[1] and len(tables[0]) == 3
    shards = [len(list(k.glob("*.safetensors"))) for k in tmp_path.glob("c1/features/*")]
    assert len(shards) == 2 and min(shards) > 1  # vote and mta share their features


def a_leaderboard(capsys, number: int, place: list[str]) -> dict:
    out = ["--out", f"l{number}", "--json", *place]
    command = ["leaderboard", "--variants", "iconshift-a", "--methods", "vote", "mta"]
    assert cli.main([*command, "--reduced_size", "8", "--n_aug", "3", *out]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {row["row"]: (row["mean"], row["ece"]) for row in table["rows"]}


def test_a_leaderboard_is_the_same_on_a_cluster(inline, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TPT_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    found = [a_leaderboard(capsys, k, p) for k, p in enumerate([[], ["--cluster", "here"]])]
    assert found[0] == found[1] and set(found[0]) >= {"vote", "mta"}
    assert inline[0].attempts


@pytest.mark.parametrize("command", ["evaluate", "sweep", "leaderboard"])
def test_without_ray_it_says_what_to_install(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text("rows: [{method: tpt, dataset: iconshift-a}]")
    board = ["--variants", "iconshift-a", "--methods", "vote", "--out", "o"]
    options = {"evaluate": [], "sweep": ["g.yaml"], "leaderboard": board}[command]
    assert cli.main([command, *options, "--cluster", "local"]) == 2
    assert "pip install -r ci/requirements-cluster.txt" in capsys.readouterr().err
    assert (REPO / "ci" / "requirements-cluster.txt").read_text().count("ray>=") == 1


def test_nobody_imports_ray_for_it():
    code = "import sys, tpt_nb.__main__, tpt_nb.scale; print('ray' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr


# --- with Ray ------------------------------------------------------------------------------------


@pytest.fixture
def scenes(tmp_path, monkeypatch) -> RunConfig:
    """60 images of IconShift, 16 views, and a folder for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return RunConfig(dataset="iconshift-a", reduced_size=60, n_aug=15, cache="cache", out="runs")


def plainly(config: RunConfig) -> list[bytes]:
    return lines(run(dataclasses.replace(config, out="plain", cache="own"), progress=False).dir)


def shards() -> list[Path]:
    return list(Path("cache").glob("features/*/*.safetensors"))


def processes(word: str) -> list[int]:
    """Of Ray, whose command line starts so; none that are only waited for."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            zombie = (place / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            if not zombie and re.match(rf"\S*{word}", (place / "cmdline").read_text()):
                found.append(int(place.name))
    return found


def no_daemons() -> bool:
    """Is nothing of Ray left? It has some seconds to go."""
    for _ in range(60):
        if not processes("raylet") and not processes("gcs_server"):
            return True
        time.sleep(0.5)
    return False


@contextlib.contextmanager
def when_shards_are_there(act, least: int = 1):
    """Call a function once, from a thread, as soon as that many shards are in the cache."""

    def watch():
        while not over.is_set() and len(shards()) < least:
            time.sleep(0.02)
        while not over.is_set() and not act():
            time.sleep(0.02)

    over = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@with_ray
@pytest.mark.slow
def test_a_worker_is_killed(scenes, capsys):
    killed = []

    def kill() -> bool:
        killed.extend(processes("ray::encode_part")[:1])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        return bool(killed)

    with when_shards_are_there(kill):
        done = scale.evaluate(scenes, "local", 2)
    assert killed and lines(done.dir) == plainly(scenes)
    assert done.summary["encoded"] == 0 and "60 encoded" in capsys.readouterr().out
    assert no_daemons()


@with_ray
@pytest.mark.slow
def test_the_driver_is_killed_and_started_again(scenes, tmp_path):
    command = [sys.executable, "-m", "tpt_nb", "evaluate", "--dataset", "iconshift-a",
               "--reduced_size", "60", "--n_aug", "15", "--cluster", "local",
               "--cluster-workers", "2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPO), "TPT_NB_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment)
    deadline = time.time() + 300
    while len(shards()) < 4 and time.time() < deadline:
        assert process.poll() is None  # it has just begun
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert no_daemons()
    left = len(shards())
    assert left >= 4 and not list(Path("runs").glob("*/summary.json"))
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert out.returncode == 0, out.stderr
    encoded = int(re.search(r"(\d+) encoded", out.stdout)[1])
    assert 0 < encoded <= 60 - 2 * left
    (folder,) = Path("runs").iterdir()
    assert lines(folder) == plainly(scenes)
    assert no_daemons()


@with_ray
@pytest.mark.slow
def test_a_node_leaves(scenes, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=options)
    left = []
    try:
        other = nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        nodes.wait_for_nodes()

        def leave() -> bool:
            left.append(other)
            nodes.remove_node(other, allow_graceful=False)
            return True

        with when_shards_are_there(leave, 3):
            done = scale.evaluate(scenes, nodes.address)
    finally:
        nodes.shutdown()
    assert left and lines(done.dir) == plainly(scenes)
    assert "60 encoded" in capsys.readouterr().out
    assert not list(Path(".").glob("*/.driver-*"))


@with_ray
@pytest.mark.slow
def test_a_sweep_and_a_leaderboard_are_the_same_on_a_cluster(scenes, capsys):
    common, workers = {"dataset": "iconshift-a", "reduced_size": 20, "n_aug": 7}, "2"
    places = [["--jobs", "1"], ["--cluster", "local", "--cluster-workers", workers]]
    tables = [a_sweep(capsys, common, k, place) for k, place in enumerate(places)]
    assert tables[0] == tables[1] and len(tables[0]) == 3
    found = [a_leaderboard(capsys, k, place) for k, place in enumerate([[], places[1]])]
    assert found[0] == found[1] and set(found[0]) >= {"vote", "mta"}
    assert no_daemons()

"""cluster: the tasks as plain functions, the driver on a Ray that is not there, storage that errs.

The tests marked slow start a real Ray and kill what they can: workers, the driver, a node.
"""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from test_experiment import BROKEN, world  # noqa: F401 (a fixture)

from tpt_nb import __main__ as cli
from tpt_nb import __version__
from tpt_nb.runs import RunConfig, run
from tpt_nb.scale import cluster, storage
from tpt_nb.scale.storage import Storage

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))
import leaderboard  # noqa: E402
import sweep  # noqa: E402

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed (pip install -r ci/requirements-cluster.txt)",
)


@pytest.fixture
def config(world, tmp_path, monkeypatch) -> RunConfig:  # noqa: F811
    """A run of 55 images, one of them damaged, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("TPT_NB_CACHE", str(tmp_path / "near"))
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    cluster._state.clear()
    return RunConfig(
        **{**world, "cache": str(tmp_path / "cache")},
        out=str(tmp_path / "runs"),
        learning_rate=0.05,
    )


@pytest.fixture
def plain(config, tmp_path) -> Path:
    """The folder of the same run without a cluster."""
    changes = {"out": str(tmp_path / "plain"), "cache": str(tmp_path / "plain-cache")}
    return run(dataclasses.replace(config, **changes), progress=False).dir


def as_job(config: RunConfig, **changes) -> dict:
    job = {"values": dataclasses.asdict(config), "cache": config.cache, "out": config.out,
           "cwd": os.getcwd(), "marks": [], "version": __version__, "env": {}, "threads": 1,
           "loaders": 0}  # fmt: skip
    return job | changes


def do(job: dict, size: int = 7, parts=None) -> dict:
    """All tasks of a job, one after the other."""
    found = cluster.describe(job)
    job["values"] = found["config"]
    missing = found["missing"]
    parts = parts or [missing[k : k + size] for k in range(0, len(missing), size)]
    results = [cluster.encode_part(job, found["key"], part) for part in parts]
    done = cluster.adapt_config(job, found["key"])
    done["retried"] += [line for r in results for line in r["retried"]] + found["retried"]
    return done | {"found": found, "results": results}


def lines(folder: Path | str) -> list[bytes]:
    return (Path(folder) / "records.jsonl").read_bytes().splitlines()


# --- the tasks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["in order", "backwards, one twice"])
@pytest.mark.parametrize("address", [False, True])
def test_the_tasks_leave_the_records_of_a_plain_run(config, plain, order, address, tmp_path):
    if address:
        config = dataclasses.replace(
            config, cache=f"file://{tmp_path}/cache", out=f"file://{tmp_path}/runs"
        )
    job, parts = as_job(config), None
    if order != "in order":
        everything = cluster.describe(job)["missing"]
        parts = [everything[k : k + 5] for k in range(0, len(everything), 5)][::-1]
        parts.insert(3, parts[7])
    done = do(job, parts=parts)
    folder = tmp_path / "runs" / done["name"]
    assert lines(folder) == lines(plain)
    assert folder.name == plain.name and done["summary"]["n"] == len(lines(plain)) == 54
    assert done["summary"]["encoded"] == 0  # stage 2 found all features
    failed = json.loads((plain / "summary.json").read_text())["failed"]
    assert done["summary"]["failed"] == failed and BROKEN in failed["images"][0]["path"]
    assert sum(len(r["failed"]) for r in done["results"]) == 1
    header = json.loads((folder / "config.json").read_text())
    assert header["config"]["out"] == config.out and header["config"]["cache"] == config.cache
    theirs = json.loads((plain / "config.json").read_text())
    assert {**header, "config": 0} == {**theirs, "config": 0}
    # nothing is left of the attempts, and nothing half-written
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [folder.name]
    assert not list(tmp_path.glob("cache/**/.tmp-*"))
    again = cluster.describe(as_job(config))
    assert again["finished"] and again["summary"] == done["summary"]


def test_a_plain_run_goes_on_with_what_a_cluster_left(config, plain):
    job = as_job(config)
    found = cluster.describe(job)
    job["values"] = found["config"]
    cluster.encode_part(job, found["key"], found["missing"][:20])
    assert len(cluster.describe(as_job(config))["missing"]) == 35  # the damaged one is no. 18
    done = run(config, progress=False)
    assert lines(done.dir) == lines(plain) and done.summary["encoded"] == 34


@pytest.mark.parametrize("address", [False, True])
@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_shard_is_found_and_encoded_again(config, plain, address, harm, tmp_path):
    if address:
        config = dataclasses.replace(config, cache=f"file://{tmp_path}/cache")
    job = as_job(config)
    found = cluster.describe(job)
    job["values"] = found["config"]
    for k in range(0, 55, 9):
        cluster.encode_part(job, found["key"], found["missing"][k : k + 9])
    victim = sorted((tmp_path / "cache" / found["key"]).glob("*.safetensors"))[2]
    data = bytearray(victim.read_bytes())
    data[-100] ^= 255
    victim.write_bytes(data if harm == "flip" else data[:-100])
    done = do(as_job(config))
    if address and harm == "flip":  # from afar only the length is looked at, until it is fetched
        assert done["found"]["damaged"] == [] and done["summary"]["encoded"] >= 8
        assert "damaged shard" in done["said"] and not victim.exists()
    else:
        assert done["found"]["damaged"] == [victim.name]
        assert len(done["found"]["missing"]) in (9, 10) and done["summary"]["encoded"] == 0
    assert lines(tmp_path / "runs" / done["name"]) == lines(plain)


def test_an_attempt_that_died_is_gone_on_with(config, plain):
    job = as_job(config)
    found = cluster.describe(job)
    dead = Path(config.out) / ".attempts" / found["name"] / "0123abcd" / found["name"]
    dead.mkdir(parents=True)
    (dead / "config.json").write_bytes((plain / "config.json").read_bytes())
    torn = (plain / "records.jsonl").read_bytes()
    (dead / "records.jsonl").write_bytes(b"".join(torn.splitlines(keepends=True)[:20]) + b'{"id"')
    done = do(job)
    assert done["summary"]["resumed"] == 20
    assert lines(Path(config.out) / done["name"]) == lines(plain)
    assert not (Path(config.out) / ".attempts").exists()


def test_machines_that_differ_are_an_error(config):
    job = as_job(config)
    job["values"] = cluster.describe(job)["config"]
    with pytest.raises(ValueError, match="has other images, weights or versions"):
        cluster.encode_part(job, "features/other", [0, 1])
    with pytest.raises(ValueError, match="does not see .* disk that all machines share"):
        cluster.describe(as_job(config, marks=["/nowhere/.driver-1"]))
    with pytest.raises(ValueError, match="the driver has 9.9"):
        cluster.describe(as_job(config, version="9.9"))


def test_only_whole_runs_are_published(config, monkeypatch):
    """A summary says that all of a run is there, so it comes last."""
    written = []
    real = Storage.write
    monkeypatch.setattr(Storage, "write", lambda *a: (written.append(a[1]), real(*a)))
    do(as_job(config))
    names = [name for name in written if not name.endswith(".safetensors")]
    assert names == ["manifest.json", "config.json", "records.jsonl", "summary.json"]


# --- storage -------------------------------------------------------------------------------------


class Flaky(LocalFileSystem):
    """A remote store: every third call fails, and uploads are sometimes cut."""

    protocol = "flaky"
    cachable = False
    calls = 0

    def _now(self, what: str) -> None:
        Flaky.calls += 1
        if Flaky.calls % 3 == 0:
            raise TimeoutError(f"{what}: the store did not answer")

    def ls(self, path, detail=False, **kwargs):
        self._now("ls")
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._now("cat")
        return super().cat_file(path, start=start, end=end, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        self._now("pipe")
        return super().pipe_file(path, value[:-1] if Flaky.calls % 7 == 0 else value, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("flaky://"))


def test_storage_that_errs_now_and_then(config, plain, tmp_path, monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    address = f"flaky://{tmp_path}/far"
    done = do(as_job(dataclasses.replace(config, cache=address, out=f"{address}/runs")))
    assert lines(tmp_path / "far" / "runs" / done["name"]) == lines(plain)
    kinds = Counter(line.split()[0] for line in done["retried"])
    assert min(kinds["list"], kinds["read"], kinds["write"]) >= 1
    assert any("bytes arrived" in line for line in done["retried"])
    assert not list((tmp_path / "far").glob("**/.tmp-*"))


@pytest.mark.parametrize("address", [False, True])
def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch, address):
    place = Storage(f"file://{tmp_path}/a" if address else str(tmp_path / "a"), tries=2, pause=0)
    assert place.names() == {}
    place.write("x", b"12345")
    place.write("x", b"123456")
    assert place.names() == {"x": 6}
    assert place.read("x") == b"123456" and place.read("x", 1, 3) == b"23"

    def fails(*args, **kwargs):
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        patch.setattr(LocalFileSystem, "mv", fails)
        with pytest.raises(OSError):
            place.write("x", b"other")
        with pytest.raises(OSError):
            place.write("y", b"other")
    assert place.names() == {"x": 6} and place.read("x") == b"123456"
    assert len(place.retried) == 2
    place.delete("x")
    place.delete("x")
    assert place.names() == {}
    with pytest.raises(FileNotFoundError):
        place.read("x")


@pytest.mark.parametrize("number, tries", [(errno.ENOSPC, 1), (errno.EACCES, 1), (errno.EIO, 4)])
def test_only_what_may_pass_is_tried_again(tmp_path, monkeypatch, number, tries):
    calls = []

    def fails(*args):
        calls.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fails)
    place = Storage(str(tmp_path), tries=4, pause=0)
    with pytest.raises(OSError) as caught:
        place.write("x", b"1")
    assert caught.value.errno == number and len(calls) == tries == len(place.retried) + 1
    assert list(tmp_path.iterdir()) == []


# --- the driver, on a Ray that is not there ------------------------------------------------------


class FakeRay:
    """Runs tasks where they are handed out; a plan says which attempts die."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause):
                self.cause = cause

    def __init__(self, dies=lambda argument, attempt: False, cpus: int = 2):
        self.dies, self.cpus = dies, cpus
        self.attempts, self.most, self.flying = Counter(), 0, {}

    def cluster_resources(self) -> dict:
        return {"CPU": self.cpus}

    def remote(self, **options):
        outer = self
        assert options["max_retries"] == 0  # tries are ours, so that they can be told

        class Remote:
            def __init__(self, function):
                self.function = function

            def remote(self, *arguments):
                outer.attempts[str(arguments)] += 1
                number = sum(outer.attempts.values())
                ref = self.function, arguments, outer.attempts[str(arguments)]
                outer.flying[number] = ref
                outer.most = max(outer.most, len(outer.flying))
                return number

        return Remote

    def wait(self, refs, timeout):
        return refs[-1:], refs[:-1]

    def get(self, number):
        function, arguments, attempt = self.flying.pop(number)
        if self.dies(arguments[0], attempt):
            raise self.exceptions.RayError("the worker died")
        try:
            return function(*arguments)
        except Exception as error:
            raise self.exceptions.RayTaskError(error) from error

    def cancel(self, number, force):
        self.flying.pop(number)


def half(x: int) -> dict:
    if x == 5:
        raise ValueError("five")
    if x == 6:
        raise OSError(errno.EIO, "six")
    return {"half": x / 2, "retried": [f"read {x}"] if x == 8 else []}


def test_tasks_are_done_again_and_none_stops_the_rest():
    ray = FakeRay(lambda x, attempt: x == 3 or (x == 4 and attempt < 3))
    nodes, retried = cluster.Cluster(ray, None, True), []
    results = {
        i: (r, e) for i, r, e in nodes.tasks(half, [(x,) for x in range(20)], "cpu", retried)
    }
    assert sorted(results) == list(range(20))
    good = [x for x in range(20) if x not in (3, 5, 6)]
    assert all(results[x][0]["half"] == x / 2 and results[x][1] is None for x in good)
    assert "worker died" in str(results[3][1])
    assert isinstance(results[5][1], ValueError) and isinstance(results[6][1], OSError)
    tries = {3: cluster.TRIES, 4: 3, 5: 1, 6: cluster.TRIES}
    assert ray.attempts == Counter({f"({x},)": tries.get(x, 1) for x in range(20)})
    again = sum(n - 1 for n in tries.values())
    assert len(retried) == again + 1 and "read 8" in retried
    assert ray.most == 4  # two at work, two waiting: the driver does not run ahead


def test_few_workers_means_few_tasks():
    ray = FakeRay(cpus=16)
    nodes = cluster.Cluster(ray, 3, False)
    assert len(list(nodes.tasks(half, [(x,) for x in range(9, 40)], "cpu", []))) == 31
    assert ray.most == 3


def test_what_is_under_way_is_ended_with_the_driver():
    ray = FakeRay()
    tasks = cluster.Cluster(ray, None, True).tasks(half, [(x,) for x in range(9)], "cpu", [])
    next(tasks)
    tasks.close()
    assert ray.flying == {}


def test_broken_parts_are_named_after_the_others_are_done(monkeypatch, config):
    job = as_job(config)
    found = {"missing": list(range(40)), "n": 55, "key": "k", "data": "d", "damaged": [],
             "bytes": 10, "free": 5}  # fmt: skip
    done = []

    def tasks(self, function, arguments, device, retried):
        for k, (_, _, part) in enumerate(arguments):
            done.append(k)
            if k == 1:
                yield k, None, RuntimeError("the worker died")
            else:
                yield k, {"images": len(part), "failed": [], "retried": []}, None

    monkeypatch.setattr(cluster.Cluster, "tasks", tasks)
    report = cluster.Report()
    with pytest.raises(RuntimeError, match=r"1 of 20 parts .*number 2 to 3\): the worker died"):
        cluster.encode_all(cluster.Cluster(FakeRay(), None, True), job, found, report, False)
    assert len(done) == 20 and report.encoded == 38


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
        used.append(FakeRay(lambda argument, attempt: attempt == 1))
        yield cluster.Cluster(used[-1], workers, True)

    monkeypatch.setattr(cluster, "connect", connect)
    return used


def test_the_command(config, plain, inline, capsys, tmp_path):
    given = {k: v for k, v in dataclasses.asdict(config).items() if v not in ("", None)}
    options = [f"--{k}={v}" for k, v in given.items() if not isinstance(v, bool)]
    for says in ("55 images: 54 encoded in", "nothing computed"):
        assert cli.main(["evaluate", *options, "--cluster", "here", "--json"]) == 0
        out = capsys.readouterr().out
        assert says in out and "profile " in out
        assert json.loads(out.splitlines()[-1])["n"] == 54
    (folder,) = (tmp_path / "runs").iterdir()
    assert lines(folder) == lines(plain)
    assert min(inline[0].attempts.values()) == 2  # each task was done again


def test_a_sweep_is_the_same_on_a_cluster(config, inline, capsys, tmp_path):
    common = {k: v for k, v in dataclasses.asdict(config).items() if v not in ("", None)}
    del common["out"], common["cache"]
    rows = [{"label": "vote", "method": "vote"}, {"label": "mta", "method": "mta"},
            {"label": "few", "method": "vote", "n_aug": 3}, {"label": "wrong", "method": "votte"},
            {"label": "worse", "methid": "vote"}]  # fmt: skip
    grid = {"common": common, "baseline": "vote", "rows": rows}
    Path("g.yaml").write_text(json.dumps(grid))  # YAML too
    tables = []
    for place in (["--jobs", "1"], ["--cluster", "here"]):
        command = ["g.yaml", "--json", "--out", f"o{len(tables)}", "--cache", f"c{len(tables)}"]
        assert sweep.main([*command, *place]) == 1  # two rows cannot work
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert "did you mean 'vote'" in result["failed"][0]["error"]
        assert [f["label"] for f in result["failed"]] == ["wrong", "worse"]
        tables.append([{**r, "seconds_per_image": 0} for r in result["rows"]])
    assert tables[0] == tables[1] and len(tables[0]) == 3
    shards = [len(list(tmp_path.glob(f"c1/features/{k.name}/*.safetensors")))
              for k in tmp_path.glob("c1/features/*")]  # fmt: skip
    assert len(shards) == 2 and inline[0].attempts  # vote and mta share their features
    assert sweep.main(["g.yaml", "--cluster", "here", "--out", "s3://bucket/x"]) == 2
    assert "out must be a folder" in capsys.readouterr().err


def test_a_leaderboard_is_the_same_on_a_cluster(inline, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TPT_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    command = ["--variants", "iconshift-a", "--methods", "vote", "--n", "8", "--n_aug", "3"]
    found = []
    for place in ([], ["--cluster", "here"]):
        out = ["--out", str(tmp_path / f"l{len(found)}"), "--json"]
        assert leaderboard.main([*command, *out, *place]) == 0
        table = json.loads(capsys.readouterr().out.splitlines()[-1])
        found.append({r["row"]: (r["mean"], r["ece"]) for r in table["rows"]})
    assert found[0] == found[1] and "vote" in found[0]
    files = [sorted(p.name for p in tmp_path.glob(f"l{k}/*.json")) for k in (0, 1)]
    assert files[0] == files[1]
    assert len(inline[0].attempts) == 1 + len(files[1])  # the features were there


# --- without Ray ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "sweep", "leaderboard"])
def test_without_ray_it_says_what_to_install(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text("rows: [{method: tpt, dataset: iconshift-a}]")
    mains = {
        "evaluate": lambda: cli.main(["evaluate", "--cluster", "local"]),
        "sweep": lambda: sweep.main(["g.yaml", "--cluster", "local"]),
        "leaderboard": lambda: leaderboard.main(
            ["--variants", "iconshift-a", "--methods", "vote", "--n", "20", "--out", "o",
             "--cluster", "local"]),
    }  # fmt: skip
    assert mains[command]() == 2
    assert "pip install -r ci/requirements-cluster.txt" in capsys.readouterr().err
    assert (REPO / "ci" / "requirements-cluster.txt").read_text().count("ray>=") == 1


def test_nobody_imports_ray_or_torch_for_it():
    code = "import sys, tpt_nb.__main__, tpt_nb.cluster\n"
    code += "print([m for m in ('ray', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


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


def no_daemons() -> bool:
    """Is nothing of Ray left? It has some seconds to go."""
    for _ in range(60):
        names = [p.read_text().strip() for p in Path("/proc").glob("[0-9]*/comm") if readable(p)]
        if not {"raylet", "gcs_server"} & set(names):
            return True
        time.sleep(0.5)
    return False


def readable(path: Path) -> bool:
    """Is the process there, and not a zombie that its parent has not asked about?"""
    with contextlib.suppress(OSError, IndexError):
        return (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@with_ray
@pytest.mark.slow
def test_a_worker_is_killed(scenes):
    killed = []

    def kill(part: dict) -> None:
        if not killed:  # it has its next part by now
            killed.append(part["pid"])
            os.kill(part["pid"], signal.SIGKILL)

    done, report = cluster.evaluate(scenes, "local", 2, progress=False, on_part=kill)
    assert killed and lines(done.dir) == plainly(scenes)
    assert done.summary["encoded"] == 0 and report.encoded == 60
    assert report.retried and "died" in report.text()
    assert len({part["pid"] for part in report.parts}) >= 2
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
    while len(list(Path("cache").glob("features/*/*.safetensors"))) < 4 and time.time() < deadline:
        assert process.poll() is None  # it has just begun
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert no_daemons()
    left = len(list(Path("cache").glob("features/*/*.safetensors")))
    assert left >= 4 and not list(Path("runs").glob("*/summary.json"))
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert out.returncode == 0, out.stderr
    encoded = int(out.stdout.split("60 images: ")[1].split(" encoded")[0])
    assert 0 < encoded <= 60 - 2 * left
    (folder,) = Path("runs").iterdir()
    assert lines(folder) == plainly(scenes)
    assert no_daemons()


@with_ray
@pytest.mark.slow
def test_a_node_leaves(scenes, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=options)
    try:
        other = nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        nodes.wait_for_nodes()
        left = []

        def leave(part: dict) -> None:
            if not left:
                left.append(part)
                nodes.remove_node(other, allow_graceful=False)

        done, report = cluster.evaluate(scenes, nodes.address, progress=False, on_part=leave)
    finally:
        nodes.shutdown()
    assert left and lines(done.dir) == plainly(scenes) and report.encoded == 60
    assert not list(Path(".").glob("*/.driver-*"))


@with_ray
@pytest.mark.slow
def test_a_sweep_and_a_leaderboard_are_the_same_on_a_cluster(scenes, capsys):
    Path("g.yaml").write_text(
        "common: {dataset: iconshift-a, reduced_size: 20, n_aug: 7}\nbaseline: vote\n"
        "rows: [{label: vote, method: vote}, {label: mta, method: mta}, {label: few, method: vote, "
        "n_aug: 3}, {label: wrong, method: votte}]"
    )
    tables = []
    for place in (["--jobs", "1"], ["--cluster", "local", "--cluster-workers", "2"]):
        command = ["g.yaml", "--json", "--out", f"o{len(tables)}", "--cache", f"c{len(tables)}"]
        assert sweep.main([*command, *place]) == 1  # one row cannot work
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert "did you mean 'vote'" in result["failed"][0]["error"]
        tables.append([{**r, "seconds_per_image": 0} for r in result["rows"]])
    assert tables[0] == tables[1] and len(tables[0]) == 3
    found = []
    for place in ([], ["--cluster", "local", "--cluster-workers", "2"]):
        command = ["--variants", "iconshift-a", "--methods", "vote", "mta", "--n", "20", "--n_aug"]
        out = ["--out", f"l{len(found)}", "--json"]
        assert leaderboard.main([*command, "7", *out, *place]) == 0
        table = json.loads(capsys.readouterr().out.splitlines()[-1])
        found.append({r["row"]: (r["mean"], r["ece"]) for r in table["rows"]})
    assert found[0] == found[1] and set(found[0]) >= {"vote", "mta"}
    assert no_daemons()

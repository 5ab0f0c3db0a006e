"""Runs over several processes, GPUs or machines, with Ray: ``--cluster local`` or ``ADDRESS``.

The driver, the process that was started, holds no images, no features and no model: it hands out
tasks and counts. Stage 1 is one task per shard: a worker, which keeps the data set and the model
between its tasks, encodes the images of a shard exactly as ``encode`` does and writes the same file
into the same cache. Stage 2 is one task per configuration: ordinary ``experiment.run`` on the
complete cache. So the records are those of one machine because the code is, and what was lost on
the way (a shard that was damaged after it was written) stage 2 finds missing and encodes.

Nothing is lost and nothing is there twice: shards are named by their images and appear whole
(:mod:`tpt_nb.storage`); a run is made in a folder of its own attempt, below ``<out>/.attempts``,
and published file by file, the summary last. A task whose worker or node died is handed out again,
and said to have been; a driver that died finds the finished shards when it is started again.

``cache`` and ``out`` may be addresses (``s3://``, ``gs://`` ...). A worker then copies the shards
of a run to its own disk before stage 2, and a stage 2 that died starts from its first image.

Ray is imported by :func:`connect` and nowhere else.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import secrets
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tpt_nb import __version__
from tpt_nb.core.paths import REPO, cache_dir
from tpt_nb.core.remote import is_remote
from tpt_nb.runs import RunConfig
from tpt_nb.scale.storage import FULL, Storage

SHARD = 64  # images per task and cache file at most, as in encode


PARTS = 16  # tasks per worker at least, where there are so many images: the last ones end together


TRIES = 4  # of a task whose worker died or whose storage failed


STORE_MEMORY = 100 * 2**20  # of Ray's object store, in a local cluster; nothing large goes there


PASSED = ("TPT_NB_CACHE", "TPT_NB_DATASETS", "TPT_NB_DOWNLOAD")  # variables that workers get too


INSTALL = "pip install -r ci/requirements-cluster.txt"


@dataclass
class Report:
    """What happened: counts, seconds, and what had to be done again."""

    workers: int = 0
    images: int = 0
    encoded: int = 0
    failed: int = 0
    damaged: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)
    parts: list[dict] = field(default_factory=list)  # per task of stage 1: images, times, process
    seconds: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """Two lines at most."""
        seconds = self.seconds.get("encode", 0.0)
        rate = f", {self.encoded / seconds:.1f} images/s" if self.encoded and seconds else ""
        line = f"{self.images} images: {self.encoded} encoded in {len(self.parts)} parts on "
        line += f"{self.workers} workers in {seconds:.1f} s{rate}; "
        line += f"{self.failed} could not be read; done again: {len(self.retried)}"
        more = [f"damaged shards dropped: {len(self.damaged)}"] if self.damaged else []
        more += self.retried[:3]
        return line + (f" ({'; '.join(more)})" if more else "")


@dataclass
class Done:
    """A finished run: where it is, its configuration (all filled in), its summary, its output."""

    dir: str
    config: RunConfig
    summary: dict
    said: str = ""


_state: dict[str, tuple] = {}  # of the last task: data set, model, augmenter, name of the cache


def describe(job: dict) -> dict:
    """Fill in the configuration of a job and see what is there.

    Returns ``config`` (a dict), ``name`` (of the run), ``finished``, then with its ``summary``; if
    it is not finished ``key`` (folder of its features below the cache), ``n`` images, ``missing``
    (positions of the images whose features are not there), ``bytes`` that these will take, ``free``
    bytes of the disk and ``damaged`` shards, which were dropped.
    """
    from tpt_nb import runs
    from tpt_nb.runs import config as config_module

    config, why = runs.resolve(_enter(job))
    name = config_module._name(config)
    said = f"profile {config.profile}: {why}\n"
    found = {"config": dataclasses.asdict(config), "said": said, "name": name, "retried": []}
    folder = Storage(job["out"], retried=found["retried"]).child(name)
    summary = _finished(folder, config)
    if summary:
        found["said"] += f"{folder.url} is complete, nothing computed\n"
        return found | {"finished": True, "summary": summary}
    dataset, clip, augmenter, (key, text) = _open(config)
    cache = Storage(job["cache"], retried=found["retried"])
    shards = cache.child(key)
    if "manifest.json" not in shards.names():
        shards.write("manifest.json", text.encode())
    position = {image_id: i for i, image_id in enumerate(dataset.ids)}
    have, damaged = _scan(shards, position)
    missing = [i for image_id, i in position.items() if image_id not in have]
    return found | {
        "finished": False,
        "key": key,
        "n": len(position),
        "data": dataset.name,
        "missing": missing,
        "bytes": len(missing) * augmenter.n_views * clip.embed_dim * 4,
        "free": cache.free(),
        "damaged": damaged,
    }


def encode_part(job: dict, key: str, indices: Sequence[int]) -> dict:
    """Encode the images at these positions of the data set and write them as one shard.

    Returns counts, times and what was retried. ``ValueError`` if this machine's data or weights are
    not those that the run was described with.
    """
    import torch
    from tqdm import tqdm

    from tpt_nb import datasets, features
    from tpt_nb.features import shards as shards_module

    began = time.time()
    config = _enter(job)
    dataset, clip, augmenter, (own, _) = _open(config)
    if own != key:
        raise ValueError(
            f"{socket.gethostname()} has other images, weights or versions than the machine where "
            f"the run was described (its features are {own}, not {key}); make them the same."
        )
    if clip.device.type == "cpu":
        torch.set_num_threads(1)  # a worker is a core
    part = datasets.subset(dataset, list(indices))
    storage = Storage(job["cache"]).child(key)
    store = features.Store(part.ids)

    def write(chosen: list[int]) -> None:
        name, data = features.pack_shard(store, chosen)
        try:
            storage.write(name, data)
        except OSError as error:
            raise shards_module._explain(error, Path(storage.url)) from error

    everything = list(range(len(part)))
    with tqdm(disable=True) as bar:
        failed = features.fill(
            store, part, clip, augmenter, config.seed, everything, job["loaders"], bar,
            len(part), write,
        )  # fmt: skip
    return {
        "images": len(part),
        "failed": failed,
        "began": began,
        "ended": time.time(),
        "pid": os.getpid(),
        "node": socket.gethostname(),
        "retried": storage.retried,
    }


def adapt_config(job: dict, key: str) -> dict:
    """Stage 2 of a job on the features that are there: an ordinary run, then published.

    Returns its summary, its configuration, what it printed, and what was retried.
    """
    import torch

    from tpt_nb import runs
    from tpt_nb.runs import config as config_module

    config = _enter(job)
    torch.set_num_threads(job["threads"] or _cores())
    out = Storage(job["out"])
    name = config_module._name(config)
    said = io.StringIO()
    with (
        _attempt(out, name) as place,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        cache = _local_cache(job, key, out.retried)
        here = dataclasses.replace(config, out=str(place), cache=cache)
        done = runs.run(here, progress=False)
        _publish(done.dir, out.child(name), {"out": config.out, "cache": config.cache})
    lines = said.getvalue().replace(str(done.dir), name).splitlines(keepends=True)
    return {
        "summary": done.summary,
        "config": dataclasses.asdict(config),
        "name": name,
        "said": "".join(line for line in lines if not line.startswith("profile ")),
        "retried": out.retried,
    }


def call_script(job: dict, script: str, function: str, argument: object) -> object:
    """Call a function of a script of ``ci/`` (``ci/leaderboard.py`` has one) with one argument."""
    import importlib

    import torch

    _enter(job)
    torch.set_num_threads(job["threads"] or _cores())
    if str(REPO / "ci") not in sys.path:
        sys.path.insert(0, str(REPO / "ci"))
    return getattr(importlib.import_module(script), function)(argument)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _enter(job: dict) -> RunConfig:
    """Check that this process sees what the driver sees; the configuration of the job."""
    if job["version"] != __version__:
        raise ValueError(
            f"{socket.gethostname()} has tpt_nb {__version__}, the driver has {job['version']}."
        )
    for mark in job["marks"]:
        if not Path(mark).is_file():
            raise ValueError(
                f"{socket.gethostname()} does not see {Path(mark).parent} of the driver: put cache "
                "and out on a disk that all machines share, or give addresses (s3://, gs:// ...)."
            )
    os.environ.update(job["env"])
    if Path(job["cwd"]).is_dir():  # relative paths mean what they mean to the driver
        os.chdir(job["cwd"])
    return RunConfig(**job["values"])


def _open(config: RunConfig) -> tuple:
    """Data set, model, augmenter, and (folder, manifest) of the features; kept for the next."""
    from tpt_nb import datasets, models
    from tpt_nb.features import cache_key, manifest
    from tpt_nb.views import AUGMENTERS, make_augmenter

    names = ("dataset", "root", "model", "device", "reduced_size", "subset_seed", "seed")
    takes = AUGMENTERS[config.augmenter].__dataclass_fields__
    params = {name: getattr(config, name) for name in takes if hasattr(config, name)}
    wanted = [getattr(config, name) for name in names]
    print_ = json.dumps([wanted, config.augmenter, params], sort_keys=True)
    if print_ not in _state:
        _state.clear()  # first, so that there are never two models in memory
        dataset = datasets.load(
            config.dataset, config.reduced_size, config.subset_seed, config.root or None
        )
        if not len(dataset):
            raise ValueError(f"the data set {config.dataset} has no images: nothing to run over.")
        try:
            clip = models.load(config.model, device=config.device)
        except RuntimeError as error:  # weights that cannot be fetched
            raise ValueError(str(error)) from error
        augmenter = make_augmenter(config.augmenter, size=clip.image_size, **params)
        key = manifest(cache_key(dataset, clip, augmenter, config.seed))
        _state[print_] = dataset, clip, augmenter, key
    return _state[print_]


def _scan(shards: Storage, wanted: dict[str, int]) -> tuple[set[str], list[str]]:
    """The wanted ids that whole shards hold, and the names of damaged shards, which are dropped.

    Here every byte is read and its checksum compared; far away the header, and whether the file is
    as long as it says (the checksum is looked at when it is fetched).
    """
    from tpt_nb.features import read_shard

    have, damaged = set(), []
    for name, size in sorted(shards.names().items()):
        if not name.endswith(".safetensors"):
            continue
        try:
            if shards.remote:
                ids = _header(shards, name, size)
            else:
                ids = read_shard(Path(shards.url) / name, wanted)[0] or ()
        except FileNotFoundError:  # another process dropped it
            continue
        except OSError:  # cannot be read now: that says nothing about what is in it
            raise
        except Exception:  # safetensors has errors of its own
            damaged.append(name)
            shards.delete(name)
            continue
        have.update(image_id for image_id in ids if image_id in wanted)
    return have, damaged


def _header(shards: Storage, name: str, size: int) -> list[str]:
    """The image ids of a shard, of which only the header is read. ``ValueError`` if it is cut."""
    length = int.from_bytes(shards.read(name, 0, 8), "little")
    if length > size:
        raise ValueError("cut in its header")
    header = json.loads(shards.read(name, 8, 8 + length))
    ids = json.loads(header.pop("__metadata__")["shard"])["ids"]
    if size != 8 + length + max(entry["data_offsets"][1] for entry in header.values()):
        raise ValueError("not as long as its header says")
    return ids


def _local_cache(job: dict, key: str, retried: list[str]) -> str:
    """The cache, or a copy here of what the run needs of it. A damaged shard is dropped there."""
    from tpt_nb.features import read_shard

    if not is_remote(job["cache"]):
        return job["cache"]
    far = Storage(job["cache"], retried=retried).child(key)
    here = cache_dir() / "cluster" / key.split("/")[-1][:8]
    near = Storage(str(here)).child(key)
    there = near.names()
    for name, size in far.names().items():
        if there.get(name) == size:
            continue
        near.write(name, far.read(name))
        if name.endswith(".safetensors"):
            try:
                read_shard(Path(near.url) / name)
            except Exception as error:
                print(f"damaged shard {name} ({error}); its images are encoded again")
                near.delete(name)
                far.delete(name)
    return str(here)


def _finished(folder: Storage, config: RunConfig) -> dict | None:
    """The summary of a run if all of it is there."""
    from tpt_nb.runs import records

    if not folder.remote:
        done = records._finished(Path(folder.url), config)
        return done.summary if done else None
    names = folder.names()  # published whole, the summary last
    return json.loads(folder.read("summary.json")) if "summary.json" in names else None


@contextlib.contextmanager
def _attempt(out: Storage, name: str) -> Iterator[Path]:
    """A folder for a run that nobody else writes to, with the records of the attempts before.

    Two workers can be at the same run: one that was given up for dead, and its successor.
    """
    local = None if out.remote else Path(out.url)
    root = (local or cache_dir() / "cluster" / "runs") / ".attempts" / name
    place = root / secrets.token_hex(4)
    (place / name).mkdir(parents=True)
    if local:
        before = [*root.glob(f"*/{name}/records.jsonl"), local / name / "records.jsonl"]
        sizes = {path: path.stat().st_size for path in before if path.is_file()}
        for path in sorted(sizes, key=sizes.get)[-1:]:
            for other in ("config.json", "records.jsonl"):
                if (path.parent / other).is_file():
                    shutil.copyfile(path.parent / other, place / name / other)
    yield place
    # after an error it stays: what was computed serves the next attempt
    shutil.rmtree(root, ignore_errors=True)
    with contextlib.suppress(OSError):
        root.parent.rmdir()  # if it was the last


def _publish(folder: Path, to: Storage, changes: dict) -> None:
    """The files of a run to their place, the summary last; its configuration as it was asked."""
    header = json.loads((folder / "config.json").read_text())
    header["config"] |= changes
    to.write("config.json", (json.dumps(header, indent=1) + "\n").encode())
    for path in sorted(folder.iterdir(), key=lambda p: p.name == "summary.json"):
        if path.name != "config.json":
            to.write(path.name, path.read_bytes())


class Cluster:
    """A connection to Ray; :func:`connect` makes it."""

    def __init__(self, ray, workers: int | None, local: bool):
        self.ray, self.workers, self.local = ray, workers, local
        resources = ray.cluster_resources()
        self.gpus = int(resources.get("GPU", 0))
        self.cpus = int(resources.get("CPU", 0))

    def device(self, wanted: str) -> str:
        """What "auto" means on this cluster."""
        return ("cuda" if self.gpus else "cpu") if wanted == "auto" else wanted

    def slots(self, device: str) -> int:
        """Tasks that can run at once now; nodes come and go."""
        have = self.ray.cluster_resources().get("GPU" if device.startswith("cuda") else "CPU", 0)
        return min(int(have), self.workers or int(have))

    def tasks(
        self, function: Callable, arguments: Sequence[tuple], device: str, retried: list[str]
    ) -> Iterator[tuple[int, object, Exception | None]]:
        """Do the tasks in any order; yields (position, result, None) or (position, None, error).

        A task whose worker or node died, or whose storage failed, is handed out again, ``TRIES``
        times at most, with a line in ``retried``. Few are under way at a time.
        """
        ray = self.ray
        # a worker keeps its process, and with it the model, also where it has a GPU (max_calls)
        gpus = int(device.startswith("cuda"))
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=0)(function)
        waiting = deque((i, 1) for i in range(len(arguments)))
        flying: dict = {}
        idle_since = time.monotonic()
        try:
            while waiting or flying:
                slots = self.slots(device)
                room = max(1, slots if self.workers else 2 * slots)
                while waiting and len(flying) < room:
                    i, attempt = waiting.popleft()
                    flying[remote.remote(*arguments[i])] = i, attempt
                if slots:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > 60:
                    what = "GPU" if gpus else "CPU"
                    raise ValueError(
                        f"the cluster has had no {what} for a minute; what is finished is kept, "
                        "the same command goes on from there"
                    )
                for ref in ray.wait(list(flying), timeout=2)[0]:
                    i, attempt = flying.pop(ref)
                    try:
                        result = ray.get(ref)
                    except ray.exceptions.RayError as error:
                        why, again = _why(ray, error)
                        if again and attempt < TRIES:
                            retried.append(f"task {i + 1} of {len(arguments)}: {_first_line(why)}")
                            waiting.append((i, attempt + 1))
                        else:
                            yield i, None, why
                    else:
                        retried += result.get("retried", []) if isinstance(result, dict) else []
                        yield i, result, None
        finally:
            for ref in flying:
                with contextlib.suppress(Exception):
                    ray.cancel(ref, force=True)

    def job(self, config: RunConfig, marks: Sequence[str] = (), alone: bool = True) -> dict:
        """What a task needs to know beside its own share.

        A run that is ``alone`` may use all cores in its stage 2, as it does without a cluster.
        """
        threads = 1
        if alone:  # Ray hides this variable's value from its workers
            threads = int(os.environ.get("OMP_NUM_THREADS") or (_cores() if self.local else 0))
        device = self.device(config.device)
        per_gpu = self.cpus // max(1, self.gpus)
        loaders = config.workers
        if loaders is None:
            loaders = max(0, min(8, per_gpu - 1)) if device.startswith("cuda") else 0
        cache = config.cache or str(cache_dir())
        return {
            "values": dataclasses.asdict(config) | {"device": device},
            "cache": cache if is_remote(cache) else str(Path(cache).absolute()),
            "out": config.out if is_remote(config.out) else str(Path(config.out).absolute()),
            "cwd": os.getcwd(),
            "marks": list(marks),
            "version": __version__,
            "env": {k: os.environ[k] for k in PASSED if k in os.environ},
            "threads": threads,
            "loaders": loaders,
        }


@contextlib.contextmanager
def connect(address: str, workers: int | None = None) -> Iterator[Cluster]:
    """Connect to a cluster, or start one in this machine (``local``) and stop it at the end.

    ``workers``: how many at a time at most; by default one per GPU if there are any, else one per
    CPU. Raises ``ValueError`` if Ray is not installed or nobody answers at the address.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
    except ImportError as error:
        raise ValueError(f"--cluster needs Ray, which is not installed: {INSTALL}") from error
    if workers is not None and workers < 1:
        raise ValueError(f"--cluster-workers is {workers}; it must be 1 or more.")
    local = address == "local"
    options: dict = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if local:
        path = [str(REPO), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        options |= {"object_store_memory": STORE_MEMORY, "include_dashboard": False}
        if workers and not os.path.exists("/dev/nvidia0"):
            options["num_cpus"] = workers
    try:
        context = ray.init(**options)
    except Exception as error:  # Ray raises plain ones, too
        what, hint = f"no Ray cluster is at {address}", "start one with `ray start --head`"
        if local:  # Ray gives its own processes half a minute, which a busy machine may exceed
            what, hint = "Ray does not start here", "is the machine very busy? Then try again"
        raise ValueError(f"{what} ({_first_line(error)}); {hint}.") from error
    try:
        if getattr(context, "dashboard_url", None):
            print(f"Ray's dashboard: http://{context.dashboard_url}")
        yield Cluster(ray, workers, local)
    finally:
        ray.shutdown()


def _why(ray, error: Exception) -> tuple[Exception, bool]:
    """The error behind one of Ray's, in our terms, and whether another try may help."""
    if not isinstance(error, ray.exceptions.RayTaskError):  # the worker or the node died
        return RuntimeError(f"{type(error).__name__}: {_first_line(error)}"), True
    if "No module named 'tpt_nb'" in str(error):
        return ValueError(
            "the machines of the cluster do not find tpt_nb: run `pip install -e .` in the "
            "repository on each, or set PYTHONPATH to it before `ray start`."
        ), False
    cause = error.cause if isinstance(error.cause, Exception) else error
    again = isinstance(cause, OSError) and cause.errno not in FULL
    return cause, again and not isinstance(cause, FileNotFoundError)


def evaluate(
    config: RunConfig,
    address: str,
    workers: int | None = None,
    progress: bool = True,
    on_part: Callable[[dict], None] | None = None,
) -> tuple[Done, Report]:
    """One run on a cluster; raises what :func:`tpt_nb.experiment.run` raises.

    ``on_part`` is called with what every task of stage 1 returned.
    """
    began, report = time.perf_counter(), Report()
    with connect(address, workers) as cluster:
        report.seconds["connect"] = time.perf_counter() - began
        ((_, done),) = run_all(cluster, [config], report, progress, on_part)
        report.seconds["total"] = time.perf_counter() - began
    if isinstance(done, Exception):
        raise done
    return done, report


def run_all(
    cluster: Cluster,
    configs: Sequence[RunConfig],
    report: Report,
    progress: bool = True,
    on_part: Callable[[dict], None] | None = None,
) -> Iterator[tuple[int, Done | Exception]]:
    """Runs, as they finish: (position, run), or why there is none.

    First stage 1 for all of them, features that several need once; then stage 2 side by side.
    """
    with _marks(cluster, configs) as marks:
        jobs = [cluster.job(config, marks, alone=len(configs) == 1) for config in configs]
        ready = prepare(cluster, jobs, report, progress, on_part)
        for i, found in ready.items():
            if isinstance(found, Exception):
                yield i, found
            elif found["finished"]:
                yield i, _done(jobs[i], found)
        left = [
            i for i, found in ready.items() if isinstance(found, dict) and not found["finished"]
        ]
        began = time.perf_counter()
        arguments = [(jobs[i], ready[i]["key"]) for i in left]
        device = jobs[0]["values"]["device"]
        for k, result, error in cluster.tasks(adapt_config, arguments, device, report.retried):
            report.seconds["adapt"] = time.perf_counter() - began
            if error is None:
                result["said"] = ready[left[k]]["said"] + result["said"]
            yield left[k], error or _done(jobs[left[k]], result)


def prepare(
    cluster: Cluster,
    jobs: Sequence[dict],
    report: Report,
    progress: bool = True,
    on_part: Callable[[dict], None] | None = None,
) -> dict[int, dict | Exception]:
    """Stage 1 of some jobs: for each what :func:`describe` found, or why it has no features.

    The jobs get their configurations with every default filled in. Raises ``OSError`` if the disk
    is full.
    """
    began = time.perf_counter()
    device = jobs[0]["values"]["device"]
    out: dict[int, dict | Exception] = {}
    for i, found, error in cluster.tasks(describe, [(j,) for j in jobs], device, report.retried):
        out[i] = error or found
        if error is None:
            jobs[i]["values"] = found["config"]
    report.seconds["describe"] = time.perf_counter() - began
    subsets: dict[str, set] = {}
    for i, found in sorted(out.items()):
        if isinstance(found, Exception) or found["finished"]:
            continue
        subset = found["config"]["reduced_size"], found["config"]["subset_seed"]
        seen = subsets.setdefault(found["key"], set())
        if subset in seen:
            continue
        if seen:  # other images of the same data set: some may be there by now
            ((_, found, error),) = cluster.tasks(describe, [(jobs[i],)], device, report.retried)
            out[i] = error or found
            if error is not None:
                continue
        seen.add(subset)
        try:
            encode_all(cluster, jobs[i], found, report, progress, on_part)
        except (ValueError, RuntimeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            same = [
                k for k, f in out.items() if isinstance(f, dict) and f.get("key") == found["key"]
            ]
            out |= dict.fromkeys(same, error)
    return dict(sorted(out.items()))


def encode_all(
    cluster: Cluster,
    job: dict,
    found: dict,
    report: Report,
    progress: bool = True,
    on_part: Callable[[dict], None] | None = None,
) -> None:
    """Stage 1 of a job: the missing images in parts, with one bar.

    Raises ``OSError`` if the disk is full, ``ValueError`` if the machines differ, both at once; if
    some parts fail again and again ``RuntimeError``, after all others are done.
    """
    began = time.perf_counter()
    missing, device = found["missing"], job["values"]["device"]
    report.workers = max(1, cluster.slots(device))
    size = part_size(len(missing), report.workers)
    parts = [missing[k : k + size] for k in range(0, len(missing), size)]
    report.images += found["n"]
    report.damaged += found["damaged"]
    if found["free"] is not None and found["bytes"] > found["free"]:
        print(
            f"warning: the features will take {found['bytes'] / 1e9:.1f} GB, and {job['cache']} "
            f"has {found['free'] / 1e9:.1f} GB free; --cache names another place",
            file=sys.stderr,
        )
    broken, failed, before = [], 0, len(report.retried)
    with _bar(found["n"], len(missing), found["data"], progress) as bar:
        arguments = [(job, found["key"], part) for part in parts]
        for k, result, error in cluster.tasks(encode_part, arguments, device, report.retried):
            if error is None:
                bar.update(result["images"])
                failed += len(result["failed"])
                report.encoded += result["images"] - len(result["failed"])
                report.parts.append({k: v for k, v in result.items() if k != "retried"})
                if on_part:
                    on_part(result)
            elif isinstance(error, ValueError) or getattr(error, "errno", None) in FULL:
                raise error
            else:
                broken.append((k, error))
            again = len(report.retried) - before
            if failed or again or broken:
                bar.set_postfix(failed=failed, again=again, broken=len(broken))
    report.failed += failed
    before = report.seconds.get("encode", 0.0)
    report.seconds["encode"] = before + time.perf_counter() - began
    if broken:
        k, error = broken[0]
        raise RuntimeError(
            f"{len(broken)} of {len(parts)} parts failed {TRIES} times, the first (images number "
            f"{parts[k][0]} to {parts[k][-1]}): {_first_line(error)}. The others are in the cache: "
            "the same command goes on from there."
        )


def part_size(images: int, workers: int) -> int:
    """Images per task of stage 1: many tasks per worker, so that the last ones end together."""
    return max(1, min(SHARD, math.ceil(images / (PARTS * workers))))


def _bar(total: int, missing: int, name: str, progress: bool):
    from tqdm import tqdm

    off = {} if progress and missing else {"disable": True}  # unset, TQDM_DISABLE decides
    return tqdm(total=total, initial=total - missing, desc=f"encode {name}", unit="image", **off)


@contextlib.contextmanager
def _marks(cluster: Cluster, configs: Sequence[RunConfig]) -> Iterator[list[str]]:
    """Files in the local folders of some runs, by which a worker knows that it sees them too."""
    folders = {config.out for config in configs}
    folders |= {config.cache or str(cache_dir()) for config in configs}
    folders = set() if cluster.local else {f for f in folders if not is_remote(f)}
    marks = [Path(folder).absolute() / f".driver-{secrets.token_hex(4)}" for folder in folders]
    try:
        for mark in marks:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        yield [str(mark) for mark in marks]
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


def _done(job: dict, found: dict) -> Done:
    folder = f"{job['out'].rstrip('/')}/{found['name']}"
    return Done(folder, RunConfig(**found["config"]), found["summary"], found["said"])


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).strip().split("\n")[0].split())[:200]

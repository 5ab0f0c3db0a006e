"""Runs over several processes, GPUs or machines, with Ray: ``--cluster local`` or ``ADDRESS``.

The process that was started holds no images and no model. Stage 1 is a Ray task per shard, which
calls ``features.encode`` for its images and so fills the same cache as any run; stage 2 is a Ray
task per configuration: ``runs.run`` on the cache that is then complete. So the records are those of
one machine because the code is, and what got lost in between stage 2 finds missing and makes. Ray
repeats a task whose worker or machine died or whose storage failed; what is finished stays in cache
and out, so that the same command goes on from there.

``cache`` and ``out`` may be addresses (``s3://``, ``gs://`` ...; fsspec). A worker then works in a
folder of its own machine and copies what is finished to the address.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from tpt_nb import __version__, datasets, features, runs
from tpt_nb.core.files import only_writer, write_whole
from tpt_nb.core.messages import bar, first_line, say_once
from tpt_nb.core.paths import REPO, cache_dir
from tpt_nb.core.remote import Remote, is_remote

SHARD = 64  # images per task at most; they are a file of the cache
PARTS = 16  # tasks per worker at least, where there are so many images: the last ones end together
RETRIES = 3  # by Ray, of a task whose worker died or whose storage failed
PASSED = ("TPT_NB_CACHE", "TPT_NB_DATASETS", "TPT_NB_DOWNLOAD")  # variables that workers get too
INSTALL = "pip install -r ci/requirements-cluster.txt"

# --- what a worker does; a job is a configuration (``values``) and what the driver sees ----------

_session = functools.cache(runs.Session)  # a worker keeps the model and the data set of its last
_dataset = functools.lru_cache(maxsize=1)(datasets.load)  # task


def describe(job: dict) -> dict:
    """The job with every default of its configuration filled in, and what there is to do for it.

    Adds ``name`` (of the run), ``why`` (this profile), ``key`` (folder of its features below the
    cache) and ``missing`` (positions of the images whose features are not there); the last two are
    empty for a finished run.
    """
    config, why = runs.resolve(_enter(job))
    job = job | {"values": dataclasses.asdict(config), "name": runs.run_name(config)}
    job["why"] = f"profile {config.profile}: {why}"
    if (fetch(config.out, job["name"]) / "summary.json").is_file():
        return job | {"key": "", "missing": ()}
    dataset, _, _, key = _open(config)
    position = {name: i for i, name in enumerate(dataset.ids)}
    have = {record["i"] for record in features.read_shards(fetch(config.cache, key), position)}
    return job | {"key": key, "missing": tuple(i for i in position.values() if i not in have)}


def encode_part(job: dict, positions: Sequence[int]) -> int:
    """Stage 1 of these images; returns how many could be read.

    ``ValueError`` if data or weights here are not those that the run was described with.
    """
    config = _enter(job)
    dataset, clip, augmenter, key = _open(config)
    if key != job["key"]:
        raise ValueError(
            f"{socket.gethostname()} has other images, weights or versions than the machine where "
            f"the run was described (its features are {key}, not {job['key']}); make them the same."
        )
    part, workers = datasets.subset(dataset, list(positions)), config.workers
    if clip.device.type == "cpu":  # a worker is a core
        torch.set_num_threads(1)
        workers = workers or 0
    with tempfile.TemporaryDirectory() as place:
        cache = place if is_remote(config.cache) else config.cache
        try:
            done = features.encode(
                part, clip, augmenter, config.seed, cache, workers, progress=False
            )
        except ValueError:  # not one of these images can be read: stage 2 says so
            return 0
        if is_remote(config.cache):
            publish(Path(place) / key, config.cache, key)
    return len(done)


def adapt(job: dict) -> str:
    """Stage 2: an ordinary run on the features that are there. Returns what it printed."""
    config, said = _enter(job), io.StringIO()
    torch.set_num_threads(job["threads"])  # those of the driver: the last bits hang on them
    near = dataclasses.replace(config, out=str(_here(config.out)), cache=str(_here(config.cache)))
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if job["key"]:
            fetch(config.cache, job["key"])
        done = runs.run(near, _session(), progress=False)
        if is_remote(config.out):
            publish(done.dir, config.out, done.name)
    return re.sub(r"^profile .*\n", "", said.getvalue(), flags=re.M)  # the driver said it


def _enter(job: dict) -> runs.RunConfig:
    """The configuration of a job. ``ValueError`` where this machine differs from the driver's."""
    here = socket.gethostname()
    if job["version"] != __version__:
        raise ValueError(f"{here} has tpt_nb {__version__}, the driver has {job['version']}.")
    os.environ.update(job["env"])
    if Path(job["cwd"]).is_dir():  # relative paths mean what they mean to the driver
        os.chdir(job["cwd"])
    for mark in job["marks"]:
        if not Path(mark).is_file():
            raise ValueError(
                f"{here} does not see {Path(mark).parent} of the driver: put cache and out on a "
                "disk that all machines share, or give addresses (s3://, gs:// ...)."
            )
    return runs.RunConfig.from_dict(job["values"])


def _open(config: runs.RunConfig) -> tuple:
    """Data set, model, augmenter, and the folder of the features below the cache."""
    dataset = _dataset(config.dataset, config.reduced_size, config.subset_seed, config.root or None)
    clip = _session().model(config)
    augmenter = runs.augmenter_of(config, clip.image_size)
    key, _ = features.manifest(features.cache_key(dataset, clip, augmenter, config.seed))
    return dataset, clip, augmenter, key


def _here(url: str) -> Path:
    """A local folder itself; for an address, where this machine has its copy."""
    copy = cache_dir() / "cluster" / re.sub(r"[^\w.-]+", "_", url)
    return copy if is_remote(url) else Path(url)


def fetch(url: str, name: str) -> Path:
    """A folder below ``url``, as it is here; from an address, what is new is copied first."""
    here = _here(url) / name
    if not is_remote(url):
        return here
    fs, base = Remote(url).open()
    fs.invalidate_cache()  # others write too
    with only_writer(here), contextlib.suppress(FileNotFoundError):  # nothing there yet
        for file in fs.ls(f"{base}/{name}", detail=True):
            path = here / file["name"].rsplit("/", 1)[-1]
            if not path.is_file() or path.stat().st_size != file["size"]:
                write_whole(path, fs.cat_file(file["name"]))
    return here


def publish(folder: Path, url: str, name: str) -> None:
    """The files of a folder to ``name`` at an address, each whole, ``summary.json`` last."""
    fs, base = Remote(url).open()
    fs.makedirs(f"{base}/{name}", exist_ok=True)
    for path in sorted(folder.glob("[!.]*"), key=lambda path: path.name == "summary.json"):
        with fs.transaction:
            fs.pipe_file(f"{base}/{name}/{path.name}", path.read_bytes())


# --- the driver ----------------------------------------------------------------------------------


def evaluate(config: runs.RunConfig, address: str, workers: int | None = None) -> runs.Run:
    """One run on a cluster; raises what ``runs.run`` and :func:`run_all` raise."""
    ((_, done),) = run_all([config], address, workers)
    if isinstance(done, Exception):
        raise done
    return done


def run_all(
    configs: Sequence[runs.RunConfig], address: str, workers: int | None = None
) -> Iterator[tuple[int, runs.Run | Exception]]:
    """Runs, as they finish: (position, run), or why there is none.

    First stage 1 for all of them, features that several need once; then stage 2 side by side. What
    a run has to say is printed when it is finished. Of runs at an address this machine gets copies.

    Args:
        address: of a Ray cluster, or "local" to start one on this machine.
        workers: tasks at a time at most; default: one per GPU if there are any, else one per CPU.
    Raises:
        ValueError: no Ray, no cluster, or fewer than 1 worker.
        OSError: the disk is full.
    """
    with connect(address, workers) as ray, contextlib.ExitStack() as stack:
        jobs = _jobs(ray, configs, address == "local", stack)
        gpu = any(job["values"]["device"].startswith("cuda") for job in jobs)
        slots = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0))
        if not slots:
            raise ValueError(f"the cluster at {address} has no {'GPU' if gpu else 'CPU'}.")
        do = functools.partial(tasks, ray, gpu, workers)
        found: dict[int, dict] = {}
        for i, job in do(describe, [(job,) for job in jobs]):
            if isinstance(job, Exception):
                yield i, job
            else:
                found[i] = job
                say_once(job["why"])
        broken = _encode(do, found.values(), min(slots, workers or slots))
        yield from ((i, broken[job["key"]]) for i, job in found.items() if job["key"] in broken)
        left = [i for i, job in found.items() if job["key"] not in broken]
        for k, said in do(adapt, [(found[i] | {"missing": ()},) for i in left]):
            job = found[left[k]]
            if isinstance(said, Exception):
                yield left[k], said
            else:
                print(said, end="", flush=True)
                yield left[k], runs.load_run(fetch(job["values"]["out"], job["name"]))


@contextlib.contextmanager
def connect(address: str, workers: int | None = None) -> Iterator:
    """The module ``ray``, connected to a cluster, or to one that is started here and then stopped.

    Raises ``ValueError`` if Ray is not installed or nobody answers at the address.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--cluster-workers is {workers}; it must be 1 or more.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"--cluster needs Ray, which is not installed: {INSTALL}") from error
    options: dict = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    hint = "start one with `ray start --head`"
    if address == "local":  # Ray gives its own processes half a minute, which may be too little
        hint = "is this machine very busy? Then try again"
        path = [str(REPO), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        options |= {"num_cpus": workers, "include_dashboard": False}
        options["object_store_memory"] = 100 * 2**20  # nothing large goes there
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises plain ones, too
        raise ValueError(f"no Ray cluster at {address} ({first_line(error)}); {hint}.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def tasks(
    ray, gpu: bool, workers: int | None, function: Callable, arguments: Sequence[tuple]
) -> Iterator[tuple[int, object]]:
    """Tasks in any order, a CPU or a GPU each: (position, result), or (position, exception)."""
    again = {"max_retries": RETRIES, "retry_exceptions": [OSError]}
    # max_calls: a worker keeps its process, and with it the model, also where it has a GPU
    remote = ray.remote(num_cpus=1, num_gpus=int(gpu), max_calls=0, **again)(function)
    waiting, flying = list(enumerate(arguments))[::-1], {}
    while waiting or flying:
        while waiting and len(flying) < (workers or 1000):
            i, one = waiting.pop()
            flying[remote.remote(*one)] = i
        ((ref,), _) = ray.wait(list(flying), num_returns=1)
        i = flying.pop(ref)
        try:
            yield i, ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            yield i, error.cause if isinstance(error.cause, Exception) else error
        except ray.exceptions.RayError as error:  # its worker or machine died, again and again
            yield i, RuntimeError(f"{type(error).__name__}: {first_line(error)}")


def spread(
    function: Callable, arguments: Sequence[tuple], address: str, workers: int | None = None
) -> Iterator[tuple[int, object]]:
    """Calls of a function of a module, spread over a cluster: (position, result or exception).

    A GPU each if the cluster has some. What they leave must be on a disk that all machines share.
    Raises what :func:`connect` raises.
    """
    with connect(address, workers) as ray:
        yield from tasks(
            ray, bool(ray.cluster_resources().get("GPU")), workers, function, arguments
        )


def _jobs(ray, configs: Sequence[runs.RunConfig], local: bool, stack) -> list[dict]:
    """The jobs of some configurations, and marks in their local folders until the stack closes."""
    device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    jobs, marks = [], set()
    for config in configs:
        values = dataclasses.asdict(config) | {"cache": config.cache or str(cache_dir())}
        values["device"] = device if config.device == "auto" else config.device
        jobs.append(values)
        for place in (values["out"], values["cache"]):
            if not local and not is_remote(place):
                mark = Path(place) / f".driver-{os.getpid()}"
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
                marks.add(str(mark))
                stack.callback(mark.unlink, missing_ok=True)
    common = {"version": __version__, "cwd": os.getcwd(), "marks": sorted(marks)}
    common["env"] = {name: os.environ[name] for name in PASSED if name in os.environ}
    # a single run may use all cores in its stage 2, as it does without a cluster
    common["threads"] = torch.get_num_threads() if len(configs) == 1 else 1
    return [common | {"values": values} for values in jobs]


def part_size(images: int, workers: int) -> int:
    """Images per task of stage 1: many tasks per worker, so that the last ones end together."""
    return max(1, min(SHARD, math.ceil(images / (PARTS * workers))))


def _encode(do: Callable, jobs: Iterable[dict], slots: int) -> dict[str, Exception]:
    """Stage 1: the folders of features that could not be completed, and why."""
    need = {(job["key"], job["missing"]): job for job in jobs}  # each once
    total = sum(len(missing) for _, missing in need)
    size, parts, broken = part_size(total, slots), [], {}
    for (_, missing), job in need.items():
        slim = job | {"missing": ()}
        parts += [(slim, missing[k : k + size]) for k in range(0, len(missing), size)]
    if not parts:
        return {}
    began, encoded = time.perf_counter(), 0
    with bar(total, 0, "encode") as shown:
        for k, result in do(encode_part, parts):
            job, positions = parts[k]
            shown.update(len(positions))
            if isinstance(result, int):
                encoded += result
            elif getattr(result, "errno", 0) in (errno.ENOSPC, errno.EDQUOT):
                raise result
            elif not isinstance(result, ValueError):
                result = RuntimeError(
                    f"images number {positions[0]} to {positions[-1]} failed {RETRIES + 1} times: "
                    f"{first_line(result)}. Others are in the cache: the same command goes on."
                )
            if isinstance(result, Exception):
                broken.setdefault(job["key"], result)
    seconds = time.perf_counter() - began
    print(
        f"{total} images: {encoded} encoded in {len(parts)} parts on {slots} workers in "
        f"{seconds:.1f} s, {encoded / seconds:.1f} images/s",
        flush=True,
    )
    return broken

"""The engine: a configuration in, records and a summary out, on disk and resumable.

``run(config)`` opens the data set and the folder, encodes the images (stage 1, cached), adapts to
each of them (stage 2) and summarises. It fills ``<out>/<run name>/``:

- ``config.json``: the configuration with every default filled in, and what it was run on;
- ``records.jsonl``: one line per image, in the order of the data set, group by group;
- ``summary.json``: metrics with intervals, failed images, versions, device, seconds; written last;
- TensorBoard events on request.
"""

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpt_nb import datasets, features, methods, metrics, models
from tpt_nb.core.files import only_writer, write_json
from tpt_nb.core.machine import check_memory, device_name, versions
from tpt_nb.core.messages import bar, say_once
from tpt_nb.runs.config import (
    GROUP,
    RunConfig,
    augmenter_of,
    describe,
    identity,
    name_of,
    options_of,
    short_hash,
)
from tpt_nb.runs.profile import data_of, resolve
from tpt_nb.runs.records import (
    Run,
    append,
    check_folder,
    finished,
    hint_at_chance,
    report_failed,
    resume,
    to_records,
)
from tpt_nb.runs.tensorboard import write_tensorboard
from tpt_nb.runs.threads import in_order, memory_of, threads_of


class Session:
    """The model and the prompts that several runs share, so that each is made once.

    Holds those of the last run. What depends on nothing else (the Jacobian of the text tower) is
    then made once for many runs. Local weights are the same if their content is.
    """

    def __init__(self) -> None:
        self._models: dict[str, models.Clip] = {}
        self._prompts: dict[str, object] = {}

    def model(self, config: RunConfig) -> models.Clip:
        """The model of a (filled-in) configuration; ``ValueError`` if it cannot be had."""
        key = json.dumps([identity(config)["model"], config.device])
        if key not in self._models:
            self._models.clear()  # first, so that there are never two models in memory
            self._prompts.clear()
            try:
                self._models[key] = models.load(config.model, device=config.device)
            except RuntimeError as error:  # weights that cannot be fetched
                raise ValueError(str(error)) from error
        return self._models[key]

    def prompts(self, config: RunConfig, classnames: list[str]):
        """The prompts of a (filled-in) configuration for these classes."""
        clip, values = self.model(config), identity(config)
        names = ["ctx_init", "n_ctx", "coop", "class_token_position", "csc", "templates", "seed"]
        names += ["dataset"] if config.templates == "dataset" else []
        key = json.dumps([[values[name] for name in names], list(classnames)])
        if key not in self._prompts:
            self._prompts.clear()
            self._prompts[key] = make_prompts(config, clip, classnames)
        return self._prompts[key]


def make_prompts(config: RunConfig, clip: models.Clip, classnames: list[str]):
    """The prompts of a (filled-in) configuration: CoOp's, words, random vectors, or an ensemble."""
    if config.templates == "dataset":  # the sentence that CoOp has for it
        sentence = datasets.template(config.dataset)
        return models.TemplatePrompts(clip, classnames, [sentence])
    if config.templates:
        return models.TemplatePrompts(clip, classnames, config.templates)
    try:
        return models.Prompts(
            clip,
            classnames,
            ctx_init=config.ctx_init or None,
            n_ctx=config.n_ctx,
            coop=config.coop or None,
            class_token_position=config.class_token_position,
            class_specific=config.csc,
            seed=config.seed,
        )
    except ValueError as error:  # in the words of who configures a run
        text = str(error).replace("class_specific=True", "csc=True (--csc)")
        text = text.replace("class_specific=False", "csc=False (--no-csc)")
        raise ValueError(text.replace("ctx_init=None", "ctx_init=''")) from error


def run_name(config: RunConfig) -> str:
    """The name of a run's folder, see ``runs.config.name_of``."""
    return name_of(resolve(config)[0])


def run(config: RunConfig | Mapping, session: Session | None = None, progress: bool = True) -> Run:
    """Do one run, go on with a killed one, or load a finished one.

    A second process that starts the same run waits until the first has finished it. Images that
    cannot be decoded are left out, counted and named in the summary and at the end.

    Args:
        config: or a dict of parameters, flat ones too.
        session: shares its model and prompts with other runs.
        progress: show bars and print the settings before the run starts.
    Raises:
        ValueError: a bad configuration, a data set without images, a folder that holds a run of
            something else.
    """
    opened = _open(config)
    done = finished(opened.folder, opened.config)
    if not done:
        setting, prepared = _prepare(opened, session or Session())  # before anything is left behind
        with only_writer(opened.folder):
            done = finished(opened.folder, opened.config)  # by the process that was waited for
            if not done:
                return _compute(opened, setting, prepared, progress)
    print(f"{done.dir} is complete: {len(done.records)} records loaded, nothing computed")
    if opened.config.tensorboard and not list(done.dir.glob("events.out.tfevents.*")):
        write_tensorboard(done, opened.dataset.classnames, opened.dataset)
    return _report(done, opened)


@dataclass
class _Opened:
    """A run before anything is computed."""

    config: RunConfig
    dataset: datasets.Dataset
    folder: Path
    header: dict
    began: float
    given: features.Features | None = None  # extracted by others


def _open(config: RunConfig | Mapping) -> _Opened:
    """The configuration filled in, its images, and its folder, which holds nothing else."""
    began = time.perf_counter()
    config = config if isinstance(config, RunConfig) else RunConfig.from_dict(config)
    resolved, why = resolve(config)
    if config.profile == "auto":
        say_once(f"profile {resolved.profile}: {why}")
    dataset, given = data_of(resolved)
    if not len(dataset):
        raise ValueError(f"the data set {resolved.dataset} has no images: nothing to run over.")
    note = getattr(dataset, "note", "")
    if note:
        say_once(note)
    depends = identity(resolved)
    folder = Path(resolved.out) / name_of(resolved)
    header = {
        "name": folder.name,
        "hash": short_hash(depends),
        "identity": depends,
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint, "n": len(dataset)},
        "config": dataclasses.asdict(resolved),
        "classnames": list(dataset.classnames),
    }
    check_folder(folder, header)
    return _Opened(resolved, dataset, folder, header, began, given)


def _prepare(opened: _Opened, session: Session) -> tuple[methods.Setting, methods.Prepared]:
    """Model, prompts, augmenter, and the method made ready: it fails before the encoding."""
    config, dataset = opened.config, opened.dataset
    clip = session.model(config)
    setting = methods.Setting(
        clip=clip,
        prompts=session.prompts(config, dataset.classnames),
        dataset=dataset,
        augmenter=augmenter_of(config, clip.image_size),
        config=config,
        cache=Path(config.cache),
        seed=config.seed,
        device=config.device,
    )
    method, n = methods.get(config.method), len(dataset)
    if method.kind != "episodic":
        views, classes = setting.augmenter.n_views, len(dataset.classnames)
        size = memory_of(method, n, views, clip.embed_dim, classes)
        check_memory(size, f"{config.method} takes all {n:,} images in one call, which")
    return setting, method.ready(options_of(config), setting)


def _compute(
    opened: _Opened, setting: methods.Setting, prepared: methods.Prepared, progress: bool
) -> Run:
    """Encode, adapt, summarise; the folder is ours."""
    config, dataset, folder = opened.config, opened.dataset, opened.folder
    prompts, cache = setting.prompts, setting.cache
    if progress:
        print(describe(config), flush=True)
    check_folder(folder, opened.header)
    write_json(folder / "config.json", opened.header)
    loaded = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*images failed")  # reported at the end
        encoded = opened.given or features.encode(
            dataset,
            setting.clip,
            setting.augmenter,
            seed=config.seed,
            cache=cache,
            workers=config.workers,
            progress=progress,
        )
    ready = time.perf_counter()
    if isinstance(prompts, models.Prompts):
        prompts.expect(len(encoded.ids), cache)  # of the whole run, so that resuming changes no bit
    records = resume(folder / "records.jsonl", list(encoded.ids))
    if done := len(records):
        print(f"{folder.name}: resumed at {done} of {len(encoded.ids)} images")
    method, device = methods.get(config.method), setting.clip.device
    # what an online method learns from one image it keeps for the next: all of them in one call
    size = GROUP if method.kind == "episodic" else len(encoded.ids)
    threads = threads_of(method, setting.clip)

    def adapt(views, ids):
        return prepared.adapt(views.to(device), prompts, ids)

    seconds, right = {"method": 0.0}, sum(r["pred_after"] == r["target"] for r in records)
    with bar(len(encoded.ids), done, config.method, progress) as shown:
        path = folder / "records.jsonl"
        for fresh in _adapt(path, encoded, done, adapt, size, threads, seconds):
            records += fresh
            right += sum(r["pred_after"] == r["target"] for r in fresh)
            shown.set_postfix_str(f"{100 * right / len(records):.1f} % right", refresh=False)
            shown.update(len(fresh))
    ended = time.perf_counter()
    seconds |= {"load": loaded - opened.began, "encode": ready - loaded}
    seconds |= {"adapt": ended - ready, "total": ended - opened.began}
    summary = _summary(opened, records, done, encoded, seconds, prepared.seconds)
    result = Run(folder, config, records, summary)
    if config.tensorboard:
        write_tensorboard(result, dataset.classnames, dataset)
    write_json(folder / "summary.json", summary)
    return _report(result, opened)


def _adapt(
    path: Path, encoded: features.Features, done: int, adapt: Callable, size: int, threads: int,
    seconds: dict,
) -> Iterator[list[dict]]:  # fmt: skip
    """Adapt to the images after the first ``done``; append and yield the records of each group.

    ``seconds["method"]`` grows by what the method itself takes, of ``threads`` groups at a time.
    """
    n = len(encoded)
    # the whole group is adapted even where some of it is there: same operations, same bits
    starts = [start for start in range(0, n, size) if min(n, start + size) > done]

    def work(start: int) -> tuple[float, list[dict]]:
        part = range(start, min(n, start + size))
        views, ids = encoded.at(part), encoded.ids[start : part.stop]
        began = time.perf_counter()
        adapted = adapt(views, ids)
        took = time.perf_counter() - began
        records = to_records(ids, encoded.targets[start : part.stop], adapted)
        return took, records[max(0, done - start) :]

    for at_once, (took, fresh) in in_order(work, starts, threads):
        seconds["method"] += took / at_once
        append(path, fresh)
        yield fresh


def _summary(
    opened: _Opened, records: list[dict], done: int, encoded: features.Features,
    seconds: dict, own: Mapping[str, float],
) -> dict:  # fmt: skip
    """What ``summary.json`` holds; ``own`` are the seconds of views that the method brought."""
    config, n, n_new = opened.config, len(records), len(records) - done
    times = seconds | {f"{key} (its own views)": value for key, value in own.items()}
    return {
        "name": opened.folder.name,
        "dataset": opened.dataset.name,
        "model": config.model,
        "method": config.method,
        **metrics.summarize(records),
        "failed": {"count": len(encoded.failed), "images": list(encoded.failed)},
        "resumed": done,
        "seconds": {key: round(value, 6) for key, value in times.items()},
        # encoding counts whenever it was done, so that a full cache does not flatter a method
        "seconds_per_image": (encoded.seconds + own.get("encode", 0)) / n
        + seconds["adapt"] / max(1, n_new),
        **({"seconds_to_generate": own["generate"] / n} if "generate" in own else {}),
        "encoded": encoded.encoded,
        "device": device_name(config.device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"by": by} if (by := os.environ.get("TPT_NB_BY")) else {}),  # a notebook, for ci/run
    }


def _report(done: Run, opened: _Opened) -> Run:
    report_failed(done.summary)
    hint_at_chance(done.summary, len(opened.dataset.classnames))
    return done

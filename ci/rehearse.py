"""Rehearse the full profile without a network: each notebook alone in an empty folder.

    bash ci/run --rehearse            # all notebooks, RN50's image tower
    bash ci/run --rehearse --size quick --only 03,06

A server on this machine stands for the outside world (``ci/rehearse_world.py``). Each notebook is
copied into an empty folder; an interpreter without ``tpt_nb`` and an empty home execute it with
papermill, so that its first cell clones the repository, and the profile "auto" downloads what full
needs. Half way the process is killed, kernel and all, and started again (once for each notebook):
finished records must come back unchanged, and nothing may be downloaded twice. Four variables make
the difference to Colab:

``TPT_NB_MIRROR``        one address in place of all that downloads come from (core/download.py)
``TPT_NB_PRETEND_GPU``   1: the profile is chosen as if there were a GPU (runs/profile.py)
``COLAB_RELEASE_TAG``    as Colab has it: the first cell may install and download
``GIT_CONFIG_*``         git's own: the repository's public address leads to a copy made from here
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
from rehearse_world import LAYERS, Server, build

REPO = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds in which a notebook must finish a cell
CLONED = re.compile(r"git clone -qb (\S+) --depth=1 (\S+) ")


@dataclass(frozen=True)
class Case:
    """One notebook with its parameters; ``says`` must be in what its cells print."""

    number: str
    says: str
    values: dict = field(default_factory=dict)
    name: str = ""
    before: tuple[tuple[str, ...], ...] = ()  # commands of tpt_nb that the reader gives first

    @property
    def title(self) -> str:
        return f"{self.number}{f' ({self.name})' if self.name else ''}"


FULL, COOP = "profile full (", "the prompt starts from CoOp"
PICTURES = {"generator": "{given}/pipeline:steps=1,side=32", "n_generated": 4}
GENERATE = ("generate", "--dataset", "imagenet-a", "--reduced_size", "3", "--device", "cpu")
GENERATE += ("--generator", PICTURES["generator"], "--n_generated", "4")
DOWNLOAD = ("download", "imagenet-a")
MAKE = (DOWNLOAD, GENERATE)
FOLDER = {"generator": "{given}/generated", "n_generated": 4}
FEW = {"n_aug": 7, "n_compare": 2, "n_kind": 3}
KNOWLEDGE = {"descriptions": "{given}/CuPL_prompts_imagenet_adversarial.json"}
KNOWLEDGE["image_database"] = "{given}/db_embedding/LAION2B_imagenet_adversarial_aux_RN50"
CASES = [
    Case("00", FULL, {"n": 24, "n_single": 2, "n_aug": 3, "batch": 8, "n_stream": 24}),
    Case("01", FULL, {"n": 6, "shots": 1, "n_train": 8, "epochs": 1}),
    Case("02", "TPT + CoOp against CoOp", {"n": 4, "n_augmix": 2, "n_dev": 2, "n_aug": 7}),
    Case("03", COOP, {"reduced_size": 2, "n_look": 2}),
    Case("03", 'prompt "a photo of a"', {"reduced_size": 1, "n_look": 1, "coop": ""}, "no CoOp"),
    Case("04", COOP, {"reduced_size": 1, "n_curve": 2, "n_variant": 1, "n_crops": 9}),
    Case("05", COOP, {"reduced_size": 3, "n_signs": 2, "n_aug": 15, "n_patches": 4, "n_copies": 3}),
    Case("06", "for full this notebook needs 63 pictures", {"n": 4, **FEW}, "auto"),
    Case("06", FULL, {**PICTURES, "n": 3, **FEW}, "pictures made before", MAKE),
    Case("06", FULL, {**FOLDER, "n": 3, **FEW}, "folder of pictures", (DOWNLOAD,)),
    Case("07", "Going on with mini", {"n": 6}, "auto, no hub"),
    Case("07", FULL, {"n": 3, "captioner": "clip"}, "captioner clip"),
    Case("08", "for full this notebook needs the parameters descriptions", {"n": 6}, "auto"),
    Case("08", FULL, {**KNOWLEDGE, "n": 3, "n_aug": 7}, "descriptions and database given"),
    Case("09", FULL, {"n": 3, "n_paper": 1, "n_aug": 7, "repeats": 1}),
    Case("10", FULL, {"n": 6, "n_classes": 3, "n_tuned": 1, "n_damaged": 1, "n_aug": 7}),
]


# --- what stands for the machine -----------------------------------------------------------------


def interpreter(room: Path) -> Path:
    """A Python with the packages of this one, but without ``tpt_nb``, as Colab's is."""
    import venv

    venv.create(room / "python", symlinks=True)
    base = {"base": str(room / "python"), "platbase": str(room / "python")}
    site = Path(sysconfig.get_path("purelib", vars=base))
    # a line of a .pth adds the folder, but not what its own .pth files say: the editable tpt_nb
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return room / "python" / "bin" / "python"


def repository(room: Path) -> dict[str, str]:
    """What a clone gets, as files are here now; the variables that lead its address there."""
    ref, url = addresses()
    copy, names = room / "repository", _git("ls-files", "-co", "--exclude-standard", "-z")
    for name in filter(None, names.split("\0")):
        if (REPO / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, copy / name)
    who = ("-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost")
    for command in (("init", "-q"), ("add", "-A", "-f"), (*who, "commit", "-qm", "rehearsal")):
        _git("-C", str(copy), *command)
    _git("-C", str(copy), "tag", ref)
    value = {"KEY": f"url.{copy.as_uri()}.insteadOf", "VALUE": url}
    return {"GIT_CONFIG_COUNT": "1", **{f"GIT_CONFIG_{k}_0": v for k, v in value.items()}}


def addresses() -> tuple[str, str]:
    """Tag and address that the notebooks' first cells clone from."""
    text = next((REPO / "notebooks").glob("01_*.ipynb")).read_text("utf-8")
    return CLONED.search(text).groups()


def _git(*command: str) -> str:
    done = subprocess.run(("git", *command), cwd=REPO, capture_output=True, text=True, check=True)
    return done.stdout


def environment(room: Path, mirror: str) -> dict[str, str]:
    """Of a machine like Colab's, with nothing of this one's settings."""
    drop = ("TPT_NB_", "PYTHONPATH", "MPLBACKEND", "VIRTUAL_ENV", "HF_", "GIT_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    env |= {"HOME": str(room / "home"), "COLAB_RELEASE_TAG": "rehearsal", "HF_HUB_OFFLINE": "1"}
    env |= {"TPT_NB_MIRROR": mirror, "TPT_NB_PRETEND_GPU": "1", "TPT_NB_HEADLESS": "1"}
    env |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    return env | {"PYTHONHASHSEED": "0"} | repository(room)


# --- one notebook --------------------------------------------------------------------------------


def executed(path: Path) -> tuple[int, int]:
    """How many code cells a papermill output has done, of how many."""
    try:
        cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    except (OSError, ValueError):
        return 0, 1  # not there yet, or being written
    done = [c.metadata.get("papermill", {}).get("status") == "completed" for c in cells]
    return sum(done), len(cells)


def papermill(command: Sequence[str], env: dict, out: Path, stop_at: float) -> int | None:
    """Run it, or kill it with all its children once so much of it is done; None if killed.

    Raises ``TimeoutError`` if no cell ends for ten minutes.
    """
    with open(out.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, cwd=out.parent, env=env, stdout=log, stderr=log)
    last, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        done, of = executed(out)
        if done != last:
            last, since = done, time.monotonic()
        late = time.monotonic() - since > PATIENCE
        if done >= stop_at * of or late:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.wait()
            if late:
                raise TimeoutError(f"no cell ended for {PATIENCE} s after {done} of {of}")
            return None
    return process.returncode


def records(folder: Path) -> dict[Path, bytes]:
    """The whole lines of all records below a folder."""
    found = {p: p.read_bytes() for p in folder.rglob("records.jsonl")}
    return {p: data[: data.rfind(b"\n") + 1] for p, data in found.items()}


def rehearse(case: Case, room: Path, python: Path, env: dict, given: Path, kill: bool) -> dict:
    """The notebook killed half way and started again; "problem" is empty if all went well."""
    began = time.monotonic()
    folder = room / re.sub(r"\W+", "-", case.title).strip("-")
    folder.mkdir()
    source = next((room / "repository" / "notebooks").glob(f"{case.number}_*.ipynb"))
    notebook, out = folder / source.name, folder / "executed.ipynb"
    shutil.copy2(source, notebook)
    values = {k: str(v).format(given=given) for k, v in case.values.items()}
    options = [part for k, v in values.items() for part in ("-p", k, v)]
    command = [str(python), "-m", "papermill", notebook.name, out.name, *options]
    command += ["--no-progress-bar", "--autosave-cell-every", "0"]
    problem, before = "", {}
    try:
        for words in case.before:
            there = {**env, "PYTHONPATH": str(room / "repository"), "TPT_NB_DOWNLOAD": "1"}
            first = [str(python), "-m", "tpt_nb", *(word.format(given=given) for word in words)]
            subprocess.run(first, cwd=folder, env=there, check=True, capture_output=True, text=True)
        if kill:
            papermill(command, env, out, 0.5)
            before = records(folder)
        code = papermill(command, env, out, 2.0)
        problem = verdict(case, out, code) or changed(before)
    except (TimeoutError, subprocess.CalledProcessError) as error:
        problem = f"{error}\n{(getattr(error, 'stderr', '') or '')[-800:]}".strip()
    kept = sum(data.count(b"\n") for data in before.values())
    seconds = round(time.monotonic() - began)
    return {"case": case.title, "seconds": seconds, "records_kept": kept, "problem": problem}


def changed(before: dict[Path, bytes]) -> str:
    """What is wrong with the records that were there when the process was killed; "" if nothing."""
    bad = [
        p for p, data in before.items() if not p.is_file() or not p.read_bytes().startswith(data)
    ]
    return f"records changed after the restart: {', '.join(p.parent.name for p in bad)}" * bool(bad)


def verdict(case: Case, out: Path, code: int | None) -> str:
    """Why this is no success, in words; "" if it is one."""
    if not out.is_file():
        return f"exit code {code}: {out.with_suffix('.log').read_text()[-800:]}"
    cells = nbformat.read(out, 4).cells
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    for o in outputs:
        if o.output_type == "error":
            trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(o.traceback[-3:]))
            return f"{o.ename}: {o.evalue[:400]}\n{trace[-900:]}"
    said = "\n".join(o.get("text", "") or str(o.get("data", "")) for o in outputs)
    if case.says not in said:
        line = next((t for t in said.split("\n") if t.startswith(("profile ", "PROFILE"))), "")
        return f"it never says {case.says!r}; it says {line[:600]!r}"
    return f"exit code {code}" if code else ""


# --- all of them ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command; returns 1 if a notebook did not do what it should."""
    parser = argparse.ArgumentParser(description="Rehearse the full profile without a network.")
    parser.add_argument("--only", default="", help="numbers of notebooks, as 01,06; default: all")
    parser.add_argument("--size", default="RN50", choices=list(LAYERS), help="of the weights")
    parser.add_argument("--out", type=Path, default=REPO / "out" / "rehearsal")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-kill", action="store_true", help="do not kill them half way")
    args = parser.parse_args(argv)
    began, room = time.monotonic(), args.out.resolve()
    world = build(
        Path(os.environ.get("TPT_NB_CACHE") or REPO / "out/cache") / "rehearsal", args.size
    )
    shutil.rmtree(room, ignore_errors=True)
    (room / "home").mkdir(parents=True)
    server = Server(world / "served")
    python, env = interpreter(room), environment(room, server.address)
    only = {number.zfill(2) for number in filter(None, args.only.split(","))}
    there = {p.name[:2] for p in (REPO / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    cases = [c for c in CASES if c.number in (only or there) & there]
    results = []

    first = {case.number: case for case in reversed(cases)}  # the others differ in what is there

    def one(case: Case) -> None:
        kill = not args.no_kill and case is first[case.number]
        result = rehearse(case, room, python, env, world / "given", kill)
        results.append(result)
        text = f"FAILED\n{result['problem']}" if result["problem"] else "as it should"
        minutes = (time.monotonic() - began) / 60
        kept = f", {result['records_kept']} records kept" if result["records_kept"] else ""
        print(f"[{minutes:4.1f} min] {case.title}: {result['seconds']} s{kept}, {text}", flush=True)

    print(f"{len(cases)} cases, weights of size {args.size}, {args.jobs} at a time -> {room}")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, cases))
    archives = [name for name in server.asked if name != "SHA256SUMS"]
    twice = sorted({name for name in archives if archives.count(name) > 1})
    if twice:
        print(f"FAILED: downloaded more than once: {', '.join(twice)}")
    failed = [r["case"] for r in results if r["problem"]]
    report = {"size": args.size, "seconds": round(time.monotonic() - began), "cases": results}
    report |= {"downloaded": sorted(set(archives)), "failed": failed}
    (room / "rehearsal.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(results) - len(failed)} of {len(results)} as they should, {report['seconds']} s")
    return int(bool(failed or twice))


if __name__ == "__main__":
    sys.exit(main())

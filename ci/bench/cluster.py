"""What ``--cluster local`` gains and costs, and whether the planner's queue predicts it.

    python ci/bench/cluster.py > out/bench/cluster.json   # 1,000 images; 10,000 for the memory
    python ci/bench/cluster.py --quick                    # four minutes on two idle cores

Every run is a process of its own on IconShift with MiniCLIP, one thread per worker
(``OMP_NUM_THREADS=1``), from an empty cache; records are compared line by line with those of the
plain run. Measured are:

- plain: ``evaluate`` without a cluster; one worker: the same with ``--cluster local
  --cluster-workers 1``. ``overhead`` is the whole command, with Ray's start, against plain;
- two workers: ``speedup`` compares images per second of stage 1 with those of one worker, first
  task to last; ``speedup_all`` the whole commands;
- killed: two workers, one of which is killed with -9 once;
- planner: ``simulate`` with the seconds per image of the run with one worker predicts stage 1 with
  two; ``error`` is (predicted - real) / real. ``error_killed`` the same for the run with the kill;
- memory: resident megabytes of the driver over a run on a folder of small pictures: after the first
  tenth of the images, at the end, and the largest in between.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from tpt_nb.runs import RunConfig  # noqa: E402
from tpt_nb.scale import (
    cluster,
    plan,  # noqa: E402
)


def pictures(root: Path, n: int) -> None:
    """A folder of ``n`` small pictures in ten classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(n):
        place = root / f"class{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(place / f"{i:05d}.jpg")


def resident() -> float:
    """Megabytes of this process that are in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def one(spec: dict) -> dict:
    """A run in this process: what ``main`` starts for every measurement."""
    config = RunConfig(**spec["config"])
    if not spec["workers"]:
        from tpt_nb.runs import run

        done = run(config, progress=False)
        return {"folder": str(done.dir), "encode_s": done.summary["seconds"]["encode"]}
    killed, memory, finished = [], [], threading.Event()

    def on_part(part: dict) -> None:
        memory.append(resident())
        if spec.get("kill") and len(memory) == 3:
            killed.append(part["pid"])
            os.kill(part["pid"], 9)

    def watch() -> None:
        while not finished.wait(0.5):
            memory.append(resident())

    if spec.get("memory"):
        threading.Thread(target=watch, daemon=True).start()
    done, report = cluster.evaluate(config, "local", spec["workers"], False, on_part)
    finished.set()
    first = min((p["began"] for p in report.parts), default=0)
    last = max((p["ended"] for p in report.parts), default=0)
    return {
        "folder": done.dir,
        "encode_s": last - first,
        "seconds": report.seconds,
        "parts": report.parts,
        "retried": report.retried,
        "killed": killed,
        "memory": memory,
        "report": report.text(),
    }


def measured(name: str, spec: dict, say) -> dict:
    """A run in a new process; its result, and the seconds of the whole process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "--one", json.dumps(spec)]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1]) | {"all_s": seconds}
    say(f"{name}: {seconds:.1f} s, stage 1 {found['encode_s']:.1f} s; {found.get('report', '')}")
    return found


def same_records(a: dict, b: dict) -> bool:
    """Are the records equal, line by line after sorting?"""
    lines = [sorted((Path(x["folder"]) / "records.jsonl").read_bytes().splitlines())
             for x in (a, b)]  # fmt: skip
    return lines[0] == lines[1] and len(lines[0]) > 0


def predict(parts: list[dict], workers: int, failures: int = 0) -> float:
    """Seconds of stage 1, by the queue, from what the tasks of another run took.

    With ``failures``, the mean over queues in which so many attempts are expected to fail.
    """
    images = sum(p["images"] for p in parts)
    each = sum(p["ended"] - p["began"] for p in parts) / images
    size = cluster.part_size(images, workers)
    tasks = plan.durations(images, size, each)
    if not failures:
        return plan.simulate(tasks, workers).seconds
    rate = failures / (len(tasks) + failures)
    runs = [plan.simulate(tasks, workers, 0.0, rate, seed) for seed in range(200)]
    return float(np.mean([r.seconds for r in runs]))


def bench(args: argparse.Namespace, say) -> dict:
    out: dict = {"machine": platform.machine(), "cores": os.cpu_count(), "images": args.images,
                 "views": args.views, "threads_per_worker": 1}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:

        def spec(name: str, workers: int, **more) -> dict:
            config = {"dataset": "iconshift-a", "reduced_size": args.images, "method": args.method,
                      "n_aug": args.views - 1, "out": f"{folder}/{name}/runs",
                      "cache": f"{folder}/{name}/cache"}  # fmt: skip
            return {"config": config | more.pop("config", {}), "workers": workers, **more}

        plain = measured("plain", spec("plain", 0), say)
        single = measured("one worker", spec("one", 1), say)
        double = measured("two workers", spec("two", 2), say)
        rates = [args.images / x["encode_s"] for x in (plain, single, double)]
        out |= {
            "images_per_second": dict(zip(("plain", "one", "two"), rates, strict=True)),
            "speedup": rates[2] / rates[1],
            "speedup_all": single["all_s"] / double["all_s"],
            "overhead": single["all_s"] / plain["all_s"] - 1,
            "overhead_s": single["all_s"] - plain["all_s"],
            "seconds": {"plain": plain["all_s"], "one": single["all_s"], "two": double["all_s"]},
            "seconds_one": single["seconds"],
            "same_records": {
                "one": same_records(plain, single),
                "two": same_records(plain, double),
            },
            "planner": {
                "predicted_s": predict(single["parts"], 2),
                "real_s": double["encode_s"],
            },
        }
        out["planner"]["error"] = out["planner"]["predicted_s"] / out["planner"]["real_s"] - 1
        if not args.quick:
            killed = measured("two workers, one killed", spec("killed", 2, kill=True), say)
            out["same_records"]["killed"] = same_records(plain, killed)
            predicted = predict(single["parts"], 2, failures=1)
            out["planner"] |= {
                "predicted_killed_s": predicted,
                "real_killed_s": killed["encode_s"],
                "error_killed": predicted / killed["encode_s"] - 1,
            }
            out["retried"] = killed["retried"]
        if args.memory_images:
            pictures(Path(folder) / "pictures", args.memory_images)
            config = {"dataset": "folder", "root": f"{folder}/pictures", "n_aug": 1,
                      "reduced_size": None, "method": "confident_view"}  # fmt: skip
            large = measured("memory", spec("large", 2, config=config, memory=True), say)
            curve = large["memory"]
            early = max(curve[: max(1, len(curve) // 10)])
            out["driver_memory"] = {
                "images": args.memory_images,
                "early_mb": early,
                "end_mb": curve[-1],
                "largest_mb": max(curve),
                "growth_mb": max(curve) - early,
            }
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=0, help="1000; with --quick 400")
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--method", default="confident_view", help="of stage 2")
    parser.add_argument("--memory-images", type=int, help="10000; with --quick 2000; 0: none")
    parser.add_argument("--quick", action="store_true", help="four minutes on two idle cores")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return 0
    args.images = args.images or (400 if args.quick else 1000)
    if args.memory_images is None:
        args.memory_images = 2000 if args.quick else 10_000
    result = bench(args, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

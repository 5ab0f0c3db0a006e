"""What ``--cluster local`` gains and costs, and whether the planner's arithmetic predicts it.

    python ci/bench/cluster.py > out/bench/cluster.json   # 1,000 images; 10,000 for the memory
    python ci/bench/cluster.py --quick                    # four minutes on two idle cores

Every run is a process of its own on IconShift with MiniCLIP, one thread per worker
(``OMP_NUM_THREADS=1``), from an empty cache; records are compared line by line with those of the
plain run. Measured are:

- plain: ``evaluate`` without a cluster; one worker: the same with ``--cluster local
  --cluster-workers 1``. ``overhead`` is the whole command, with Ray's start, against plain;
- two workers: ``speedup`` compares stage 1 with that of one worker, ``speedup_all`` the commands;
- killed: two workers, one of which is killed with -9 once;
- planner: ``planner.hours`` predicts stage 1 with two workers from the seconds of one; ``error`` is
  (predicted - real) / real;
- memory: resident megabytes of the driver over a run on a folder of small pictures: after the first
  tenth of the time, and the largest.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from tpt_nb.scale import planner  # noqa: E402
from tpt_nb.scale.cluster import part_size  # noqa: E402


def pictures(root: Path, n: int) -> None:
    """A folder of ``n`` small pictures in ten classes."""
    rng = np.random.default_rng(0)
    for i in range(n):
        place = root / f"class{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(place / f"{i:05d}.jpg")


def resident(pid: int) -> float:
    """Megabytes of a process that are in memory; 0 if it has just ended."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def kill_a_worker(folder: Path) -> bool:
    """Kill one that encodes, once there are shards; was there one?"""
    if len(list(folder.glob("cache/features/*/*.safetensors"))) < 3:
        return False
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cmdline").read_bytes().startswith(b"ray::encode_part"):
                os.kill(int(place.name), signal.SIGKILL)
                return True
        except OSError:  # it has ended
            continue
    return False


def measured(folder: Path, options: dict, workers: int, say: Callable, kill: bool = False) -> dict:
    """A command in a process of its own, watched: its seconds, its stage 1, its memory."""
    options = options | {"out": folder / "runs", "cache": folder / "cache"}
    command = [sys.executable, "-m", "tpt_nb", "evaluate"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--cluster", "local", "--cluster-workers", str(workers)] if workers else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    folder.mkdir()
    began, memory = time.perf_counter(), []
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, cwd=REPO)
        while process.poll() is None:
            memory.append(resident(process.pid))
            kill = kill and not kill_a_worker(folder)
            time.sleep(0.2)
    seconds, text = time.perf_counter() - began, (folder / "said").read_text()
    if process.returncode:
        raise SystemExit(f"{folder.name} failed:\n{text[-3000:]}")
    (run,) = (folder / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    stage = re.search(r"encoded in .* in ([\d.]+) s", text)
    encode = float(stage[1]) if stage else summary["seconds"]["encode"]
    say(f"{folder.name}: {seconds:.1f} s, stage 1 {encode:.1f} s")
    records = (run / "records.jsonl").read_bytes()
    return {"all_s": seconds, "encode_s": encode, "records": records, "memory": memory}


def bench(args: argparse.Namespace, place: Path, say: Callable) -> dict:
    """All of it, as a dict."""
    options = {"dataset": "iconshift-a", "reduced_size": args.images, "method": args.method,
               "n_aug": args.views - 1}  # fmt: skip
    plain, one, two = (
        measured(place / name, options, workers, say)
        for workers, name in enumerate(("plain", "one", "two"))
    )
    longest = one["encode_s"] * part_size(args.images, 2) / args.images
    predicted = 3600 * planner.hours(one["encode_s"], longest, 2) - planner.START
    out = {
        "machine": platform.machine(), "cores": os.cpu_count(), "images": args.images,
        "views": args.views, "threads_per_worker": 1,
        "seconds": {"plain": plain["all_s"], "one": one["all_s"], "two": two["all_s"]},
        "images_per_second": {"plain": args.images / plain["encode_s"],
                              "one": args.images / one["encode_s"],
                              "two": args.images / two["encode_s"]},
        "speedup": one["encode_s"] / two["encode_s"], "speedup_all": one["all_s"] / two["all_s"],
        "overhead": one["all_s"] / plain["all_s"] - 1,
        "same_records": {"one": one["records"] == plain["records"],
                         "two": two["records"] == plain["records"]},
        "planner": {"predicted_s": predicted, "real_s": two["encode_s"],
                    "error": predicted / two["encode_s"] - 1},
    }  # fmt: skip
    if not args.quick:
        killed = measured(place / "killed", options, 2, say, kill=True)
        out["same_records"]["killed"] = killed["records"] == plain["records"]
        out["killed_s"] = killed["encode_s"]
    if args.memory_images:
        pictures(place / "pictures", args.memory_images)
        many = {"dataset": "folder", "root": place / "pictures", "n_aug": 1, "model": "mini",
                "method": "confident_view"}  # fmt: skip
        curve = measured(place / "memory", many, 2, say)["memory"]
        early = max(curve[: max(1, len(curve) // 10)])
        out["driver_memory"] = {"images": args.memory_images, "early_mb": early,
                                "largest_mb": max(curve)}  # fmt: skip
    return out


def main() -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=0, help="1000; with --quick 400")
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--method", default="confident_view", help="of stage 2")
    parser.add_argument("--memory-images", type=int, help="10000; with --quick 2000; 0: none")
    parser.add_argument("--quick", action="store_true", help="four minutes on two idle cores")
    args = parser.parse_args()
    args.images = args.images or (400 if args.quick else 1000)
    if args.memory_images is None:
        args.memory_images = 2000 if args.quick else 10_000
    with tempfile.TemporaryDirectory() as place:
        found = bench(args, Path(place), lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

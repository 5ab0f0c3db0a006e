"""Features pass by in groups: no whole array is made, and 50,000 images fit into 2 GB."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import psutil
import pytest
import torch

from tpt_nb import datasets, features, methods, models, runs
from tpt_nb.core import machine
from tpt_nb.features import shards
from tpt_nb.runs import engine, records
from tpt_nb.scale import plan, plan_text

REPO = Path(__file__).resolve().parents[2]
MINI = {"profile": "mini", "n_aug": 3, "reduced_size": 70}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def one(tmp_path, cache, **values):
    return runs.run(MINI | {"out": str(tmp_path), "cache": cache} | values, progress=False)


@pytest.mark.parametrize("method", ["vote", "tpt"])
def test_a_run_reads_a_group_at_a_time(tmp_path, cache, monkeypatch, method):
    asked, read = [], shards.Store.read
    look = lambda store, rows: asked.append(len(rows)) or read(store, rows)  # noqa: E731
    monkeypatch.setattr(shards.Store, "read", look)
    whole = property(lambda self: pytest.fail("the whole array was asked for"))
    monkeypatch.setattr(features.Features, "features", whole)
    done = one(tmp_path, cache, method=method)
    assert len(done.records) == 70 and max(asked) <= max(runs.GROUP, 64)  # 64: a shard is written
    asked.clear()
    one(tmp_path, cache, method=method, run_name="again")  # now all of it is in the cache
    assert sorted(asked) == [6, 32, 32]


def test_groups_are_the_rows_of_the_whole_array_whatever_the_shards(tmp_path):
    ids = [f"{i:03d}" for i in range(50)]
    made = torch.rand(50, 3, 8)
    order = torch.randperm(50).tolist()  # shards in another order than the images
    for k in range(0, 50, 7):
        store = shards.Store(ids)
        for i in order[k : k + 7]:
            store.put(i, made[i], i % 5, 0.5)
        shards.write_shard(tmp_path, store, order[k : k + 7])
        assert not any(isinstance(place, torch.Tensor) for place in store.places)  # memory let go
    store = shards.Store(ids)
    for record in features.read_shards(tmp_path, store.position):
        store.found(**record)
    found = features.Features(store, list(range(50)), store.targets, ids, [], 25.0, 0)
    assert torch.equal(found.features, made)
    parts = [views for _, views, _ in found.batches(16)]
    assert torch.equal(torch.cat(parts), made) and len(parts) == 4
    assert torch.equal(found.at([49, 0, 7]), made[[49, 0, 7]])
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(OSError, match="gone from the cache; start again"):
        found.at(range(50))


def test_records_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    torch.manual_seed(0)
    adapted = methods.Adapted(
        torch.randn(50, 9), torch.randn(50, 9), torch.rand(50), torch.rand(50, 4) < 0.5
    )
    ids, targets = [str(i) for i in range(50)], torch.arange(50) % 9
    whole = records.to_records(ids, targets, adapted)
    monkeypatch.setattr(records, "AT_ONCE", 7)
    assert records.to_records(ids, targets, adapted) == whole


def test_the_records_file_is_closed_after_each_group(tmp_path, cache, monkeypatch):
    """Google Drive uploads a file when it is closed; an open one is lost with the machine."""
    there, real = [], engine.append

    def append(path, fresh):
        real(path, fresh)
        held = {file.path for file in psutil.Process().open_files()}
        there.append((str(path.resolve()) in held, len(path.read_bytes().splitlines())))

    monkeypatch.setattr(engine, "append", append)
    one(tmp_path, cache, method="vote", run_name="closed")
    assert there == [(False, 32), (False, 64), (False, 70)]


@pytest.mark.parametrize("method", ["tda", "stata"])
def test_a_method_of_all_images_says_what_it_needs_before_anything_is_encoded(
    tmp_path, cache, monkeypatch, method
):
    monkeypatch.setattr(machine, "free_memory", lambda device: 10_000)
    monkeypatch.setattr(features, "encode", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=rf"{method} takes all 70 images.* GB of memory.*fewer"):
        one(tmp_path / method, cache, method=method)
    assert not (tmp_path / method).exists()


def test_the_whole_array_is_refused_where_it_does_not_fit(tmp_path, monkeypatch):
    store = shards.Store(["a"])
    store.put(0, torch.rand(4, 8), 0, 0.1)
    found = features.Features(store, [0], store.targets, ["a"], [], 0.1, 1)
    monkeypatch.setattr(machine, "free_memory", lambda device: 100)
    with pytest.raises(ValueError, match="features of all 1 images at once need"):
        _ = found.features
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    assert found.features.shape == (1, 4, 8)


def test_plan_says_the_memory():
    found = plan("imagenet", "RN50", 64, methods=["tpt", "tda", "zero_shot"])
    assert found["memory"]["tda"] > 10e9 > 1e9 > found["memory"]["tpt"]
    assert found["memory"]["zero_shot"] < found["memory"]["tpt"]
    text = plan_text(found)
    assert "memory" in text and "tda" in text.split("memory")[1] and "all images at once" in text


# --- the mark: 50,000 images x 64 views x 1024 numbers -------------------------------------------

TINY = {
    "embed_dim": 1024,
    "vision_cfg": {"layers": (1, 1, 1, 1), "width": 8, "head_width": 64, "image_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    "quick_gelu": True,
}
MEASURE = """
import os, sys, threading, time
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]) / "ci" / "tests"))
import test_memory
peak, over = {"RssAnon": 0, "VmHWM": 0}, threading.Event()

def watch():
    while not over.wait(0.02):
        for line in open("/proc/self/status"):
            name, _, rest = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(rest.split()[0]) // 1000)

threading.Thread(target=watch, daemon=True).start()
done = test_memory.run_big(int(sys.argv[2]), Path(sys.argv[3]))
over.set()
print(len(done.records), done.summary["encoded"], peak["RssAnon"], peak["VmHWM"])
"""


def run_big(n: int, place: Path):
    """A vote over n images of 64 views and 1024 numbers, which are in the cache already."""
    import open_clip

    names = [f"thing {c}" for c in range(10)]
    ids, targets = [f"{i:05d}" for i in range(n)], [i % 10 for i in range(n)]
    data = datasets.Dataset("big", names, ids, targets, "big", lambda i: pytest.fail("encoded"))
    datasets.register("big", lambda root, classnames: data)
    model = models.build_mini(0, TINY)
    tokens = open_clip.get_tokenizer("RN50")([f"a photo of a {c}." for c in names])
    models.save_mini(model, tokens.flatten().tolist(), place / "tiny.safetensors")
    values = {"dataset": "big", "model": str(place / "tiny.safetensors"), "device": "cpu"}
    values |= {"method": "vote", "n_aug": 63, "out": str(place), "cache": str(place / "cache")}
    config, _ = runs.resolve(runs.RunConfig.from_dict(values))
    clip = models.load(config.model, device="cpu")
    augmenter = runs.augmenter_of(config, clip.image_size)
    folder = shards.open_folder(Path(config.cache), features.cache_key(data, clip, augmenter, 0))
    draw = torch.Generator().manual_seed(0)
    for k in range(0, n, 64):
        part = range(k, min(n, k + 64))
        rows = torch.zeros(len(part), augmenter.n_views, clip.embed_dim)
        first = torch.randn(rows.shape[1:], generator=draw)
        rows[0] = torch.nn.functional.normalize(first, dim=-1)
        tensors = {"features": rows, "targets": torch.tensor([i % 10 for i in part])}
        tensors |= {"seconds": torch.ones(len(part), dtype=torch.float64)}
        sparse_shard(folder, [ids[i] for i in part], tensors)
    return runs.run(config, progress=False)


def sparse_shard(folder: Path, ids: list[str], tensors: dict[str, torch.Tensor]) -> None:
    """A shard of the cache's layout, but its images of zeros take no room on the disk."""
    crc = zlib.crc32("\0".join(ids).encode())
    for name in shards.TENSORS:
        crc = zlib.crc32(tensors[name].numpy(), crc)
    header, at = {"__metadata__": {"shard": json.dumps({"ids": ids, "crc32": crc})}}, 0
    for name, kind in zip(shards.TENSORS, ("F32", "I64", "F64"), strict=True):
        end = at + tensors[name].nbytes
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape)}
        header[name]["data_offsets"], at = [at, end], end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / f"{ids[0]}.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shards.TENSORS:
            for row in tensors[name]:
                file.write(row.numpy().tobytes()) if row.any() else file.seek(row.nbytes, 1)
        file.truncate(8 + len(text) + at)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_imagenet_at_64_views_takes_less_than_2_gb(tmp_path):
    """13.1 GB of features. VmHWM: all pages that were resident at once, also of mapped files."""
    command = [sys.executable, "-c", MEASURE, str(REPO), "50000", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    count, encoded, anonymous, resident = map(int, done.stdout.split()[-4:])
    print(f"anonymous memory {anonymous} MB, resident {resident} MB at most")
    assert (count, encoded) == (50_000, 0)
    assert anonymous < 2000 and resident < 2000

"""Stage 1 and its cache: exact, resumable, and robust to what disks and processes do.

The encoder is a real (tiny, random, frozen) network whose calls are logged to a file, so that "not
encoded again" can be asserted across processes too.
"""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, UnidentifiedImageError

from tpt_nb import models
from tpt_nb import views as views_room
from tpt_nb.core import files
from tpt_nb.core.images import view_seed
from tpt_nb.features import cache_key, encode, encoding
from tpt_nb.views import RandomViews, resample

HERE = Path(__file__).resolve().parent
SIZE = 32
VIEWS = RandomViews(n_aug=3, size=SIZE)


class Encoder(torch.nn.Module):
    """A small convolutional image encoder with the interface of tpt_nb.clip.Clip."""

    name, image_size, fingerprint = "tiny", SIZE, "weights-0"

    def __init__(self, log: Path | None = None, delay: float = 0.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Conv2d(3, 16, 5, stride=2),
                torch.nn.GELU(),
                torch.nn.Conv2d(16, 32, 3, stride=2),
                torch.nn.GELU(),
                torch.nn.Flatten(),
                torch.nn.LazyLinear(24),
            )
            self.net(torch.zeros(1, 3, SIZE, SIZE))
        self.requires_grad_(False).eval()
        self.log, self.delay, self.calls = log, delay, 0

    def encode_views(self, views: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        time.sleep(self.delay)
        if self.log:
            with open(self.log, "a") as file:
                file.write("x")
        views = views.float() / 255 if views.dtype == torch.uint8 else views
        return torch.nn.functional.normalize(self.net(views), dim=-1)


class Pictures:
    """n pictures of a fixed list, with the data set interface. `bad` ones fail to decode."""

    name, fingerprint, classnames = "pictures", "pictures-0", ["dog", "cat", "bird"]

    def __init__(self, n: int, bad: dict[int, Exception] | None = None, first: int = 0):
        self.indices = range(first, first + n)
        self.ids = [f"picture/{i}.png" for i in self.indices]
        self.paths = [Path("/data") / i for i in self.ids]
        self.bad = bad or {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: int):
        i = self.indices[k]
        if i in self.bad:
            raise self.bad[i]
        rng = np.random.default_rng(i)
        blocks = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        return Image.fromarray(blocks).resize((60 + i, 50), Image.Resampling.BICUBIC), i % 3


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("features/*/*.safetensors"))


def same(a, b) -> bool:
    return (
        a.ids == b.ids
        and torch.equal(a.targets, b.targets)
        and a.features.numpy().tobytes() == b.features.numpy().tobytes()
    )


def run(n: int, cache, encoder=None, **params):
    encoder = encoder or Encoder()
    params = {"workers": 0, "shard": 4, "progress": False} | params
    return encode(Pictures(n), encoder, VIEWS, cache=cache, **params)


def test_features_are_the_encoders_on_the_augmenters_views(tmp_path):
    data, encoder = Pictures(6), Encoder()
    result = encode(data, encoder, VIEWS, seed=3, cache=tmp_path, workers=0, progress=False)
    assert result.features.shape == (6, 4, 24) and result.features.dtype == torch.float32
    for i in range(6):
        image, target = data[i]
        expected = encoder.encode_views(VIEWS(image, view_seed(3, data.ids[i])))
        assert torch.equal(result.features[i], expected)
        assert result.targets[i] == target
    assert result.ids == data.ids and result.failed == [] and result.encoded == len(result) == 6
    assert result.targets.dtype == torch.int64 and result.seconds > 0


def test_batches_cover_everything_in_order(tmp_path):
    result = run(7, tmp_path)
    parts = list(result.batches(3))
    assert [len(ids) for ids, _, _ in parts] == [3, 3, 1]
    assert [i for ids, _, _ in parts for i in ids] == result.ids
    assert torch.equal(torch.cat([f for _, f, _ in parts]), result.features)
    assert torch.equal(torch.cat([t for _, _, t in parts]), result.targets)


def test_second_run_comes_from_the_cache(tmp_path):
    first, encoder = run(10, tmp_path), Encoder()
    second = run(10, tmp_path, encoder)
    assert encoder.calls == second.encoded == 0 and same(first, second)
    assert second.seconds == pytest.approx(first.seconds)
    assert len(shards(tmp_path)) == 3


def test_without_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TPT_NB_CACHE", str(tmp_path / "usual"))
    assert same(run(5, cache=False), run(5, cache=tmp_path / "other"))
    assert not (tmp_path / "usual").exists()
    run(5, cache=None)
    assert shards(tmp_path / "usual")


def test_subsets_share_the_cache_both_ways(tmp_path):
    whole = run(50, tmp_path / "whole")
    encoder = Encoder()
    run(20, tmp_path, encoder)
    assert encoder.calls == 20
    grown = run(50, tmp_path, encoder)
    assert encoder.calls == 50 and grown.encoded == 30 and same(grown, whole)
    part = run(20, tmp_path, encoder)
    assert encoder.calls == 50 and part.encoded == 0
    assert torch.equal(part.features, whole.features[:20])
    middle = encode(Pictures(5, first=30), encoder, VIEWS, cache=tmp_path, progress=False)
    assert encoder.calls == 50 and torch.equal(middle.features, whole.features[30:35])
    assert middle.ids == whole.ids[30:35] and torch.equal(middle.targets, whole.targets[30:35])


@pytest.mark.parametrize("n_aug", [0, 3])
def test_float_views_and_single_views(tmp_path, n_aug):
    views = RandomViews(n_aug=n_aug, size=SIZE, augmix=True)
    result = encode(Pictures(3), Encoder(), views, cache=tmp_path, workers=0, progress=False)
    assert result.features.shape == (3, n_aug + 1, 24)


@pytest.mark.parametrize("workers", [1, 2])
def test_number_of_workers_does_not_matter(tmp_path, workers):
    state = torch.get_rng_state()
    assert same(run(9, tmp_path / "0"), run(9, tmp_path / "n", workers=workers))
    assert torch.equal(state, torch.get_rng_state())


def script(code: str, *args, **popen) -> subprocess.Popen:
    """Run code in a fresh interpreter in which this module is importable as test_encode."""
    preamble = "from test_encode import *\n"
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", preamble + code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        **popen,
    )


def test_spawned_workers_give_the_same(tmp_path):
    code = (
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    run(5, Path(sys.argv[1]), workers=1)\n"
    )
    assert script(code, tmp_path / "spawned").wait(120) == 0
    encoder = Encoder()
    spawned = run(5, tmp_path / "spawned", encoder)
    assert encoder.calls == 0 and same(spawned, run(5, tmp_path / "here"))


def test_kill_in_mid_encode_then_resume(tmp_path):
    """kill -9, at whatever point it hits: no finished shard is lost, or encoded again."""
    undisturbed = run(40, tmp_path / "undisturbed", shard=2)
    cache, log = tmp_path / "killed", tmp_path / "log"
    code = "run(40, Path(sys.argv[1]), Encoder(Path(sys.argv[2]), delay=0.05), shard=2)"
    process = script(code, cache, log)
    deadline = time.time() + 120
    while len(shards(cache)) < 3 and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    finished = len(shards(cache))
    assert 3 <= finished < 20
    before = {path: path.stat().st_mtime_ns for path in shards(cache)}
    encoder = Encoder()
    resumed = run(40, cache, encoder, shard=2)
    assert same(resumed, undisturbed)
    assert encoder.calls == resumed.encoded == 40 - 2 * finished
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())
    # the killed process may have lost one unfinished shard and no more
    assert len(log.read_text()) - 2 * finished in (0, 1, 2)


SHARED = """
gate = Path(sys.argv[2])
(gate / str(os.getpid())).touch()
while len(list(gate.iterdir())) < 2:
    time.sleep(0.005)
done = run(24, Path(sys.argv[1]), Encoder(Path(sys.argv[3]), delay=0.05), workers=int(sys.argv[4]))
print(done.encoded)
torch.save(done.features, f"{sys.argv[3]}.{os.getpid()}")
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_share_the_work(tmp_path, workers):
    """Each image is encoded once, by one of them, and both have all."""
    cache, gate, log = tmp_path / "cache", tmp_path / "gate", tmp_path / "log"
    gate.mkdir()
    both = [script(SHARED, cache, gate, log, workers, stdout=subprocess.PIPE) for _ in range(2)]
    counts = [int(process.communicate(timeout=240)[0].split()[-1]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(counts) == len(log.read_text()) == 24 and min(counts) > 0
    expected = run(24, tmp_path / "alone").features
    for path in tmp_path.glob("log.*"):
        assert torch.equal(torch.load(path), expected)


def test_what_a_killed_process_had_claimed_is_encoded_by_another(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    code = "run(8, Path(sys.argv[1]), Encoder(Path(sys.argv[2]), delay=0.3))"
    first = script(code, cache, log)
    deadline = time.time() + 120
    while not log.exists() and time.time() < deadline:  # it has claimed its first shard
        time.sleep(0.005)
    second = script(code, cache, log)
    while len(log.read_text()) < 3 and time.time() < deadline:
        time.sleep(0.005)
    first.kill()
    assert second.wait(120) == 0 and first.wait(30) != 0
    assert run(8, cache).encoded == 0
    assert same(run(8, cache), run(8, tmp_path / "alone"))


def test_without_locks_the_work_is_done_all_the_same(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert run(5, tmp_path).encoded == 5


def test_interrupt_keeps_even_the_unfinished_shard(tmp_path):
    class Stopped(Encoder):
        def encode_views(self, views):
            if self.calls == 6:
                raise KeyboardInterrupt
            return super().encode_views(views)

    with pytest.raises(KeyboardInterrupt):
        run(10, tmp_path, Stopped())
    assert run(10, tmp_path).encoded == 4


def test_leftovers_of_a_killed_write_are_ignored_and_in_time_removed(tmp_path):
    first = run(4, tmp_path)
    folder = shards(tmp_path)[0].parent
    for name, age in ((".tmp-1-old", 7200), (".tmp-2-young", 0)):
        (folder / name).write_bytes(b"half a shard")
        os.utime(folder / name, (time.time() - age,) * 2)
    assert same(run(4, tmp_path), first)
    assert not (folder / ".tmp-1-old").exists() and (folder / ".tmp-2-young").exists()


def damage_cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damage_bit(data: bytes) -> bytes:
    return data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]


def damage_id(data: bytes) -> bytes:
    return data.replace(b"picture/5.png", b"picture/7.png")


def damage_all(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, damage_id, damage_all])
def test_damaged_shard_is_encoded_again_with_a_warning(tmp_path, damage):
    first = run(12, tmp_path)
    broken = next(p for p in shards(tmp_path) if b"picture/5.png" in p.read_bytes())
    broken.write_bytes(damage(broken.read_bytes()))
    encoder = Encoder()
    with pytest.warns(UserWarning, match=f"damaged.*{broken.name}.*encoded again"):
        again = run(12, tmp_path, encoder)
    assert encoder.calls == 4 and same(first, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(12, tmp_path).encoded == 0


def test_undecodable_image_is_recorded_and_the_run_goes_on(tmp_path):
    bad = {2: UnidentifiedImageError("cannot identify image file"), 5: OSError("truncated")}
    data, encoder = Pictures(8, bad), Encoder()
    with pytest.warns(UserWarning, match=r"2 of 8 images failed.*/data/picture/2.png.*cannot iden"):
        result = encode(data, encoder, VIEWS, cache=tmp_path, workers=0, progress=False)
    assert [f["id"] for f in result.failed] == ["picture/2.png", "picture/5.png"]
    assert result.failed[1] == {
        "id": "picture/5.png",
        "path": "/data/picture/5.png",
        "error": "OSError: truncated",
    }
    clean = run(8, tmp_path / "clean")
    keep = [0, 1, 3, 4, 6, 7]
    assert result.ids == [clean.ids[i] for i in keep] and encoder.calls == 6
    assert torch.equal(result.features, clean.features[keep])
    assert torch.equal(result.targets, clean.targets[keep])
    repaired = run(8, tmp_path)
    assert repaired.encoded == 2 and same(repaired, clean)


def test_truncated_file_fails_when_it_is_decoded(tmp_path):
    class Files(Pictures):
        def __getitem__(self, k):
            return Image.open(self.paths[k]), 0

    data = Files(3)
    data.paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(data.paths):
        Pictures(3)[i][0].save(path)
    data.paths[1].write_bytes(data.paths[1].read_bytes()[:200])
    with pytest.warns(UserWarning, match="1 of 3 images failed"):
        result = encode(data, Encoder(), VIEWS, cache=False, workers=1, progress=False)
    assert [f["path"] for f in result.failed] == [str(data.paths[1])] and len(result) == 2


def test_all_images_undecodable_is_an_error(tmp_path):
    bad = {i: OSError(f"no picture {i}") for i in range(3)}
    with pytest.raises(ValueError, match="none of the 3 images.*picture/0.png.*no picture 0"):
        encode(Pictures(3, bad), Encoder(), VIEWS, cache=tmp_path, workers=0, progress=False)


def test_a_bug_in_the_augmenter_is_not_a_failed_image(tmp_path):
    class Broken(RandomViews):
        def __call__(self, image, seed):
            raise ZeroDivisionError("bug")

    with pytest.raises(ZeroDivisionError):
        encode(Pictures(3), Encoder(), Broken(size=SIZE), cache=tmp_path, workers=0, progress=False)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_keeps_the_finished_shards_and_says_so(tmp_path, monkeypatch):
    """The third shard is written to /dev/full: a real ENOSPC from the kernel."""
    tokens = itertools.count()

    def token(n):
        name = f"{next(tokens):0{2 * n}d}"
        if int(name) == 3:  # manifest, two shards, then this one
            (folder,) = tmp_path.glob("features/*")
            (folder / f".tmp-{os.getpid()}-{name}").symlink_to("/dev/full")
        return name

    monkeypatch.setattr(files.secrets, "token_hex", token)
    follow = {"xb": "wb"}  # "xb" would refuse the link

    def opened(path, mode):
        return Path(path).open(follow[mode])

    monkeypatch.setattr(files, "open", opened, raising=False)
    with pytest.raises(
        OSError, match="disk is full.*2 finished shards are kept.*TPT_NB_CACHE"
    ) as e:
        run(20, tmp_path)
    assert e.value.errno == errno.ENOSPC and str(tmp_path) in str(e.value)
    monkeypatch.undo()
    assert len(shards(tmp_path)) == 2 and not list(tmp_path.glob("features/*/.tmp-*"))
    resumed = run(20, tmp_path)
    assert resumed.encoded == 12 and same(resumed, run(20, tmp_path / "undisturbed"))


def test_processes_on_one_cache_at_once(tmp_path):
    """Three of them, started together on overlapping subsets: nobody breaks or loses anything."""
    code = (
        "Path(sys.argv[3]).touch()\n"
        "while len(list(Path(sys.argv[3]).parent.glob('ready-*'))) < 3: time.sleep(0.001)\n"
        "run(int(sys.argv[2]), Path(sys.argv[1]), Encoder(Path(sys.argv[4]), 0.01), shard=3)"
    )
    log, cache = tmp_path / "log", tmp_path / "both"
    processes = [script(code, cache, n, tmp_path / f"ready-{n}", log) for n in (30, 29, 17)]
    assert [p.wait(120) for p in processes] == [0, 0, 0]
    # each image once, but for the last shard of a shorter one, which is not a shard of the others
    assert 30 <= len(log.read_text()) <= 30 + 2 * 3
    encoder = Encoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = run(30, cache, encoder)
    assert encoder.calls == 0 and same(both, run(30, tmp_path / "alone"))
    assert not list(cache.glob("features/*/.tmp-*"))


def test_key_changes_with_what_the_features_depend_on():
    def key(seed=0, views=VIEWS, model="weights-0", images="pictures-0", names=("a", "b")):
        data, encoder = Pictures(3), Encoder()
        data.fingerprint, data.classnames, encoder.fingerprint = images, list(names), model
        return json.dumps(cache_key(data, encoder, views, seed), sort_keys=True)

    keys = [
        key(),
        key(seed=1),
        key(views=RandomViews(n_aug=4, size=SIZE)),
        key(model="weights-1"),
        key(images="pictures-1"),
        key(names=("b", "a")),
    ]
    assert len(set(keys)) == len(keys) and key() == keys[0]


def test_features_depend_on_the_image_tower_alone():
    def key(change: str = "") -> tuple[dict, str]:
        model = models.build_mini(0)
        if change:
            with torch.no_grad():
                model.get_parameter(change).view(-1)[0] += 1
        made = models.wrap(model, "mini", device="cpu")
        return cache_key(Pictures(2), made, VIEWS, 0), made.fingerprint

    plain, whole = key()
    same, other_text = key("text_projection")
    assert same == plain and other_text != whole
    other, _ = key("visual.conv1.weight")
    assert other != plain


def test_other_seed_is_not_served_from_the_cache(tmp_path):
    first, second = run(3, tmp_path, seed=0), run(3, tmp_path, seed=1)
    assert second.encoded == 3
    assert torch.equal(first.features[:, 0], second.features[:, 0])
    assert not torch.equal(first.features[:, 1:], second.features[:, 1:])


def test_targets_of_the_data_set_count_more_than_cached_ones(tmp_path):
    """Renaming or reordering classes must not serve old labels with cached features."""
    data = Pictures(6)
    data.targets = [i % 3 for i in range(6)]
    encoder = Encoder()
    first = encode(data, encoder, VIEWS, cache=tmp_path, workers=0, progress=False)
    data.classnames, data.targets = ["bird", "cat", "dog"], [2 - t for t in data.targets]
    second = encode(data, encoder, VIEWS, cache=tmp_path, workers=0, progress=False)
    assert encoder.calls == 6 and torch.equal(second.targets, 2 - first.targets)


def test_manifest_spells_out_the_key(tmp_path):
    run(2, tmp_path, seed=5)
    (manifest,) = tmp_path.glob("features/*/manifest.json")
    assert json.loads(manifest.read_text()) == cache_key(Pictures(2), Encoder(), VIEWS, 5)
    manifest.write_text("{")  # damaged: written again
    run(2, tmp_path, seed=5)
    assert json.loads(manifest.read_text())["seed"] == 5
    (path,) = shards(tmp_path)
    assert set(safetensors.torch.load_file(path)) == {"features", "targets", "seconds"}


def test_progress_bar_and_its_switches(tmp_path, monkeypatch, capsys):
    code = "run(3, Path(sys.argv[1]), progress=True)"
    pipe = {"stderr": subprocess.PIPE, "text": True}
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    on = script(code, tmp_path / "on", **pipe)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    disabled = script(code, tmp_path / "disabled", **pipe)
    shown, nothing = (process.communicate(timeout=120)[1] for process in (on, disabled))
    assert on.returncode == disabled.returncode == 0
    assert "encode pictures" in shown and "3/3" in shown and "image/s" in shown
    assert "pictures" not in nothing
    run(3, tmp_path / "off", progress=False)
    run(3, tmp_path / "off", progress=True)  # all in the cache: nothing to show
    assert "pictures" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "views", "params", "message"),
    [
        (Pictures(2), RandomViews(size=64), {}, "64 px but the model takes 32 px"),
        (Pictures(0), VIEWS, {}, "0 images"),
        (Pictures(2), VIEWS, {"shard": 0}, "shard is 0"),
    ],
)
def test_bad_input(tmp_path, data, views, params, message):
    with pytest.raises(ValueError, match=message):
        encode(data, Encoder(), views, cache=tmp_path, progress=False, **params)


def test_ids_must_be_unique(tmp_path):
    data = Pictures(3)
    data.ids = ["a", "b", "a"]
    with pytest.raises(ValueError, match="'a' appears more than once"):
        encode(data, Encoder(), VIEWS, cache=tmp_path, progress=False)


# --- the path of a GPU, on the CPU ---------------------------------------------------------------


def on_gpu(monkeypatch):
    """Crops are cut where the encoder is, as on a GPU."""
    monkeypatch.setattr(views_room, "fits", lambda device: True)


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_cut_where_the_encoder_is(tmp_path, monkeypatch, workers):
    usual = run(6, tmp_path)
    on_gpu(monkeypatch)
    encoder = Encoder()
    here = run(6, tmp_path, encoder, workers=workers)
    assert encoder.calls == 6 and here.ids == usual.ids  # not served from the others' cache
    assert torch.equal(here.targets, usual.targets)
    assert 0 < (here.features - usual.features).abs().max() < 1e-3
    keys = [json.loads(path.read_text()) for path in tmp_path.glob("features/*/manifest.json")]
    assert sorted(key.get("crops", "") for key in keys) == ["", "tensor"]
    data = Pictures(6)
    plan = VIEWS.plan(data[2][0], view_seed(0, data.ids[2]))
    views = resample.render(plan, SIZE)
    assert torch.equal(here.features[2], Encoder().encode_views(views))
    again = Encoder()
    assert same(run(6, tmp_path, again), here) and again.calls == 0


def test_mixed_views_are_made_by_the_workers_everywhere(tmp_path, monkeypatch):
    views = RandomViews(n_aug=2, size=SIZE, augmix=True)
    params = {"cache": tmp_path, "workers": 0, "progress": False}
    first = encode(Pictures(3), Encoder(), views, **params)
    on_gpu(monkeypatch)
    assert same(encode(Pictures(3), Encoder(), views, **params), first)
    assert len(list(tmp_path.glob("features/*"))) == 1


@pytest.mark.parametrize("ahead", [1, 3, 20])
def test_images_under_way_come_back_in_order(monkeypatch, ahead):
    monkeypatch.setattr(encoding, "AHEAD", 0)
    data, encoder = Pictures(8, {0: OSError("x"), 5: OSError("y")}), Encoder()
    loaded = encoding._load(data, VIEWS, 0, list(range(8)), encoder, 0)
    expected = list(encoding._encode_ahead(loaded, encoder))
    loaded = encoding._load(data, VIEWS, 0, list(range(8)), encoder, 0)
    rows = encoding._encode_ahead(loaded, encoder, ahead)
    before = encoder.calls
    first = next(rows)
    assert first[0] == 0 and first[3] == "OSError: x"
    assert encoder.calls - before == min(ahead, 7) - (ahead >= 5)
    rest = [first, *rows]
    assert [row[0] for row in rest] == list(range(8)) and rest[5][3] == "OSError: y"
    for mine, theirs in zip(rest, expected, strict=True):
        assert mine[0] == theirs[0] and mine[2:] == theirs[2:]
        assert mine[1] is None if mine[3] else torch.equal(mine[1], theirs[1])


def test_a_row_that_overflowed_is_encoded_again():
    class Event:
        def synchronize(self):
            row[:] = float("inf")  # what arrives

    row, encoder = torch.zeros(4, 24), Encoder()
    views = VIEWS(Pictures(1)[0][0], 0)
    _, again, target, _ = encoding._arrived(encoder, 7, (row, Event(), views), 2, None)
    assert torch.equal(again, Encoder().encode_views(views)) and target == 2


def test_the_writing_thread_keeps_the_order_and_hands_on_errors():
    written, free = [], threading.Event()

    def write(chosen):
        free.wait(30)
        if chosen == [2]:
            raise OSError(errno.ENOSPC, "full")
        written.append(chosen)

    writer = encoding._Writer(write)
    writer.put([0])
    assert written == []  # nobody waited
    free.set()
    writer.put([1])
    writer.put([2])
    with pytest.raises(OSError, match="full"):
        writer.put([3])
    assert written == [[0], [1]]
    with pytest.raises(OSError, match="full"):
        writer.close()

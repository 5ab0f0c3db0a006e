"""Text files and checkpoints of other people: any encoding, any damage, a result or one line."""

import codecs
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_plan import MEASURED
from test_runs import TINY, world  # noqa: F401 (a fixture)

from tpt_nb import datasets, models
from tpt_nb.__main__ import main
from tpt_nb.core import files
from tpt_nb.datasets.folder import read_names
from tpt_nb.methods import ra_tta
from tpt_nb.models import load_coop
from tpt_nb.runs import run, sweep
from tpt_nb.scale.planner import read_costs

CLASSES = [f"müsli_{i}" for i in range(10)]  # as many as EuroSAT has


# --- text files: a reader and a right text of each kind ------------------------------------------


def split_of(path: Path) -> list[str]:
    return datasets.load("eurosat", root=path.parent).classnames


def names_text() -> str:
    return "".join(f"n{i:08d} müsli {i}\n" for i in range(10))


def split_text() -> str:
    entries = [[f"{name}/0.png", i, name] for i, name in enumerate(CLASSES)]
    return json.dumps({"train": [], "val": [], "test": entries}, ensure_ascii=False, indent=0)


def descriptions_text() -> str:
    some = {name: [f"{name} tastes well.", "crème"] for name in CLASSES}
    return json.dumps(some, ensure_ascii=False, indent=0)


def grid_text() -> str:
    rows = [{"label": "naïve", "n_aug": 1}, {"label": "b", "n_aug": [1, 2]}]
    grid = {"baseline": "naïve", "common": {"method": "vote"}, "rows": rows}
    return yaml.safe_dump(grid, allow_unicode=True)


KINDS = {
    "class names": ("names.txt", names_text, read_names),
    "split": ("split_zhou_EuroSAT.json", split_text, split_of),
    "descriptions": (
        "cupl.json",
        descriptions_text,
        lambda path: ra_tta.read_descriptions(path, CLASSES),
    ),
    "costs": (
        "costs.json",
        lambda: json.dumps([MEASURED[0] | {"note": "é"}][0], ensure_ascii=False, indent=0),
        read_costs,
    ),
    "grid": ("grid.yaml", grid_text, lambda path: sweep.read_grid(path, {})[:2]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the images that the split names; the texts are written beside them."""
    folder = tmp_path_factory.mktemp("texts")
    for name in CLASSES:
        (folder / "2750" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "2750" / name / "0.png")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_every_text_file_may_have_a_byte_order_mark(place, kind, coding):
    name, text, read = KINDS[kind]
    (place / name).write_text(text(), "utf-8")
    want = read(place / name)
    mark = codecs.BOM_UTF16_BE if coding == "utf-16-be" else b""
    (place / name).write_bytes(mark + text().replace("\n", "\r\n").encode(coding))
    assert read(place / name) == want


@pytest.mark.parametrize("kind", KINDS)
def test_other_encodings_are_refused_with_file_and_line(place, kind):
    name, text, read = KINDS[kind]
    lines = text().encode().split(b"\n")
    first = next(i for i, line in enumerate(lines, 1) if not line.isascii())
    (place / name).write_bytes(text().encode("latin-1"))
    with pytest.raises(ValueError) as error:
        read(place / name)
    assert str(error.value) == f"{place / name}, line {first}: not UTF-8; save the file as UTF-8"
    for content in (text(), text().replace("ü", "u")):  # without its mark
        (place / name).write_bytes(content.encode("utf-16-le"))
        with pytest.raises(ValueError, match=rf"{name}, line \d+: not UTF-8; save"):
            read(place / name)


def test_a_half_utf_16_file(tmp_path):
    (tmp_path / "x").write_bytes("a\nb\nc".encode("utf-16") + b"\x00")
    with pytest.raises(ValueError, match="x, line 3: not UTF-16; save"):
        files.read_text(tmp_path / "x")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": [1}', r"x\.json is no JSON: .*line 1 column 9"),
        ("[" * 200_000, r"x\.json is no JSON"),
        ('{"a": ["\\ud83d"]}', r"x\.json is no JSON: .*surrogates"),
        ("1" * 5000, r"x\.json is no JSON"),
    ],
)
def test_what_is_no_json(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('"\\ud83d\\ude00"')
    assert files.read_json(tmp_path / "x.json") == "\U0001f600"


@pytest.mark.parametrize("value", [{"müsli_0": "a string"}, {"müsli_0": [1]}, {"müsli_0": None}, 3])
def test_descriptions_are_lists_of_sentences(tmp_path, value):
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"x\.json is not {class: \[sentences\]}"):
        ra_tta.read_descriptions(tmp_path / "x.json", CLASSES[:1])


@pytest.mark.parametrize(
    "change",
    [{"floor_s": "x"}, {"views": 0}, {"views_s": -1}, {"fast_s": float("nan")}, {"model": 3}],
)
def test_costs_are_numbers(tmp_path, change):
    (tmp_path / "x.json").write_text(json.dumps(MEASURED[0] | change))
    with pytest.raises(ValueError, match=r"x\.json is no result of"):
        read_costs(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["common: [1]\nrows: [{n_aug: 1}]", "rows: [{n_aug: 2024-13-45}]"])
def test_grids_that_are_none(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml"):
        sweep.read_grid(tmp_path / "x.yaml", {})


def test_an_image_beside_the_class_folders_of_a_split(place):
    entries = [[f"{name}/0.png", i, name] for i, name in enumerate(CLASSES)]
    split = {"train": [], "val": [], "test": [*entries, ["0.png", 0, CLASSES[0]]]}
    (place / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match=r"contradicts itself 1 times:\n.*in no class folder"):
        split_of(place / "split_zhou_EuroSAT.json")


def test_damaged_lists_of_an_official_split_name_their_folder(tmp_path):
    cub = tmp_path / "CUB_200_2011"
    cub.mkdir()
    for name in ("classes", "images", "image_class_labels", "train_test_split"):
        (cub / f"{name}.txt").write_text("1 0\n")
    (cub / "images.txt").write_text("2 a.jpg\n")
    with pytest.raises(ValueError, match=r"CUB_200_2011: the lists of cub200 are damaged"):
        datasets.load("cub200", root=tmp_path)
    (cub / "images.txt").write_bytes(b"1 a\xe9.jpg\n")
    with pytest.raises(ValueError, match=r"images\.txt, line 1: not UTF-8"):
        datasets.load("cub200", root=tmp_path)


# --- checkpoints ---------------------------------------------------------------------------------


def coop_file(path: Path, ctx, legacy: bool = False, **more) -> Path:
    content = {"state_dict": {"ctx": ctx, **more}, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def test_legacy_checkpoints_are_read(tmp_path):
    ctx = torch.randn(4, 192)
    assert torch.equal(load_coop(coop_file(tmp_path / "old.pth", ctx, True), 4, 192), ctx)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    coop_file(tmp_path / "objects.pth", scheduler, True)
    with pytest.raises(ValueError, match="holds objects that cannot be read"):
        load_coop(tmp_path / "objects.pth", 4, 192)


@pytest.mark.parametrize("legacy", [False, True])
def test_legacy_weights_are_read(world, tmp_path, legacy):  # noqa: F811
    """A state dict of OpenAI's family, of random weights."""
    state = models.load("mini", device="cpu").model.state_dict()
    path = tmp_path / "weights.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert models.load(str(path), device="cpu").name == "weights.pt"
    state["logit_scale"] = torch.tensor(float("nan"))
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"weights\.pt.*logit_scale has values that are not fin"):
        models.load(str(path), device="cpu")


@pytest.mark.parametrize(
    "ctx, more, message",
    [
        (torch.full((4, 192), float("nan")), {}, "not finite"),
        (torch.zeros(4, 192).index_fill(0, torch.tensor(2), float("inf")), {}, "not finite"),
        (torch.full((4, 192), 1e300, dtype=torch.float64), {}, "not finite"),
        (torch.zeros(4, 192, dtype=torch.int64), {}, "not finite numbers"),
        (torch.zeros(4, 192, dtype=torch.complex64), {}, "not finite numbers"),
        (torch.zeros(4, 192).to_sparse(), {}, "not finite numbers"),
        (torch.zeros(0, 192), {}, "no context vectors"),
        (torch.zeros(0), {}, "no context vectors"),
        (torch.tensor(1.0), {}, "no context vectors"),
        (torch.zeros(4, 192), {"meta_net.linear1.weight": torch.zeros(2)}, "of CoCoOp.*meta_net"),
        (torch.zeros(4, 192), {"proj.weight": torch.zeros(2)}, r"trained with it \(proj"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_contexts_that_cannot_be_used(tmp_path, ctx, more, message, legacy):
    coop_file(tmp_path / "x.pth", ctx, legacy, **more)
    with pytest.raises(ValueError, match=rf"x\.pth.*{message}"):
        load_coop(tmp_path / "x.pth", 4, 192)


def test_a_context_that_is_not_finite_is_found_before_the_encoding(world, tmp_path):  # noqa: F811
    models.save_coop(tmp_path / "nan.pth", torch.full((4, 64), float("nan")), epoch=1)
    places = {"out": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"nan\.pth.*not finite"):
        run(world | places | {"coop": str(tmp_path / "nan.pth")}, progress=False)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "shape, option, said",
    [((6, 4, 64), [], "set csc=True (--csc)"), ((4, 64), ["--csc"], "set csc=False (--no-csc)")],
)
def test_messages_name_the_option_of_a_run(world, tmp_path, capsys, shape, option, said):  # noqa: F811
    models.save_coop(tmp_path / "c.pth", torch.zeros(shape), epoch=1)
    words = [w for key in ("root", "model", "cache") for w in (f"--{key}", str(world[key]))]
    words += ["--coop", str(tmp_path / "c.pth"), "--out", str(tmp_path / "runs"), *option]
    assert main(["evaluate", "--dataset", "folder", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "class_specific" not in error and error.count("\n") == 1


# --- damage --------------------------------------------------------------------------------------


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut off, left out, doubled or put in, at one to three places."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(0, len(out) + 1)), int(rng.integers(1, 30))
        noise = rng.integers(0, 256, n, dtype=np.uint8).tobytes()
        match rng.integers(0, 6):
            case 0:
                out[at : at + n] = noise
            case 1:
                del out[at:]
            case 2:
                del out[at : at + n]
            case 3:
                out[at:at] = out[at : at + n]
            case 4:
                out[at:at] = noise
            case 5 if out:
                out[at % len(out)] ^= 1 << int(rng.integers(0, 8))
    return bytes(out)


def check_damage(path: Path, data: bytes, read, rng: np.random.Generator) -> bool:
    """Was the damaged file refused? Nothing but a result or an error that names it may come."""
    path.write_bytes(damaged(data, rng))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
    except (ValueError, OSError) as error:
        said = str(error)
        assert path.name in said or str(path.parent) in said, said
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_of_text_files(place, kind):
    name, text, read = KINDS[kind]
    rng = np.random.default_rng(list(KINDS).index(kind))
    refused = sum(check_damage(place / name, text().encode(), read, rng) for _ in range(100))
    assert refused > 5  # the damage does damage


@pytest.mark.parametrize("legacy", [False, True])
def test_random_damage_of_a_context(tmp_path, legacy):
    path, rng = tmp_path / "coop.pth", np.random.default_rng(legacy)
    data = coop_file(path, torch.randn(4, 16), legacy, token_prefix=torch.zeros(6, 1, 16))
    data = data.read_bytes()
    refused = sum(check_damage(path, data, lambda p: load_coop(p, 4, 16), rng) for _ in range(150))
    assert refused > 50


@pytest.mark.parametrize("kind", ["mini", "safetensors", "zip", "legacy", "torchscript"])
def test_random_damage_of_weights(tmp_path, kind):
    model = models.build_mini(0, TINY)
    path = tmp_path / ("w.safetensors" if kind in ("mini", "safetensors") else "w.pt")
    if kind == "mini":
        models.save_mini(model, [1, 2, 3], path)
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file({"a.weight": torch.randn(8, 8), "visual.proj": torch.randn(3)}, path)
    elif kind == "torchscript":
        torch.jit.script(torch.nn.Linear(4, 4)).save(path)
    else:
        state = {"state_dict": {"a.weight": torch.randn(8, 8), "visual.proj": torch.randn(3)}}
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data, rng = path.read_bytes(), np.random.default_rng(7)
    # most of the bytes are numbers: the head, which says what they are, is hit too
    head = data[:2000]
    for i in range(20):
        check_damage(path, data, lambda p: models.load(str(p), device="cpu"), rng)
        path.write_bytes(damaged(head, rng) + data[2000:])
        try:
            models.load(str(path), device="cpu")
        except (ValueError, OSError) as error:
            assert path.name in str(error), (i, error)

"""generate: in parts, on a cluster, through the paper's pipeline; pictures of a folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_cluster import inline  # noqa: F401 (a fixture)
from test_diffusion import Paint, tiny_pipeline  # noqa: F401 (a fixture)
from test_runs import CLASSES, world  # noqa: F401 (a fixture)

from tpt_nb import datasets, runs
from tpt_nb.__main__ import main
from tpt_nb.methods import difftpt
from tpt_nb.methods.difftpt import adapt, generate, part_of, pictures_of


def test_parts_are_all_of_it_and_share_nothing():
    ids = [f"i{k}" for k in range(11)]
    parts = [part_of(ids, f"{k}/4") for k in (1, 2, 3, 4)]
    assert sorted(sum(parts, [])) == sorted(ids) and len(set(sum(parts, []))) == 11
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert part_of(ids, "") == part_of(ids, "1/1") == ids
    for wrong in ("0/4", "5/4", "3", "a/b", "-1/4"):
        with pytest.raises(ValueError, match="3/8 is the third of eight"):
            part_of(ids, wrong)


def test_parts_made_apart_are_what_is_made_at_once(tmp_path):
    scenes = datasets.load("iconshift-a", n=5)
    whole = generate(scenes, Paint(), 3, cache=tmp_path / "whole")
    first, second = Paint(), Paint()
    generate(scenes, first, 3, cache=tmp_path / "parts", part="1/2")
    assert len(first.made) == 3
    made = pictures_of(scenes, Paint(), cache=tmp_path / "parts")
    assert made.missing(scenes.ids, 3) == part_of(scenes.ids, "2/2")
    generate(scenes, second, 3, cache=tmp_path / "parts", part="2/2")
    assert len(second.made) == 2
    for image_id in scenes.ids:
        assert torch.equal(made.read(image_id, 3), whole.read(image_id, 3))


COMMAND = ["generate", "--dataset", "iconshift-a", "--reduced_size", "5", "--n_generated", "2"]


def test_the_command_makes_a_part_or_all_on_a_cluster(inline, tmp_path, capsys, monkeypatch):  # noqa: F811
    for module in (adapt, difftpt):
        monkeypatch.setattr(module, "load_generator", lambda name, device="cpu": Paint())
    command = [*COMMAND, "--cache", str(tmp_path / "c")]
    assert main([*command, "--part", "2/3"]) == 0
    assert "2 variations of each of 2 of 5 images" in capsys.readouterr().out
    assert main([*command, "--part", "4/3"]) == 2
    assert main([*command, "--part", "1/3", "--cluster", "somewhere"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main([*command, "--cluster", "somewhere", "--cluster_workers", "1"]) == 0
    said = capsys.readouterr().out
    assert all(f"part {k}/4: 2 variations" in said for k in (1, 2, 3, 4))
    scenes = datasets.load("iconshift-a", n=5)
    there = pictures_of(scenes, Paint(), cache=tmp_path / "c")
    assert not there.missing(scenes.ids, 2)


def test_the_papers_pipeline_through_the_command(tiny_pipeline, tmp_path, capsys):  # noqa: F811
    """Stable Diffusion's own call, on random weights: generate, then a run that reads them."""
    name = f"{tiny_pipeline}:steps=1,side=32,batch=2"
    command = [*COMMAND[:4], "2", *COMMAND[5:], "--generator", name, "--cache", str(tmp_path)]
    for part in ("1/2", "2/2"):
        assert main([*command, "--part", part]) == 0
    assert capsys.readouterr().out.count("2 variations of each of 1 of 2 images") == 2
    config = dict(dataset="iconshift-a", reduced_size=2, method="difftpt", n_aug=3, n_generated=2,
                  generator=name, cache=str(tmp_path), out=str(tmp_path / "runs"), workers=0,
                  device="cpu", tta_steps=1)  # fmt: skip
    done = runs.run(config, progress=False)
    assert len(done.records) == 2 and done.summary["seconds_to_generate"] > 0


# --- pictures of a folder, as the authors' script writes them ------------------------------------


@pytest.fixture
def authors(world, tmp_path):  # noqa: F811
    """A folder with three variations of each image; those of the first class are in one colour."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "made" / name).mkdir(parents=True)
        for i in range(9):
            for k in (10, 2, 0):  # numbers, not strings
                pixels = np.full((8, 12, 3), 20 * k) if name == CLASSES[0] else None
                pixels = rng.integers(0, 256, (8, 12, 3)) if pixels is None else pixels
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.save(tmp_path / "made" / name / f"{i}_{k}.png")
    return tmp_path / "made"


def test_pictures_of_a_folder_are_read(authors, world, tmp_path):  # noqa: F811
    folder = difftpt.load_generator(str(authors))
    assert isinstance(folder, difftpt.PictureFolder) and folder.usual == 3
    image_id = f"{CLASSES[0]}/4.png"
    pictures = folder.read(image_id, 3)
    assert pictures.shape == (3, 3, 224, 224)
    assert [int(p.float().mean()) for p in pictures] == [0, 40, 200]
    assert folder.read(image_id, 4) is None
    with pytest.raises(ValueError, match="a run reads them"):
        folder.make(None, [0])
    with pytest.raises(ValueError, match=r"should hold circle/4_0.jpg, circle/4_1.jpg"):
        folder.check([image_id], 4)
    config = {**world, "method": "difftpt", "generator": str(authors), "n_aug": 3, "tta_steps": 1,
              "device": "cpu", "out": str(tmp_path / "runs"), "cache": str(tmp_path / "c"),
              "reduced_size": 6}  # fmt: skip
    done = runs.run(config, progress=False)
    assert done.config.options["n_generated"] == 3 and len(done.records) == 6
    assert max(v for r in done.records for v in r["selected"]) < 7  # four views and three pictures
    name = runs.run_name(done.config)
    (authors / CLASSES[0] / "4_2.png").write_bytes(b"longer than it was" * 99)
    assert runs.run_name(done.config) != name  # they count by names and sizes

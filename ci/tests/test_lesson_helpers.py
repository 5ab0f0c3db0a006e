"""What notebooks 06 and 08 do beside their teaching cells: sheets, real pictures, the search."""

import numpy as np
import pytest
import torch

from tpt_nb import datasets
from tpt_nb.lessons import diffusion, retrieval


@pytest.mark.parametrize("count", [1, 5, 16, 20])
def test_a_sheet_has_the_image_first_and_the_nearest_next(count):
    near = torch.rand(count, generator=torch.Generator().manual_seed(count))
    seen = [f"class {k}" for k in range(count)]
    cells, row = diffusion.sheet("image", "label", list(range(count)), near, seen)
    assert len(cells) == 2 * row and cells[0] == ("image", "label", None)
    shown = [cell for cell in cells[1:] if cell[0] is not None]
    order = near.argsort(descending=True).tolist()[: len(shown)]
    assert [cell[0] for cell in shown] == order
    kept = int(0.8 * count)
    assert [cell[2] for cell in shown] == ["blue"] * min(kept, len(shown)) + ["orange"] * (
        len(shown) - min(kept, len(shown))
    )


def test_real_pictures_are_of_the_class_that_was_asked_for(monkeypatch):
    """Whatever encodes them: here a picture's features say which image of the source it is."""
    source = datasets.load("iconshift-v2", n=600)
    place = {image_id: i for i, image_id in enumerate(source.ids)}

    def encode(part, *args, **kwargs):
        rows = torch.tensor([[[float(place[i])]] for i in part.ids])
        return type("Encoded", (), {"features": rows})()

    monkeypatch.setattr(diffusion.features, "encode", encode)
    clip = type("Clip", (), {"image_size": 64})()
    asked = [7, 3, 7, 150]
    found = diffusion.real_pictures(source, clip, asked, 3)
    assert found.shape == (4, 3, 1)
    for row, wanted in zip(found[..., 0].long().tolist(), asked, strict=True):
        assert len(set(row)) == 3
        assert all(source.targets[i] == wanted for i in row)


def test_every_scene_of_the_database_is_compared(monkeypatch):
    tested = datasets.load("iconshift-r", n=5)
    items = [f"{style}/{k}" for style in list(datasets.iconshift.styles())[:2] for k in range(20)]
    assert retrieval.overlap("iconshift-r", tested.ids, items) == 0
    kept = datasets.iconshift.kept("iconshift-r")
    index = int(tested.ids[-1].split("/")[1])
    stolen = datasets.iconshift.spec("iconshift-r", index if kept is None else kept[index])
    honest = retrieval.ra_tta.database_spec
    last = items[-1]  # not only every fiftieth
    leak = lambda item: stolen if item == last else honest(item)  # noqa: E731
    monkeypatch.setattr(retrieval.ra_tta, "database_spec", leak)
    assert retrieval.overlap("iconshift-r", tested.ids, items) == 1


def test_the_halves_of_a_database_share_no_class():
    class Database:
        items = [f"style/{k}" for k in range(40)]

        def subset(self, rows):
            return [int(self.items[r].split("/")[1]) % 10 for r in rows]

    low, high = retrieval.halves(Database(), 10)
    assert set(low) == set(range(5)) and set(high) == set(range(5, 10))
    assert len(low) + len(high) == 40


def test_frames_are_those_of_the_encoded_crops():
    from tpt_nb import views

    image, _ = datasets.load("iconshift-r", n=1)[0]
    frames = retrieval.frames(image, "some id", seed=3, n_aug=6)
    assert frames[0].tolist() == [0, 0, *image.size]
    crops = views.make_augmenter("random", size=32, n_aug=6)(image, views.view_seed(3, "some id"))
    for box, crop in zip(frames[1:], crops[1:], strict=True):
        again = np.asarray(image.crop(tuple(box.tolist())).resize((32, 32), 3), np.int16)
        want = crop.permute(1, 2, 0).numpy().astype(np.int16)
        apart = min(np.abs(again - want).mean(), np.abs(again[:, ::-1] - want).mean())
        assert apart < 12

"""Put generated pictures into the archive that the repository ships, from the cache.

    python -m tpt_nb generate --dataset iconshift-a --reduced_size 100
    python data/diffusion/ship.py iconshift-a 100

The archive's name has a hash of the data set, the weights and the settings; remove older ones.
"""

import argparse
import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tpt_nb import datasets  # noqa: E402
from tpt_nb.core.files import write_whole  # noqa: E402
from tpt_nb.methods import difftpt  # noqa: E402


def ship(pictures, ids: Sequence[str]) -> Path:
    """Write the archive of the variations of these images; the same pictures, the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in ["manifest.json", *(difftpt.file_name(image_id) for image_id in ids)]:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, (pictures.folder / name).read_bytes())
    pictures.archive.parent.mkdir(parents=True, exist_ok=True)
    write_whole(pictures.archive, out.getvalue())
    return pictures.archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset")
    parser.add_argument("n", type=int)
    args = parser.parse_args()
    images = datasets.load(args.dataset, n=args.n)
    generator = difftpt.load_generator("mini")
    pictures = difftpt.pictures_of(images, generator)
    if pictures.archive.is_file():
        raise SystemExit(f"{pictures.archive.name} is there already; remove it to pack it anew.")
    pictures.check(images.ids, generator.usual)
    print(ship(pictures, images.ids))


if __name__ == "__main__":
    main()

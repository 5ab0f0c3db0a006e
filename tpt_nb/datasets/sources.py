"""Where the data sets can be had, and how: addresses, sizes, checksums; ``download`` brings one.

Sizes and SHA-256 are those that TensorFlow Datasets records, MD5 those of torchvision and torchgeo,
the files on Google Drive those that CoOp's page of data sets and SuS-X name.
"""

import os
from pathlib import Path

from tpt_nb.core.download import Source, fetch
from tpt_nb.core.drive_folder import fetch_folder
from tpt_nb.core.paths import datasets_dir
from tpt_nb.core.unpack import ARCHIVES, is_unpacked, unpack

_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_HF = "https://huggingface.co/datasets"
_CALTECH = "https://data.caltech.edu/records"


def _split(name: str, drive: str) -> Source:
    return Source(f"split_zhou_{name}.json", (f"gdrive:{drive}",))


# fmt: off
SOURCES: dict[str, tuple[Source, ...]] = {
    "imagenet-a": (
        Source("imagenet-a.tar",
            ("https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
             "gdrive:1Fdx3kYLSzDdYsBzqhfPYhfKUEXkFZbhW"),
            687_552_512, "3bb3632277e6ba6392ea64c02ddbf4dd2266c9caffd6bc09c9656d28f012589e"),
    ),
    "imagenet-r": (
        Source("imagenet-r.tar", ("https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",),
            2_191_079_936, "18c6bf493b39a0d975d48e587437f562caab9c52ae6327dcfa9dd8eb54aa1b52"),
    ),
    "imagenet-v2": (
        Source("imagenetv2-matched-frequency.tar.gz",
            (f"{_HF}/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
             "https://imagenetv2public.s3-us-west-2.amazonaws.com/"
             "imagenetv2-matched-frequency.tar.gz"),
            1_264_079_360, "f0c37fdf925916b19ea1323cd9a2208cdb6959ba2c32eef2a7fc393835c9ca7c"),
    ),
    "imagenet-sketch": (
        Source("ImageNet-Sketch.zip", ("gdrive:1Mj0i5HBthqH1p_yeXzsg22gZduvgoNeA",), 7_593_573_012,
            "4d3ce6b82a7c48aabf14aeac105eb533e75707f152cc858f55bfc022031a72ed"),
    ),
    "caltech101": (
        Source("caltech-101.zip", (f"{_CALTECH}/mzrjq-6wc02/files/caltech-101.zip?download=1",),
            137_414_764, "331234750fc7f77520e50d9565e8b6907b03565e30320da1401130db08c61f91",
            inner=("caltech-101/101_ObjectCategories.tar.gz",)),
        _split("Caltech101", "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"),
    ),
    "oxford-pets": (
        Source("images.tar.gz", ("https://thor.robots.ox.ac.uk/~vgg/data/pets/images.tar.gz",),
            791_918_971, "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d"),
        _split("OxfordPets", "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs"),
    ),
    "flowers102": (
        Source("102flowers.tgz", (f"{_VGG}/flowers/102/102flowers.tgz",), 344_862_509,
            "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246"),
        _split("OxfordFlowers", "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
    ),
    "food101": (
        Source("food-101.tar.gz", ("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",),
            4_996_278_331, "d97d15e438b7f4498f96086a4f7e2fa42a32f2712e87d3295441b2b6314053a4"),
        _split("Food101", "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl"),
    ),
    "fgvc-aircraft": (
        Source("fgvc-aircraft-2013b.tar.gz",
            (f"{_VGG}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",)),
    ),
    "sun397": (
        Source("SUN397.tar.gz", ("https://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",),
            39_077_296_924, "f404130965a7ad77bed5ececc71e720ab50f3cc1e1bb257257610d38f3b928ec"),
        _split("SUN397", "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq"),
    ),
    "dtd": (
        Source("dtd-r1.0.1.tar.gz", (f"{_VGG}/dtd/download/dtd-r1.0.1.tar.gz",), 625_239_812,
            "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205"),
        _split("DescribableTextures", "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x"),
    ),
    "eurosat": (
        Source("EuroSAT.zip", ("http://madm.dfki.de/files/sentinel/EuroSAT.zip",), 94_280_567,
            "8ebea626349354c5328b142b96d0430e647051f26efc2dc974c843f25ecf70bd"),
        _split("EuroSAT", "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o"),
    ),
    "ucf101": (
        Source("UCF-101-midframes.zip", ("gdrive:10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O",)),
        _split("UCF101", "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y"),
    ),
    "caltech256": (
        Source("256_ObjectCategories.tar",
            (f"{_CALTECH}/nyy15-4j048/files/256_ObjectCategories.tar",),
            md5="67b4f42ca05d46448c6bb8ecd2220f6d"),
        Source("split_Caltech256.json", ("gdrive:12tQM2F3IQfH2J3YU_ul7Tt4bUR-4xVeA",)),
    ),
    "resisc45": (
        Source("NWPU-RESISC45.zip", (f"{_HF}/torchgeo/resisc45/resolve/main/NWPU-RESISC45.zip",),
            md5="75206b2e16446591afa88e2628744886"),
        Source("resisc45-test.txt",
            (f"{_HF}/torchgeo/resisc45/resolve/main/resisc45-test.txt",
             "https://storage.googleapis.com/remote_sensing_representations/resisc45-test.txt"),
            md5="3dda9e4988b47eb1de9f07993653eb08"),
    ),
    "cub200": (
        Source("CUB_200_2011.tgz", (f"{_CALTECH}/65de6-vp158/files/CUB_200_2011.tgz?download=1",),
            1_150_585_339, "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"),
    ),
    # not a data set: the contexts that CoOp's authors trained on ImageNet, for the option coop
    "coop-weights": (
        Source("coop-weights.zip", ("gdrive:18ypxfd82RR0pizc5MM1ZWDYDk4j0BtPF",)),
    ),
    # the one of them that the study of patches and losses started from, as it kept it (75 MB)
    "coop-rn50": (
        Source("rn50_nctx4_model.pth.tar-50", ("gdrive:1shomU1N2fbbolKtIKigq0-FDyb_04rH1",)),
    ),
}
# fmt: on

FOLDERS = {  # on Google Drive; the embedded images of LAION-2B that RA-TTA's authors searched
    "ra-tta-databases": "1EF8VgitV8xFatQAxNwpf1RTb2PhPQMah",
}

BY_HAND = {
    "imagenet": "Register at image-net.org, download ILSVRC2012_img_val.tar and the devkit of task "
    "1 and 2, and sort the images with torchvision.datasets.ImageNet(root, split='val').",
    "imagenet-c": "Download blur.tar, digital.tar, noise.tar and weather.tar (extra.tar has four "
    "more damages) from https://zenodo.org/record/2235448 and unpack them side by side in a folder "
    "imagenet-c, which then holds imagenet-c/<damage>/<severity>/<synset>/*.JPEG.",
    "stanford-cars": "Its server is gone; copies are on Kaggle (for example "
    "jessicali9530/stanford-cars-dataset). CoOp's split file is on Google Drive, "
    "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT.",
}


def how_to_get(name: str) -> str:
    """A sentence: the command that downloads the data set and what it takes, or what to do."""
    if name in BY_HAND:
        return BY_HAND[name]
    files = SOURCES[name]
    size = sum(f.size for f in files)
    about = f" ({size / 1e9:.1f} GB)" if size else ""
    hosts = dict.fromkeys(_host(url) for f in files for url in f.urls)
    return f"`python -m tpt_nb download {name}` gets it{about} from {', '.join(hosts)}."


def _host(url: str) -> str:
    return "Google Drive" if url.startswith("gdrive:") else url.split("/")[2]


def download(name: str, root: str | Path | None = None, progress: bool = True) -> Path:
    """Download and unpack a data set, unless it is there; returns its folder.

    Args:
        root: where to; default: a folder of its own in the usual place. ``TPT_NB_ARCHIVES`` names a
            folder where archives are kept (a mounted Drive, say: one large file is read from there
            quickly, thousands of small ones are not); otherwise they are removed when unpacked.

    Raises:
        ValueError: it cannot be downloaded (the message says how to get it), or is damaged.
        OSError: see :func:`tpt_nb.core.download.fetch`.
    """
    if name in FOLDERS:
        return fetch_folder(FOLDERS[name], root or datasets_dir() / name, progress)
    if name not in SOURCES:
        what = BY_HAND.get(name, f"known: {', '.join([*SOURCES, *FOLDERS])}.")
        raise ValueError(f"{name} cannot be downloaded. {what}")
    folder = Path(root) if root else datasets_dir() / name
    keep = os.environ.get("TPT_NB_ARCHIVES")
    for source in SOURCES[name]:
        if not source.filename.endswith(ARCHIVES):
            fetch(source, folder, progress)
        elif not is_unpacked(source.filename, folder):
            archive = fetch(source, Path(keep) if keep else folder, progress)
            try:
                unpack(archive, folder, source.inner)
            except ValueError:
                if not source.checksum:  # the download may be at fault: next time anew
                    archive.unlink(missing_ok=True)
                raise
            if not keep:
                archive.unlink(missing_ok=True)
    return folder

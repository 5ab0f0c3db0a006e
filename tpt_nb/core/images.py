"""Reading an image, whatever file it is in, and the seed of its views."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

STRIP = 16  # aspect ratio from which on the centre is cut out before it is resized


EXIF_ORIENTATION = 0x0112


def view_seed(seed: int, image_id: str) -> int:
    """Seed of one image's views: a stable hash (not Python's salted ``hash``), in [0, 2**63)."""
    digest = hashlib.blake2b(f"{int(seed)}\0{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: EXIF rotation, white under transparency, 16 bits scaled.

    Raises:
        ValueError: no pixels, or floating-point pixels, whose range is anyone's guess.
    """
    if 0 in image.size:
        raise ValueError(f"the image has {image.width} x {image.height} pixels: nothing to see")
    if image.mode == "F":
        raise ValueError("the image has floating-point pixels (mode F); convert it to 8 bits first")
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") would clip 16-bit grey to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_rgb(path: str | Path) -> Image.Image:
    """The picture as a viewer shows it; see :func:`tpt_nb.views.as_rgb`."""
    with Image.open(path) as file:
        image = as_rgb(file)
        image.load()
    return image

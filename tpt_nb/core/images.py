"""Reading an image, whatever file it is in, and the seed of its views."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

STRIP = 16  # aspect ratio from which on the centre is cut out before it is resized
EXIF_ORIENTATION = 0x0112
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def view_seed(seed: int, image_id: str) -> int:
    """Seed of one image's views: a stable hash (not Python's salted ``hash``), in [0, 2**63)."""
    digest = hashlib.blake2b(f"{int(seed)}\0{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: EXIF rotation, white under transparency, 8 bits.

    16 bits are scaled. Of 32-bit integers, 0 to 255 are taken as they are, others are scaled by the
    largest value there (and from the smallest, if it is negative).

    Raises:
        ValueError: no pixels, or floating-point pixels, whose range is anyone's guess.
    """
    if 0 in image.size:
        raise ValueError(f"the image has {image.width} x {image.height} pixels: nothing to see")
    if image.mode == "F":
        raise ValueError("the image has floating-point pixels (mode F); convert it to 8 bits first")
    image = _eight_bits(_upright(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    except Exception:  # SyntaxError and others: damaged EXIF says nothing, the pixels may be fine
        image.load()  # raises if they are not
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits in 8, where ``convert("RGB")`` would clip it to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64) >> 8  # these formats have 16 bits at most
    elif image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        values -= min(0, values.min())
        if (most := values.max()) > 255:
            values = (values * 255 + most // 2) // most
    else:
        return image
    return Image.fromarray(values.astype(np.uint8))


def read_rgb(path: str | Path) -> Image.Image:
    """The picture in a file as a viewer shows it; see :func:`as_rgb`."""
    with Image.open(path) as file:
        image = as_rgb(file)
        image.load()
    return image

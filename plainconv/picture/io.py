"""Pictures as tensors, and back. Pillow decodes and encodes; this page only decides what a mode means.

A picture is float32 [c, h, w] in levels, 0 to 255 or, for 16-bit grey, 0 to 65535. Levels are small integers, which
float32 holds exactly, so reading and writing an untouched picture changes nothing.

    Pillow's mode          pixels   alpha    written as
    L, 1                   [1,h,w]  -        L
    LA, L with a key       [1,h,w]  [1,h,w]  LA
    RGB, CMYK, YCbCr, ...  [3,h,w]  -        RGB
    RGBA, PA, ...          [3,h,w]  [1,h,w]  RGBA
    P (a palette)          as the colours in it: RGB, or RGBA when one of them is transparent
    I;16 and its kin       [1,h,w]  -        I;16

16-bit colour is refused: Pillow would quietly read it as 8-bit. Of an animation the first frame is read.
"""

import struct
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from plainconv.files import InputError, write_whole

# What Pillow raises on a picture that is damaged: most formats OSError, some of them any of these.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """A picture in memory.

    Attributes:
        pixels: float32 [c, h, w], c is 1 (grey) or 3 (red, green, blue), in levels from 0 to `peak`.
        alpha: float32 [1, h, w], 0 (clear) to 255, or None when every pixel is opaque.
        peak: the level of white: 255, or 65535 for 16-bit grey.
        profile: the ICC colour profile the levels are meant in, or None.
    """

    pixels: Tensor
    alpha: Tensor | None = None
    peak: int = 255
    profile: bytes | None = None

    def with_pixels(self, pixels: Tensor) -> "Picture":
        """The same kind of picture with other colours: float [c, h, w] of this picture's height and width."""
        return replace(self, pixels=pixels)


def read(path: str | Path) -> Picture:
    """Read a picture file, turned the way its EXIF orientation says.

    Args:
        path: a file in any format that Pillow knows.

    Returns:
        the picture; pixels float32 [c, h, w] in levels.

    Raises:
        InputError: the file is missing, is no picture, is damaged, or is of a kind not read here.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # Pillow warns before it raises
            _refuse_deep_colour(image, path)
            image.load()
            return _from_image(ImageOps.exif_transpose(image), path)
    except InputError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except BROKEN as error:
        said = "" if str(path) in str(error) else f" ({error})"
        raise InputError(f"{path}: not a picture that can be read{said}") from error


def write(picture: Picture, path: str | Path) -> None:
    """Write a picture; the ending of `path` names the format. Levels are rounded and clamped to 0..peak.

    Args:
        picture: pixels float [c, h, w] in levels, on any device.
        path: where to; an older file there is replaced only when the new one is complete.

    Raises:
        InputError: no such format, or the format cannot hold this kind of picture (JPEG has no alpha and no 16 bits).
        OSError: the folder is missing, the disk is full and so on.
    """
    path = Path(path)
    format = Image.registered_extensions().get(path.suffix.lower())
    if format not in Image.SAVE:
        raise InputError(f"{path}: no picture format has the ending {path.suffix!r}; .png holds every kind of picture")
    image = to_image(picture)
    options = {"quality": 95} if format in ("JPEG", "WEBP") else {}
    with write_whole(path) as file:
        try:
            image.save(file, format=format, icc_profile=picture.profile, **options)
        except OSError as error:
            if error.errno is not None:  # the disk, not the format
                raise
            raise InputError(f"{path}: {error}; .png holds every kind of picture") from error


def to_image(picture: Picture) -> Image.Image:
    """The picture as Pillow's image: mode L, LA, RGB, RGBA or I;16. NaN becomes black."""
    planes = [picture.pixels.detach().cpu()]
    if picture.alpha is not None:
        planes.append(picture.alpha.cpu())
    levels = torch.cat(planes).nan_to_num(nan=0.0).round().clamp(0, picture.peak)  # [c (+1), h, w]
    array = levels.permute(1, 2, 0).numpy().astype(np.uint16 if picture.peak > 255 else np.uint8)  # [h, w, c (+1)]
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _from_image(image: Image.Image, path: str | Path) -> Picture:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        return Picture(_planes(image), peak=65535, profile=profile)
    if image.mode in ("I", "F"):
        raise InputError(f"{path}: pictures of 32-bit levels are not read; 8-bit and 16-bit grey are")
    grey = image.mode in ("1", "L", "LA", "La")
    clear = image.has_transparency_data
    mode = ("LA" if clear else "L") if grey else ("RGBA" if clear else "RGB")
    if image.mode not in (mode, "P"):  # the profile belongs to the colours before the conversion
        profile = None
    planes = _planes(image.convert(mode))
    return Picture(planes[:-1], planes[-1:], profile=profile) if clear else Picture(planes, profile=profile)


def _planes(image: Image.Image) -> Tensor:
    array = np.array(image, dtype=np.float32)  # [h, w] or [h, w, c]
    return torch.from_numpy(array).reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()  # [c, h, w]


def _refuse_deep_colour(image: Image.Image, path: str | Path) -> None:
    if image.mode not in ("RGB", "RGBA", "LA") or not hasattr(image, "tile"):
        return
    raw = [arg for tile in image.tile for arg in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    if any(isinstance(arg, str) and ";16" in arg for arg in raw):
        raise InputError(f"{path}: 16-bit colour is not read (8-bit colour and 16-bit grey are)")

"""Pictures in and out: every mode comes back as it was."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from plainconv.files import InputError
from plainconv.picture import Picture, read, write

H, W = 5, 7
RNG = np.random.default_rng(0)


def save(path, array, **options):
    image = Image.fromarray(array)
    image.save(path, **options)
    return image


def levels(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@pytest.mark.parametrize(
    ("mode", "array", "channels", "clear"),
    [
        ("L", levels(H, W), 1, False),
        ("LA", levels(H, W, 2), 1, True),
        ("RGB", levels(H, W, 3), 3, False),
        ("RGBA", levels(H, W, 4), 3, True),
        ("I;16", levels(H, W, dtype=np.uint16), 1, False),
    ],
)
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_untouched_pictures_come_back_exactly(tmp_path, mode, array, channels, clear, ending):
    first, second = tmp_path / f"first.{ending}", tmp_path / f"second.{ending}"
    save(first, array)
    picture = read(first)
    assert picture.pixels.shape == (channels, H, W)
    assert picture.pixels.dtype == torch.float32
    assert (picture.alpha is not None) == clear
    assert picture.peak == (65535 if mode == "I;16" else 255)
    write(picture, second)
    with Image.open(second) as back:
        assert back.mode == mode
        assert np.array_equal(np.asarray(back), array)


def test_jpeg_comes_back_nearly(tmp_path):
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    save(tmp_path / "a.jpg", smooth, quality=95)
    picture = read(tmp_path / "a.jpg")
    write(picture, tmp_path / "b.jpg")
    assert (read(tmp_path / "b.jpg").pixels - picture.pixels).abs().mean() < 2


def test_a_palette_is_read_as_its_colours(tmp_path):
    image = Image.new("P", (W, H), color=1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    assert torch.equal(picture.pixels, torch.tensor([10.0, 20, 30]).view(3, 1, 1).expand(3, H, W))
    assert picture.alpha is None
    image.save(tmp_path / "b.png", transparency=1)
    assert torch.equal(read(tmp_path / "b.png").alpha, torch.zeros(1, H, W))


def test_black_and_white_and_cmyk(tmp_path):
    Image.new("1", (W, H), color=1).save(tmp_path / "a.png")
    assert torch.equal(read(tmp_path / "a.png").pixels, torch.full((1, H, W), 255.0))
    Image.new("CMYK", (W, H), color=(0, 255, 255, 0)).save(tmp_path / "b.tiff")
    assert torch.equal(read(tmp_path / "b.tiff").pixels[:, 0, 0], torch.tensor([255.0, 0, 0]))


def test_exif_orientation_is_honoured(tmp_path):
    array = levels(H, W, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise to see it
    save(tmp_path / "a.png", array, exif=exif)
    turned = np.rot90(array, k=-1).astype(np.float32)
    assert np.array_equal(read(tmp_path / "a.png").pixels.permute(1, 2, 0).numpy(), turned)


def test_levels_are_rounded_and_clamped(tmp_path):
    pixels = torch.tensor([[[-3.0, 0.4, 0.6, 254.6, 300.0, float("nan"), float("inf")]]])
    write(Picture(pixels), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(image).tolist() == [[0, 0, 1, 255, 255, 0, 255]]
    write(Picture(pixels * 300, peak=65535), tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        assert np.asarray(image).tolist() == [[0, 120, 180, 65535, 65535, 0, 65535]]


def test_the_colour_profile_stays(tmp_path):
    save(tmp_path / "a.png", levels(H, W, 3), icc_profile=b"a profile")
    write(read(tmp_path / "a.png"), tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        assert image.info["icc_profile"] == b"a profile"


def deep_png(path, colour_type, channels):
    """A PNG with 16 bits in each channel, which Pillow itself cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, colour_type, 0, 0, 0)
    rows = (b"\0" + bytes(4 * channels)) * 2
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_deep_colour_is_refused_and_not_flattened(tmp_path, colour_type, channels):
    deep_png(tmp_path / "a.png", colour_type, channels)
    with pytest.raises(InputError, match="16-bit colour is not read"):
        read(tmp_path / "a.png")


def test_deep_grey_is_read(tmp_path):
    deep_png(tmp_path / "a.png", 0, 1)
    assert read(tmp_path / "a.png").peak == 65535


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: No such file"):
        read(tmp_path / "none.png")
    with pytest.raises(InputError, match="Is a directory"):
        read(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png: not a picture"):
        read(tmp_path / "text.png")
    Image.new("F", (W, H)).save(tmp_path / "float.tiff")
    with pytest.raises(InputError, match="32-bit"):
        read(tmp_path / "float.tiff")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tiff", "bmp", "webp"])
def test_a_file_cut_or_damaged_anywhere_is_a_picture_or_an_input_error(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    save(path, levels(16, 16, 3))
    whole = path.read_bytes()
    for cut in range(0, len(whole), max(1, len(whole) // 40)):
        damaged = bytearray(whole)
        damaged[cut] ^= 0xFF
        for content in (whole[:cut], bytes(damaged)):
            path.write_bytes(content)
            try:
                read(path)
            except InputError as error:
                assert path.name in str(error)  # noqa: PT017 (damage may go unnoticed)


@pytest.mark.parametrize(
    ("picture", "name", "why"),
    [
        (Picture(torch.zeros(3, H, W), alpha=torch.zeros(1, H, W)), "a.jpg", "RGBA"),
        (Picture(torch.zeros(1, H, W), peak=65535), "a.jpg", "I;16"),
        (Picture(torch.zeros(1, H, W)), "a.xyz", "no picture format"),
        (Picture(torch.zeros(1, H, W)), "a", "no picture format"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path, picture, name, why):
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(InputError, match=why):
        write(picture, tmp_path / name)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, b"old")]

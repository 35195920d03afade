import numpy as np
import pytest
import torch
from PIL import Image

from datasets.images import allow_large_images, decoding, read_image, read_upright
from datasets.loaders import SkipUnreadable
from datasets.masks import read_segment_ids

RGB = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


def pixels(path):
    return read_image(path).permute(1, 2, 0).numpy()


def test_jpeg_gives_pils_pixels(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").dtype == torch.uint8
    assert np.array_equal(pixels(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg")))


@pytest.mark.parametrize("mode, suffix", [
    ("L", "jpg"), ("CMYK", "jpg"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"),
])  # fmt: skip
def test_other_kinds_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"{mode}.{suffix}"
    Image.fromarray(RGB).convert(mode).save(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize("largest", [65535, 4095, 200])
def test_sixteen_bits_are_scaled_by_their_type_not_their_content(tmp_path, largest):
    grey = np.linspace(0, largest, 20).astype(np.uint16).reshape(4, 5)
    for suffix in ("png", "tiff"):
        Image.fromarray(grey).save(tmp_path / f"deep.{suffix}")
        found = pixels(tmp_path / f"deep.{suffix}")
        assert found.shape == (4, 5, 3) and np.array_equal(found[..., 1], grey // 257)


@pytest.mark.parametrize("dtype, mode", [(np.float32, "F"), (np.int32, "I")])
def test_pixels_of_32_bits_are_refused(tmp_path, dtype, mode):
    Image.fromarray(np.ones((4, 5), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=f"a.tiff.*mode {mode}, 32 bits"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("read", [read_image, read_upright, read_segment_ids])
def test_an_image_of_too_many_pixels_is_refused_unless_allowed(tmp_path, suffix, read, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / f"big.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=f"big.{suffix}.*exceeds limit of 200 pixels.*; --allow large_images reads it"):
        read(tmp_path / f"big.{suffix}")
    allow_large_images()
    read(tmp_path / f"big.{suffix}")


@pytest.mark.parametrize("error", [IndexError("x"), EOFError(), KeyError(3), OverflowError("x"), SyntaxError("x")])
def test_whatever_a_decoder_raises_names_the_file(error):
    with pytest.raises(ValueError, match=r"a\\x1b.jpg: not a readable image"), decoding("a\x1b.jpg"):
        raise error


def test_errors_of_the_system_are_not_blamed_on_the_image(tmp_path):
    with pytest.raises(OSError, match="a.jpg: Stale file handle"), decoding(tmp_path / "a.jpg"):
        raise OSError(116, "Stale file handle")
    with pytest.raises(OSError, match="Is a directory"):
        read_image(tmp_path)


class Failing:
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 0:
            raise self.error
        return index


def test_only_images_at_fault_are_skipped():
    for error in (ValueError("damaged"), FileNotFoundError("gone")):
        assert SkipUnreadable(Failing(error))[0] == 1
    with pytest.raises(OSError, match="Stale"):
        SkipUnreadable(Failing(OSError(116, "Stale file handle")))[0]


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    Image.fromarray(RGB).save(tmp_path / "turned.jpg", exif=exif)
    assert pixels(tmp_path / "turned.jpg").shape == (16, 20, 3)


@pytest.mark.parametrize("content", [b"\xff\xd8\xff", b"just text", b"", None])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content is None:  # cut short
        Image.fromarray(RGB).save(path)
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.jpg.*not a readable image"):
        read_image(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.jpg"):
        read_image(tmp_path / "absent.jpg")

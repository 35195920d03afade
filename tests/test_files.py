"""Files that annotations name: inside their folder, there, or there under a similar name."""

import re

import pytest

from datasets.files import check_against_folder, inside, leads_outside


def refused(tmp_path, name, **options):
    with pytest.raises(ValueError) as refusal:
        check_against_folder("a.json", [name], tmp_path / "images", **options)
    return str(refusal.value)


@pytest.fixture
def images(tmp_path):
    for name in ("a.jpg", "sub/b.jpg", "photo 1.jpg", "UPPER.JPG"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    (tmp_path / "secret.jpg").touch()
    return tmp_path / "images"


@pytest.mark.parametrize("name", [
    "../secret.jpg", "sub/../../secret.jpg", "/etc/passwd", "..\\secret.jpg", "sub\\..\\..\\secret.jpg",
    "C:\\secret.jpg", "C:secret.jpg", "\\\\host\\share\\secret.jpg", "..",
])  # fmt: skip
def test_names_that_lead_out_of_the_folder_are_refused(images, tmp_path, name):
    assert leads_outside(name)
    assert "1 images outside" in refused(tmp_path, name) and "--allow outside_paths" in refused(tmp_path, name)
    with pytest.raises(ValueError, match="lies outside"):
        inside(images, name)


@pytest.mark.parametrize("name", ["a.jpg", "sub/b.jpg", "a..b.jpg", "...jpg", "./a.jpg", "1:2.jpg"])
def test_names_inside_the_folder_are_no_escape(tmp_path, name):
    assert not leads_outside(name)
    assert inside(tmp_path, "a.jpg") == tmp_path / "a.jpg"


def test_names_outside_are_read_when_allowed(images, tmp_path):
    check_against_folder("a.json", ["../secret.jpg", str(tmp_path / "secret.jpg")], images, outside=True)
    assert "not in" in refused(tmp_path, "../gone.jpg", outside=True)
    assert inside(images, "../secret.jpg", outside=True) == images / "../secret.jpg"


@pytest.mark.parametrize("name", ["", ".", "sub", "sub/", "a.jpg/", "a.jpg/b.jpg", "b.jpg\0", "x\0y/a.jpg"])
def test_names_that_are_no_file_are_refused(images, tmp_path, name):
    assert "1 images that are not in" in refused(tmp_path, name)


@pytest.mark.parametrize("listed, there", [
    ("train2017/a.jpg", "a.jpg"), ("a.jpeg", "a.jpg"), (" a.jpg ", "a.jpg"), ("sub\\b.jpg", "sub/b.jpg"),
    ("photo%201.jpg", "photo 1.jpg"), ("upper.jpg", "UPPER.JPG"), ("data\\x\\A.png", "a.jpg"),
    ("sub/b.PNG", "sub/b.jpg"),
])  # fmt: skip
def test_a_file_that_may_be_meant_is_suggested(images, tmp_path, listed, there):
    assert f"{listed} (did you mean {there}?)" in refused(tmp_path, listed)


def test_absent_files_are_counted_and_printed_escaped(images, tmp_path):
    with pytest.raises(ValueError, match=re.escape(r"7 panoptic maps that are not in") + r".*\\x1b\[31mx.*, \.\.\.$"):
        check_against_folder("a.json", ["\x1b[31mx", *"bcdefg"], images, "panoptic maps")

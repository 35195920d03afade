"""Input images of tools/predict.py: files, folders and globs, their ids, and a dataset that reads them."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from torch import Tensor
from torch.utils.data import Dataset

from datasets.coco_index import read_coco_index
from datasets.images import allow_large_images, read_upright
from tools.predictor import as_tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def find_images(inputs: Sequence[str]) -> dict[Path, str]:
    """Expand files, folders and globs to {path: its path relative to the given folder, or its file name}.

    Raises FileNotFoundError or ValueError for an input that gives no image.
    """
    images, seen = {}, set()
    for text in inputs:
        folder = Path(text)
        if folder.is_dir():
            files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
            found = {path: path.relative_to(folder) for path in files if path.is_file() or path.is_symlink()}
            if not found:
                raise ValueError(f"{text}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
        else:
            names = [text] if folder.is_file() else sorted(glob.glob(text, recursive=True))
            found = {Path(name): Path(name).name for name in names if Path(name).is_file()}
            if not found:
                raise FileNotFoundError(f"{text}: no such file or folder, and no file matches")
        for path, relative in found.items():
            absolute = os.path.abspath(path)
            if absolute not in seen:
                seen.add(absolute)
                images[path] = PurePosixPath(relative).as_posix()
    return images


def read_image_list(path: str | Path) -> tuple[dict[str, int], dict[int, str]]:
    """Read {file name: image id} and {class id: name} of a COCO file."""
    index = read_coco_index(path)
    ids = dict(zip(index.file_names.tolist(), index.image_ids.tolist(), strict=True))
    if len(ids) < len(index.file_names):
        raise ValueError(f"{path}: some images have the same file name")
    return ids, index.categories


def image_ids(paths: Sequence[Path], annotations: str | None, relative: Sequence[str] | None = None) -> list[int]:
    """Number the images: by the annotation file, else by their names if these are different numbers, else from 1.

    An image is looked up by its path relative to the given folder, then by the listed names that its path ends in.
    Raises ValueError for images that are not listed, that match several listed names, or that match the same one.
    """
    if annotations:
        return _listed_ids(paths, read_image_list(annotations)[0], relative or [""] * len(paths), annotations)
    stems = [path.stem for path in paths]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(paths) + 1))


def _listed_ids(paths: Sequence[Path], listed: dict[str, int], relative: Sequence[str], file: str) -> list[int]:
    ids, unknown = {}, []
    for path, name in zip(paths, relative, strict=True):
        parts = Path(os.path.abspath(path)).parts
        endings = ["/".join(parts[k:]) for k in range(1, len(parts))]
        names = [name] if name in listed else [ending for ending in endings if ending in listed]
        if len(names) > 1:
            raise ValueError(f"{path} could be any of {', '.join(names)} in {file}: give the folder of the images")
        if not names:
            unknown.append(name or path.name)
        elif listed[names[0]] in ids.values():
            other = next(other for other, i in ids.items() if i == listed[names[0]])
            raise ValueError(f"{path} and {other} are both {names[0]} in {file}: give only one of them")
        else:
            ids[path] = listed[names[0]]
    if unknown:
        raise ValueError(f"{file} does not list {len(unknown)} of the images: {', '.join(unknown[:5])}")
    return list(ids.values())


class Pictures(Dataset):
    """Image files; an item is (path, image id, uint8 RGB [3, H, W] or an error message)."""

    def __init__(self, paths: Sequence[Path], ids: Sequence[int], upright: bool, large: bool = False):
        self.paths, self.ids, self.upright, self.large = paths, ids, upright, large

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Path, int, Tensor | str]:
        path = self.paths[i]
        if self.large:
            allow_large_images()  # here, because this may be a worker process
        try:
            image = as_tensor(read_upright(path) if self.upright else path)
        except (ValueError, OSError, MemoryError) as error:  # the other images must not be lost
            image = str(error)
        return path, self.ids[i], image

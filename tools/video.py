"""Predict the frames of a film or camera for tools/predict.py: an annotated film, and the records of all frames."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tools.draw import to_pil
from tools.predictor import Detections
from tools.results import OutputFolder, coco_records
from util.text import printable

SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
USUAL_RATE = 25  # frames per second, for a source that does not say


def find_video(inputs: Sequence[str]) -> str | None:
    """Return the film or camera number among the inputs, or None; ValueError for one beside other inputs."""
    videos = [text for text in inputs if is_camera(text) or (is_film(text) and not Path(text).is_dir())]
    if videos and len(inputs) > 1:
        raise ValueError(f"{videos[0]}: a film or camera is predicted alone, its frames are numbered: give one input")
    return videos[0] if videos else None


def is_film(text: str) -> bool:
    """Return whether a file name is that of a film."""
    return Path(text).suffix.lower() in SUFFIXES


def is_camera(text: str) -> bool:
    """Return whether an input is a camera number, and not the name of a file or folder."""
    return text.isascii() and text.isdigit() and not Path(text).exists()


def import_av() -> Any:
    """Return the package `av`, which is optional."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"films need PyAV ({error}): pip install -r requirements-video.txt") from error
    return av


@contextmanager
def video_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn PyAV's errors into a ValueError."""
    try:
        yield
    except import_av().FFmpegError as error:
        raise ValueError(f"{printable(what)} ({printable(error)}); {remedy}") from error


def open_video(source: str) -> Any:
    """Open a film or camera as a container of PyAV. Raises FileNotFoundError or ValueError if there is no picture."""
    av = import_av()
    if is_camera(source):
        if not sys.platform.startswith("linux"):
            raise ValueError(
                f"camera {source}: cameras are read through V4L2, on Linux only; record a film and give it"
            )
        device = f"/dev/video{int(source)}"
        with video_errors(f"camera {source}: {device} cannot be opened", "is it connected, and used by no one else?"):
            return av.open(device, format="v4l2")
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file")
    with video_errors(f"{source}: not a readable film", "convert it, for example with ffmpeg"):
        container = av.open(os.path.abspath(source))  # an absolute path is never taken for an address
    if not container.streams.video:
        raise ValueError(f"{source}: no pictures in this film, only {len(container.streams)} other streams")
    return container


def read_frames(container: Any, source: str, upright: bool = False) -> Iterator[Tensor]:
    """Yield the frames, uint8 RGB [3, H, W], in the size of the first; with `upright`, rotated as the film says.

    Raises ValueError for a film without frames, and after the last frame before damage.
    """
    stream, size, number = container.streams.video[0], {}, 0
    stream.thread_type = "AUTO"  # decode on several cores
    frames = container.decode(stream)
    while True:
        with video_errors(f"{source}: damaged after {number} frames", "convert it again, or replace it"):
            frame = next(frames, None)
        if frame is None:
            break
        size = size or {"width": frame.width, "height": frame.height}
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", **size)).permute(2, 0, 1)
        yield pixels.rot90(frame.rotation // 90, dims=(1, 2)) if upright else pixels
        number += 1
    if number == 0:
        raise ValueError(f"{source}: no frames in this film; it is empty or was cut off")
    if number < stream.frames:
        print(f"warning: {printable(source)}: {number} of {stream.frames} frames could be read", file=sys.stderr)


@contextmanager
def film_writer(path: Path, rate: Fraction | int, width: int, height: int) -> Iterator[Callable[[Image.Image], None]]:
    """Open a film (H.264) and give a function that writes the next picture; at the end, or on an error, finish it.

    Pictures of another size are scaled to width x height: those of small images are drawn larger.
    """
    av = import_av()
    with video_errors(f"{path}: the film cannot be written", "is there space on the disk?"):
        with av.open(str(path.absolute()), "w") as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.width, stream.height = width, height
            # Players like 4:2:0 best, whose colours are stored for 2 x 2 pixels; it has no odd sizes.
            stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
            try:
                yield lambda picture: container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            finally:
                container.mux(stream.encode(None))  # the frames that the encoder still holds


def predict_frames(
    frames: Iterable[Tensor], predict: Callable[[Tensor], Detections | str], name: str, every: int
) -> Iterator[tuple[Tensor, Detections | None, list[dict]]]:
    """Yield (frame, detections, records) for all frames; predict each `every`-th one, and repeat what it gave.

    The detections of a frame without prediction are None; the error is printed.
    """
    found, records = None, []
    for number, frame in enumerate(frames):
        if number % every == 0:
            answer = predict(frame)
            if isinstance(answer, str):
                tqdm.write(f"error: {printable(name)}#{number}: {printable(answer)}", file=sys.stderr)
            found = None if isinstance(answer, str) else answer
            records = [] if found is None else coco_records(found, number, name)
        file_name = {"image_id": number, "file_name": f"{name}#{number}"}
        yield frame, found, [{**record, **file_name} for record in records]


def source_name(source: str, output: str | Path) -> str:
    """Return the name of a film or camera in the results; ValueError for a film inside the output folder."""
    if is_camera(source):
        return f"camera_{int(source)}"
    if Path(output).resolve() in Path(source).resolve().parents:
        raise ValueError(f"{source} lies in --output {output} and could be overwritten: choose another")
    return os.fsencode(Path(source).name).decode("utf-8", "backslashreplace")


def predict_video(
    source: str,
    predict: Callable[[Tensor], Detections | str],
    class_names: dict[int, str],
    output: str | Path,
    show: str | None = None,
    every: int = 1,
    upright: bool = False,
) -> int:
    """Predict each `every`-th frame and repeat its boxes on the next ones; return 1 if some frames have no prediction.

    `predict` takes a frame and returns detections or an error message. Ctrl-C, or damage in the film, ends the files
    properly with the frames so far. With `show` "none" no film is written.
    """
    name = source_name(source, output)
    with open_video(source) as container:
        stream = container.streams.video[0]
        frames = read_frames(container, source, upright)
        first = next(frames)  # a film without frames leaves no output
        folder = OutputFolder(output)
        path = folder.path / f"{folder.stem(name)}.mp4"
        rate = stream.average_rate or stream.guessed_rate or USUAL_RATE
        writer = nullcontext() if show == "none" else film_writer(path, rate, first.shape[2], first.shape[1])
        progress = tqdm(chain([first], frames), total=stream.frames or None, unit="frame", disable=None, leave=False)
        count = failed = 0
        try:
            with writer as add:
                for frame, found, records in predict_frames(progress, predict, name, every):
                    if add:
                        add(to_pil(frame) if found is None else replace(found, image=frame).draw(show))
                    folder.records += records
                    count, failed = count + 1, failed + (found is None)
        finally:  # an error or Ctrl-C must not lose the frames so far
            written = folder.close(name, class_names) + ("" if show == "none" else f", {path}")
    print(f"{printable(name)}: {count} frames, {len(folder.records)} objects")
    print(f"written: {printable(written)}")
    return 1 if failed else 0

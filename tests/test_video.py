"""Films: every frame predicted and written, in the film's size and rate, also when it breaks off."""

import itertools
import json
import re
import sys
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model
from tests.helpers import parse
from tools import predict, video
from tools.predictor import Detections
from tools.video import film_writer, find_video, predict_video
from util.checkpoint import save_checkpoint
from util.cli import exit_status

pytestmark = pytest.mark.slow
NAMES = {1: "cat"}
CODECS = {".avi": "mpeg4", ".webm": "libvpx"}


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="needs av: pip install -r requirements-video.txt")


def write_film(av, path, frames=12, rate=12, size=(64, 48), **options):
    """A film of grey frames, frame n of the value 20 n; the top left quarter is white."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(CODECS.get(path.suffix, "libx264"), rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv444p" if size[0] % 2 else "yuv420p"
        for n in range(frames):
            pixels = np.full((size[1], size[0], 3), 20 * n % 256, np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def read_film(av, path):
    """The frames [H, W, 3] of a film, and its rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream.average_rate


def one_box(frame, calls=None):
    """A box in the lower right quarter of every frame; its score is the frame's brightness."""
    (height, width), brightness = frame.shape[1:], frame[:, -4:, -4:].float().mean() / 255
    if calls is not None:
        calls.append(frame)
    box = torch.tensor([[0.6 * width, 0.6 * height, 0.9 * width, 0.9 * height]])
    return Detections(frame, brightness[None], torch.tensor([1]), box, NAMES)


def records_of(folder):
    return json.loads((folder / "predictions.json").read_text())


def run(*flags):
    return exit_status(lambda: predict.main([*map(str, flags), "--device", "cpu"]))


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    args = parse("--num_classes 4")
    state = {"model": build_model(args)[0].state_dict(), "args": vars(args)}
    save_checkpoint(state, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--tile", 32]])
def test_predict_of_a_film_writes_every_frame_and_its_records(av, checkpoint, tmp_path, more, capsys):
    film = write_film(av, tmp_path / "film.mp4")
    flags = ("--checkpoint", checkpoint, "--threshold", 0, "--output", tmp_path / "found", *more)
    assert run(film, *flags) == 0
    frames, rate = read_film(av, tmp_path / "found" / "film.mp4")
    assert len(frames) == 12 and frames[0].shape == (48, 64, 3) and rate == 12
    records = records_of(tmp_path / "found")
    assert {(r["image_id"], r["file_name"]) for r in records} == {(n, f"film.mp4#{n}") for n in range(12)}
    assert len(records) == 12 * 8 or more
    assert f"film.mp4: 12 frames, {len(records)} objects" in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "size", "rate"), [
    (".mp4", (64, 48), 12), (".mp4", (65, 47), Fraction(30000, 1001)), (".avi", (64, 48), 25), (".mov", (64, 48), 24),
    (".mkv", (64, 48), Fraction(24000, 1001)), (".webm", (640, 48), 12),
])  # fmt: skip
def test_films_of_all_kinds_keep_their_size_rate_and_pixels(av, tmp_path, suffix, size, rate):
    film = write_film(av, tmp_path / f"a{suffix}", rate=rate, size=size)
    assert predict_video(str(film), one_box, NAMES, tmp_path / "found") == 0
    (before, rate_before), (frames, rate_after) = read_film(av, film), read_film(av, tmp_path / "found" / "a.mp4")
    assert len(frames) == len(before) == 12 and rate_after == rate_before
    for n, frame in enumerate(frames):
        assert frame.shape == (size[1], size[0], 3)
        np.testing.assert_allclose(frame[26:, :20], before[n][26:, :20], atol=12)  # no box there


def test_every_third_frame_is_predicted_and_its_boxes_are_repeated(av, tmp_path):
    film, calls = write_film(av, tmp_path / "a.mp4", frames=8, size=(640, 480)), []
    assert predict_video(str(film), lambda frame: one_box(frame, calls), NAMES, tmp_path / "o", every=3) == 0
    assert [round(frame[:, -4:, -4:].float().mean().item() / 20) for frame in calls] == [0, 3, 6]
    records = records_of(tmp_path / "o")
    assert [record["image_id"] for record in records] == list(range(8))
    assert [round(record["score"] * 255 / 20) for record in records] == [0, 0, 0, 3, 3, 3, 6, 6]
    for n, frame in enumerate(read_film(av, tmp_path / "o" / "a.mp4")[0]):
        assert np.ptp(frame[400, 376:392].astype(int)) > 60, f"no box in frame {n}"
        assert abs(int(frame[460, 620].mean()) - 20 * n) < 12, f"frame {n} shows another one"


def test_ctrl_c_ends_the_film_and_the_result_file(av, checkpoint, tmp_path, monkeypatch):
    film, calls = write_film(av, tmp_path / "a.mp4"), []

    def interrupted(predictor, images, threshold):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return [one_box(images[0], calls)]

    monkeypatch.setattr(predict, "predict_each", interrupted)
    assert run(film, "--checkpoint", checkpoint, "--output", tmp_path / "o") == 130
    frames, rate = read_film(av, tmp_path / "o" / "a.mp4")
    assert len(frames) == 5 and rate == 12 and len(records_of(tmp_path / "o")) == 5


def test_a_film_without_frames_is_refused_and_leaves_no_output(av, checkpoint, tmp_path, capsys):
    whole = write_film(av, tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    for name, message in ("empty.mp4", "not a readable film"), ("text.mp4", "not a readable"), ("cut.mkv", "no frames"):
        assert run(tmp_path / name, "--checkpoint", checkpoint, "--output", tmp_path / "o") == 2
        error = capsys.readouterr().err
        assert f"error: {tmp_path / name}: {message}" in error and "Traceback" not in error
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode(None)])
    assert run(tmp_path / "sound.mkv", "--checkpoint", checkpoint, "--output", tmp_path / "o") == 2
    assert "no pictures in this film" in capsys.readouterr().err
    assert run(tmp_path / "gone.mp4", "--checkpoint", checkpoint) == 2
    assert "gone.mp4: no such file" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_damaged_film_keeps_the_frames_before_the_damage(av, tmp_path, monkeypatch):
    film, container = write_film(av, tmp_path / "a.mp4"), av.open(str(tmp_path / "a.mp4"))

    def decode(stream):
        yield from itertools.islice(container.decode(stream), 5)
        raise av.error.InvalidDataError(1, "invalid data")

    damaged = SimpleNamespace(streams=container.streams, decode=decode)
    monkeypatch.setattr(video, "open_video", lambda source: nullcontext(damaged))
    with pytest.raises(ValueError, match="a.mp4: damaged after 5 frames .*invalid data"):
        predict_video(str(film), one_box, NAMES, tmp_path / "o")
    assert len(read_film(av, tmp_path / "o" / "a.mp4")[0]) == len(records_of(tmp_path / "o")) == 5


def test_a_film_that_was_cut_off_is_predicted_with_a_warning(av, tmp_path, capsys):
    film = write_film(av, tmp_path / "a.avi")
    film.write_bytes(film.read_bytes()[: film.stat().st_size * 9 // 10])
    assert predict_video(str(film), one_box, NAMES, tmp_path / "o") == 0
    assert re.search(r"warning: .*a.avi: \d of 12 frames could be read", capsys.readouterr().err)


def test_frames_without_prediction_stay_in_the_film(av, tmp_path, capsys):
    film, numbers = write_film(av, tmp_path / "a.mp4"), iter(range(12))
    answer = lambda frame: "out of memory" if next(numbers) == 4 else one_box(frame)  # noqa: E731
    assert predict_video(str(film), answer, NAMES, tmp_path / "o") == 1
    assert capsys.readouterr().err.strip() == "error: a.mp4#4: out of memory"
    assert len(read_film(av, tmp_path / "o" / "a.mp4")[0]) == 12
    assert [record["image_id"] for record in records_of(tmp_path / "o")] == [n for n in range(12) if n != 4]


def test_a_film_without_pictures_shown_is_not_written(av, tmp_path):
    film = write_film(av, tmp_path / "a.mp4")
    assert predict_video(str(film), one_box, NAMES, tmp_path / "o", show="none") == 0
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["predictions.json"]
    assert len(records_of(tmp_path / "o")) == 12


@pytest.mark.parametrize("upright", [False, True])
def test_a_film_of_a_turned_phone_is_rotated_on_demand(av, tmp_path, upright):
    film, calls = write_film(av, tmp_path / "a.mp4"), []
    content = film.read_bytes()
    plain, turned = (b"".join((n % 2**32).to_bytes(4, "big") for n in numbers) for numbers in [
        (65536, 0, 0, 0, 65536, 0, 0, 0, 2**30), (0, 65536, 0, -65536, 0, 0, 0, 0, 2**30)])  # fmt: skip
    start = content.index(plain, content.index(b"tkhd"))  # the display matrix of the track: a quarter turn clockwise
    film.write_bytes(content[:start] + turned + content[start + len(plain) :])
    assert predict_video(str(film), lambda f: one_box(f, calls), NAMES, tmp_path / "o", upright=upright) == 0
    frames, _ = read_film(av, tmp_path / "o" / "a.mp4")
    assert list(calls[0].shape) == [3, *frames[0].shape[:2]] == ([3, 64, 48] if upright else [3, 48, 64])
    assert frames[0][4, -4].min() > 200 if upright else frames[0][4, 4].min() > 200
    assert frames[0][4, 4].max() < 60 if upright else frames[0][4, -4].max() < 60


def test_frames_of_another_size_are_scaled_to_that_of_the_first(av):
    frames = [av.VideoFrame.from_image(Image.new("RGB", size)) for size in [(64, 48), (32, 32), (128, 96)]]
    streams = SimpleNamespace(video=[SimpleNamespace(frames=0)])
    container = SimpleNamespace(streams=streams, decode=lambda stream: iter(frames))
    assert [list(frame.shape) for frame in video.read_frames(container, "a.mp4")] == [[3, 48, 64]] * 3


def test_a_film_in_the_output_folder_is_refused(av, tmp_path):
    film = write_film(av, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="could be overwritten: choose another"):
        predict_video(str(film), one_box, NAMES, tmp_path)


def test_a_film_that_cannot_be_written_is_an_error_in_a_sentence(av, tmp_path):
    with pytest.raises(ValueError, match="the film cannot be written .*is there space"):
        with film_writer(tmp_path / "gone" / "a.mp4", 12, 64, 48) as add:
            add(Image.new("RGB", (64, 48)))


def test_a_camera_that_is_not_there_is_refused(av, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "linux")
    assert run("99", "--checkpoint", checkpoint, "--output", tmp_path / "o") == 2
    assert "camera 99: /dev/video99 cannot be opened" in capsys.readouterr().err
    monkeypatch.setattr(sys, "platform", "other")
    assert run("99", "--checkpoint", checkpoint, "--output", tmp_path / "o") == 2
    assert "on Linux only" in capsys.readouterr().err


def test_find_video_tells_films_and_cameras_from_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    assert find_video(["a.jpg", "7", "folder.mp4", "*.png"]) is None
    assert [find_video([text]) for text in ("0", "a.MP4", "b.webm")] == ["0", "a.MP4", "b.webm"]
    with pytest.raises(ValueError, match="is predicted alone"):
        find_video(["a.jpg", "0"])


def test_films_without_pyav_are_refused_with_the_remedy(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(tmp_path / "a.mp4", "--checkpoint", checkpoint, "--output", tmp_path / "o") == 2
    assert "pip install -r requirements-video.txt" in capsys.readouterr().err

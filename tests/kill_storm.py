"""Check that a run killed many times ends with the same bits as an undisturbed one.

python -m tests.kill_storm FOLDER --kills 20 --epochs 8      # test_kill_storm.py has a shorter form
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.helpers import TINY, assert_same_weights, write_coco

STEPS_PER_EPOCH = 8
SECONDS = 120  # a process that does nothing for so long hangs


class KilledRun:
    """Kills of one training, each at a random moment after some more steps."""

    def __init__(self, folder: Path, epochs: int, seed: int, more: str = ""):
        self.folder, self.epochs, self.random, self.more = folder, epochs, random.Random(seed), more
        self.checkpoint = folder / "killed" / "checkpoint.pth"
        self.kills: dict[str, int] = {}
        objects = [(i, 1 + i % 2, [i, 4, 20, 30], {}) for i in range(1, 17)]
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        write_coco(folder / "coco", "train", range(1, 17), objects, categories)
        write_coco(folder / "coco", "val", range(1, 5), objects[:4], categories)

    def start(self, name: str, workers: int) -> subprocess.Popen:
        """Start the training in a process group of its own."""
        flags = f"{TINY} --coco_path {self.folder}/coco --output_dir {self.folder / name} --resume auto --batch_size 2 "
        flags += f"--epochs {self.epochs} --lr_drop 3 --save_every_steps 1 --num_workers {workers} {self.more}"
        command = [sys.executable, "main.py", *flags.split()]
        with open(self.folder / f"{name}.log", "a") as log:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)

    def kill(self) -> None:
        """Let the run save a few times, then kill it: at once, or in the middle of the next save."""
        process = self.start("killed", self.random.randint(0, 2))
        for _ in range(self.random.randint(0, 3)):
            before = self.written()
            self.wait(lambda before=before: self.written() > before, process)
        how = self.random.choice(["SIGKILL", "SIGKILL in a save", "SIGTERM to all", "SIGTERM"])
        if how == "SIGKILL in a save":
            self.wait(lambda: any(self.checkpoint.parent.glob(".checkpoint.pth.*")), process, pause=0.0005)
        else:
            time.sleep(self.random.uniform(0, 0.5))
        number = signal.SIGTERM if how.startswith("SIGTERM") else signal.SIGKILL
        if how == "SIGTERM":
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)
        process.wait(SECONDS)
        self.kills[how] = self.kills.get(how, 0) + 1
        if self.checkpoint.exists():
            torch.load(self.checkpoint, weights_only=True)

    def written(self) -> float:
        """When the checkpoint was last written."""
        return self.checkpoint.stat().st_mtime if self.checkpoint.exists() else 0.0

    def wait(self, condition, process: subprocess.Popen, pause: float = 0.01) -> None:
        """Wait for the condition, raise AssertionError if the run ends by itself."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert process.poll() is None, f"ended by itself, see {self.folder}/killed.log; give more --epochs"
            assert time.monotonic() < deadline, f"hangs, see {self.folder}/killed.log"
            time.sleep(pause)


def storm(folder: Path, kills: int, epochs: int, seed: int = 0, more: str = "") -> dict[str, int]:
    """Train twice, once under kills, and compare; return how often each kind of kill was used."""
    run = KilledRun(folder, epochs, seed, more)
    assert run.start("whole", 0).wait(600) == 0, (folder / "whole.log").read_text()[-2000:]
    for _ in range(kills):
        run.kill()
    assert run.start("killed", 0).wait(600) == 0, (folder / "killed.log").read_text()[-2000:]
    assert_same_weights(folder / "whole", folder / "killed")
    rows = [(folder / name / "log.txt").read_text().splitlines() for name in ("whole", "killed")]
    assert [json.loads(row) for row in rows[0]] == [json.loads(row) for row in rows[1]]
    assert not list((folder / "killed").rglob("*.draft")), "an unfinished file was left"
    return run.kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", default="", help="more flags of main.py, in one word")
    flags = parser.parse_args()
    print(storm(flags.folder, flags.kills, flags.epochs, flags.seed, flags.more), "and the same bits in the end")

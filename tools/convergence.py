"""Train variants of the flags with several seeds, and compare how fast they converge.

python tools/convergence.py --output runs/bench --seeds 0 1 2 \
    --variant plain="--epochs 20" --variant fast="--recipe fast --epochs 20" \
    --common "--coco_path mine --backbone resnet18 --min_size 256 --max_size 352"

Each run is one of main.py, in the folder OUTPUT/VARIANT-SEED; a bench that was interrupted continues. results.json has
AP, AP50 and the detections above 0.5 for each object, for each variant, seed and evaluated epoch. ap.png shows the mean
and the range of the seeds over epochs and minutes.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.json_file import read_json, write_json
from util.cli import command_line, exit_status
from util.plot_utils import plt, read_log

ROOT = Path(__file__).resolve().parents[1]


def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the runs, results.json and ap.png")
    add("--variant", action="append", required=True, metavar="NAME=FLAGS", help="flags of main.py to compare")
    add("--common", default="", help="flags of main.py that all variants have")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="--seed of the runs of each variant (default 0 1 2)")
    return parser


def parse_variants(texts: list[str]) -> dict[str, list[str]]:
    """Split each NAME=FLAGS into a name and a list of flags."""
    variants = {}
    for text in texts:
        name, sign, flags = text.partition("=")
        if not sign or not name or "/" in name or name in variants:
            raise ValueError(f"--variant {text}: give NAME=FLAGS, each name once")
        variants[name] = shlex.split(flags)
    return variants


def train(flags: list[str], folder: Path) -> float:
    """Run main.py to its end, or what is left of it; return the minutes of the whole run."""
    folder.mkdir(parents=True, exist_ok=True)
    state, minutes, begin = folder / "bench.json", 0.0, time.perf_counter()
    if state.is_file():
        minutes, finished = read_json(state)
        if finished:
            return minutes
    command = [sys.executable, "main.py", *flags, "--output_dir", str(folder.resolve()), "--resume", "auto"]
    status = -1
    try:
        with open(folder / "output.log", "a") as log:
            status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    finally:
        minutes += (time.perf_counter() - begin) / 60
        write_json(state, [minutes, status == 0])
    if status:
        raise ValueError(f"{shlex.join(command)}: exit status {status}; see {folder}/output.log")
    return minutes


def summarise(folder: Path, minutes: float) -> dict:
    """Return the epochs that a run evaluated, the numbers of each, and the minutes of an epoch with its evaluation."""
    rows = read_log(folder)
    evaluated = [row for row in rows if "test_coco_eval_bbox" in row]
    return {
        "epochs": [row["epoch"] + 1 for row in evaluated],
        "AP": [row["test_coco_eval_bbox"][0] for row in evaluated],
        "AP50": [row["test_coco_eval_bbox"][1] for row in evaluated],
        "boxes_per_object": [row.get("test_boxes_per_object") for row in evaluated],
        "minutes_per_epoch": minutes / max(len(rows), 1),
    }


def plot(results: dict[str, dict[int, dict]], path: Path) -> None:
    """Draw the mean of the seeds and, as a band, their range."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharey="row")
    for name, runs in results.items():
        epochs = next(iter(runs.values()))["epochs"]
        label = f"{name}, {len(runs)} seed" + "s" * (len(runs) > 1)
        pace = mean(run["minutes_per_epoch"] for run in runs.values())
        for row, number in zip(axes, ("AP", "AP50"), strict=True):
            values = list(zip(*(run[number] for run in runs.values()), strict=True))
            for axis, x in zip(row, (epochs, [epoch * pace for epoch in epochs]), strict=True):
                line = axis.plot(x, [mean(each) for each in values], ".-", label=label)[0]
                axis.fill_between(
                    x, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2
                )
            row[0].set_ylabel(number)
    axes[1][0].set_xlabel("epochs")
    axes[1][1].set_xlabel("minutes")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(args) -> None:
    """Train what is not trained yet; write results.json after every run, and ap.png at the end."""
    variants, results = parse_variants(args.variant), {}
    for seed in args.seeds:
        for name, flags in variants.items():
            folder = args.output / f"{name}-{seed}"
            minutes = train([*shlex.split(args.common), *flags, "--seed", str(seed)], folder)
            run = results.setdefault(name, {})[seed] = summarise(folder, minutes)
            print(f"{name}, seed {seed}: AP {run['AP'][-1]:.3f}, AP50 {run['AP50'][-1]:.3f}, {minutes:.1f} minutes")
            write_json(args.output / "results.json", results)
    plot(results, args.output / "ap.png")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(command_line(__doc__, get_args_parser()).parse_args())))

"""What DETR costs: forward, training step, criterion, loader, index and evaluator, alone or beside others.

python tools/benchmark.py forward train --peer transformers            # ratios against Hugging Face's DETR, in one run
python tools/benchmark.py forward --batch 1 4 16 --precision float32 bf16 --compile --device cuda
python tools/benchmark.py train --peer ../other-detr                   # another tree with the same contract
python tools/benchmark.py cost --output bench                          # cost against batch, size and queries: a plot
python tools/benchmark.py loader --coco_path /data/coco                # against PIL and float tensors, one thread
python tools/benchmark.py feed predict --coco_path /data/coco          # images a second: to training, and to boxes
python tools/benchmark.py index evaluator                              # against pycocotools

Calls of both sides alternate, so that a noisy machine is noisy for both; only another tree, which needs a process of
its own, is measured before this one. Times are medians; spread is from quartile to quartile; memory is what a call
takes at most on top of what was held before it.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# From tools/ only: where another tree is measured, `main`, `models` and `util` are its own.
from tools import benchmark_parts
from tools.benchmark_sides import Ours, Transformers, load_tree
from tools.gauges import machine

NETWORK = ("forward", "train", "split", "criterion", "syncs", "graphs", "cost")
DATA = ("loader", "feed", "predict", "index", "evaluator")


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="+", choices=NETWORK + DATA)
    add("--models", nargs="+", default=["resnet50"], help="resnet18, 34, 50, 101; with -dc5 dilated")
    add("--batch", nargs="+", type=int, default=[1, 2], help="images in a batch")
    add("--size", nargs="+", type=picture_size, default=[(800, 1066)], metavar="HxW",
        help="sizes of the images, taken in turn in a batch")
    add("--queries", type=int, default=100)
    add("--precision", nargs="+", default=["float32"], choices=("float32", "tf32", "bf16", "fp16"))
    add("--compile", action="store_true", help="measure compiled models too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads (default: PyTorch's)")
    add("--rounds", type=int, default=5, help="timed calls of each side")
    add("--peer", help="transformers, or the folder of another tree with DETR's contract")
    add("--peer_precision", choices=("float32", "tf32", "bf16", "fp16"), help="precision of the peer, if another one")
    add("--coco_path", help="data in COCO's layout, for loader, feed and predict")
    add("--passes", type=int, default=1, help="times over the images, for loader and feed")
    add("--workers", nargs="+", type=int, default=[0, 1, 2], help="data loading processes, for feed")
    add("--output", help="folder for benchmark.json, benchmark.md and the plot of `cost`")
    add("--tree", help=argparse.SUPPRESS)  # how a folder given as --peer is run, in a process of its own
    options = parser.parse_args(argv)
    if options.peer not in (None, "transformers") and not (Path(options.peer) / "main.py").is_file():
        parser.error(f"--peer {options.peer}: neither transformers nor a folder with a main.py in it")
    return options


# fmt: on
def picture_size(text: str) -> tuple[int, int]:
    """Read HxW."""
    height, width = map(int, text.split("x"))
    return height, width


def main() -> None:
    """Measure what was asked for, and print a table for each."""
    options = parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.tree:
        print(json.dumps(list(run(options, load_tree(options.tree)))))
        return
    hardware = machine(options.device)
    print(
        f"{hardware}, torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    )
    rows = list(run(options, Ours, show=True))
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmark.json").write_text(json.dumps({"machine": hardware, "rows": rows}, indent=1))
        (folder / "benchmark.md").write_text(f"{hardware}\n\n{table(rows)}\n")
        if "cost" in options.what:
            benchmark_parts.plot_cost([row for row in rows if row["what"] == "cost"], folder / "cost.png")


def run(options: argparse.Namespace, side: type, show: bool = False):
    """Yield a row for every measurement: its settings, its figures, and the peer's with the ratio."""
    peer = Transformers if options.peer == "transformers" else None
    others = run_tree(options) if options.peer and not peer else None
    for what in options.what:
        head = None
        for row in measurement(what)(options, side, peer):
            row = {"what": what, **row}
            theirs = next(others) if others and what in NETWORK else {}
            if "s" in theirs:
                row |= {"peer_s": theirs["s"], "ratio": theirs["s"] / row["s"]}
            if show:
                if head != list(row):
                    head = list(row)
                    print("\n" + table([row]), flush=True)
                else:
                    print(table([row]).splitlines()[-1], flush=True)
            yield row


def measurement(what: str):
    """Return the function that measures something; what reads this tree's data is imported only where it is asked."""
    if what in NETWORK:
        return getattr(benchmark_parts, f"measure_{what}")
    from tools import benchmark_data

    return getattr(benchmark_data, f"measure_{what}")


def run_tree(options: argparse.Namespace):
    """Measure the other tree's network with the same flags, in a process of its own; yield its rows."""
    what = [word for word in options.what if word in NETWORK]
    if not what:
        return iter(())
    precision = [options.peer_precision or one for one in options.precision]
    command = [sys.executable, __file__, *what, "--tree", options.peer, "--models", *options.models]
    command += ["--batch", *options.batch, "--size", *(f"{h}x{w}" for h, w in options.size), "--precision", *precision]
    command += ["--queries", options.queries, "--device", options.device, "--rounds", options.rounds]
    command += ["--compile"] * options.compile + ["--threads", options.threads] * bool(options.threads)
    command = [str(word) for word in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{options.peer}: the benchmark did not run there")
    return iter(json.loads(done.stdout.splitlines()[-1]))


def table(rows: list[dict]) -> str:
    """Lay rows out as Markdown; rows of other columns begin a table of their own."""
    lines, head = [], None
    for row in rows:
        if list(row) != head:
            head = list(row)
            lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines.append("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    main()

"""Export a model to ONNX, torch.export or TorchScript; run the file at once and compare it with the model.

python tools/export.py --checkpoint runs/mine/checkpoint_best.pth --format onnx --output model.onnx
python tools/export.py --checkpoint runs/mine/checkpoint_best.pth --format onnx --quantize int8 --output model.onnx
python tools/export.py --model detr_resnet50 --format torchscript --postprocess --uint8 --output detr.ts
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.backbone import PIXEL_MEAN, PIXEL_STD
from tools.export_check import compare_sizes, load_exported
from tools.export_graph import (
    FORMAT_VERSION,
    OLDEST_OPSET,
    SUFFIXES,
    TRACED,
    ExportGraph,
    example,
    quantize_onnx,
    require_onnx,
    write_graph,
)
from tools.predictor import HUB_NAMES, Predictor
from util.cli import exit_status
from util.text import printable


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="file or URL; written by training, or in DETR's published format")
    add("--model", choices=HUB_NAMES, help="a published model: for its weights, or for a file that names no model")
    add("--format", required=True, choices=tuple(SUFFIXES), help="format of the file")
    add("--output", required=True, help=f"file to write: {', '.join(f'{s} for {f}' for f, s in SUFFIXES.items())}")
    add("--quantize", choices=("int8", "fp16"), help="smaller numbers in an ONNX file")
    add("--postprocess", action="store_true",
        help="outputs are scores, labels, boxes and masks in pixels of the input, instead of logits")
    add("--padding_mask", action="store_true",
        help="a second input: the mask of a padded batch of images of different sizes, true on padding")
    add("--uint8", action="store_true", help="the input is 8-bit RGB, and the graph normalises it")
    add("--opset", type=int, help="ONNX opset (default: PyTorch's)")
    return parser


# fmt: on
def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not fit together, before the model is loaded."""
    if not (args.checkpoint or args.model):
        raise ValueError(f"which model? Give --checkpoint FILE, or --model, one of {', '.join(HUB_NAMES)}")
    if (args.checkpoint or "").endswith(tuple(SUFFIXES.values())):
        raise ValueError(f"--checkpoint {args.checkpoint}: an exported file; give the checkpoint it was made from")
    suffix = SUFFIXES[args.format]
    if not args.output.endswith(suffix):
        raise ValueError(f"--output {args.output}: the name of a {args.format} file ends in {suffix}")
    if not Path(args.output).parent.is_dir():
        raise FileNotFoundError(f"--output {args.output}: no such folder; create it first")
    if args.format != "onnx" and (args.quantize or args.opset):
        flag = f"--quantize {args.quantize}" if args.quantize else f"--opset {args.opset}"
        raise ValueError(f"{flag} is for --format onnx; {args.format} files are float32 (.half() converts them)")
    if args.opset is not None and args.opset < OLDEST_OPSET:
        raise ValueError(f"--opset {args.opset}: PyTorch writes {OLDEST_OPSET} or later; leave --opset out")
    if args.format == "onnx":
        require_onnx()


def describe_model(predictor: Predictor, args: argparse.Namespace) -> dict:
    """Collect what a program needs to know to use the file."""
    panoptic = predictor.postprocessors.get("panoptic")
    things = None if panoptic is None else sorted(c for c, thing in panoptic.is_thing_map.items() if thing)
    return {
        "format_version": FORMAT_VERSION,
        "class_names": {str(number): name for number, name in predictor.class_names.items()},
        "min_size": predictor.min_size,
        "max_size": predictor.max_size,
        "mean": list(PIXEL_MEAN),
        "std": list(PIXEL_STD),
        "input": "uint8" if args.uint8 else "float32",
        "padding_mask": args.padding_mask,
        "postprocess": args.postprocess,
        "quantize": args.quantize,
        "things": things,  # ids of the classes that are things; null: no panoptic model
        "panoptic_threshold": None if panoptic is None else panoptic.threshold,
    }


def export(predictor: Predictor, args: argparse.Namespace) -> bool:
    """Write the file and compare it with the model; return whether all differences are within the tolerances."""
    graph = ExportGraph(predictor.model.requires_grad_(False), "segm" in predictor.postprocessors, args.postprocess)
    graph.eval()
    output = Path(args.output)
    # A draft, since a run that is interrupted must not leave half a file; it keeps the suffix, which PyTorch looks at.
    draft = output.with_name(f".{os.getpid()}.{output.name}")
    try:
        inputs = example(TRACED, args.padding_mask, args.uint8)
        write_graph(graph, args.format, draft, inputs, describe_model(predictor, args), args.opset)
        if args.quantize:
            quantize_onnx(draft, args.quantize)
        os.replace(draft, output)
    finally:
        draft.unlink(missing_ok=True)
    print(f"written: {printable(output)}, {output.stat().st_size / 1e6:.1f} MB. Compared with the model:")
    exported = load_exported(output, args.format)
    return compare_sizes(graph, exported, args.format, args.quantize, args.padding_mask, args.uint8)


def main(argv: list[str] | None = None) -> int:
    """Export; return 1 if the file's outputs differ from the model's by more than the tolerances."""
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    if args.model:
        predictor = Predictor.from_hub(args.model, args.checkpoint, "cpu")
    else:
        predictor = Predictor.from_checkpoint(args.checkpoint, "cpu")
    passed = export(predictor, args)
    print("all within the tolerances" if passed else f"do not use {printable(args.output)}: see above")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))

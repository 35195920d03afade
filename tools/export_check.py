"""Run an exported file in its own runtime and compare it with the model it was made from."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tools.export_graph import ExportGraph, example
from tools.onnx_model import OnnxModel

# Images, height and width of the batches that are compared: none is that of the traced example, and the heights and
# widths of the last two are no multiples of the strides.
SIZES = ((1, 96, 224), (3, 200, 136), (1, 259, 187))
# Float32: limits of the largest difference, as a share of the output's largest value (at least 1). Torch's own formats
# run the same kernels; ONNX Runtime has others, which sum in another order.
EXACT = {"onnx": 1e-3, "torch-export": 1e-4, "torchscript": 1e-4}
DIFFERING = 1e-3  # share of labels and mask pixels that may differ: those on a boundary, where rounding decides
# Half precision and int8: limits of the average difference, in what users see.
QUANTIZED = {
    "fp16": {"scores": 0.005, "labels": 0.01, "boxes": 0.005, "masks": 0.01},
    "int8": {"scores": 0.05, "labels": 0.1, "boxes": 0.02, "masks": 0.05},
}
CONFIDENT = 0.5  # labels are compared for objects with at least this score
UNITS = {
    "scores": "",
    "labels": f" of the objects with a score of at least {CONFIDENT} have another class",
    "boxes": " of the image's side",
    "masks": " of the mask pixels differ",
}


def load_exported(path: Path, file_format: str) -> Callable[..., dict[str, Tensor]]:
    """Load an exported file in its own runtime, as a function of the graph's inputs."""
    if file_format == "onnx":
        model = OnnxModel(path)
        return lambda *inputs: model.run(dict(zip(model.inputs, inputs, strict=True)))
    if file_format == "torch-export":
        return torch.export.load(path).module()
    with warnings.catch_warnings():  # PyTorch calls TorchScript deprecated
        warnings.filterwarnings("ignore", message="`torch.jit.*deprecated")
        return torch.jit.load(path)


@torch.no_grad()
def compare_sizes(
    graph: ExportGraph, exported: Callable, file_format: str, quantize: str | None, with_mask: bool, uint8: bool,
    sizes: Sequence[tuple[int, int, int]] = SIZES,
) -> bool:  # fmt: skip
    """Compare a file with its graph on random batches, print each output's difference; return whether all are small."""
    passed = True
    for size in sizes:
        inputs = example(size, with_mask, uint8)
        expected, found = graph(*inputs), exported(*inputs)
        print(f"{size[0]} x {size[1]} x {size[2]} pixels")
        if quantize:
            expected, found = (in_user_terms(outputs, size) for outputs in (expected, found))
        for name, value in expected.items():
            if quantize:
                text, within = _quantized_row(name, value, found[name], expected["scores"], QUANTIZED[quantize][name])
            else:
                text, within = _exact_row(value, found[name], EXACT[file_format])
            print(f"  {name:12} {text}{'' if within else ': ABOVE THE TOLERANCE'}")
            passed &= within
    return passed


def in_user_terms(outputs: dict[str, Tensor], size: tuple[int, int, int]) -> dict[str, Tensor]:
    """Return scores and labels [B, Q], boxes [B, Q, 4] as shares of the image, and bool masks, of either outputs."""
    if "pred_logits" in outputs:
        scores, labels = outputs["pred_logits"].softmax(-1)[..., :-1].max(-1)
        terms = {"scores": scores, "labels": labels, "boxes": outputs["pred_boxes"]}
        return terms | ({"masks": outputs["pred_masks"] > 0} if "pred_masks" in outputs else {})
    height, width = size[1:]
    return {**outputs, "boxes": outputs["boxes"] / torch.tensor([width, height, width, height])}


def _exact_row(expected: Tensor, found: Tensor, limit: float) -> tuple[str, bool]:
    """Describe the difference of an output in float32, and whether it is within the limit."""
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}", False
    if not expected.is_floating_point():
        share = (found != expected).float().mean().item()
        return f"{share:.2%} of the values differ (tolerance {DIFFERING:.2%})", share <= DIFFERING
    largest = (found - expected).abs().max().item()
    limit *= max(1.0, expected.abs().max().item())
    return f"largest difference {largest:.1e} (tolerance {limit:.1e})", largest <= limit


def _quantized_row(name: str, expected: Tensor, found: Tensor, scores: Tensor, limit: float) -> tuple[str, bool]:
    """Describe the difference of a quantized output in what users see, and whether its average is within the limit."""
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}", False
    if not expected.is_floating_point():
        differs = (found != expected).float()
        differs = differs[scores >= CONFIDENT] if name == "labels" else differs
        share = differs.mean().item() if differs.numel() else 0.0
        return f"{share:.2%}{UNITS[name]} (tolerance {limit:.2%})", share <= limit
    difference = (found - expected).abs()
    average, largest = difference.mean().item(), difference.max().item()
    style = ".4f" if name == "scores" else ".2%"
    numbers = [format(number, style) for number in (average, limit, largest)]
    text = "average difference {}{} (tolerance {}), largest {}".format(numbers[0], UNITS[name], *numbers[1:])
    return text, average <= limit

"""The network as other programs see it: tensors in, a few named tensors out; and its files in three formats.

Shapes: B images, Q queries, K classes, H x W pixels of the input, h4 x w4 cells of the finest features (stride 4).
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.box_ops import box_cxcywh_to_xyxy
from util.nested_tensor import NestedTensor

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".ts"}  # by format
METADATA = "detr.json"  # the extra file in files of torch.export and TorchScript; ONNX files have a property per entry
OLDEST_OPSET = 18  # PyTorch writes operators of this one
TRACED = (2, 128, 160)  # images, height, width of the example that is traced; all three stay free
AXES = {"images": {0: "batch", 2: "height", 3: "width"}, "mask": {0: "batch", 1: "height", 2: "width"}}
FORMAT_VERSION = 1  # of the metadata; a later version may mean something else by the same names


class ExportGraph(nn.Module):
    """A DETR or DETRsegm as a function of tensors, without its auxiliary outputs.

    With `postprocess`, outputs are scores, labels, boxes and masks in pixels of the input instead of logits.
    """

    def __init__(self, model: nn.Module, has_masks: bool, postprocess: bool):
        super().__init__()
        self.model, self.has_masks, self.postprocess = model, has_masks, postprocess

    def forward(self, images: Tensor, mask: Optional[Tensor] = None) -> dict[str, Tensor]:  # noqa: UP045  (TorchScript)
        """Detect objects in images [B, 3, H, W], uint8 RGB or normalised floats.

        The mask [B, H, W] is True on padding; without it there is none. Returns `pred_logits` [B, Q, K+1], `pred_boxes`
        [B, Q, 4] and, from mask models, `pred_masks` [B, Q, h4, w4]; or, with `postprocess`, `scores` [B, Q], `labels`
        [B, Q], `boxes` [B, Q, 4] (x0, y0, x1, y1) and bool `masks` [B, Q, H, W].
        """
        if mask is None:
            size = [images.shape[0], images.shape[2], images.shape[3]]
            mask = torch.zeros(size, dtype=torch.bool, device=images.device)
        out = self.model(NestedTensor(images, mask))
        found = {"pred_logits": out["pred_logits"], "pred_boxes": out["pred_boxes"]}
        if self.has_masks:
            found["pred_masks"] = out["pred_masks"]
        return self._in_pixels(found, mask) if self.postprocess else found

    def _in_pixels(self, out: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Post-process as PostProcess and PostProcessSegm do, at the size of the input; queries keep their order."""
        scores, labels = out["pred_logits"].softmax(-1)[:, :, :-1].max(-1)
        height, width = (~mask).any(2).sum(1), (~mask).any(1).sum(1)  # of each image without its padding
        scale = torch.stack([width, height, width, height], 1)
        found = {"scores": scores, "labels": labels, "boxes": box_cxcywh_to_xyxy(out["pred_boxes"]) * scale[:, None]}
        if self.has_masks:
            masks = F.interpolate(out["pred_masks"], size=mask.shape[-2:], mode="bilinear", align_corners=False)
            found["masks"] = masks.sigmoid() > 0.5
        return found


def output_names(graph: ExportGraph) -> list[str]:
    """List the names of a graph's outputs in their order."""
    names = ["scores", "labels", "boxes"] if graph.postprocess else ["pred_logits", "pred_boxes"]
    return [*names, *(["masks" if graph.postprocess else "pred_masks"] if graph.has_masks else [])]


def example(size: tuple[int, int, int], with_mask: bool, uint8: bool) -> tuple[Tensor, ...]:
    """Make random input of (images, height, width): images and, `with_mask`, a mask; the last image is padded."""
    count, height, width = size
    generator = torch.Generator().manual_seed(sum(size))
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(count, height, width, dtype=torch.bool)
    if with_mask:
        mask[-1, height * 3 // 4 :], mask[-1, :, width * 2 // 3 :] = True, True
    if not uint8:
        images = (images / 255 - 0.45) / 0.225
    images = images.masked_fill(mask[:, None], 0)
    return (images, mask) if with_mask else (images,)


def write_graph(
    graph: ExportGraph, file_format: str, path: Path, inputs: tuple[Tensor, ...], metadata: dict, opset: int | None
) -> None:
    """Write a graph in a format of SUFFIXES, traced with `inputs`: batch, height and width stay free."""
    text = {METADATA: json.dumps(metadata)}
    names = list(AXES)[: len(inputs)]
    if file_format == "onnx":
        write_onnx(graph, path, inputs, metadata, opset)
    elif file_format == "torch-export":
        free = tuple(dict.fromkeys(AXES[name], torch.export.Dim.AUTO) for name in names)
        torch.export.save(torch.export.export(graph, inputs, dynamic_shapes=free), path, extra_files=text)
    else:
        with warnings.catch_warnings():  # PyTorch calls TorchScript deprecated; libtorch programs still need it
            warnings.filterwarnings("ignore", message="`torch.jit.*deprecated")
            torch.jit.save(torch.jit.script(graph), path, _extra_files=text)


def write_onnx(
    graph: ExportGraph, path: Path, inputs: tuple[Tensor, ...], metadata: dict, opset: int | None = None
) -> None:
    """Write one ONNX file. Raises ValueError if its packages are missing, or PyTorch cannot write `opset`."""
    require_onnx()
    import onnx
    import onnxscript.optimizer

    names = list(AXES)[: len(inputs)]
    with quiet():
        program = torch.onnx.export(
            graph, inputs, dynamo=True, verbose=False, opset_version=opset, input_names=names,
            output_names=output_names(graph), dynamic_shapes=tuple(AXES[name] for name in names),
        )  # fmt: skip
    assert program is not None, "torch.onnx.export returned no program"
    written = program.model.opset_imports[""]
    if opset is not None and written != opset:  # its conversion to this opset failed
        raise ValueError(f"--opset {opset}: PyTorch could only write opset {written}; leave --opset out")
    with quiet():
        # Frozen norms are folded into the weights of their convolutions here: constants of any size, hence the limits.
        # Otherwise quantization does not see these weights.
        onnxscript.optimizer.optimize(program.model, input_size_limit=2**31, output_size_limit=2**31)
    program.model.metadata_props.update(as_properties(metadata))
    program.save(path)
    onnx.checker.check_model(path)


def quantize_onnx(path: Path, kind: str) -> None:
    """Replace an ONNX file by one in int8 (dynamic quantization) or fp16 (inputs and outputs stay float32)."""
    import onnx

    whole = onnx.load(path)
    with quiet():
        if kind == "int8":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            # Unsigned weights: ONNX Runtime's CPU convolutions have no signed ones.
            quantize_dynamic(path, path, weight_type=QuantType.QUInt8)
            smaller = onnx.load(path)
        else:
            from onnxruntime.transformers.float16 import convert_float_to_float16

            smaller = convert_float_to_float16(whole, keep_io_types=True)
        onnx.helper.set_model_props(smaller, {entry.key: entry.value for entry in whole.metadata_props})
        onnx.save(smaller, path)


def require_onnx() -> None:
    """Raise ValueError, with the remedy, if a package of ONNX is not installed."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX files need packages that are not installed ({', '.join(missing)}): "
            "pip install -r requirements-export.txt"
        )


def as_properties(metadata: dict[str, Any]) -> dict[str, str]:
    """Return metadata as ONNX keeps it: every value as JSON text."""
    return {name: json.dumps(value) for name, value in metadata.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages of exporters, which report every step of theirs; errors are raised all the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

"""An exported ONNX file in ONNX Runtime, called as the PyTorch model it was made from.

from tools.onnx_model import onnx_predictor
onnx_predictor("model.onnx")("photo.jpg").draw().save("found.png")
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from models.detr import PostProcess
from models.segmentation import PostProcessPanoptic, PostProcessSegm
from tools.export_graph import FORMAT_VERSION, require_onnx
from tools.predictor import Predictor
from util.nested_tensor import nested_tensor_from_tensor_list


class OnnxModel(nn.Module):
    """A session of ONNX Runtime that takes images and returns outputs as DETR and DETRsegm do.

    It runs on the CPU, or with `device` "cuda" on a GPU where onnxruntime-gpu is installed; tensors stay on the CPU.
    Raises FileNotFoundError, or ValueError if ONNX Runtime is not installed or cannot load the file.
    """

    def __init__(self, path: str | Path, device: str = "cpu"):
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such ONNX file")
        self.session = open_session(path, device)
        self.path = str(path)
        self.inputs = {each.name: each.type for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]
        properties = self.session.get_modelmeta().custom_metadata_map
        try:
            self.metadata = {name: json.loads(text) for name, text in properties.items()}
        except ValueError:
            self.metadata = {}
        if self.metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path}: no metadata of version {FORMAT_VERSION} of this project in it: write it with tools/export.py"
            )

    def forward(self, images: list[Tensor]) -> dict[str, Tensor]:
        """Detect objects in uint8 images [3, h, w]; the outputs are the graph's, on the CPU."""
        batch = nested_tensor_from_tensor_list(images)
        pixels, mask = batch.tensors.cpu(), batch.mask
        assert mask is not None, "a batch of images has no padding mask"
        if "mask" not in self.inputs and mask.any():
            raise ValueError(
                f"{self.path} takes images of one size only: use batches of one image, or export with --padding_mask"
            )
        if self.inputs["images"] != "tensor(uint8)":
            mean, std = (torch.tensor(self.metadata[name])[:, None, None] for name in ("mean", "std"))
            pixels = ((pixels.float() / 255 - mean) / std).masked_fill(mask[:, None].cpu(), 0.0)
        return self.run({"images": pixels.contiguous(), "mask": mask.cpu()})

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on tensors by name; RuntimeError if ONNX Runtime cannot."""
        arrays = {name: inputs[name].numpy() for name in self.inputs}
        try:
            found = self.session.run(None, arrays)
        except Exception as error:  # ONNX Runtime's own types are plain exceptions
            raise RuntimeError(f"{self.path}: ONNX Runtime: {error}") from error
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, found, strict=True)}


def open_session(path: str | Path, device: str):
    """Load a file in ONNX Runtime; ValueError if that is not installed, or cannot load the file."""
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    there = onnxruntime.get_available_providers()
    providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in there]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's own types are plain exceptions
        raise ValueError(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from None


def onnx_predictor(path: str | Path, device: str = "cuda", class_names: dict[int, str] | None = None) -> Predictor:
    """Build a Predictor for a file of tools/export.py; `class_names` take precedence over the file's own.

    Raises FileNotFoundError, or ValueError for a file that does not fit.
    """
    model = OnnxModel(path, device)
    if "pred_logits" not in model.outputs:
        raise ValueError(f"{path}: its graph post-processes already; export it without --postprocess for this")
    metadata = model.metadata
    postprocessors: dict[str, nn.Module] = {"bbox": PostProcess()}
    if "pred_masks" in model.outputs:
        postprocessors["segm"] = PostProcessSegm()
    if metadata["things"] is not None:
        things = dict.fromkeys(metadata["things"], True)
        postprocessors["panoptic"] = PostProcessPanoptic(things, metadata["panoptic_threshold"])
    names = class_names or {int(number): name for number, name in metadata["class_names"].items()}
    return Predictor(model, postprocessors, names, metadata["min_size"], metadata["max_size"], "cpu")

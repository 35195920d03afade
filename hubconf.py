"""The published DETR models by name, with their weights.

model = torch.hub.load(FOLDER_OR_REPO, "detr_resnet50", pretrained=True)          # source="local" for a folder
model = torch.hub.load(FOLDER_OR_REPO, "detr", checkpoint="runs/shapes/checkpoint.pth")      # one you have trained

Every entry point but `detr` takes `pretrained`: False (random weights, nothing is downloaded), True (the published
weights, from torch.hub's cache or else their address, the hash in their name checked), or the path or URL of a
checkpoint file in DETR's format. With another `num_classes` than the checkpoint's, the class head is re-initialised
and all else is kept, which is logged. The models come in training mode: call `eval()` before use. `model.aux_loss =
True` makes them return the earlier decoder layers' outputs too, for training.

Inputs are images [3, H, W], in a list or as a batch [B, 3, H, W]: uint8 RGB, or floating, scaled to 0..1 and
normalised with ImageNet's mean and deviation. The figures below were published with an 800-pixel shortest side.
"""

from torch import nn

from models.backbone import Backbone, Joiner
from models.detr import DETR, PostProcess
from models.position_encoding import PositionEmbeddingSine
from models.segmentation import DETRsegm, PostProcessPanoptic
from models.transformer import Transformer
from models.weights import build_described
from util.checkpoint import count_classes, load_checkpoint, load_model
from util.finetune import finetune
from util.logger import logger

dependencies = ["torch", "torchvision", "scipy", "tqdm", "filelock"]

PUBLISHED = "https://dl.fbaipublicfiles.com/detr/"
LAST_THING = 90  # in COCO's numbering, things have the ids up to here and stuff those above


def detr_resnet50(pretrained=False, num_classes: int = 91, return_postprocessor: bool = False):
    """DETR R50: COCO val5k AP 42.0 at 500 epochs; 41 M parameters, stride 32.

    Returns the model, or (model, PostProcess) with `return_postprocessor`. Outputs are `pred_logits`
    [B, 100, num_classes + 1] and `pred_boxes` [B, 100, 4] (centre x, y, width, height in 0..1).
    """
    return _detector("resnet50", False, "detr-r50-e632da11.pth", pretrained, num_classes, return_postprocessor)


def detr_resnet50_dc5(pretrained=False, num_classes: int = 91, return_postprocessor: bool = False):
    """DETR-DC5 R50, stride 16 in the last stage: COCO val5k AP 43.3 at 500 epochs; otherwise as `detr_resnet50`."""
    return _detector("resnet50", True, "detr-r50-dc5-f0fb7ef5.pth", pretrained, num_classes, return_postprocessor)


def detr_resnet101(pretrained=False, num_classes: int = 91, return_postprocessor: bool = False):
    """DETR R101: COCO val5k AP 43.5 at 500 epochs; 60 M parameters; otherwise as `detr_resnet50`."""
    return _detector("resnet101", False, "detr-r101-2c7b67e5.pth", pretrained, num_classes, return_postprocessor)


def detr_resnet101_dc5(pretrained=False, num_classes: int = 91, return_postprocessor: bool = False):
    """DETR-DC5 R101: COCO val5k AP 44.9 at 500 epochs; otherwise as `detr_resnet50_dc5`."""
    return _detector("resnet101", True, "detr-r101-dc5-a2e86def.pth", pretrained, num_classes, return_postprocessor)


def detr_resnet50_panoptic(
    pretrained=False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
):
    """DETR R50 with the mask head: COCO val5k PQ 43.4, mask AP 31.1; 43 M parameters.

    Returns the model, or (model, PostProcessPanoptic) with `return_postprocessor`; it keeps segments that score above
    `threshold`. Outputs as `detr_resnet50`'s and `pred_masks` [B, 100, h, w] at a quarter of the input's size.
    """
    file = "detr-r50-panoptic-00ce5173.pth"
    return _segmenter("resnet50", False, file, pretrained, num_classes, threshold, return_postprocessor)


def detr_resnet50_dc5_panoptic(
    pretrained=False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
):
    """DETR-DC5 R50 with the mask head: COCO val5k PQ 44.6, mask AP 31.9; otherwise as `detr_resnet50_panoptic`."""
    file = "detr-r50-dc5-panoptic-da08f1b1.pth"
    return _segmenter("resnet50", True, file, pretrained, num_classes, threshold, return_postprocessor)


def detr_resnet101_panoptic(
    pretrained=False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
):
    """DETR R101 with the mask head: COCO val5k PQ 45.1, mask AP 33; otherwise as `detr_resnet50_panoptic`."""
    file = "detr-r101-panoptic-40021d53.pth"
    return _segmenter("resnet101", False, file, pretrained, num_classes, threshold, return_postprocessor)


def detr(checkpoint, return_postprocessor: bool = False):
    """The network that a checkpoint of a training describes, with its weights: this project's file, or DETR's own.

    `checkpoint` is a path or URL. Returns the model, or (model, post-processor) with `return_postprocessor`:
    PostProcess or, for panoptic models, PostProcessPanoptic. Raises ValueError for a file that does not say its
    architecture. The published files do not: each has an entry point of its own.
    """
    model, postprocessors, _ = build_described(load_checkpoint(checkpoint), str(checkpoint))
    postprocessor = postprocessors.get("panoptic", postprocessors["bbox"])
    return (model, postprocessor) if return_postprocessor else model


def _detector(backbone: str, dilation: bool, file: str, pretrained, num_classes: int, return_postprocessor: bool):
    model = _make_detr(backbone, dilation, num_classes)
    _load(model, file, pretrained)
    return (model, PostProcess()) if return_postprocessor else model


def _segmenter(
    backbone: str, dilation: bool, file: str, pretrained, num_classes: int, threshold: float, return_postprocessor: bool
):
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: segments that score above it are kept; give a number from 0 to 1")
    model = _make_detr(backbone, dilation, num_classes, mask=True)
    _load(model, file, pretrained)
    is_thing = {i: i <= LAST_THING for i in range(num_classes)}
    return (model, PostProcessPanoptic(is_thing, threshold)) if return_postprocessor else model


def _make_detr(backbone_name: str, dilation: bool = False, num_classes: int = 91, mask: bool = False) -> nn.Module:
    """Build DETR with 100 queries, or with `mask` DETRsegm; the weights are random."""
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: give the largest class id + 1, at least 1")
    # Weights "none": no ImageNet weights are downloaded, since a checkpoint has the backbone's too.
    body = Backbone(backbone_name, train_backbone=True, return_interm_layers=mask, dilation=dilation, weights="none")
    transformer = Transformer(d_model=256, return_intermediate_dec=True)
    positions = PositionEmbeddingSine(transformer.d_model // 2, normalize=True)
    detr = DETR(Joiner(body, positions), transformer, num_classes, num_queries=100)
    return DETRsegm(detr) if mask else detr


def _load(model: nn.Module, file: str, pretrained) -> None:
    """Load the weights that `pretrained` names: none, the published file, or a file of the caller."""
    if not pretrained:
        return
    source = PUBLISHED + file if pretrained is True else str(pretrained)
    try:
        state = load_checkpoint(source)
    except OSError as error:
        if pretrained is True:
            raise OSError(f"{error}: pretrained='path/to/{file}' instead of pretrained=True") from error
        raise
    if count_classes(state["model"]) == count_classes(model.state_dict()):
        load_model(model, state, source)
    else:
        logger.info("\n  ".join(finetune(model, state["model"], source)))

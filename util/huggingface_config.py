"""The files beside the weights of a DETR model of Hugging Face's transformers, and the flags that say the same.

`config.json` describes the network and names its classes, `preprocessor_config.json` gives sizes and normalisation.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from util.huggingface import to_own
from util.logger import logger

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # in such a folder; the first is preferred
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of models/backbone.py
FLAGS = {  # the name in config.json: the flag here, and transformers' default
    "d_model": ("hidden_dim", 256),
    "encoder_attention_heads": ("nheads", 8),
    "encoder_layers": ("enc_layers", 6),
    "decoder_layers": ("dec_layers", 6),
    "encoder_ffn_dim": ("dim_feedforward", 2048),
    "num_queries": ("num_queries", 100),
    "dropout": ("dropout", 0.1),
    "position_embedding_type": ("position_embedding", "sine"),
    "auxiliary_loss": ("aux_loss", False),
}
EQUAL = {"decoder_attention_heads": "encoder_attention_heads", "decoder_ffn_dim": "encoder_ffn_dim"}
FIXED = {"activation_function": "relu", "num_channels": 3}
TRAINING = {  # flags that build_model reads and config.json lacks, at their defaults
    "lr_backbone": 1e-5, "pre_norm": False, "frozen_weights": None, "device": "cpu",
    "set_cost_class": 1, "set_cost_bbox": 5, "set_cost_giou": 2, "eos_coef": 0.1,
    "bbox_loss_coef": 5, "giou_loss_coef": 2, "mask_loss_coef": 1, "dice_loss_coef": 1,
}  # fmt: skip
RESNETS = {  # transformers' own: the kind of its blocks, and their numbers
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}
BACKBONES = (*RESNETS, "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}
OLD_POSITIONS = {"v2": "sine", "v3": "learned"}
PANOPTIC_CLASSES = 250  # of the published panoptic models
NO_NAME = "N/A"  # the label of ids without a class, in the published models


def read_model(weights: dict[str, Tensor], folder: Path, name: str) -> dict[str, Any]:
    """Return a checkpoint of this project from a model of transformers: its weights, and the files in its folder.

    Raises FileNotFoundError if config.json is absent, ValueError if the files describe something else than DETR.
    """
    files = folder / "config.json", folder / "preprocessor_config.json"
    config, processor = _read_json(files[0]), _read_json(files[1]) if files[1].exists() else {}
    with _errors_name(files[0]):
        flags = flags_of(config, any(key.startswith("mask_head.") for key in weights))
        model = to_own(weights)
        flags["num_classes"] = _check_classes(config, model)
        names = class_names_of(config)
    with _errors_name(files[1]):
        flags |= sizes_of(processor)
    flags["dataset_file"] = "coco_panoptic" if flags["masks"] and flags["num_classes"] == PANOPTIC_CLASSES else "coco"
    logger.info(
        f"{name}: converted from transformers ({flags['backbone']}{', dilated' * flags['dilation']}"
        f"{', masks' * flags['masks']}, {flags['num_classes']} classes)"
    )
    return {"model": model, "args": flags, **({"class_names": names} if names else {})}


@contextmanager
def _errors_name(file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file}: an entry has another type than transformers gives it ({error})") from error


def flags_of(config: Mapping[str, Any], masks: bool) -> dict[str, Any]:
    """Return the flags of the network that config.json describes; ValueError if it is not one of this project."""
    if config.get("model_type") != "detr":
        raise ValueError(
            f"model_type is {config.get('model_type')!r}, another architecture: give a folder of "
            "DetrForObjectDetection or DetrForSegmentation, whose model_type is 'detr'"
        )
    defaults = {name: default for name, (_, default) in FLAGS.items()}
    for name, other in EQUAL.items():
        values = config.get(name, defaults[other]), config.get(other, defaults[other])
        if values[0] != values[1]:
            raise ValueError(f"{name} {values[0]} and {other} {values[1]}: they are one number in this project")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}: this project supports {value!r} only")
    flags = {}
    for name, (flag, default) in FLAGS.items():
        flags[flag] = config.get(name, default)
        if type(default) is int and not (isinstance(flags[flag], int) and flags[flag] >= 1):
            raise ValueError(f"{name} is {flags[flag]!r}: expected a whole number, at least 1")
    backbone, dilation = backbone_of(config)
    return {**TRAINING, **flags, "backbone": backbone, "dilation": dilation, "masks": masks,
            "thing_classes": config.get("thing_classes")}  # fmt: skip


def backbone_of(config: Mapping[str, Any]) -> tuple[str, bool]:
    """Return torchvision's name of the backbone, and whether its last stage is dilated; ValueError for others."""
    inner = config.get("backbone_config") or {}
    if inner.get("model_type") == "resnet":
        return _own_resnet(inner), False
    name = inner.get("backbone") or config.get("backbone") or "resnet50"
    short = name.rsplit("/", 1)[-1].split(".")[0].replace("resnet-", "resnet")
    if inner.get("model_type", "timm_backbone") != "timm_backbone" or short not in BACKBONES:
        kind = f"{inner.get('model_type', '')} {name}".strip()
        raise ValueError(f"the backbone {kind} is none of this project: {', '.join(BACKBONES)}")
    stride = inner.get("output_stride") or (config.get("backbone_kwargs") or {}).get("output_stride")
    if stride not in (None, 16, 32):
        raise ValueError(f"the backbone's output_stride is {stride}: this project supports 32, and 16 (--dilation)")
    return short, bool(config.get("dilation")) if stride is None else stride == 16


def _own_resnet(inner: Mapping[str, Any]) -> str:
    """Return the name of transformers' own ResNet."""
    kind, depths = inner.get("layer_type", "bottleneck"), inner.get("depths", [3, 4, 6, 3])
    found = [name for name, described in RESNETS.items() if described == (kind, depths)]
    plain = {"hidden_sizes": WIDTHS.get(kind), "embedding_size": 64, "hidden_act": "relu",
             "downsample_in_first_stage": False, "downsample_in_bottleneck": False}  # fmt: skip
    other = [f"{name} {inner[name]}" for name, value in plain.items() if inner.get(name, value) != value]
    if not found or other:
        what = ", ".join(other) or f"{kind} blocks, {depths}"
        raise ValueError(f"the backbone is a ResNet with {what}: this project supports {', '.join(RESNETS)}")
    return found[0]


def sizes_of(processor: Mapping[str, Any]) -> dict[str, int]:
    """Return min_size and max_size of preprocessor_config.json; ValueError for another normalisation than ours."""
    for name, ours in (("image_mean", MEAN), ("image_std", STD)):
        theirs = processor.get(name, ours)
        if len(theirs) != 3 or any(abs(a - b) > 1e-6 for a, b in zip(theirs, ours, strict=True)):
            raise ValueError(f"{name} is {theirs}: models of this project take images normalised with {list(ours)}")
    if not processor.get("do_normalize", True) or abs(processor.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise ValueError("images are not scaled to 0..1 and normalised: models of this project need both")
    size = processor.get("size", {})
    if isinstance(size, int):
        size = {"shortest_edge": size}
    least = size.get("shortest_edge", None if size else 800)
    most = size.get("longest_edge") or processor.get("max_size") or 1333
    if not (isinstance(least, int) and isinstance(most, int) and 1 <= least <= most):
        raise ValueError(f"size is {processor['size']}: give shortest_edge and longest_edge, in pixels")
    if not processor.get("do_resize", True):
        logger.warning(f"do_resize is off in preprocessor_config.json; here images are resized to {least}/{most}")
    return {"min_size": least, "max_size": most}


def class_names_of(config: Mapping[str, Any]) -> dict[int, str]:
    """Return {class id: name} of config.json, without ids that have no class; none if the names are only numbers."""
    labels = {int(i): str(text) for i, text in (config.get("id2label") or {}).items()}
    if all(text == f"LABEL_{i}" for i, text in labels.items()):
        return {}
    return {i: text for i, text in sorted(labels.items()) if text != NO_NAME}


def _check_classes(config: Mapping[str, Any], model: dict[str, Tensor]) -> int:
    """Return the number of classes; ValueError if the labels are not the rows of the class head, less "no object"."""
    heads = [value for name, value in model.items() if name.endswith("class_embed.bias")]
    if not heads:
        raise ValueError("there is no class head among the weights: save DetrForObjectDetection, not DetrModel")
    classes, labels = len(heads[0]) - 1, config.get("id2label")
    listed = config.get("num_labels", 2) if labels is None else len(labels)  # files lack the default, two labels
    if listed != classes or (labels and sorted(map(int, labels)) != list(range(classes))):
        raise ValueError(
            f'id2label has {listed} labels, the class head {classes} and "no object": '
            f"list the labels 0 to {classes - 1}"
        )
    return classes


def config_of(flags: Mapping[str, Any], classes: int, names: Mapping[int, str], own_resnet: bool) -> dict[str, Any]:
    """Return the contents of config.json for a network of these flags; ValueError if transformers has none.

    With `own_resnet` the backbone is transformers' own, otherwise timm's.
    """
    if flags.get("pre_norm"):
        raise ValueError("--pre_norm: the DETR of transformers normalises after each sublayer only")
    backbone, dilation = flags["backbone"], bool(flags.get("dilation"))
    if own_resnet and (backbone not in RESNETS or dilation):
        raise ValueError(
            f"transformers has no {'dilated ' * dilation}{backbone} of its own: choose --backbone_layout timm"
        )
    labels = {str(i): names.get(i, NO_NAME if names else f"LABEL_{i}") for i in range(classes)}
    config: dict[str, Any] = {
        "architectures": ["DetrForSegmentation" if flags.get("masks") else "DetrForObjectDetection"],
        "model_type": "detr",
        "is_encoder_decoder": True,
        **{name: flags.get(flag, default) for name, (flag, default) in FLAGS.items()},
        **FIXED,
        "backbone": None if own_resnet else backbone,
        "backbone_config": _resnet_config(backbone) if own_resnet else None,
        "dilation": dilation,
        "use_timm_backbone": not own_resnet,
        "use_pretrained_backbone": False,
        "id2label": labels,
        "label2id": {text: int(i) for i, text in labels.items()},
    }
    config |= {name: config[other] for name, other in EQUAL.items()}
    position = config["position_embedding_type"]
    config["position_embedding_type"] = OLD_POSITIONS.get(position, position)
    if flags.get("thing_classes"):
        config["thing_classes"] = list(flags["thing_classes"])
    return config


def processor_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of preprocessor_config.json for the sizes in the flags."""
    return {
        "image_processor_type": "DetrImageProcessor",
        "format": "coco_panoptic" if flags.get("masks") else "coco_detection",
        "do_resize": True, "size": {"shortest_edge": flags["min_size"], "longest_edge": flags["max_size"]},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD),
        "do_pad": True,
    }  # fmt: skip


def _resnet_config(backbone: str) -> dict[str, Any]:
    kind, depths = RESNETS[backbone]
    stages = [f"stage{i}" for i in range(1, 5)]
    return {"model_type": "resnet", "layer_type": kind, "depths": depths, "hidden_sizes": WIDTHS[kind],
            "embedding_size": 64, "hidden_act": "relu", "out_features": stages}  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; it describes the network of the {' or '.join(WEIGHTS_FILES)} beside it: copy it too"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a readable JSON file ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not the description of a model")
    return content

"""Convert a DETR of Hugging Face's transformers to a checkpoint of this project, and the reverse.

python tools/convert.py --checkpoint detr-resnet-50 --output detr-r50.pth            # a folder of transformers
python tools/convert.py --checkpoint runs/mine/checkpoint_best.pth --output mine     # writes such a folder
python tools/convert.py --checkpoint detr-r50-e632da11.pth --model detr_resnet50 --output detr-resnet-50

--output decides: a name that ends in .pth becomes a checkpoint with weights, flags and class names, any other name a
folder with config.json, model.safetensors and preprocessor_config.json. The folder needs: pip install safetensors.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.coco_names import COCO_NAMES
from main import get_args_parser as training_flags
from models.weights import build_described
from tools.predictor import COCO_CLASSES, HUB_NAMES
from util.checkpoint import load_checkpoint, save_checkpoint
from util.cli import HelpFormatter, exit_status
from util.drafts import draft_of
from util.flags import NEW_FLAGS, with_defaults
from util.huggingface import BACKBONES, to_huggingface
from util.huggingface_config import WEIGHTS_FILES, config_of, processor_of
from util.logger import logger
from util.origin import saved_flags
from util.safe_load import import_safetensors


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="file, URL, or folder of transformers")
    add("--output", required=True, type=Path, help="file to write, if it ends in .pth, else folder; must not exist")
    add("--model", choices=HUB_NAMES, help="the published model that a file is, where the file does not say it")
    add("--backbone_layout", default="timm", choices=list(BACKBONES),
        help="folder's backbone: timm's ResNet, as in published folders, or transformers' own, which needs no timm")
    return parser


# fmt: on
def hub_flags(name: str) -> dict[str, Any]:
    """Return the flags of a published model."""
    flags = vars(training_flags().parse_args([]))
    masks = "panoptic" in name
    described = {"backbone": name.split("_")[1], "dilation": "dc5" in name, "masks": masks}
    return {**flags, **described, "dataset_file": "coco_panoptic" if masks else "coco"}


def load_described(source: str, model: str | None) -> dict[str, Any]:
    """Load a checkpoint that says its architecture; `model` says it for one that does not.

    Returns `model`, `args` and `class_names`. Raises ValueError if the weights do not fit the architecture.
    """
    state = load_checkpoint(source)
    if model:
        state["args"] = hub_flags(model)
    elif not saved_flags(state):
        raise ValueError(
            f"{source} does not say its architecture (no 'args' in it): name it with --model, one of "
            f"{', '.join(HUB_NAMES)}"
        )
    network, _, args = build_described(state, source)
    names = state.get("class_names") or (COCO_NAMES if args.num_classes in COCO_CLASSES else {})
    names = {i: text for i, text in names.items() if i < args.num_classes}
    flags = {**saved_flags(state), "num_classes": args.num_classes}
    return {"model": network.state_dict(), "args": flags, "class_names": names}


def write_folder(state: dict[str, Any], folder: Path, layout: str) -> None:
    """Write a model of transformers into a new folder, the weights last, since without them there is no model."""
    file = folder / WEIGHTS_FILES[0]
    safetensors = import_safetensors(file)
    flags = vars(with_defaults(state["args"], NEW_FLAGS))
    config = config_of(flags, flags["num_classes"], state["class_names"], layout == "transformers")
    processor = processor_of(flags)
    weights = to_huggingface(state["model"], layout)
    if config["position_embedding_type"] == "learned":
        logger.warning("learned positions: release 5 of transformers and newer read this folder, older ones do not")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft = draft_of(file)
    draft.write_bytes(safetensors.torch.save(weights, {"format": "pt"}))  # its own save_file ignores the umask
    draft.replace(file)


def main(argv: list[str] | None = None) -> None:
    """Convert what the flags name."""
    args = get_args_parser().parse_args(argv)
    output = args.output
    if output.exists() and not (output.is_dir() and output.suffix != ".pth" and not any(output.iterdir())):
        raise ValueError(f"--output {output} exists: name a new file or folder")
    state = load_described(args.checkpoint, args.model)
    flags = saved_flags(state)
    if output.suffix == ".pth":
        output.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(state, output)
        next_step = f"python tools/predict.py --checkpoint {output} photo.jpg"
    else:
        write_folder(state, output, args.backbone_layout)
        head = "DetrForSegmentation" if flags["masks"] else "DetrForObjectDetection"
        next_step = f"{head}.from_pretrained({str(output)!r})"
    print(f"written: {output} ({flags['backbone']}, {flags['num_classes']} classes)\nnext: {next_step}")


if __name__ == "__main__":
    sys.exit(exit_status(main))

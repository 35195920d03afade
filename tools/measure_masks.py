"""Memory and time of a training step of the mask head: masks of all queries against those of the matched ones only.

python tools/measure_masks.py                              # one image of 800 x 1066 pixels, R50, 100 queries
python tools/measure_masks.py --backbone resnet18 --height 400 --width 600 --objects 12

The detector is frozen, as in the second stage of training. Memory is the peak above what was held when the detector was
done: until the head has drawn the masks, and until the backward pass is through. The time is the whole step's.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from main import get_args_parser
from models import build_model
from tools.gauges import most_held, start_counting


def main() -> None:
    """Measure both ways, side by side, and compare their losses and gradients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument(
        "--objects", type=int, default=11, help="objects in each image; COCO panoptic has 11 on average"
    )
    args = parser.parse_args()
    flags = f"--masks --dataset_file coco_panoptic --backbone_weights none --frozen_weights none --device {args.device}"
    flags += f" --backbone {args.backbone} --num_queries {args.queries}"
    torch.manual_seed(0)
    model, criterion, _ = build_model(argparse.ArgumentParser(parents=[get_args_parser()]).parse_args(flags.split()))
    model.to(args.device).train()
    images = torch.rand(args.batch_size, 3, args.height, args.width, device=args.device)
    targets = [scene(args.objects, args.height, args.width, args.device) for _ in range(args.batch_size)]
    with torch.no_grad():
        model(images)  # the first call pays for what later ones find ready

    print(f"{args.batch_size} x {args.height} x {args.width}, {args.queries} queries, {args.objects} objects, "
          f"{args.backbone}, {args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    rows = {"all queries": step(model, criterion, images, targets, every=True)}
    rows["matched only"] = step(model, criterion, images, targets, every=False)
    print(f"{'':14}{'head GB':>10}{'step GB':>10}{'step s':>8}{'loss':>10}")
    for name, row in rows.items():
        print(f"{name:14}{row['head']:10.2f}{row['peak']:10.2f}{row['time']:8.2f}{row['loss']:10.5f}")
    every, few = rows.values()
    print(f"{'ratio':14}{every['head'] / few['head']:10.1f}{every['peak'] / few['peak']:10.1f}"
          f"{every['time'] / few['time']:8.1f}")  # fmt: skip
    largest = max(gradient.abs().max().item() for gradient in every["gradients"])
    off = max((a - b).abs().max().item() for a, b in zip(every["gradients"], few["gradients"], strict=True))
    print(f"largest gradient {largest:.3g}, largest difference between the two {off:.2g}")


def scene(objects: int, height: int, width: int, device: str) -> dict[str, Tensor]:
    """Boxes somewhere, and their whole area for masks."""
    centre, size = 0.2 + 0.6 * torch.rand(objects, 2), 0.05 + 0.3 * torch.rand(objects, 2)
    boxes = torch.cat([centre, size], 1)
    y, x = torch.arange(height) / height, torch.arange(width) / width
    rows = (y - centre[:, 1:]).abs() < size[:, 1:] / 2
    columns = (x - centre[:, :1]).abs() < size[:, :1] / 2
    target = {"labels": torch.randint(1, 200, (objects,)), "boxes": boxes, "masks": rows[:, :, None] & columns[:, None]}
    return {name: value.to(device) for name, value in target.items()}


def step(model: nn.Module, criterion: nn.Module, images: Tensor, targets: list[dict], every: bool) -> dict:
    """Run a forward and a backward pass; with `every`, draw the masks of all queries first, as the loss need not."""
    model.zero_grad()
    start = time.perf_counter()
    outputs = model(images)
    device, (batch, queries) = images.device.type, outputs["pred_logits"].shape[:2]
    draw, held, head = outputs["masks_of"], start_counting(device), 0.0

    def counted(image: Tensor, query: Tensor) -> Tensor:
        nonlocal head
        masks = draw(image, query)
        head = most_held(device) - held
        return masks

    def draw_all(image: Tensor, query: Tensor) -> Tensor:
        everyone = torch.arange(batch * queries, device=image.device)
        return counted(everyone // queries, everyone % queries)[image * queries + query]

    outputs["masks_of"] = draw_all if every else counted
    losses = criterion(outputs, targets)
    loss = losses["loss_mask"] + losses["loss_dice"]
    loss.backward()
    peak = most_held(device) - held
    seconds = time.perf_counter() - start
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return {"head": head, "peak": peak, "time": seconds, "loss": loss.item(), "gradients": gradients}


if __name__ == "__main__":
    main()

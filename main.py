"""The flags of a run, its parts, and the walk through the epochs.

python main.py --coco_path /data/coco --output_dir runs/r50          # the published recipe
python main.py --coco_path /data/coco --eval --resume FILE_OR_URL    # AP of a checkpoint
python main.py --coco_path /data/coco --masks --frozen_weights FILE  # masks on top of a trained detector
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader, Dataset

import datasets
import models
from datasets import build_dataset, get_coco_api_from_dataset
from datasets.batches import EvalBatches, TrainBatches
from datasets.coco import AUGMENTS
from datasets.coco_eval import CocoEvaluator, curves
from datasets.transforms import resized_size
from engine import allow_tf32, compile_network, evaluate, train_one_epoch
from models import build_model
from util.checkpoint import count_classes, load_checkpoint, load_model, newest_checkpoint, save_checkpoint
from util.dist import (
    ProcessInfo,
    from_main,
    get_rank,
    get_world_size,
    is_main_process,
    pick_device,
    process_group,
)
from util.finetune import finetune
from util.interruption import Interruption, worker_init
from util.logger import MetricLogger, logger
from util.misc import get_sha
from util.nested_tensor import collate_fn
from util.plot_utils import draw_curves
from util.run import Run, changed_flags

# Flags that change the network, but not the shape of any weight.
SHAPELESS = ("dilation", "nheads", "pre_norm")


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Declare every flag. The defaults are the published recipe; new flags deviate from nothing unless given."""
    new = {**models.NEW_FLAGS, **datasets.NEW_FLAGS}
    parser = argparse.ArgumentParser("DETR", add_help=False)
    add = _group(parser, "optimisation")
    add("--lr", default=1e-4, type=float, help="learning rate of the transformer and the heads")
    add("--lr_backbone", default=1e-5, type=float, help="learning rate of the backbone; 0 freezes it")
    add("--batch_size", default=2, type=int, help="images per process and step")
    add("--weight_decay", default=1e-4, type=float, help="AdamW's weight decay")
    add("--epochs", default=300, type=int, help="epochs in all")
    add("--lr_drop", default=200, type=int, help="divide both rates by 10 every so many epochs")
    add("--clip_max_norm", default=0.1, type=float, help="largest norm of the gradient; 0 leaves it alone")
    add("--accum_steps", default=1, type=int, help="batches whose gradients are averaged for one step")
    add("--amp", choices=["bf16", "fp16"], help="half precision in the network (matching and losses stay float32)")
    add("--tf32", action="store_true",
        help="let float32 convolutions and products on a GPU round their inputs to TF32, 10 bits of fraction")
    add("--compile", action="store_true", help="compile the network (torch.compile)")

    add = _group(parser, "backbone")
    add("--backbone", default="resnet50", type=str, help="resnet18, resnet34, resnet50 or resnet101")
    add("--dilation", action="store_true", help="stride 16 instead of 32 in the last stage (DC5; resnet50 and 101)")
    add("--position_embedding", default="sine", type=str, choices=("sine", "learned"),
        help="kind of position encoding")
    add("--backbone_weights", default=new["backbone_weights"], metavar="imagenet|none|PATH",
        help="torchvision's ImageNet V1 weights, random ones, or a state dict in torchvision's names")
    add("--backbone_norm", default=new["backbone_norm"], choices=("frozen", "batch"),
        help="frozen: statistics and affine stay as loaded; batch: live, and stem and layer1 train too (from scratch)")

    add = _group(parser, "transformer")
    add("--enc_layers", default=6, type=int, help="encoder layers")
    add("--dec_layers", default=6, type=int, help="decoder layers")
    add("--dim_feedforward", default=2048, type=int, help="inner width of the perceptrons")
    add("--hidden_dim", default=256, type=int, help="width of the transformer")
    add("--dropout", default=0.1, type=float, help="dropout in the transformer")
    add("--nheads", default=8, type=int, help="attention heads")
    add("--num_queries", default=100, type=int, help="object queries: the most objects found in an image")
    add("--pre_norm", action="store_true", help="normalise before each sublayer instead of after it")
    add("--num_classes", default=new["num_classes"], type=int,
        help="largest class id + 1; default: from the annotations")

    add = _group(parser, "segmentation")
    add("--masks", action="store_true", help="train the mask head")
    add("--frozen_weights", type=str, help="a trained box model to put the mask head on; only the head trains")

    add = _group(parser, "matching and loss")
    add("--no_aux_loss", dest="aux_loss", action="store_false", help="train only the last decoder layer's outputs")
    add("--set_cost_class", default=1, type=float, help="weight of the class probability in the matching cost")
    add("--set_cost_bbox", default=5, type=float, help="weight of the L1 distance in the matching cost")
    add("--set_cost_giou", default=2, type=float, help="weight of the generalized IoU in the matching cost")
    add("--mask_loss_coef", default=1, type=float, help="weight of the focal mask loss")
    add("--dice_loss_coef", default=1, type=float, help="weight of the dice mask loss")
    add("--bbox_loss_coef", default=5, type=float, help="weight of the L1 box loss")
    add("--giou_loss_coef", default=2, type=float, help="weight of the generalized IoU loss")
    add("--eos_coef", default=0.1, type=float, help='weight of "no object" in the classification loss')

    add = _group(parser, "data")
    add("--dataset_file", default="coco", help=f"one of: {', '.join(datasets.DATASETS)}")
    add("--coco_path", type=str,
        help="folder with train2017/, val2017/ and annotations/ (shapes: where to write them)")
    add("--coco_panoptic_path", type=str,
        help="folder with panoptic_train2017/, panoptic_val2017/ and annotations/; default: --coco_path")
    add("--remove_difficult", action="store_true", help="accepted for old scripts; has never had an effect")
    for part in ("train", "val"):
        add(f"--{part}_images", help=f"folder of the {part} images, where the layout is not COCO's")
        add(f"--{part}_annotations", help=f"COCO instances file of the {part} images")
    add("--min_size", default=new["min_size"], type=int,
        help="shortest side at evaluation; all training sizes scale with it")
    add("--max_size", default=new["max_size"], type=int, help="most pixels of the longest side")
    add("--augment", default=new["augment"], choices=AUGMENTS,
        help="full: the published flips, sizes and crops; flip: only flips, at the evaluation's size; none: neither")
    add("--shapes_train", default=new["shapes_train"], type=int, help="generated training images")
    add("--shapes_val", default=new["shapes_val"], type=int, help="generated validation images")
    add("--shapes_size", default=new["shapes_size"], type=int, help="longest side of generated images")
    add("--shapes_classes", default=new["shapes_classes"], type=int, help="classes of generated objects, 1 to 8")
    add("--shapes_seed", default=new["shapes_seed"], type=int, help="seed of the generated dataset")

    add = _group(parser, "run")
    add("--output_dir", default="", help="where checkpoints, logs and pictures go; empty: nowhere")
    add("--device", default="cuda", help="device to run on; without a GPU the CPU is used")
    add("--seed", default=42, type=int, help="seed of weights, data order and augmentation")
    add("--resume", default="",
        help="checkpoint to go on from (file or URL), or auto: the newest in --output_dir, if any")
    add("--finetune", default="", metavar="FILE_OR_URL",
        help="checkpoint to begin from: its weights where they fit, epoch 0, a new optimizer")
    add("--start_epoch", default=0, type=int, metavar="N", help="first epoch; a resumed run knows its own")
    add("--eval", action="store_true", help="evaluate only")
    add("--eval_every", default=1, type=int, help="evaluate after every so many epochs, and after the last")
    add("--eval_padding_free", action="store_true",
        help="batch only images of equal size at evaluation: batch size cannot matter")
    add("--coco_eval", default="auto", choices=("auto", "faster", "pycocotools"),
        help="AP by faster-coco-eval or pycocotools (the same numbers); auto: the faster one where installed")
    add("--save_every_steps", default=0, type=int,
        help="write checkpoint.pth every so many steps too; 0: after each epoch, and when a signal ends the run")
    add("--print_freq", default=10, type=int, help="steps between log lines")
    add("--num_workers", default=2, type=int, help="data loading processes, per training process")

    add = _group(parser, "distributed")
    add("--world_size", default=1, type=int,
        help="accepted for old scripts; the launcher says how many processes there are")
    add("--dist_url", default="env://", help="where processes meet")
    return parser


# fmt: on
def _group(parser: argparse.ArgumentParser, title: str):
    return parser.add_argument_group(title).add_argument


def check_flags(args) -> None:
    """Raise ValueError for values, or combinations of them, that cannot be what was meant."""
    refusals = [
        (args.frozen_weights and not args.masks, "--frozen_weights trains a mask head on a frozen model: add --masks"),
        (args.nheads < 1 or args.hidden_dim % args.nheads,
            f"--hidden_dim {args.hidden_dim} cannot be split into --nheads {args.nheads}"),
        (min(args.enc_layers, args.start_epoch) < 0, "--enc_layers and --start_epoch: 0 or more"),
        (min(args.lr, args.lr_backbone, args.eos_coef) < 0, "--lr, --lr_backbone and --eos_coef: 0 or more"),
        (args.min_size < 1, f"--min_size {args.min_size}: at least 1"),
        (args.print_freq < 1, f"--print_freq {args.print_freq}: at least 1"),
        (args.num_classes is not None and args.num_classes < 1, f"--num_classes {args.num_classes}: at least 1"),
        (args.hidden_dim % 4, f"--hidden_dim {args.hidden_dim}: positions need a multiple of 4"),
        (not 0 <= args.dropout < 1, f"--dropout {args.dropout}: at least 0, and below 1"),
        (args.num_queries < 1, f"--num_queries {args.num_queries}: at least 1"),
        (args.dec_layers < 1, f"--dec_layers {args.dec_layers}: at least 1"),
        (args.batch_size < 1, f"--batch_size {args.batch_size}: at least 1"),
        (args.accum_steps < 1, f"--accum_steps {args.accum_steps}: at least 1"),
        (args.eval_every < 1, f"--eval_every {args.eval_every}: at least 1"),
        (args.save_every_steps < 0, f"--save_every_steps {args.save_every_steps}: 0 or more"),
        (args.lr_drop < 1, f"--lr_drop {args.lr_drop}: at least 1"),
        (args.max_size < args.min_size, f"--max_size {args.max_size} is below --min_size {args.min_size}"),
        (args.resume == "auto" and not args.output_dir, "--resume auto looks in --output_dir: give one"),
        (args.finetune and args.resume not in ("", "auto"), "--finetune begins a run, --resume goes on: choose one"),
        (args.finetune and args.frozen_weights, "--finetune and --frozen_weights both bring weights: choose one"),
        (args.finetune and args.eval, "--finetune is for training; --eval takes a whole model: use --resume"),
        (args.eval and args.frozen_weights and not args.resume, "--eval takes a whole model: give --resume"),
        (args.backbone_norm == "batch" and not args.lr_backbone, "--backbone_norm batch trains: --lr_backbone is 0"),
    ]  # fmt: skip
    for wrong, why in refusals:
        if wrong:
            raise ValueError(why)


@record
def main(args) -> None:
    """Run what the flags say; those that `args` lacks have their defaults.

    Raises ValueError or FileNotFoundError for flags and files that cannot be used.
    """
    args = argparse.Namespace(**{**vars(get_args_parser().parse_args([])), **vars(args)})
    check_flags(args)
    with process_group(args.device, args.dist_url) as processes:
        run_process(args, processes)


def run_process(args, processes: ProcessInfo) -> None:
    """Do one process's share of the run."""
    device = pick_device(args.device, processes.local_rank)
    allow_tf32(args.tf32)
    logger.info(get_sha())
    logger.info(args)
    torch.manual_seed(args.seed + processes.rank)
    output_dir = Path(args.output_dir) if args.output_dir else None
    if output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)

    resume = from_main(lambda: newest_checkpoint(output_dir)) if args.resume == "auto" else args.resume
    checkpoint = load_checkpoint(resume) if resume else None
    args.num_classes = args.num_classes or (checkpoint and count_classes(checkpoint["model"]))
    train_set = None if args.eval else build_dataset("train", args)
    args.num_classes = args.num_classes or (train_set and train_set.num_classes)
    val_set = build_dataset("val", args)
    args.num_classes = args.num_classes or val_set.num_classes
    args.thing_classes = getattr(val_set, "thing_classes", None)
    val_loader = build_val_loader(val_set, args, device)
    base_ds = get_coco_api_from_dataset(val_set) if is_main_process() else None

    model, criterion, postprocessors = build_parts(args, device, checkpoint, str(resume))

    judge = partial(
        evaluate, model, criterion, postprocessors, val_loader, base_ds, device, args.output_dir,
        amp=args.amp, coco_backend=args.coco_eval, print_freq=args.print_freq,
    )  # fmt: skip
    if args.eval:
        _, evaluator = judge()
        if output_dir and is_main_process():
            evaluator.save_predictions(output_dir)
            save_checkpoint(curves(evaluator.coco_eval["bbox"]), output_dir / "eval.pth")
        return

    run = build_run(args, model, train_set)
    if checkpoint:
        run.restore(checkpoint, str(resume))
        if output_dir and is_main_process():
            forget_rows(output_dir / "log.txt", run.epoch)
    start = time.perf_counter()
    train(run, distribute(model, processes, device), criterion, train_set, judge, device, output_dir)
    logger.info(f"Training time {timedelta(seconds=int(time.perf_counter() - start))}")


def train(
    run: Run, model: nn.Module, criterion: nn.Module, train_set: Dataset, judge: Callable, device: torch.device,
    output_dir: Path | None,
) -> None:  # fmt: skip
    """Walk through the epochs; `model` is the run's own or a distributed wrapper of it, `judge` evaluates."""
    args = run.flags
    loader = build_train_loader(train_set, args, device)
    n_parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    logger.info(f"{n_parameters} trainable parameters; {args.epochs} epochs, {run.epoch} of them done")
    while run.epoch < args.epochs:
        epoch = run.epoch
        train_stats = finish_epoch(run, model, criterion, loader, device, output_dir)
        judged_now = (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs
        test_stats, evaluator = judge() if judged_now else ({}, None)
        with warnings.catch_warnings():  # torch misses the steps when they were done before a resume
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            run.lr_scheduler.step()
        run.epoch, run.seen, run.sums = epoch + 1, 0, {}
        if output_dir:
            log = {f"train_{name}": value for name, value in train_stats.items()}
            log |= {f"test_{name}": value for name, value in test_stats.items()}
            leave_behind(output_dir, run, log | {"epoch": epoch, "n_parameters": n_parameters}, evaluator)


def finish_epoch(
    run: Run, model: nn.Module, criterion: nn.Module, loader: DataLoader, device: torch.device,
    output_dir: Path | None,
) -> dict[str, float]:  # fmt: skip
    """Train on what is left of the epoch and return its averages; save now and then, and when a signal ends the run.

    It ends with a checkpoint whose epoch lacks only the evaluation: whatever happens there, the training is not lost.
    """
    args, batches = run.flags, loader.batch_sampler
    loader.dataset.set_epoch(run.epoch)
    batches.set_epoch(run.epoch, run.seen)
    done = -(-run.seen // batches.images_per_step)  # more than what was seen only after a change of batch size
    first, last = done, done + len(batches)

    def after_step(done: int, metrics: MetricLogger) -> None:
        signal = interruption.requested()
        steps = done // args.accum_steps
        if not signal and done < last and not (args.save_every_steps and steps % args.save_every_steps == 0):
            return
        run.seen = batches.seen + (done - first) * batches.images_per_step if done < last else batches.length
        run.sums = metrics.sums()
        where = f"after {done} of {last} batches of epoch {run.epoch}"
        if output_dir:
            run.save(output_dir, "checkpoint.pth")
        if signal:
            saved = f"saved {output_dir}/checkpoint.pth; go on with --resume auto" if output_dir else "nothing saved"
            logger.info(f"stopped by a signal {where}: {saved}")
            interruption.leave(signal)

    with Interruption() as interruption:
        return train_one_epoch(
            model, criterion, loader, run.optimizer, device, run.epoch, args.clip_max_norm,
            amp=args.amp, scaler=run.scaler, accum_steps=args.accum_steps, print_freq=args.print_freq,
            done=done, sums=run.sums, after_step=after_step,
        )  # fmt: skip


def build_parts(args, device: torch.device, checkpoint: dict | None = None, name: str = "") -> tuple:
    """Build model, criterion and post-processors on the device, with the weights of a checkpoint called `name`."""
    # A run that goes on has its own weights already: what it was begun from no longer matters.
    begun_from = args.finetune or args.frozen_weights
    origin = load_checkpoint(begun_from) if begun_from and not checkpoint else None
    # A checkpoint holds the backbone too: nothing is downloaded to be overwritten.
    weights = "none" if checkpoint or origin else args.backbone_weights
    parts = argparse.Namespace(**{**vars(args), "backbone_weights": weights, "device": str(device)})
    model, criterion, postprocessors = build_model(parts)
    if checkpoint:
        load_model(model, checkpoint, name)
        logger.info(f"weights from {name}")
        if other := changed_flags(args, checkpoint, SHAPELESS):
            logger.warning(f"{name} was trained as another network: {', '.join(other.values())}")
    elif args.finetune:
        logger.info("\n  ".join(finetune(model, origin["model"], args.finetune)))
    elif args.frozen_weights:
        load_model(model.detr, origin, args.frozen_weights)
        logger.info(f"detector from {args.frozen_weights}, frozen: only the mask head trains")
    elif args.eval:
        logger.warning("evaluating a model that was never trained: --resume names its checkpoint")
    model.to(device)
    if args.compile:
        compile_network(model)
    return model, criterion, postprocessors


def build_run(args, model: nn.Module, train_set: Dataset) -> Run:
    """Build the optimizer and its schedule: AdamW with a rate of its own for the backbone, and steps down by ten."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "backbone" not in name]},
        {"params": [p for name, p in named if "backbone" in name], "lr": args.lr_backbone},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=args.amp == "fp16")
    return Run(model, optimizer, lr_scheduler, scaler, args, train_set.class_names, args.start_epoch)


def build_train_loader(train_set: Dataset, args, device: torch.device) -> DataLoader:
    """Build the loader of shuffled, augmented batches."""
    batches = TrainBatches(len(train_set), args.batch_size, args.seed, get_rank(), get_world_size())
    return _loader(train_set, batches, args, device)


def build_val_loader(val_set: Dataset, args, device: torch.device) -> DataLoader:
    """Build the loader of every validation image once."""
    sizes = None
    if args.eval_padding_free:
        sizes = [resized_size(h, w, args.min_size, args.max_size) for h, w in val_set.sizes]
    batches = EvalBatches(len(val_set), args.batch_size, get_rank(), get_world_size(), sizes)
    return _loader(val_set, batches, args, device)


def _loader(dataset: Dataset, batches, args, device: torch.device) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        worker_init_fn=worker_init,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: the global one belongs to dropout, and must not depend on loaders
    )


def distribute(model: nn.Module, processes, device: torch.device) -> nn.Module:
    """Wrap the model for several processes; a single one gets it back as it is."""
    if not processes.distributed:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def leave_behind(output_dir: Path, run: Run, log: dict, evaluator: CocoEvaluator | None) -> None:
    """Write what an epoch leaves, its checkpoint last. Every process calls it, the main one writes."""
    epoch, names = log["epoch"], []
    if run.epoch % run.flags.lr_drop == 0 or run.epoch % 100 == 0:
        names.append(f"checkpoint{epoch:04}.pth")
    quality = from_main(lambda: judged(log))
    if quality > run.best:
        run.best = quality
        names.append("checkpoint_best.pth")
    if is_main_process():
        write_results(output_dir, log, evaluator)
    run.save(output_dir, *names, "checkpoint.pth")  # last: with it, the epoch counts as done


def write_results(output_dir: Path, log: dict, evaluator: CocoEvaluator | None) -> None:
    """Append the epoch's row to `log.txt`, redraw the curves, and write the predictions of an evaluation."""
    with (output_dir / "log.txt").open("a") as file:
        file.write(json.dumps(log) + "\n")
    draw_curves(output_dir)
    if evaluator and "bbox" in evaluator.coco_eval:
        evaluator.save_predictions(output_dir)
        (output_dir / "eval").mkdir(exist_ok=True)
        numbered = [output_dir / "eval" / f"{log['epoch']:03}.pth"] if log["epoch"] % 50 == 0 else []
        files = [output_dir / "eval" / "latest.pth", *numbered]
        save_checkpoint(curves(evaluator.coco_eval["bbox"]), *files)


def forget_rows(log_file: Path, epoch: int) -> None:
    """Drop from a log the epochs that are about to be gone through (again): one row each is left in the end."""
    if log_file.exists():
        lines = log_file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _epoch_of(line) < epoch]
        if len(kept) < len(lines):
            draft = log_file.with_suffix(".tmp")
            draft.write_text("".join(kept))
            draft.replace(log_file)


def _epoch_of(line: str) -> int:
    """Read the epoch off a row of the log; a line that is none of ours is of no epoch, and stays."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return -1


def judged(log: dict) -> float:
    """Return what epochs are compared by: PQ where there is one, else AP of masks, else AP of boxes; -1 for nothing."""
    if "test_PQ_all" in log:
        return log["test_PQ_all"]["pq"]
    return log.get("test_coco_eval_masks", log.get("test_coco_eval_bbox", [-1.0]))[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[get_args_parser()], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    main(parser.parse_args())

"""The flags of a run, its set-up, and the loop over epochs.

python main.py --coco_path /data/coco --output_dir runs/r50          # the published recipe
python main.py --coco_path /data/coco --eval --resume FILE_OR_URL    # AP of a checkpoint
python main.py --coco_path /data/coco --masks --frozen_weights FILE  # masks on top of a trained detector
"""

import argparse
import sys

from util.cli import command_line, exit_status
from util.flags import LEAST_VALUES, NEW_FLAGS, changed_flags, check_numbers, with_defaults, with_values
from util.recipes import RECIPES, parse_args


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Declare every flag. The defaults are the published recipe."""
    new = NEW_FLAGS
    parser = argparse.ArgumentParser("DETR", add_help=False)
    add = _group(parser, "optimisation")
    add("--lr", default=1e-4, type=float, help="learning rate of the transformer and the heads")
    add("--lr_backbone", default=1e-5, type=float, help="learning rate of the backbone; 0 freezes it")
    add("--batch_size", default=2, type=int, help="images per process and step")
    add("--weight_decay", default=1e-4, type=float, help="AdamW's weight decay")
    add("--epochs", default=300, type=int, help="epochs in all")
    add("--lr_drop", default=200, type=int, help="divide both rates by 10 every so many epochs")
    add("--clip_max_norm", default=0.1, type=float, help="largest norm of the gradient; 0: no clipping")
    add("--accum_steps", default=1, type=int, help="batches whose gradients are averaged for one step")
    add("--amp", choices=["none", "auto", "bf16", "fp16"], help="half precision in the network; auto: where it is fast")
    add("--tf32", action="store_true",
        help="let float32 products on a GPU round their inputs to TF32, 10 bits of fraction")
    add("--compile", action="store_true", help="compile the network (torch.compile)")
    add("--checkpoint_activations", action="store_true",
        help="compute inner results of the blocks again in the backward pass: less memory, more time")

    add = _group(parser, "backbone")
    add("--backbone", default="resnet50", type=str,
        help="a ResNet of torchvision: resnet18 to resnet152, resnext50_32x4d, wide_resnet50_2..., or timm/NAME")
    add("--dilation", action="store_true", help="stride 16 instead of 32 in the last stage (DC5; resnet50 and deeper)")
    add("--position_embedding", default="sine", type=str,
        help="sine or learned: kind of position encoding (models/position_encoding.py)")
    add("--backbone_weights", default=new["backbone_weights"], metavar="imagenet|imagenet_v2|none|PATH",
        help="torchvision's ImageNet V1 or V2 weights, random ones, or a state dict in torchvision's names")
    add("--backbone_norm", default=new["backbone_norm"], choices=("frozen", "batch"),
        help="frozen: statistics and affine stay as loaded; batch: trained, as is every layer (to train from scratch)")

    add = _group(parser, "transformer")
    add("--enc_layers", default=6, type=int, help="encoder layers")
    add("--dec_layers", default=6, type=int, help="decoder layers")
    add("--dim_feedforward", default=2048, type=int, help="inner width of the feed-forward layers")
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

    add = _group(parser, "convergence (training only: the network does not change)")
    add("--denoising_groups", default=new["denoising_groups"], type=int,
        help="groups of denoising queries, whose targets are noised objects; 0: none")
    add("--denoising_box_noise", default=new["denoising_box_noise"], type=float,
        help="largest shift of a noised box's corners, as a share of half its sides")
    add("--denoising_label_noise", default=new["denoising_label_noise"], type=float,
        help="share of noised objects with a random class")
    add("--encoder_loss_coef", default=new["encoder_loss_coef"], type=float,
        help="weight of a loss on the encoder's output, where each cell predicts the object that it lies in; 0: none")
    add("--query_init", default=new["query_init"], choices=("random", "local"),
        help="local: object queries begin as the points of a grid, and attend to the image near them")
    add("--ema_decay", default=0.0, type=float,
        help="evaluate and save a moving average of the weights with this decay, for example 0.999; 0: none")
    add("--lr_schedule", default="step",
        help="step: divide the rates by 10 at --lr_drop; linear, cosine: lower them to 0 over the run, at every step")
    add("--warmup_steps", default=0, type=int, help="first steps, over which the rates rise from 0")
    add("--decoder_delay", default=0.0, type=float,
        help="first share of the run's steps, in which decoder and queries keep their weights")

    add = _group(parser, "data")
    add("--dataset_file", default="coco", help="coco, coco_panoptic, shapes or shapes_panoptic (datasets/__init__.py)")
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
    add("--max_size", default=new["max_size"], type=int, help="longest side at most, in pixels")
    add("--augment", default=new["augment"], choices=("full", "strong", "crop", "flip", "none"),
        help="full: the published flips, sizes and crops; strong: more of them, and changes of colour; crop: flips, "
        "changes of colour and enlarged crops, at the evaluation's size; flip: only flips, at that size; none: neither")
    add("--class_balance", default=new["class_balance"], choices=("none", "weights", "repeat"),
        help="for rare classes: weights: a larger weight in the loss; repeat: images with them are drawn more often")
    add("--image_dtype", default="uint8", choices=("uint8", "float32"),
        help="uint8: images reach the device as bytes and the model normalises them; float32: the loader does")
    add("--allow", action="append", default=[], choices=("large_images", "outside_paths"),
        help="large_images: beyond PIL's limit of pixels; outside_paths: file names that lead out of the image folder")
    add("--shapes_train", default=new["shapes_train"], type=int, help="generated training images")
    add("--shapes_val", default=new["shapes_val"], type=int, help="generated validation images")
    add("--shapes_size", default=new["shapes_size"], type=int, help="longest side of generated images")
    add("--shapes_classes", default=new["shapes_classes"], type=int, help="classes of generated objects, 1 to 8")
    add("--shapes_seed", default=new["shapes_seed"], type=int, help="seed of the generated dataset")

    add = _group(parser, "run")
    add("--recipe", choices=list(RECIPES), help="values for many flags at once (util/recipes.py); given flags override")
    add("--output_dir", default="", help="folder for checkpoints, logs and pictures; empty: nothing is written")
    add("--device", default="cuda", help="device to run on; without a GPU the CPU is used")
    add("--seed", default=42, type=int, help="seed of weights, data order and augmentation")
    add("--resume", default="",
        help="checkpoint to continue from (file or URL), or auto: the furthest in --output_dir, if any")
    add("--finetune", default="", metavar="FILE_OR_URL",
        help="checkpoint to start from: its weights where they fit, epoch 0, a new optimizer")
    add("--overwrite", action="store_true",
        help="replace the checkpoints and the log of an earlier run in --output_dir; without it such a run is refused")
    add("--start_epoch", default=0, type=int, metavar="N", help="first epoch; a checkpoint that is resumed has its own")
    add("--eval", action="store_true", help="evaluate only")
    add("--eval_every", default=1, type=int, help="evaluate after every so many epochs, and after the last")
    add("--patience", default=0, type=int, help="end after so many evaluations without a better score; 0: never")
    add("--eval_padding_free", action="store_true",
        help="batch only images of equal size at evaluation, so that the batch size does not change the AP")
    add("--coco_eval", default="auto", choices=("auto", "hotcoco", "pycocotools", "faster"),
        help="AP by hotcoco or pycocotools (the same numbers); auto, or its old name faster: hotcoco where installed")
    add("--eval_max_dets", default=100, type=int,
        help="detections of an image that AP counts, the best ones; COCO's protocol says 100")
    add("--save_every_steps", default=0, type=int,
        help="write checkpoint.pth every so many steps too; 0: after each epoch, and when the run is stopped")
    add("--on_bad_image", default="stop", choices=("stop", "skip"),
        help="when a training image cannot be read: save and stop, or use the next one")
    add("--tensorboard", action="store_true",
        help="write losses, metrics and example pictures to OUTPUT_DIR/tensorboard (pip install tensorboard)")
    add("--print_freq", default=10, type=int, help="steps between log lines")
    add("--num_workers", default=2, type=int, help="data loading processes, per training process")

    add = _group(parser, "distributed")
    add("--world_size", default=1, type=int,
        help="accepted for old scripts; the launcher sets the number of processes")
    add("--dist_url", default="env://", help="address at which processes connect (torch.distributed's init_method)")
    return parser


# fmt: on
def _group(parser: argparse.ArgumentParser, title: str):
    return parser.add_argument_group(title).add_argument


# The flags come before these imports, which take seconds: --help and misspelt flags are answered at once.
if __name__ == "__main__":
    FLAGS = parse_args(command_line(__doc__, get_args_parser()))

from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from datasets import build_dataset, build_datasets, get_coco_api_from_dataset
from datasets.class_balance import class_weights
from datasets.class_metrics import write_classes
from datasets.coco_backends import pick_backend
from datasets.coco_eval import write_evaluation
from datasets.loaders import build_train_loader, build_val_loader
from engine import EvalOptions, allow_tf32, compile_network, evaluate, pick_amp, train_one_epoch
from models import build_model
from models.position_encoding import LEARNED_CELLS, OLD_NAMES, POSITION_EMBEDDINGS
from models.training import build_training
from models.weights import build_parts
from util.build_run import build_run
from util.checkpoint import load_resumed, position
from util.dist import ProcessInfo, broadcast_buffers, distribute, is_main_process, pick_device, process_group
from util.interruption import Interruption
from util.logger import configure_logging, log_file, logger
from util.optim import SHAPES
from util.origin import describe
from util.output_dir import files_to_replace, locked, make_folder
from util.project import get_sha

__all__ = ["build_dataset", "build_model", "get_args_parser", "get_coco_api_from_dataset", "main"]


def check_flags(args) -> None:
    """Raise ValueError for values, and combinations of them, that cannot be used."""
    check_numbers(vars(args), LEAST_VALUES)
    stride = 4 if args.masks else 16 if args.dilation else 32  # of the finest features that have positions
    refusals = [
        (args.frozen_weights and not args.masks, "--frozen_weights trains a mask head on a frozen model: add --masks"),
        (args.hidden_dim % args.nheads, f"--hidden_dim {args.hidden_dim} cannot be split into --nheads {args.nheads}"),
        (args.hidden_dim % 4, f"--hidden_dim {args.hidden_dim}: positions need a multiple of 4"),
        (args.position_embedding not in (*POSITION_EMBEDDINGS, *OLD_NAMES),
            f"--position_embedding {args.position_embedding}: choose one of {', '.join(POSITION_EMBEDDINGS)}"),
        (args.query_init == "local" and args.position_embedding not in ("sine", "v2"),
            f"--query_init local with --position_embedding {args.position_embedding}: it needs sine"),
        (args.lr_schedule not in SHAPES, f"--lr_schedule {args.lr_schedule}: choose one of {', '.join(SHAPES)}"),
        (args.dropout >= 1, f"--dropout {args.dropout}: give less than 1"),
        (args.ema_decay >= 1, f"--ema_decay {args.ema_decay}: give less than 1"),
        (args.decoder_delay >= 1, f"--decoder_delay {args.decoder_delay}: a share of the run; give less than 1"),
        (args.masks and (args.denoising_groups or args.encoder_loss_coef),
            "--denoising_groups and --encoder_loss_coef train boxes: leave out --masks"),
        (args.max_size < args.min_size, f"--max_size {args.max_size} is below --min_size {args.min_size}"),
        (args.position_embedding == "learned" and args.max_size > stride * LEARNED_CELLS,
            f"--max_size {args.max_size}: learned positions cover {LEARNED_CELLS} cells of {stride} pixels; give "
            f"{stride * LEARNED_CELLS} or less, or --position_embedding sine"),
        (not args.eval and args.start_epoch >= args.epochs,
            f"--start_epoch {args.start_epoch} of --epochs {args.epochs}: nothing would be trained; give more epochs"),
        (args.resume == "auto" and not args.output_dir, "--resume auto looks in --output_dir: give one"),
        (args.tensorboard and not args.output_dir, "--tensorboard writes to --output_dir: give one"),
        (args.finetune and args.resume not in ("", "auto"), "--finetune starts a run, --resume continues: choose one"),
        (args.finetune and args.frozen_weights, "--finetune and --frozen_weights both give weights: choose one"),
        (args.finetune and args.eval, "--finetune is for training; --eval takes a whole model: use --resume"),
        (args.eval and args.frozen_weights and not args.resume, "--eval takes a whole model: give --resume"),
        (args.backbone_norm == "batch" and not args.lr_backbone, "--backbone_norm batch trains: --lr_backbone is 0"),
        (args.masks and (args.hidden_dim % 128 or args.nheads % 8),
            f"--masks with --hidden_dim {args.hidden_dim} and --nheads {args.nheads}: give multiples of 128 and of 8"),
    ]  # fmt: skip
    for wrong, why in refusals:
        if wrong:
            raise ValueError(why)


@record
def main(args) -> None:
    """Train or evaluate as the flags say; flags that `args` lacks have their defaults.

    Raises ValueError or FileNotFoundError for flags and files that cannot be used.
    """
    args = with_defaults(args, vars(get_args_parser().parse_args([])))
    args = with_defaults(args, {"given_flags": list(changed_flags(args, get_args_parser()))})
    check_flags(args)
    pick_backend(args.coco_eval)  # raises for a package that is not installed
    configure_logging()
    folder = "" if args.eval else args.output_dir
    with process_group(args.device, args.dist_url) as processes, locked(folder), Interruption() as interruption:
        with log_file(set_up(args, processes)):
            run_process(args, processes, interruption)


def run_process(args, processes: ProcessInfo, interruption: Interruption) -> None:
    """Run one process: build, resume, then evaluate or train."""
    device = pick_device(args.device, processes.local_rank)
    log_start(args)
    name, checkpoint = load_resumed(args.resume, args.output_dir)
    if checkpoint:
        args = describe(args, checkpoint, name)
        check_flags(args)
    start = position(checkpoint) if checkpoint else (args.start_epoch, 0)
    obsolete = files_to_replace("" if args.eval else args.output_dir, name, start, args.overwrite)
    train_set, val_set, num_classes = build_datasets(args, checkpoint)
    args = with_values(args, num_classes=num_classes, thing_classes=getattr(val_set, "thing_classes", None))
    val_loader = build_val_loader(val_set, args, device)
    base_ds = get_coco_api_from_dataset(val_set) if is_main_process() else None
    model, criterion, postprocessors = build_parts(args, device, checkpoint, name, (train_set or val_set).class_names)
    if args.compile:
        compile_network(model)
    amp = pick_amp(args.amp, device)
    options = EvalOptions(amp, args.coco_eval, args.eval_max_dets, args.print_freq)
    evaluation = (criterion, postprocessors, val_loader, base_ds, device, args.output_dir, options)
    if args.eval:
        _, evaluator = evaluate(model, *evaluation)
        write_evaluation(evaluator, args.output_dir, "eval.pth")
        write_classes(evaluator, args.output_dir)
        return

    if args.class_balance == "weights":
        criterion.empty_weight[:-1] = torch.tensor(class_weights(train_set))
    train_loader = build_train_loader(train_set, args, device)
    network, train_criterion, training_only = build_training(args, model, criterion)
    run = build_run(args, model, train_loader, train_set.class_names, training_only, interruption)
    run.with_targets = network is not model
    run.restore(checkpoint, name)
    network = distribute(network, processes, device)
    logger.info(f"{run.trainable_parameters()} trainable parameters; {args.epochs} epochs, {run.epoch} of them done")
    for path in obsolete:
        path.unlink()
    for epoch in run.epochs():
        with run.training(train_loader):
            train_stats = train_one_epoch(
                network, train_criterion, train_loader, run.optimizer, device, epoch, args.clip_max_norm,
                amp=amp, scaler=run.scaler, accum_steps=args.accum_steps, print_freq=args.print_freq, state=run,
            )  # fmt: skip
        test_stats = {}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            broadcast_buffers(run.evaluated_model)
            test_stats, evaluator = evaluate(run.evaluated_model, *evaluation)
            numbered = [f"eval/{epoch:03}.pth"] if epoch % 50 == 0 else []
            write_evaluation(evaluator, args.output_dir, "eval/latest.pth", *numbered)
        run.finish_epoch(train_stats, test_stats)


def set_up(args, processes: ProcessInfo) -> Path | None:
    """Seed the random generators, make the output folder, and return the file for log lines, if there is one."""
    allow_tf32(args.tf32)
    torch.manual_seed(args.seed + processes.rank)
    if not args.output_dir or processes.rank > 0:
        return None
    make_folder(args.output_dir)
    return Path(args.output_dir) / "messages.log"


def log_start(args) -> None:
    """Log the version of the project, and the flags that have other values than their defaults."""
    logger.info(get_sha())
    changed = changed_flags(args, get_args_parser())
    logger.info(f"flags: {' '.join(f'--{name} {value}' for name, value in changed.items()) or 'the defaults'}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(FLAGS)))

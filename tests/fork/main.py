"""The fork's training script, in the style of DETR's first one: its own flags, loaders and loop."""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

import util.misc as utils
from datasets import get_coco_api_from_dataset
from engine import evaluate, train_one_epoch
from tests.fork import dataset, model


def get_args_parser():
    """Declare the flags, none of which is new in this project."""
    parser = argparse.ArgumentParser("fork", add_help=False)
    numbers = {"lr": 1e-4, "lr_backbone": 1e-5, "batch_size": 2, "weight_decay": 1e-4, "clip_max_norm": 0.1}
    numbers |= {"enc_layers": 1, "dec_layers": 2, "dim_feedforward": 64, "hidden_dim": 32, "dropout": 0.1}
    numbers |= {"nheads": 4, "num_queries": 8, "bbox_loss_coef": 5, "eos_coef": 0.1}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    for name in ("dilation", "pre_norm", "masks"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--aux_loss", default=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--position_embedding", default="sine")
    parser.add_argument("--coco_path")
    parser.add_argument("--output_dir")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dist_url", default="env://")
    return parser


def main(args):
    """Train an epoch, evaluate, save."""
    utils.init_distributed_mode(args)
    device = torch.device(args.device)
    network, criterion, postprocessors = model.build(args)
    network.to(device)
    param_dicts = [
        {"params": [p for n, p in network.named_parameters() if "backbone" not in n and p.requires_grad]},
        {
            "params": [p for n, p in network.named_parameters() if "backbone" in n and p.requires_grad],
            "lr": args.lr_backbone,
        },
    ]
    optimizer = torch.optim.AdamW(param_dicts, lr=args.lr, weight_decay=args.weight_decay)
    train, val = dataset.build("train", args), dataset.build("val", args)
    batches = BatchSampler(RandomSampler(train), args.batch_size, drop_last=True)
    train_loader = DataLoader(train, batch_sampler=batches, collate_fn=utils.collate_fn)
    val_loader = DataLoader(val, args.batch_size, sampler=SequentialSampler(val), collate_fn=utils.collate_fn)
    base_ds = get_coco_api_from_dataset(val)

    stats = train_one_epoch(network, criterion, train_loader, optimizer, device, 0, args.clip_max_norm)
    test_stats, evaluator = evaluate(network, criterion, postprocessors, val_loader, base_ds, device, args.output_dir)
    log = {f"train_{k}": v for k, v in stats.items()} | {f"test_{k}": v for k, v in test_stats.items()}
    if utils.is_main_process():
        with (Path(args.output_dir) / "log.txt").open("a") as f:
            f.write(json.dumps(log) + "\n")
        torch.save(evaluator.coco_eval["bbox"].eval, Path(args.output_dir) / "eval.pth")
        utils.save_on_master({"model": network.state_dict(), "args": args}, Path(args.output_dir) / "checkpoint.pth")
    return log

"""Build the state of a training run from the flags."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from util.interruption import Interruption
from util.optim import build_lr_scheduler, build_optimizer, moving_average
from util.run import Run
from util.tensorboard import TensorBoard


def build_run(
    args, model: nn.Module, train_loader: DataLoader, class_names: dict[int, str],
    training_only: nn.Module | None = None, interruption: Interruption | None = None,
) -> Run:  # fmt: skip
    """Build the state of a training run at its beginning."""
    every_step = args.lr_schedule != "step" or args.warmup_steps > 0 or args.decoder_delay > 0
    steps_per_epoch = math.ceil(len(train_loader) / args.accum_steps) if every_step else 0
    optimizer = build_optimizer(args, model, training_only)
    ema = (
        AveragedModel(model, multi_avg_fn=moving_average(args.ema_decay), use_buffers=True) if args.ema_decay else None
    )
    return Run(
        model,
        optimizer,
        build_lr_scheduler(args, optimizer, steps_per_epoch),
        torch.amp.GradScaler(next(model.parameters()).device.type, enabled=args.amp == "fp16"),
        {name: value for name, value in vars(args).items() if name != "given_flags"},
        class_names,
        output_dir=Path(args.output_dir) if args.output_dir else None,
        accum_steps=args.accum_steps,
        save_every_steps=args.save_every_steps,
        check_signals_every=args.print_freq,
        lr_drop=args.lr_drop,
        steps_per_epoch=steps_per_epoch,
        images_per_step=train_loader.batch_sampler.images_per_step * args.accum_steps,
        ema=ema,
        training_only=training_only,
        tensorboard=TensorBoard(Path(args.output_dir) / "tensorboard") if args.tensorboard else None,
        epoch=args.start_epoch,
        interruption=interruption or Interruption(),
    )

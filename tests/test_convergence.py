"""Denoising queries, averaged weights and schedules in whole runs: exact resume, and an unchanged network."""

import pytest
import torch

import main
from models import build_model
from tests.helpers import loader_of, parse, write_coco
from util.checkpoint import load_model
from util.optim import build_lr_scheduler, build_optimizer
from util.run import Run

FAST = "--denoising_groups 2 --encoder_loss_coef 1 --query_init local --ema_decay 0.9 "
FAST += "--lr_schedule linear --warmup_steps 3 --decoder_delay 0.2"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    objects = [(11, 1, [4, 4, 20, 30], {}), (11, 3, [30, 10, 25, 25], {}), (12, 1, [10, 5, 30, 30], {})]
    write_coco(root, "train", [11, 12, 13, 14], objects)
    write_coco(root, "val", [11, 12, 13], objects)
    return root


def load(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


class Stop(Exception):
    """Ends a run in mid-epoch."""


@pytest.mark.slow
def test_convergence_flags_resume_in_mid_epoch_with_the_same_bits(data, tmp_path, monkeypatch):
    flags = f"--coco_path {data} --batch_size 1 --epochs 2 {FAST} --save_every_steps 1"
    main.main(parse(f"{flags} --output_dir {tmp_path}/whole"))
    after_step, steps = Run.after_step, []

    def stop_after_six(self, *args):
        after_step(self, *args)
        steps.append(1)
        if len(steps) == 6:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Run, "after_step", stop_after_six)
        main.main(parse(f"{flags} --output_dir {tmp_path}/halves"))
    main.main(parse(f"{flags} --output_dir {tmp_path}/halves --resume auto"))
    whole, halves = load(tmp_path / "whole"), load(tmp_path / "halves")
    assert_equal_states(whole["model"], halves["model"])
    assert_equal_states(whole["ema"]["trained_model"], halves["ema"]["trained_model"])
    assert_equal_states(whole["training_only"], halves["training_only"])
    assert whole["ema"]["updates"] == halves["ema"]["updates"] == 8
    assert (tmp_path / "whole" / "log.txt").read_text() == (tmp_path / "halves" / "log.txt").read_text()


@pytest.mark.slow
def test_convergence_flags_leave_a_checkpoint_of_the_plain_network(data, tmp_path):
    main.main(parse(f"--coco_path {data} --batch_size 2 --epochs 1 {FAST} --output_dir {tmp_path}"))
    state = load(tmp_path)
    plain = build_model(parse("--num_classes 4"))[0]
    load_model(plain, state, "checkpoint.pth")
    assert set(state["model"]) == set(plain.state_dict())
    assert any(not torch.equal(v, state["ema"]["trained_model"][name]) for name, v in state["model"].items())
    positions = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    rest, backbone = [len(group["params"]) for group in build_optimizer(parse(), plain).param_groups]
    delayed = sum(name.startswith(("transformer.decoder", "query_embed")) for name, _ in plain.named_parameters())
    assert positions == [rest - delayed, backbone, delayed, 3]


def test_ema_checkpoint_holds_the_average_as_its_model():
    torch.manual_seed(0)
    args = parse("--num_classes 4 --ema_decay 0.2")
    model = build_model(args)[0]
    run = main.build_run(args, model, loader_of(), {})
    weights = []
    for _ in range(3):
        with torch.no_grad():
            model.class_embed.bias += 1
        weights.append(model.class_embed.bias.detach().clone())
        run.ema.update_parameters(model)
    early = 2 / 11 * weights[0] + 9 / 11 * weights[1]  # a decay of (1 + 1) / (10 + 1), while that is below 0.2
    expected = 0.2 * early + 0.8 * weights[2]
    torch.testing.assert_close(run.evaluated_model.class_embed.bias.detach(), expected)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("step", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.1, 0.1]),
        ("linear", [0.25, 0.45, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_lr_schedule_with_warmup_gives_these_factors(schedule, rates):
    args = parse(f"--lr_schedule {schedule} --warmup_steps 3 --epochs 5 --lr_drop 4")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(args, optimizer, steps_per_epoch=2)
    found = []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(rates)


def test_lr_schedule_cosine_ends_at_zero():
    args = parse("--lr_schedule cosine --epochs 5")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(args, optimizer, steps_per_epoch=2)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_decoder_delay_trains_decoder_and_queries_after_its_share_of_the_steps():
    torch.manual_seed(0)
    args = parse("--num_classes 4 --decoder_delay 0.3 --warmup_steps 1 --lr_schedule linear --epochs 10 --dropout 0")
    model = build_model(args)[0]
    optimizer = build_optimizer(args, model)
    scheduler = build_lr_scheduler(args, optimizer, steps_per_epoch=1)
    rates = []
    for step in range(5):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        rates.append(optimizer.param_groups[2]["lr"] / args.lr)
        sum(p.sum() + p.square().sum() for p in model.parameters() if p.requires_grad).backward()
        optimizer.step()
        scheduler.step()
        moved = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
        waiting = {name for name, _ in model.named_parameters() if name.startswith(("transformer.decoder", "query_e"))}
        every = {name for name, p in model.named_parameters() if p.requires_grad}
        assert moved == (every if step >= 3 else every - waiting)
    assert rates == pytest.approx([0, 0, 0, 0.5 * 0.7, 0.6])
    panoptic = torch.nn.ModuleDict({"detr": model})  # whose parameters are named so
    assert len(build_optimizer(args, panoptic).param_groups[2]["params"]) == len(waiting)


def test_denoising_with_masks_is_refused():
    with pytest.raises(ValueError, match="leave out --masks"):
        main.main(parse("--masks --denoising_groups 2 --hidden_dim 128 --nheads 8"))

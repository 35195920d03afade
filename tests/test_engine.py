import math
import re

import pytest
import torch
from torch import nn

import main
from engine import EvalOptions, evaluate, pick_amp, train_one_epoch
from models import build_model
from tests.helpers import loader_of, parse
from util.nested_tensor import nested_tensor_from_tensor_list


def batch(n=2, first_id=1, objects=1):
    generator = torch.Generator().manual_seed(first_id)
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator) for _ in range(n)]
    targets = [
        {
            "labels": torch.full((objects,), 1),
            "boxes": torch.full((objects, 4), 0.5),
            "image_id": torch.tensor([first_id + i]),
            "orig_size": torch.tensor([48, 64]),
            "note": "not a tensor",
        }
        for i in range(n)
    ]
    return nested_tensor_from_tensor_list(images), targets


def parts(flags=""):
    torch.manual_seed(0)
    model, criterion, post = build_model(parse(f"--num_classes 4 --dropout 0 {flags}"))
    return model, criterion, post, torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.mark.slow
def test_an_epoch_learns_and_reports_what_the_log_needs():
    model, criterion, _, optimizer = parts()
    batches = [batch(2, i) for i in (1, 3)]
    stats = [train_one_epoch(model, criterion, batches, optimizer, torch.device("cpu"), e, 0.1) for e in range(6)]
    assert stats[-1]["loss"] < 0.8 * stats[0]["loss"]
    names = {"loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "loss_giou_0"}
    expected = {"lr", "loss", "class_error", "class_error_unscaled"} | names | {f"{n}_unscaled" for n in names}
    assert set(stats[0]) == expected | {"cardinality_error_unscaled", "cardinality_error_0_unscaled"}
    assert stats[0]["loss_bbox"] == pytest.approx(5 * stats[0]["loss_bbox_unscaled"])
    assert stats[0]["loss"] == pytest.approx(sum(stats[0][name] for name in names))


def test_log_lines_have_the_published_format(caplog):
    model, criterion, _, optimizer = parts()
    caplog.set_level("INFO", "detr")
    train_one_epoch(model, criterion, [batch()] * 3, optimizer, torch.device("cpu"), 7, print_freq=2)
    first, last, total = [record.getMessage() for record in caplog.records]
    head = r"Epoch: \[7\]  \[0/3\]  eta: 0:\d\d:\d\d  lr: 0.001000  class_error: \d+.\d\d  "
    assert re.match(head + r"loss: [\d.]+ \([\d.]+\)  loss_ce: .*time: [\d.]+  data: [\d.]+", first), first
    assert "[2/3]" in last and total.startswith("Epoch: [7] Total time: 0:0")


def test_train_with_a_criterion_without_class_error_leaves_it_out():
    model, criterion, _, optimizer = parts()

    class Boxes(nn.Module):
        weight_dict = criterion.weight_dict

        def forward(self, outputs, targets):
            return {name: value for name, value in criterion(outputs, targets).items() if "class_error" not in name}

    stats = train_one_epoch(model, Boxes(), [batch()], optimizer, torch.device("cpu"), 0)
    assert "class_error" not in stats and all(map(math.isfinite, stats.values()))


def test_gradients_accumulate_to_the_mean_of_the_batches():
    results = []
    for accum, data in ((1, [batch(4)]), (2, [batch(2, 1), batch(2, 3)])):
        model, criterion, _, _ = parts()
        images = torch.cat([b[0].tensors for b in data])
        torch.manual_seed(1)
        images = torch.randint(0, 256, images.shape, dtype=torch.uint8)
        data = [
            (nested_tensor_from_tensor_list(part), t)
            for part, (_, t) in zip(images.split(4 // accum), data, strict=True)
        ]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_one_epoch(model, criterion, data, optimizer, torch.device("cpu"), 0, accum_steps=accum)
        results.append(model.bbox_embed.layers[-1].weight.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_an_incomplete_last_group_still_steps():
    model, criterion, _, optimizer = parts()
    steps = []
    optimizer.register_step_post_hook(lambda *args: steps.append(1))
    train_one_epoch(model, criterion, [batch()] * 5, optimizer, torch.device("cpu"), 0, accum_steps=2)
    assert len(steps) == 3


def test_a_loss_that_is_not_finite_stops_before_the_weights_learn_from_it():
    model, criterion, _, optimizer = parts()
    with torch.no_grad():
        model.bbox_embed.layers[-1].bias.fill_(float("nan"))
    before = model.class_embed.weight.detach().clone()
    with pytest.raises(
        FloatingPointError, match=r"epoch 3, step 0, images \[5, 6\].*loss_bbox, loss_giou, loss_bbox_0, "
    ) as caught:
        train_one_epoch(model, criterion, [batch(2, 5)], optimizer, torch.device("cpu"), 3)
    assert "loss_ce" not in str(caught.value) and torch.equal(before, model.class_embed.weight)


def test_the_gradient_is_clipped():
    model, criterion, _, _ = parts()
    norms = []

    class Watch(torch.optim.SGD):
        def step(self, *args, **kwargs):
            norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())

    train_one_epoch(model, criterion, [batch()], Watch(model.parameters(), lr=1), torch.device("cpu"), 0, 0.1)
    train_one_epoch(model, criterion, [batch()], Watch(model.parameters(), lr=1), torch.device("cpu"), 0)
    assert norms[0] == pytest.approx(0.1, rel=1e-3) and norms[1] > 1


def test_bf16_runs_the_network_in_half_and_the_loss_in_float():
    model, criterion, _, optimizer = parts()
    seen = []
    model.input_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    model.bbox_embed.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    stats = train_one_epoch(model, criterion, [batch()], optimizer, torch.device("cpu"), 0, amp="bf16")
    assert seen == [torch.bfloat16, torch.float32] and math.isfinite(stats["loss"])


@pytest.mark.slow
def test_fp16_scales_its_loss_and_leaves_out_steps_that_overflow():
    model, criterion, _, _ = parts("--backbone_norm batch")
    run = main.build_run(parse("--amp fp16"), model, loader_of(), {})
    assert run.scaler.is_enabled()
    weights, options = [model.class_embed.weight.clone()], {"amp": "fp16", "scaler": run.scaler}
    for scale in (2.0**16, 2.0**7):
        run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": scale})
        train_one_epoch(model, criterion, [batch(1)], run.optimizer, torch.device("cpu"), 0, **options)
        weights.append(model.class_embed.weight.clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert run.scaler.get_scale() == 2**7 and weights[2].isfinite().all()


@pytest.mark.parametrize("max_norm", [0, 0.1])
def test_train_with_a_gradient_that_is_not_finite_stops_before_the_step(max_norm):
    model, criterion, _, optimizer = parts()
    model.query_embed.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = model.class_embed.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"epoch 3, step 0, images \[5, 6\].*gradient of query_embed.weight"):
        train_one_epoch(model, criterion, [batch(2, 5)], optimizer, torch.device("cpu"), 3, max_norm)
    assert torch.equal(before, model.class_embed.weight)


@pytest.mark.slow
def test_train_in_fp16_with_a_forward_overflow_skips_the_step_and_stops_when_a_lower_scale_does_not_help(monkeypatch):
    monkeypatch.setattr("engine.MIN_SCALE", 2.0**3)  # fewer steps: fp16 is slow on a CPU
    model, criterion, _, _ = parts("--backbone_norm batch")
    run = main.build_run(parse("--amp fp16"), model, loader_of(), {})
    calls = []

    def overflow(module, inputs, output):
        calls.append(1)
        return (output.half() * 60000 * 60000).to(output.dtype) if len(calls) == 2 else output

    handle = model.class_embed.register_forward_hook(overflow)
    options = {"amp": "fp16", "scaler": run.scaler}
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**7})
    stats = train_one_epoch(model, criterion, [batch(1)] * 3, run.optimizer, torch.device("cpu"), 0, 0.1, **options)
    assert math.isfinite(stats["loss"]) and all(p.isfinite().all() for p in model.parameters())
    assert run.scaler.get_scale() == 2**6
    handle.remove()
    model.class_embed.register_forward_hook(lambda *args: args[-1] * float("inf"))
    with pytest.raises(FloatingPointError, match="epoch 1, step 3,"):
        train_one_epoch(model, criterion, [batch(1)] * 9, run.optimizer, torch.device("cpu"), 1, 0.1, **options)


def test_a_batch_without_objects_trains():
    model, criterion, _, optimizer = parts()
    stats = train_one_epoch(model, criterion, [batch(objects=0)], optimizer, torch.device("cpu"), 0, 0.1)
    assert stats["loss_bbox"] == 0 and stats["loss_ce"] > 0


def test_evaluation_scores_every_image_at_its_original_size(coco_root):
    from datasets import build_dataset, get_coco_api_from_dataset
    from util.nested_tensor import collate_fn

    dataset = build_dataset("val", parse(f"--coco_path {coco_root}"))
    loader = [collate_fn([dataset[0], dataset[1]]), collate_fn([dataset[2]])]

    class Oracle(nn.Module):
        """Answers with the ground truth, whatever it is shown."""

        def __init__(self):
            super().__init__()
            self.batches = iter(loader)

        def forward(self, samples):
            self.half = torch.is_autocast_enabled("cpu")
            targets = next(self.batches)[1]
            logits, boxes = torch.zeros(len(targets), 8, 5), torch.full((len(targets), 8, 4), 0.01)
            logits[..., 4] = 20
            for i, target in enumerate(targets):
                for q, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
                    logits[i, q, label], logits[i, q, 4], boxes[i, q] = 20, 0, box
            return {"pred_logits": logits, "pred_boxes": boxes}

    _, criterion, post, _ = parts("--no_aux_loss")
    base_ds = get_coco_api_from_dataset(dataset)
    model, cpu = Oracle(), torch.device("cpu")
    stats, evaluator = evaluate(model, criterion, post, loader, base_ds, cpu, "")
    assert stats["coco_eval_bbox"][0] == pytest.approx(1) and len(stats["coco_eval_bbox"]) == 12
    assert stats["loss_bbox"] == pytest.approx(0, abs=1e-5) and stats["class_error"] < 100
    assert set(evaluator.results) == {21, 22, 23} and not model.half

    model = Oracle()
    _, evaluator = evaluate(model, criterion, post, loader, base_ds, cpu, "", EvalOptions("bf16", "pycocotools", 50))
    assert model.half and evaluator.coco_eval["bbox"].params.maxDets[-1] == 50
    assert type(evaluator.coco_eval["bbox"]).__module__ == "pycocotools.cocoeval"


def one_step(accum_steps=1, stale=0.0):
    """Weights after the only step of an epoch of one batch."""
    model, criterion, _, _ = parts()
    for p in model.parameters():
        p.grad = torch.full_like(p, stale) if p.requires_grad else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_one_epoch(model, criterion, [batch()], optimizer, torch.device("cpu"), 0, accum_steps=accum_steps)
    return model.class_embed.weight.detach()


def test_an_incomplete_last_group_is_the_mean_of_what_is_in_it():
    torch.testing.assert_close(one_step(accum_steps=2), one_step())


def test_gradients_left_from_before_do_not_count():
    torch.testing.assert_close(one_step(stale=9.0), one_step())


@pytest.mark.slow
def test_fp16_gradients_are_clipped_unscaled():
    model, criterion, _, _ = parts("--backbone_norm batch")
    norms, scaler = [], torch.amp.GradScaler("cpu", init_scale=2.0**7)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    given = [p for p in model.parameters() if p.requires_grad]
    optimizer.register_step_pre_hook(
        lambda *_: norms.append(nn.utils.get_total_norm([p.grad for p in given if p.grad is not None]).item())
    )
    train_one_epoch(
        model, criterion, [batch(1)], optimizer, torch.device("cpu"), 0, 0.1, amp="fp16", scaler=scaler
    )  # fmt: skip
    assert norms == [pytest.approx(0.1, rel=1e-2)]


@pytest.mark.parametrize("fast", [True, False])
def test_amp_auto_is_bf16_where_the_hardware_multiplies_it(fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast or including_emulation)
    for device in ("cpu", "cuda"):
        assert pick_amp("auto", torch.device(device)) == ("bf16" if fast else None)
    assert pick_amp("auto", torch.device("mps")) is None
    given = {None: None, "none": None, "bf16": "bf16", "fp16": "fp16"}
    assert {name: pick_amp(name, torch.device("cpu")) for name in given} == given

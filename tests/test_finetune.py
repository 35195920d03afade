"""What is kept of another model's weights, and what a fine-tuning run is."""

import pytest
import torch

import main
from models import build_model
from tests.helpers import loader_of, parse
from util.checkpoint import load_checkpoint, save_checkpoint
from util.finetune import finetune


def small(flags=""):
    torch.manual_seed(len(flags))
    return build_model(parse(flags))[0]


def test_all_of_an_equal_model_is_kept():
    origin, model = small("--num_classes 4"), small("--num_classes  4")
    lines = finetune(model, origin.state_dict(), "origin.pth")
    assert len(lines) == 1 and "origin.pth" in lines[0]
    assert all(torch.equal(value, origin.state_dict()[name]) for name, value in model.state_dict().items())


def test_another_number_of_classes_begins_only_the_class_head_anew():
    origin, model = small("--num_classes 4"), small("--num_classes 6")
    before = model.class_embed.weight.clone()
    lines = finetune(model, origin.state_dict(), "origin.pth")
    assert lines[1:] == ["class head re-initialised: 4 classes there, 6 here"]
    assert torch.equal(model.class_embed.weight, before)
    names = [name for name in model.state_dict() if not name.startswith("class_embed")]
    assert all(torch.equal(model.state_dict()[name], origin.state_dict()[name]) for name in names)


@pytest.mark.parametrize(
    ("queries", "lines"), [(5, "queries: the first 5 of 8"), (11, "queries: 8 copied, 3 re-initialised")]
)
def test_the_first_queries_are_taken(queries, lines):
    origin, model = small("--num_classes 4"), small(f"--num_classes 4 --num_queries {queries}")
    rest = model.query_embed.weight[8:].clone()
    assert finetune(model, origin.state_dict(), "origin.pth")[1:] == [lines]
    count = min(queries, 8)
    assert torch.equal(model.query_embed.weight[:count], origin.query_embed.weight[:count])
    assert torch.equal(model.query_embed.weight[8:], rest)


def test_layers_that_only_one_of_the_two_has_are_listed():
    deep, shallow = small("--num_classes 4 --dec_layers 3"), small("--num_classes 4")
    assert "not used (absent here): 18 entries" in finetune(shallow, deep.state_dict(), "deep.pth")[1]
    lines = finetune(deep, small("--num_classes 4").state_dict(), "shallow.pth")[1]
    assert "re-initialised (absent there, or of another size): 18 entries, transformer.decoder.layers.2" in lines


def test_box_and_mask_models_take_each_others_weights():
    width = "--num_classes 4 --hidden_dim 128 --nheads 8"
    boxes, masks = small(width), small(f"{width} --masks")
    lines = finetune(boxes, masks.state_dict(), "masks.pth")
    assert lines[0].startswith("fine-tuning from masks.pth") and "not used (absent here): 32 entries" in lines[1]
    assert torch.equal(boxes.query_embed.weight, masks.detr.query_embed.weight)
    masks = small(f"{width}  --masks ")
    lines = finetune(masks, boxes.state_dict(), "boxes.pth")
    assert "re-initialised (absent there, or of another size): 32 entries, bbox_attention" in lines[1]
    assert torch.equal(boxes.query_embed.weight, masks.detr.query_embed.weight)


def test_another_backbone_is_refused():
    model = small("--num_classes 4")
    with pytest.raises(ValueError, match="origin.pth was trained with another backbone.*--backbone"):
        finetune(model, {**model.state_dict(), "backbone.0.body.conv1.weight": torch.zeros(1)}, "origin.pth")


def test_a_live_batch_norm_fits_a_frozen_one():
    model, live = small("--num_classes 4"), small("--num_classes 4 --backbone_norm batch")
    assert len(finetune(model, live.state_dict(), "live.pth")) == 1
    assert len(finetune(live, small("--num_classes 4").state_dict(), "frozen.pth")) <= 2


def test_a_run_begins_at_epoch_0_with_the_weights(coco_root, tmp_path):
    origin = small("--num_classes 7")
    save_checkpoint({"model": origin.state_dict(), "epoch": 40, "optimizer": {}, "args": {}}, tmp_path / "origin.pth")
    args = parse(
        f"--coco_path {coco_root} --output_dir {tmp_path} --finetune {tmp_path / 'origin.pth'} --num_classes 4"
    )
    device = torch.device("cpu")
    model, _, _ = main.build_parts(args, device)
    assert torch.equal(model.query_embed.weight, origin.query_embed.weight)
    assert model.class_embed.out_features == 5
    run = main.build_run(args, model, loader_of(), main.build_dataset("train", args).class_names)
    assert run.epoch == 0 and not run.optimizer.state


def test_a_requeued_run_goes_on_instead_of_beginning_again(tmp_path):
    own = small("--num_classes 4")
    save_checkpoint({"model": own.state_dict()}, tmp_path / "checkpoint.pth")
    args = parse(f"--num_classes 4 --finetune {tmp_path / 'gone.pth'}")
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    model, _, _ = main.build_parts(args, torch.device("cpu"), checkpoint, "checkpoint.pth")
    assert torch.equal(model.query_embed.weight, own.query_embed.weight)


@pytest.mark.parametrize("flags", ["--resume x.pth", "--eval", "--masks --frozen_weights x.pth"])
def test_flags_that_contradict_it_are_refused(flags):
    with pytest.raises(ValueError, match="--finetune"):
        main.check_flags(parse(f"--finetune a.pth {flags}"))

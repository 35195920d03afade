"""Options that are off by default: backbones and weights, strong augmentation, rare classes, patience, less memory."""

import numpy as np
import pytest
import torch
import torchvision

import main
from datasets import build_dataset
from datasets.class_balance import class_weights, repeat_rare
from datasets.coco import make_coco_transforms
from datasets.loaders import build_train_loader
from datasets.transforms import seeded
from models import build_model
from models.backbone import Backbone
from models.checkpointing import checkpoint_activations
from tests.helpers import assert_same_weights, loader_of, parse, write_coco
from util.build_run import build_run
from util.nested_tensor import nested_tensor_from_tensor_list


def train(flags):
    main.main(parse(flags))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in ((64, 96), (80, 64))]


def targets():
    return [{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]]), "labels": torch.tensor([1])} for _ in range(2)]


@pytest.mark.parametrize("dilation", [False, True])
@pytest.mark.slow
def test_checkpointed_activations_change_neither_outputs_nor_gradients(dilation, images):
    flags = "--num_classes 4 --dropout 0.1" + (" --backbone resnet50 --dilation" if dilation else "")
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, criterion, _ = build_model(parse(flags))
        if checkpointed:
            checkpoint_activations(model)
        torch.manual_seed(1)
        losses = criterion(model.train()(nested_tensor_from_tensor_list(images)), targets())
        sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_checkpointed_activations_keep_fewer_bytes(images):
    kept = []
    for checkpointed in (False, True):
        model, _, _ = build_model(parse("--num_classes 4"))
        if checkpointed:
            checkpoint_activations(model)
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model.train()(nested_tensor_from_tensor_list(images))
        kept.append(sum(sizes.values()))
        del outputs
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.slow
def test_checkpointed_activations_train_the_same_weights_with_an_average(coco_root, tmp_path):
    flags = f"--coco_path {coco_root} --batch_size 2 --augment flip --epochs 1 --ema_decay 0.9"
    train(f"{flags} --output_dir {tmp_path / 'a'}")
    train(f"{flags} --output_dir {tmp_path / 'b'} --checkpoint_activations")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("weights, torchvision_name", [("imagenet", "IMAGENET1K_V1"), ("imagenet_v2", "IMAGENET1K_V2")])
def test_backbone_weights_are_those_that_the_flag_names(weights, torchvision_name, monkeypatch):
    own = torchvision.models.resnet50().state_dict()
    loaded = []
    monkeypatch.setattr(
        torchvision.models.ResNet50_Weights, "get_state_dict", lambda self, **_: loaded.append(self.name) or own
    )
    backbone = Backbone("resnet50", True, False, False, weights=weights)
    assert loaded == [torchvision_name] and torch.equal(backbone.body.conv1.weight, own["conv1.weight"])


def test_backbone_weights_that_torchvision_lacks_are_refused():
    with pytest.raises(ValueError, match="no IMAGENET1K_V2 weights of resnet18"):
        Backbone("resnet18", True, False, False, weights="imagenet_v2")


TIMM = {"convnext_atto": 320, "efficientnet_b0": 320, "swin_tiny_patch4_window7_224": 768, "vit_tiny_patch16_224": 192}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_backbone_gives_one_map_with_its_mask(name, images):
    pytest.importorskip("timm", reason="needs timm: pip install timm")
    model, criterion, _ = build_model(parse(f"--num_classes 4 --backbone timm/{name}"))
    assert model.backbone.num_channels == TIMM[name]
    outputs = model.train()(nested_tensor_from_tensor_list(images))
    assert outputs["pred_boxes"].shape[:2] == (2, model.num_queries)
    sum(criterion(outputs, targets()).values()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    alone = model.eval()(images[:1])["pred_boxes"]
    padded = [torch.nn.functional.pad(images[0], (0, 0, 0, 0)), torch.zeros(3, 96, 96, dtype=torch.uint8)]
    features = model.backbone(nested_tensor_from_tensor_list(padded))[0][-1]
    assert features.tensors.shape[-2:] == features.mask.shape[-2:] and features.mask[0].any()
    assert alone.isfinite().all()


@pytest.mark.slow
def test_timm_backbone_is_trained_resumed_and_predicted_with(coco_root, tmp_path):
    pytest.importorskip("timm", reason="needs timm: pip install timm")
    from tools.predictor import Predictor

    flags = f"--coco_path {coco_root} --batch_size 2 --augment flip --backbone timm/convnext_atto"
    train(f"{flags} --epochs 2 --output_dir {tmp_path / 'whole'}")
    train(f"{flags} --epochs 1 --output_dir {tmp_path / 'parts'} --lr_drop 200")
    train(f"{flags} --epochs 2 --output_dir {tmp_path / 'parts'} --resume auto")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    predictor = Predictor.from_checkpoint(tmp_path / "whole/checkpoint.pth", "cpu")
    assert len(predictor(coco_root / "val2017/000000000021.jpg", threshold=0)) > 0


@pytest.mark.parametrize("flags, message", [
    ("--backbone timm/no_such_model", "timm.list_models"),
    ("--backbone timm/convnext_atto --dilation", "need a ResNet"),
])  # fmt: skip
def test_timm_backbone_that_cannot_be_built_is_refused_in_a_sentence(flags, message):
    pytest.importorskip("timm", reason="needs timm: pip install timm")
    with pytest.raises(ValueError, match=message):
        build_model(parse(f"--num_classes 4 {flags}"))


def test_strong_augmentation_changes_colours_and_is_repeatable():
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([1]), "area": torch.tensor([3000.0]),
              "iscrowd": torch.tensor([0]), "size": torch.tensor([90, 120])}  # fmt: skip
    strong = make_coco_transforms("train", 90, 1000, "strong", "uint8")
    results = []
    for key in (0, 0, *range(1, 40)):
        with seeded(key):
            results.append(strong(image, target))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1]["boxes"], results[1][1]["boxes"])
    assert len({round(float(result.float().mean())) for result, _ in results}) > 5  # full keeps the mean nearly
    sides = {min(result.shape[1:]) for result, _ in results}
    assert min(sides) < 54 <= max(sides)  # 480 / 800 of 90 is the smallest side of full
    assert all(r["boxes"].ge(0).all() and r["boxes"].le(1).all() for _, r in results)


@pytest.fixture
def unbalanced(tmp_path):
    """Ten images: class 1 in all, class 2 in image 10 only, class 3 in none; a crowd of class 2 in image 1."""
    objects = [(i, 1, [4, 4, 9, 9], {}) for i in range(1, 11) for _ in range(3)] + [(10, 2, [20, 20, 9, 9], {})]
    objects.append((1, 2, [30, 10, 9, 9], {"iscrowd": 1}))
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    for part in ("train", "val"):
        write_coco(tmp_path, part, list(range(1, 11)), objects, categories)
    return parse(f"--coco_path {tmp_path} --batch_size 2 --augment flip")


def test_class_weights_raise_rare_classes_and_keep_the_mean(unbalanced):
    weights = class_weights(build_dataset("train", unbalanced))
    assert len(weights) == 4 and weights[0] == weights[3] == 1
    assert weights[2] / weights[1] == pytest.approx(30**0.5)  # 30 objects and 1; the crowd does not count
    assert (30 * weights[1] + 1 * weights[2]) / 31 == pytest.approx(1)


def test_repeat_rare_draws_images_of_rare_classes_more_often(unbalanced):
    data = build_dataset("train", unbalanced)
    # crowds count too: class 2 is in two of ten images, the mean share is 0.6, the factor sqrt(3) = 1.73
    counts = [np.bincount(repeat_rare(data, seed).indices, minlength=10) for seed in range(200)]
    mean = np.mean(counts, axis=0)
    assert mean[1:9].tolist() == [1.0] * 8 and abs(mean[9] - 3**0.5) < 0.1 and abs(mean[0] - 3**0.5) < 0.1
    assert repeat_rare(data, 3).indices == repeat_rare(data, 3).indices


def test_class_balance_is_off_unless_asked(unbalanced):
    data = build_dataset("train", unbalanced)
    assert len(build_train_loader(data, unbalanced, torch.device("cpu")).dataset) == 10
    unbalanced.class_balance = "repeat"
    assert len(build_train_loader(data, unbalanced, torch.device("cpu")).dataset) > 10


@pytest.mark.slow
@pytest.mark.parametrize("how", ["weights", "repeat"])
def test_class_balance_trains_and_resumes_exactly(how, unbalanced, tmp_path):
    flags = f"--coco_path {unbalanced.coco_path} --batch_size 4 --augment flip --class_balance {how}"
    train(f"{flags} --epochs 2 --output_dir {tmp_path / 'whole'}")
    train(f"{flags} --epochs 1 --output_dir {tmp_path / 'parts'}")
    train(f"{flags} --epochs 2 --output_dir {tmp_path / 'parts'} --resume auto")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    plain = flags.replace(f" --class_balance {how}", "")
    train(f"{plain} --epochs 2 --output_dir {tmp_path / 'plain'}")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "whole", tmp_path / "plain")


@pytest.mark.slow
def test_patience_ends_a_run_and_counts_over_a_resume(tmp_path, caplog):
    caplog.set_level("INFO", "detr")
    args = parse("--epochs 9 --patience 2")
    args.output_dir = str(tmp_path)
    scores, trained = iter([0.3, 0.4, 0.4, 0.1, 0.9]), []

    def epochs(run, most=9):
        for epoch in run.epochs():
            trained.append(epoch)
            run._begin = 0.0  # of the epoch, for its line in the log
            run.finish_epoch({"loss": 1.0}, {"coco_eval_bbox": [next(scores)] * 12} if epoch != 2 else {})
            if len(trained) == most:
                return

    model, _, _ = build_model(parse("--num_classes 4"))
    epochs(build_run(args, model, loader_of(), {}), most=4)
    again = build_run(args, model, loader_of(), {})
    again.restore(torch.load(tmp_path / "checkpoint.pth", weights_only=True), "checkpoint.pth")
    assert again.stale == 1
    epochs(again)
    assert trained == [0, 1, 2, 3, 4]  # epoch 2 is not evaluated; 3 and 4 are not better than 1
    assert "2 evaluations were not better than 0.400" in caplog.text

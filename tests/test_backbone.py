"""The ResNet: features, masks, frozen norms, weights; and the position encodings."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from models.backbone import Backbone, BackboneBase, FrozenBatchNorm2d, Joiner
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list


def test_features_and_masks_shrink_together():
    backbone = Backbone("resnet18", True, True, False, weights="none")
    out = backbone(nested_tensor_from_tensor_list([torch.rand(3, 64, 128), torch.rand(3, 64, 64)]))
    assert {name: tuple(f.tensors.shape) for name, f in out.items()} == {
        "0": (2, 64, 16, 32), "1": (2, 128, 8, 16), "2": (2, 256, 4, 8), "3": (2, 512, 2, 4),
    }  # fmt: skip
    assert out["3"].mask.tolist() == [[[False] * 4] * 2, [[False, False, True, True]] * 2]


def test_dilation_halves_the_stride_and_small_resnets_refuse_it():
    dc5 = Backbone("resnet50", True, False, True, weights="none")
    assert dc5(nested_tensor_from_tensor_list(torch.rand(1, 3, 64, 64)))["0"].tensors.shape == (1, 2048, 4, 4)
    with pytest.raises(ValueError, match="resnet18 cannot be dilated"):
        Backbone("resnet18", True, False, True, weights="none")
    with pytest.raises(ValueError, match="choose one of resnet101, resnet152"):
        Backbone("vgg16", True, False, False, weights="none")


@pytest.mark.parametrize(
    "train, norm, trained", [(True, "frozen", "layer"), (False, "frozen", None), (True, "batch", "")]
)
def test_backbone_trainable_parameters_follow_the_flags(train, norm, trained):
    body = Backbone("resnet18", train, False, False, weights="none", norm=norm).body
    names = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    expected = {"layer": {"layer2", "layer3", "layer4"}, None: set()}
    assert names == expected.get(trained, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"})
    kind = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
    assert isinstance(body["bn1"], kind)


def test_weights_from_a_file_load_what_fits_and_skip_norms_without_their_convolution(tmp_path, monkeypatch):
    import torchvision

    from models import backbone as module

    state = {name: torch.full_like(v, 0.5) for name, v in torchvision.models.resnet18().state_dict().items()}
    del state["layer4.0.conv1.weight"]
    state["layer4.1.conv1.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "r18.pth")
    messages = []
    monkeypatch.setattr(module.logger, "info", messages.append)
    body = Backbone("resnet18", True, False, False, weights=str(tmp_path / "r18.pth")).body.state_dict()
    assert (body["conv1.weight"] == 0.5).all() and (body["layer3.0.bn1.bias"] == 0.5).all()
    assert not (body["layer4.0.conv1.weight"] == 0.5).any()
    for name in ("layer4.0.bn1.bias", "layer4.1.bn1.bias"):
        assert (body[name] == 0).all() and name in messages[1]


def test_weights_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        Backbone("resnet18", True, False, False, weights="nowhere.pth")
    torch.save({"something": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth.*no entry fits"):
        Backbone("resnet18", True, False, False, weights=str(tmp_path / "other.pth"))


def test_sine_positions_count_valid_cells_and_put_y_first():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, :, 4:] = True
    position = PositionEmbeddingSine(8, normalize=True)(NestedTensor(torch.zeros(1, 1, 4, 6), mask))
    assert position.shape == (1, 16, 4, 6)
    y, x = 2 / (4 + 1e-6) * 2 * torch.pi, 3 / (4 + 1e-6) * 2 * torch.pi
    period = 10000 ** (2 / 8)
    expected = [torch.tensor(v).sin() for v in (y, y / period, x)]
    assert position[0, [0, 2, 8], 1, 2].tolist() == pytest.approx([e.item() for e in expected], abs=1e-5)
    assert position[0, 1, 1, 2].item() == pytest.approx(torch.tensor(y).cos().item(), abs=1e-5)
    with pytest.raises(ValueError, match="normalize"):
        PositionEmbeddingSine(scale=1.0)


def test_learned_positions_put_x_first_and_end_at_fifty():
    embed = PositionEmbeddingLearned(4)
    position = embed(NestedTensor(torch.zeros(2, 1, 3, 5), None))
    assert position.shape == (2, 8, 3, 5)
    assert torch.equal(position[1, :4, 2, 3], embed.col_embed.weight[3])
    assert torch.equal(position[1, 4:, 2, 3], embed.row_embed.weight[2])
    with pytest.raises(ValueError, match="51"):
        embed(NestedTensor(torch.zeros(1, 1, 3, 51), None))


@pytest.mark.parametrize("name, dilation", [("resnet18", False), ("resnet50", False), ("resnet50", True)])
@pytest.mark.slow
def test_folded_norms_compute_and_train_as_torchvision_does(name, dilation):
    torch.manual_seed(0)
    body = Backbone(name, True, True, dilation, weights="none").double().body
    for module in body.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.5), module.running_var.uniform_(0.5, 2)
            module.bias.normal_(), module.running_mean.normal_()
    images, trained = torch.randn(2, 3, 48, 64).double(), body["layer2"][0].conv1.weight
    features, x = body(images), images
    for i, module in enumerate(body.values()):
        x = module(x)
        if i >= 4:
            torch.testing.assert_close(features[str(i - 4)], x)
    ours, plain = (torch.autograd.grad(y.square().mean(), trained)[0] for y in (features["3"], x))
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("part", ["relu", "layer4", "layer3.0", "layer1.1.relu"])
def test_backbone_hook_on_a_block_is_called(part):
    body, shapes = Backbone("resnet50", True, True, False, weights="none").body, []
    body.get_submodule(part).register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    body(torch.randn(1, 3, 64, 64))
    assert shapes


def test_backbone_base_own_block_or_activation_is_used():
    class Nothing(BasicBlock):
        def forward(self, x):
            return super().forward(x) * 0

    resnet = torchvision.models.ResNet(Nothing, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    images = torch.randn(1, 3, 64, 64)
    assert not BackboneBase(resnet, True, 512, False).body(images)["0"].any()
    body = Backbone("resnet18", True, False, False, weights="none").body
    before = body(images)["0"]
    body["layer3"][0].relu = torch.nn.SiLU()
    assert not torch.allclose(before, body(images)["0"])


def test_joiner_uint8_images_in_a_half_precision_model_are_normalised():
    backbone = Backbone("resnet18", True, False, False, weights="none")
    joiner = Joiner(backbone, PositionEmbeddingSine(8)).bfloat16()
    samples = NestedTensor(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 64, 64, dtype=torch.bool))
    features, positions = joiner(samples)
    assert features[0].tensors.dtype == positions[0].dtype == torch.bfloat16


class Patches(nn.Module):
    """A backbone of one's own: one convolution of stride 32."""

    num_channels = 8

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 32, stride=32)

    def forward(self, tensor_list):
        x = self.body(tensor_list.tensors)
        mask = nn.functional.interpolate(tensor_list.mask[:, None].float(), size=x.shape[-2:])[:, 0] > 0.5
        return {"0": NestedTensor(x, mask)}


def test_joiner_own_backbone_gets_normalised_floats():
    torch.manual_seed(0)
    joiner = Joiner(Patches(), PositionEmbeddingSine(4, normalize=True))
    raw = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((64, 70), (50, 90))]
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    floats = [(image / 255 - mean) / std for image in raw]
    (from_bytes,), _ = joiner(nested_tensor_from_tensor_list(raw))
    (from_floats,), _ = joiner(nested_tensor_from_tensor_list(floats))
    torch.testing.assert_close(from_bytes.tensors, from_floats.tensors)


@pytest.mark.parametrize("name", ["resnet152", "resnext50_32x4d", "wide_resnet50_2"])
@pytest.mark.slow
def test_backbone_any_torchvision_resnet_equals_torchvisions(name):
    torch.manual_seed(0)
    backbone = Backbone(name, True, False, False, weights="none")
    torch.manual_seed(0)
    plain = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d)
    images = torch.randn(1, 3, 64, 64)
    x = plain.maxpool(plain.relu(plain.bn1(plain.conv1(images))))
    expected = plain.layer4(plain.layer3(plain.layer2(plain.layer1(x))))
    found = backbone(nested_tensor_from_tensor_list(images))["0"].tensors
    assert backbone.num_channels == expected.shape[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_backbone_parameters_are_contiguous():
    """Forks flatten parameters with .view, and safetensors wants them so."""
    body = Backbone("resnet18", True, False, False, weights="none").body
    assert all(parameter.is_contiguous() for parameter in body.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_backbone_without_avx512_trains_contiguous(training):
    backbone, layouts = Backbone("resnet18", True, False, False, weights="none"), []
    backbone.body["relu"].register_forward_hook(
        lambda module, inputs, output: layouts.append(inputs[0].is_contiguous())
    )
    for backbone.contiguous_training in (True, False):
        backbone.train(training)(nested_tensor_from_tensor_list([torch.rand(3, 64, 64)]))  # channels last
    assert layouts == [training, False]


@pytest.mark.parametrize("content, words", [
    ([1], "holds a list"), ("<html>404</html>", "a web page"), ("", "empty"),
    ({"conv1.weight": torch.tensor(torch.nan)}, "NaN"),
])  # fmt: skip
def test_backbone_weights_from_a_file_of_other_contents_are_refused_by_name(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    if isinstance(content, str):
        path.write_text(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"weights.pth.*{words}"):
        Backbone("resnet18", True, False, False, weights=str(path))

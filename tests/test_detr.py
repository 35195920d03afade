"""The network as a whole: the reference's numbers, the contract's names, the ways in and out."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import models
from models import build_model
from models.attention import Attention
from models.detr import PostProcess
from models.transformer import Transformer
from tests.helpers import parse
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

DATA = Path(__file__).parent / "data"


def build(flags=""):
    torch.manual_seed(0)
    return build_model(parse(f"--num_classes 5 {flags}"))


def drawn(name, shape, seed):
    """Values of one weight of the golden model: a function of its name, so that none need be stored."""
    noise = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(tuple(shape))
    body, leaf = ".body." in name, name.split(".")[-1]
    if leaf == "running_var":
        noise = 1 + 0.2 * abs(noise)
    elif leaf == "running_mean" or (len(shape) == 1 and leaf != "weight"):
        noise = 0.1 * noise
    elif len(shape) == 1:
        noise = (0.5 if body else 1.0) + 0.1 * noise
    elif "_embed" not in name or leaf != "weight" or not any(e in name for e in ("query", "row", "col")):
        noise = noise * ((2.0 if body else 1.0) / np.prod(shape[1:])) ** 0.5
    return torch.from_numpy(noise.astype(np.float32))


def golden_image(seed, h, w):
    rng = np.random.RandomState(seed)
    patches = rng.standard_normal((3, 8, 8))[:, (np.arange(h) * 8 // h)[:, None], np.arange(w) * 8 // w]
    return torch.from_numpy((patches + 0.3 * rng.standard_normal((3, h, w))).astype(np.float32))


def golden_target(seed, n, classes):
    rng = np.random.RandomState(seed)
    size = rng.uniform(0.05, 0.5, (n, 2))
    centre = rng.uniform(0, 1, (n, 2)) * (1 - size) + size / 2
    labels = torch.from_numpy(rng.randint(0, classes, n))
    return {"labels": labels, "boxes": torch.from_numpy(np.hstack([centre, size]).astype(np.float32))}


@pytest.fixture(scope="module")
def golden():
    """The reference implementation's numbers for a small model whose weights are drawn from their names."""
    numbers = dict(np.load(DATA / "golden_r18_small.npz"))
    case = json.loads(str(numbers["case"]))
    flags = " ".join(case["flags"])
    model, criterion, post = build_model(parse(f"--num_classes 91 {flags}"))
    model.load_state_dict({name: drawn(name, v.shape, case["seed"]) for name, v in model.state_dict().items()})
    images = [golden_image(1000 * case["seed"] + i, *size) for i, size in enumerate(case["sizes"])]
    targets = [golden_target(2000 * case["seed"] + i, n, 91) for i, n in enumerate(case["n"])]
    return numbers, model.eval(), criterion.eval(), post, nested_tensor_from_tensor_list(images), targets


def test_outputs_losses_and_read_out_are_the_references(golden):
    numbers, model, criterion, post, batch, targets = golden
    with torch.no_grad():
        out = model(batch)
        losses = criterion(out, targets)
    for name in ("pred_logits", "pred_boxes"):
        np.testing.assert_allclose(out[name], numbers[f"out/{name}"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(out["aux_outputs"][0][name], numbers[f"aux0/{name}"], rtol=1e-4, atol=1e-4)
    for name in (key[5:] for key in numbers if key.startswith("loss/")):
        assert losses[name].item() == pytest.approx(float(numbers[f"loss/{name}"]), rel=1e-3, abs=1e-3), name
    sizes = torch.tensor([[2 * h + 1, 3 * w] for h, w in json.loads(str(numbers["case"]))["sizes"]])
    for i, found in enumerate(post["bbox"](out, sizes)):
        np.testing.assert_allclose(found["boxes"], numbers[f"post{i}/boxes"], rtol=1e-3, atol=0.02)


def test_gradients_reach_the_references_parameters_with_the_references_norms(golden):
    numbers, model, criterion, _, batch, targets = golden
    losses = criterion(model(batch), targets)
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = dict(zip(numbers["grad/names"].tolist(), numbers["grad/norms"].tolist(), strict=True))
    assert set(norms) == set(expected)
    assert norms == pytest.approx(expected, rel=2e-2, abs=1e-3 * max(expected.values()))


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("dilation", ["", "--dilation"])
def test_state_dict_is_the_published_one(depth, dilation):
    flags = f"--backbone resnet{depth} {dilation} --hidden_dim 256 --nheads 8 --dim_feedforward 2048"
    model = build_model(parse(f"{flags} --enc_layers 6 --dec_layers 6 --num_queries 100"))[0]
    head, *lines = (DATA / f"detr_resnet{depth}.txt").read_text().splitlines()
    own = [f"{name} {'x'.join(map(str, value.shape)) or '-'}" for name, value in model.state_dict().items()]
    assert own == lines  # in this order too: by it an optimizer's state finds its parameters
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert head == f"# {parameters} parameters, {trainable} trainable"


def test_images_go_in_as_a_list_a_batch_or_a_nested_tensor():
    model = build()[0].eval()
    images = torch.rand(2, 3, 64, 80)
    with torch.no_grad():
        outputs = [model(images), model(list(images)), model(nested_tensor_from_tensor_list(list(images)))]
    assert outputs[0]["pred_logits"].shape == (2, 8, 6) and outputs[0]["pred_boxes"].shape == (2, 8, 4)
    assert len(outputs[0]["aux_outputs"]) == 1
    for other in outputs[1:]:
        torch.testing.assert_close(other["pred_boxes"], outputs[0]["pred_boxes"])


def test_raw_bytes_equal_normalised_floats_also_on_the_padding():
    model = build()[0].eval()
    raw = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((64, 70), (50, 90))]
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        a, b = model(raw), model([(image / 255 - mean) / std for image in raw])
    torch.testing.assert_close(a["pred_logits"], b["pred_logits"])


def test_auxiliary_outputs_are_switched_off_by_the_flag():
    model, criterion, _ = build("--no_aux_loss")
    assert "aux_outputs" not in model(torch.rand(1, 3, 64, 64))
    assert set(criterion.weight_dict) == {"loss_ce", "loss_bbox", "loss_giou"}


def test_attention_weights_come_to_whoever_hooks_the_module():
    model = build()[0].eval()
    seen = {}
    decoder, encoder = (
        model.transformer.decoder.layers[-1].multihead_attn,
        model.transformer.encoder.layers[-1].self_attn,
    )
    decoder.register_forward_hook(lambda module, args, output: seen.update(decoder=output[1]))
    with torch.no_grad():
        plain = model(images := [torch.rand(3, 64, 96), torch.rand(3, 64, 50)])["pred_boxes"]
        encoder.register_forward_hook(lambda module, args, output: seen.update(encoder=output[1]))
        hooked = model(images)["pred_boxes"]
    assert seen["decoder"].shape == (2, 8, 6) and seen["encoder"].shape == (2, 6, 6)
    torch.testing.assert_close(seen["decoder"].sum(-1), torch.ones(2, 8))
    assert seen["decoder"][1].view(8, 2, 3)[..., 2].abs().max() == 0, "the padding is attended"
    torch.testing.assert_close(plain, hooked)


ATTENTION_MASKS = {
    "none": None,
    "boolean": torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.7,
    "floating": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "each head": torch.rand(8, 3, 5, generator=torch.Generator().manual_seed(0)) > 0.7,
}


@pytest.mark.parametrize("attn_mask", ATTENTION_MASKS.values(), ids=ATTENTION_MASKS)
@pytest.mark.parametrize("average", [True, False])
def test_attention_with_masks_equals_pytorchs(attn_mask, average):
    torch.manual_seed(0)
    ours = Attention(16, 4).eval()
    peer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    nn.init.normal_(ours.in_proj_bias)
    peer.load_state_dict(ours.state_dict())
    q, k, v = torch.rand(2, 3, 16), torch.rand(2, 5, 16), torch.rand(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    same_type = (
        padding.float().masked_fill(padding, float("-inf")) if attn_mask is ATTENTION_MASKS["floating"] else padding
    )
    expected = peer(q, k, v, key_padding_mask=same_type, attn_mask=attn_mask, average_attn_weights=average)
    found = ours(q, k, v, padding, True, attn_mask=attn_mask, average_attn_weights=average)
    torch.testing.assert_close(found, expected)
    assert ours(q, k, v, padding, attn_mask=attn_mask)[1] is None


@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_tgt_mask_hides_queries_from_each_other(pre_norm):
    torch.manual_seed(0)
    transformer = Transformer(16, 4, 1, 2, 32, normalize_before=pre_norm, return_intermediate_dec=True).eval()
    memory, pos, queries = torch.rand(2, 6, 16), torch.rand(2, 6, 16), torch.rand(2, 5, 16)
    alone = torch.ones(5, 5, dtype=torch.bool).fill_diagonal_(False)  # each query sees itself only
    options = {"pos": pos, "query_pos": queries}
    masked = transformer.decoder(torch.zeros(2, 5, 16), memory, tgt_mask=alone, **options)
    options["query_pos"] = queries[:, 3:4]
    one = transformer.decoder(torch.zeros(2, 1, 16), memory, **options)
    torch.testing.assert_close(masked[:, :, 3:4], one)


@pytest.mark.parametrize("flags", ["", "--pre_norm", "--position_embedding learned"])
def test_padding_does_not_change_what_is_seen(flags):
    """An image of a whole number of cells gives nearly the same answer alone and beside a larger one."""
    model = build(flags)[0].eval()
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        features, positions = model.backbone(nested_tensor_from_tensor_list([image, torch.rand(3, 64, 128)]))
        memory = model.transformer(
            model.input_proj(features[-1].tensors), features[-1].mask, model.query_embed.weight, positions[-1]
        )[0]
        cut = [x[:1, :, :, :2] for x in (features[-1].tensors, positions[-1])]
        alone = model.transformer(
            model.input_proj(cut[0]), torch.zeros(1, 2, 2, dtype=torch.bool), model.query_embed.weight, cut[1]
        )[0]
    torch.testing.assert_close(memory[:, :1], alone)


def test_transformer_returns_every_layer_and_the_memory_as_a_map():
    from models.transformer import Transformer

    transformer = Transformer(16, 4, 1, 3, 32, return_intermediate_dec=True)
    args = torch.rand(2, 16, 3, 5), torch.zeros(2, 3, 5, dtype=torch.bool), torch.rand(7, 16), torch.rand(2, 16, 3, 5)
    hs, memory = transformer(*args)
    assert hs.shape == (3, 2, 7, 16) and memory.shape == (2, 16, 3, 5)
    assert Transformer(16, 4, 1, 3, 32)(*args)[0].shape == (1, 2, 7, 16)
    with pytest.raises(ValueError, match="glu"):
        Transformer(16, 4, activation="glu")


def test_read_out_scales_boxes_and_ignores_no_object():
    logits = torch.tensor([[[0.0, 2.0, 9.0], [3.0, 0.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 1.0], [0.25, 0.25, 0.5, 0.5]]])
    (found,) = PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]))
    assert found["labels"].tolist() == [1, 0]
    assert found["boxes"].tolist() == [[50, 0, 150, 100], [0, 0, 100, 50]]
    assert found["scores"][0].item() == pytest.approx(torch.softmax(logits[0, 0], 0)[1].item())
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, torch.ones(2, 2))


@pytest.mark.slow
def test_callers_who_know_only_the_old_flags():
    old = json.loads((DATA / "flags.json").read_text())
    args = SimpleNamespace(**{dest: default for dest, default in old.values()}, backbone_weights="none")
    args.device = "cpu"
    model, criterion, _ = build_model(args)
    assert model.class_embed.out_features == 92 and criterion.empty_weight.shape == (92,)
    args.dataset_file, args.num_classes = "coco_panoptic", None
    assert build_model(args)[0].class_embed.out_features == 251
    args.num_classes = 7
    assert build_model(args)[0].class_embed.out_features == 8


def test_without_a_network_old_callers_go_on_and_new_ones_are_told(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent-for-this-test")
    monkeypatch.setattr("os.makedirs", lambda *a, **k: None)
    args = parse("--backbone_weights imagenet")
    with pytest.raises(OSError, match="path of a local copy as backbone weights"):
        build_model(args)
    del args.backbone_weights
    warned = []
    monkeypatch.setattr(models.backbone.logger, "warning", warned.append)
    build_model(args)
    assert "random until a checkpoint" in warned[0]


def test_torchscript_also_behind_a_module_that_makes_the_batch():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            return self.model(nested_tensor_from_tensor_list(images))

    model = build("--no_aux_loss")[0].eval()
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 90)]
    with pytest.warns(FutureWarning, match="torch.jit.script"):
        scripted = torch.jit.script(Wrapper(model))
    with torch.no_grad():
        torch.testing.assert_close(scripted(images), model(images))


@pytest.mark.slow
def test_export_with_batch_height_and_width_free():
    model = build("--no_aux_loss")[0].eval()
    free = torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},))
    images = torch.rand(3, 3, 100, 130)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images))


def test_a_mask_is_part_of_the_contract():
    with pytest.raises(AssertionError, match="mask"):
        build()[0](NestedTensor(torch.rand(1, 3, 64, 64), None))


def test_the_transformers_matrices_begin_as_xaviers():
    for name, p in Transformer(64, 8, 1, 1, 128).named_parameters():
        if p.dim() > 1:
            assert p.abs().max() <= (6 / sum(p.shape)) ** 0.5 + 1e-6, name
            assert p.std().item() == pytest.approx((2 / sum(p.shape)) ** 0.5, rel=0.1), name

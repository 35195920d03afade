"""Recorded attention weights: those of PyTorch's own attention, for each layer and head, without any effect."""

import pytest
import torch
from torch import nn

from models import build_model
from models.attention_maps import record_attention
from models.training import build_training
from tests.helpers import parse
from util.nested_tensor import nested_tensor_from_tensor_list

IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 64, 50)]  # the second has padding: one of its 2 x 3 columns of cells
MASKS = "--masks --hidden_dim 128 --nheads 8 --dataset_file coco_panoptic"


def build(flags="--enc_layers 2"):
    torch.manual_seed(0)
    return build_model(parse(flags))[0].eval()


def shapes(maps):
    return {name: [tuple(weights.shape) for weights in entries] for name, entries in maps.items()}


def calls_of(model):
    """Keep the arguments of each attention's call; return them by module."""
    seen = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(lambda m, args, more: seen.update({m: (args, more)}), with_kwargs=True)
    return seen


@torch.no_grad()
def test_record_attention_with_padding_equals_pytorchs_attention():
    model = build()
    seen = calls_of(model)
    with record_attention(model) as maps:
        model(IMAGES)
    assert shapes(maps) == {"encoder": [(2, 4, 6, 2, 3)] * 2, "decoder": [(2, 4, 8, 2, 3)] * 2}
    stack = model.transformer
    attentions = [layer.self_attn for layer in stack.encoder.layers]
    attentions += [layer.multihead_attn for layer in stack.decoder.layers]
    for attention, weights in zip(attentions, maps["encoder"] + maps["decoder"], strict=True):
        (q, k, v, padding), _ = seen[attention]
        more = {"need_weights": True, "average_attn_weights": False}
        expected = nn.MultiheadAttention.forward(attention, q, k, v, padding, **more)[1]
        torch.testing.assert_close(weights.flatten(3), expected)
        assert weights[1, ..., 2].abs().max() == 0, "the padding is attended"
        torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(weights.shape[:3]))


@torch.no_grad()
def test_record_attention_leaves_outputs_and_model_as_they_were():
    model = build()
    plain = model(IMAGES)
    with record_attention(model):
        recorded = model(IMAGES)
    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(plain[name], recorded[name])
    with pytest.raises(ZeroDivisionError), record_attention(model) as maps:
        raise ZeroDivisionError
    model(IMAGES)
    assert maps == {"encoder": [], "decoder": []}
    for module in model.modules():
        assert not module._forward_hooks and getattr(module, "record", None) is None


@torch.no_grad()
def test_record_attention_keeps_the_chosen_layers_of_the_last_pass():
    model = build()
    with record_attention(model, layers=[-1]) as maps:
        model(IMAGES)
        model([torch.rand(3, 96, 64)])
    assert shapes(maps) == {"encoder": [(1, 4, 6, 3, 2)], "decoder": [(1, 4, 8, 3, 2)]}
    with record_attention(model) as every:
        model([torch.rand(3, 96, 64)])
    assert not torch.equal(every["decoder"][0], every["decoder"][1])
    with record_attention(model, layers=[1]) as maps:
        model([image := torch.rand(3, 96, 64)])
    with record_attention(model) as every:
        model([image])
    assert torch.equal(maps["decoder"][0], every["decoder"][1])


def test_record_attention_in_training_detaches_and_keeps_gradients_and_dropout():
    model = build().train()
    gradients = []
    for record in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        if record:
            with record_attention(model) as maps:
                outputs = model(IMAGES)
        else:
            outputs = model(IMAGES)
        outputs["pred_boxes"].sum().backward()
        gradients.append(model.query_embed.weight.grad.clone())
    assert torch.equal(*gradients)
    assert not maps["decoder"][0].requires_grad
    torch.testing.assert_close(maps["decoder"][0].sum((-2, -1)), torch.ones(2, 4, 8))


@torch.no_grad()
def test_record_attention_under_autocast_is_float32_and_near_the_full_precision():
    model = build()
    with record_attention(model) as full:
        model(IMAGES)
    with record_attention(model) as half, torch.autocast("cpu", dtype=torch.bfloat16):
        model(IMAGES)
    for name in full:
        for expected, weights in zip(full[name], half[name], strict=True):
            assert weights.dtype == torch.float32 and not torch.equal(weights, expected)
            torch.testing.assert_close(weights, expected, rtol=0.1, atol=0.02)
            torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(weights.shape[:3]))
            assert weights[1, ..., 2].abs().max() == 0


@pytest.mark.parametrize("training", [False, True])
def test_record_attention_of_a_mask_model_is_that_of_its_detector(training):
    model = build(MASKS).train(training)
    with torch.no_grad(), record_attention(model) as maps:
        model(IMAGES)
    assert shapes(maps) == {"encoder": [(2, 8, 6, 2, 3)], "decoder": [(2, 8, 8, 2, 3)] * 2}


def test_record_attention_with_denoising_queries_has_them_after_the_objects():
    model, criterion, _ = build_model(args := parse("--denoising_groups 2 --num_classes 4"))
    network, _, _ = build_training(args, model.train(), criterion)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}, {"labels": torch.tensor([]).long(),
               "boxes": torch.zeros(0, 4)}]  # fmt: skip
    with record_attention(network) as maps:
        network(nested_tensor_from_tensor_list(IMAGES), targets)
    assert shapes(maps)["decoder"] == [(2, 4, 8 + 4, 2, 3)] * 2


@torch.no_grad()
@pytest.mark.parametrize("flags", ["--enc_layers 2", "--enc_layers 2 --pre_norm"])
def test_hooks_as_in_the_originals_notebook_find_the_mean_over_heads(flags):
    model = build(flags)
    found = {}
    hooks = [
        model.transformer.encoder.layers[-1].self_attn.register_forward_hook(
            lambda self, inputs, output: found.update(encoder=output[1])
        ),
        model.transformer.decoder.layers[-1].multihead_attn.register_forward_hook(
            lambda self, inputs, output: found.update(decoder=output[1])
        ),
    ]
    with record_attention(model) as maps:
        model(IMAGES)
    for hook in hooks:
        hook.remove()
    for name, (queries, cells) in {"encoder": (6, 6), "decoder": (8, 6)}.items():
        assert found[name].shape == (2, queries, cells)
        torch.testing.assert_close(found[name], maps[name][-1].mean(1).flatten(2))


@pytest.mark.slow
@torch.no_grad()
def test_record_attention_of_a_compiled_model_runs_it_uncompiled():
    model = build()
    with record_attention(model) as expected:
        model(IMAGES)

    def backend(*_):
        raise AssertionError("compiled")

    model.compile(backend=backend)
    with record_attention(model) as maps:
        model(IMAGES)
    assert torch.equal(maps["decoder"][-1], expected["decoder"][-1])
    with pytest.raises(Exception, match="compiled"):
        model(IMAGES)


def test_record_attention_of_something_else_is_refused():
    model = build()
    with pytest.raises(ValueError, match="Linear has 0: give the network itself"), record_attention(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"layers \[2\]: .* has layers 0 to 1"), record_attention(model, [2, -1]):
        pass
    with record_attention(model), pytest.raises(ValueError, match="recorded already"), record_attention(model):
        pass
    model.transformer.encoder.layers[0].self_attn = nn.MultiheadAttention(32, 4)
    with pytest.raises(ValueError, match="not of MultiheadAttention"), record_attention(model):
        pass

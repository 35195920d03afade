"""--query_init local: where the object queries look at the start, and what they pass on."""

import pytest
import torch

from models import build_model
from models.attention_maps import record_attention
from models.local_queries import OBJECTNESS
from tests.helpers import parse
from util.nested_tensor import NestedTensor


@pytest.mark.parametrize("flags", ["--num_queries 6 --hidden_dim 128", "--num_queries 7 --hidden_dim 256 --pre_norm"])
def test_local_queries_attend_near_their_grid_points_in_every_decoder_layer(flags):
    torch.manual_seed(0)
    model = build_model(parse(f"{flags} --num_classes 4 --dec_layers 2 --query_init local"))[0]
    padding = torch.zeros(1, 32, 48, dtype=torch.bool)
    pos = model.backbone[1](NestedTensor(torch.zeros(1, 1, 32, 48), padding)).flatten(2).transpose(1, 2)
    queries = model.query_embed.weight[None]
    y, x = torch.meshgrid((torch.arange(32) + 0.5) / 32, (torch.arange(48) + 0.5) / 48, indexing="ij")
    grid = torch.cartesian_prod(torch.tensor([0.25, 0.75]), torch.tensor([1 / 6, 0.5, 5 / 6]))
    for layer in model.transformer.decoder.layers:
        weights = layer.multihead_attn(queries, pos, pos, need_weights=True)[1][0, :6].view(6, 32, 48)
        centres = torch.stack([(weights * y).sum((1, 2)), (weights * x).sum((1, 2))], dim=1)
        assert (centres - grid).abs().max() < 0.07  # 0.33 for equal attention to all cells
        spread = (weights * ((y - grid[:, :1, None]) ** 2 + (x - grid[:, 1:, None]) ** 2)).sum((1, 2)).sqrt()
        assert spread.max() < 0.15  # 0.5 for equal attention


@pytest.mark.parametrize("flags", ["", "--pre_norm"])
def test_content_does_not_change_where_local_queries_look(flags, monkeypatch):
    monkeypatch.setattr("models.local_queries.OBJECTNESS", 0.0)
    torch.manual_seed(0)
    model = build_model(parse(f"{flags} --num_queries 16 --num_classes 4 --query_init local"))[0].eval()
    with torch.no_grad(), record_attention(model) as maps:
        model(torch.rand(1, 3, 512, 512))
    for weights in maps["decoder"]:
        parts = weights[0].mean(0).unflatten(2, (4, 4)).unflatten(1, (4, 4)).sum((2, 4)).flatten(1)
        assert (parts.argmax(1) == torch.arange(16)).all() and parts.diagonal().min() > 0.8


@pytest.mark.parametrize("flags", ["", "--pre_norm"])
def test_the_decoder_begins_by_predicting_what_the_heads_read_in_the_cells(flags):
    torch.manual_seed(0)
    model = build_model(parse(f"{flags} --num_queries 4 --num_classes 4 --query_init local"))[0].eval()
    encoder, decoder = model.transformer.encoder, model.transformer.decoder
    with torch.no_grad():
        cell = (encoder.norm if flags else encoder.layers[-1].norm2)(torch.randn(model.transformer.d_model))
        memory, padding = cell.expand(1, 9, -1), torch.zeros(1, 9, dtype=torch.bool)
        hs = model.transformer.decode(memory, padding, torch.zeros_like(memory), model.query_embed.weight[None])
        torch.testing.assert_close(hs, decoder.norm(cell).expand_as(hs), atol=0.1, rtol=0)


def test_local_queries_pass_on_what_they_attend_to():
    model = build_model(parse("--num_queries 6 --query_init local"))[0].eval()
    attention = model.transformer.decoder.layers[0].multihead_attn
    memory = torch.randn(1, 1, attention.embed_dim)
    values, _ = attention(torch.randn(1, 6, attention.embed_dim), memory, memory)
    torch.testing.assert_close(values, memory.expand(1, 6, -1))


def test_local_queries_prefer_cells_that_are_not_like_no_object():
    model = build_model(parse("--num_queries 6 --query_init local"))[0].eval()
    attention, no_object = model.transformer.decoder.layers[1].multihead_attn, model.class_embed.weight[-1]
    memory = torch.stack([no_object, torch.zeros_like(no_object), -no_object])[None] * 3 / OBJECTNESS / no_object.norm()
    weights = attention(torch.zeros(1, 1, attention.embed_dim), memory, memory, need_weights=True)[1]
    wanted = torch.tensor([-3.0, 0.0, 3.0]).softmax(0)
    torch.testing.assert_close(weights[0, 0], wanted)

"""Dropout strikes as often as it says, everywhere alike, and attention under it is the fused kernel's."""

import pytest
import torch
from torch import nn

from models import transformer
from models.dropout import Dropout, strike
from models.transformer import Attention


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_place_is_struck_with_probability_p(p):
    torch.manual_seed(0)
    kept = strike(torch.ones(250_000, 4), p)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    # Four entries share a word of random bits: each of the four has its share (five standard deviations).
    assert kept.mean(0) == pytest.approx([1 - p] * 4, abs=5 * (p * (1 - p) / 250_000) ** 0.5)
    assert (kept[:, :-1] * kept[:, 1:]).mean().item() == pytest.approx((1 - p) ** 2, abs=2e-3)  # and on its own


def test_dropout_keeps_the_mean_and_passes_the_gradient_of_what_it_keeps():
    torch.manual_seed(0)
    x = torch.rand(30, 7, 11, requires_grad=True)
    y = Dropout(0.2)(x)
    assert y.mean().item() == pytest.approx(x.mean().item(), rel=0.1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0) / 0.8)
    assert torch.equal(Dropout(0.2).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()


def test_the_seed_decides():
    torch.manual_seed(7)
    first = strike(torch.ones(1001), 0.3)
    second = strike(torch.ones(1001), 0.3)
    torch.manual_seed(7)
    assert torch.equal(strike(torch.ones(1001), 0.3), first) and not torch.equal(first, second)


def test_attention_under_dropout_is_that_of_the_fused_kernel(monkeypatch):
    torch.manual_seed(0)
    attention = Attention(32, 4, dropout=0.25, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    query, memory, padding = torch.randn(2, 5, 32), torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True

    def run() -> list[torch.Tensor]:
        attention.zero_grad()
        x, _ = attention(query, memory, memory, padding)
        x.square().sum().backward()
        return [x.detach(), *(parameter.grad.clone() for parameter in attention.parameters())]

    # Striking nothing, but scaled as if: what is left is the attention itself.
    monkeypatch.setattr(transformer, "strike", lambda weights, p: weights * (1 - p))
    struck = run()
    attention.eval()
    torch.testing.assert_close(struck, run())

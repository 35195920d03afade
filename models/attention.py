"""Multi-head attention with PyTorch's fused kernels, and how to get its weights.

The fused kernels do not return the attention weights. `models.attention_maps.record_attention` gets those of all layers
and heads. For code written against DETR, a forward hook on one attention module works as well, for example on
`model.transformer.decoder.layers[-1].multihead_attn`: while it has a hook, the module computes its weights too, and the
hook finds them in output[1], averaged over heads: [B, Q, N] (for `encoder.layers[i].self_attn`: [B, N, N]).

Shapes: B images, Q queries, N keys, C = embed_dim.
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor, nn

# TorchScript cannot read `Tensor | None` in every place.
MaybeTensor = Optional[Tensor]  # noqa: UP045


class Attention(nn.MultiheadAttention):
    """Multi-head attention with nn.MultiheadAttention's parameters and PyTorch's fused kernels; batch first.

    If `record` is set, each call passes the arguments of `attention_weights` to it (see models/attention_maps.py).
    """

    record: Callable[[Tensor, Tensor, MaybeTensor], None] | None = None

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__(embed_dim, num_heads, dropout=dropout, batch_first=True)

    def forward(  # ty: ignore[incompatible-method-override]  (without is_causal)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: MaybeTensor = None,
        need_weights: bool = False,
        attn_mask: MaybeTensor = None,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, MaybeTensor]:
        """Attend from query [B, Q, C] to key and value [B, N, C]; return the result [B, Q, C] and the weights or None.

        `key_padding_mask` [B, N] is True on keys to ignore. `attn_mask`, [Q, N] or [B * heads, Q, N], is True where a
        query must not attend, or a float that is added to the scores. The weights are computed with `need_weights`
        and while the module has a forward hook: [B, Q, N], or [B, heads, Q, N] unless `average_attn_weights`.
        They are those before dropout.
        """
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)
        q = self._split_heads(nn.functional.linear(query, w_q, b_q))
        k = self._split_heads(nn.functional.linear(key, w_k, b_k))
        v = self._split_heads(nn.functional.linear(value, w_v, b_v))
        mask = self._attended(key_padding_mask, attn_mask, query.shape[0])
        dropout = self.dropout if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        weights: MaybeTensor = None
        if not torch.jit.is_scripting():
            need_weights = need_weights or len(self._forward_hooks) > 0
            if self.record is not None:
                self.record(q, k, mask)
        if need_weights:
            weights = attention_weights(q, k, mask)
            if average_attn_weights:
                weights = weights.mean(dim=1)
        return x, weights

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, C / heads]."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attended(self, key_padding_mask: MaybeTensor, attn_mask: MaybeTensor, batch: int) -> MaybeTensor:
        """Join both masks as scaled_dot_product_attention takes them, broadcastable to [B, heads, Q, N].

        The result is True where a query attends, or floats to add to the scores if `attn_mask` is floating.
        """
        attended: MaybeTensor = None
        if key_padding_mask is not None:
            attended = ~key_padding_mask[:, None, None, :]
        if attn_mask is None:
            return attended
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        if attn_mask.dtype == torch.bool:
            return ~attn_mask if attended is None else attended & ~attn_mask
        return attn_mask if attended is None else attn_mask.masked_fill(~attended, float("-inf"))


def attention_weights(q: Tensor, k: Tensor, mask: MaybeTensor) -> Tensor:
    """Softmax of q [B, heads, Q, c] times k [B, heads, N, c] under a mask as `_attended` returns: [B, heads, Q, N]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)

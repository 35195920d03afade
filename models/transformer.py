"""The transformer of DETR: positions enter every attention, and every decoder layer's output is kept.

Shapes: B images, N = h * w feature cells, Q object queries, C = d_model, L decoder layers. The batch comes first.

Attention goes through PyTorch's fused kernels, which do not give the attention weights. Whoever wants them registers a
forward hook on the attention module, say `model.transformer.decoder.layers[-1].multihead_attn`: while a hook is there
the module computes them too, and the hook finds them at output[1], averaged over heads: [B, Q, N] ([B, N, N] for
`encoder.layers[i].self_attn`).
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from models.dropout import Dropout, strike

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Transformer(nn.Module):
    """Encoder over image features, decoder over object queries (paper, section 3.2 and appendix A.3)."""

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
        return_intermediate_dec: bool = False,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"no activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        layer_sizes = (d_model, nhead, dim_feedforward, dropout, activation, normalize_before)
        # Post-norm layers end in a norm of their own; only a pre-norm encoder needs one at its end.
        encoder_norm = nn.LayerNorm(d_model) if normalize_before else None
        self.encoder = TransformerEncoder(TransformerEncoderLayer(*layer_sizes), num_encoder_layers, encoder_norm)
        self.decoder = TransformerDecoder(
            TransformerDecoderLayer(*layer_sizes), num_decoder_layers, nn.LayerNorm(d_model), return_intermediate_dec
        )
        self.d_model = d_model
        self.nhead = nhead
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from queries to image.

        Takes features `src` and positions `pos_embed`, both [B, C, h, w], the padding `mask` [B, h, w] and the queries
        [Q, C]. Returns `hs`, the decoder's output [L, B, Q, C] (L = 1 unless every layer's is kept), and the
        encoder's `memory` [B, C, h, w].
        """
        batch, _, h, w = src.shape
        cells, positions = src.flatten(2).transpose(1, 2), pos_embed.flatten(2).transpose(1, 2)
        padding = mask.flatten(1)
        memory = self.encoder(cells, padding, positions)
        queries = query_embed.unsqueeze(0).expand(batch, -1, -1)
        hs = self.decoder(torch.zeros_like(queries), memory, padding, positions, queries)
        return hs, memory.transpose(1, 2).unflatten(2, (h, w))


class TransformerEncoder(nn.Module):
    """A stack of copies of one encoder layer (copies start equal), and an optional last norm."""

    def __init__(self, encoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None):
        super().__init__()
        self.layers = nn.ModuleList([deepcopy(encoder_layer) for _ in range(num_layers)])
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, src: Tensor, padding: Tensor, pos: Tensor) -> Tensor:
        """Features and positions [B, N, C], padding [B, N] -> memory [B, N, C]."""
        for layer in self.layers:
            src = layer(src, padding, pos)
        return self.norm(src)


class TransformerDecoder(nn.Module):
    """A stack of copies of one decoder layer; one norm, shared, for every output that is kept."""

    def __init__(self, decoder_layer: nn.Module, num_layers: int, norm: nn.Module, return_intermediate: bool = False):
        super().__init__()
        self.layers = nn.ModuleList([deepcopy(decoder_layer) for _ in range(num_layers)])
        self.norm = norm
        self.return_intermediate = return_intermediate

    def forward(self, tgt: Tensor, memory: Tensor, padding: Tensor, pos: Tensor, query_pos: Tensor) -> Tensor:
        """Queries [B, Q, C] twice (content, position), memory and positions [B, N, C] -> [L or 1, B, Q, C]."""
        kept: list[Tensor] = []
        for layer in self.layers:
            tgt = layer(tgt, memory, padding, pos, query_pos)
            if self.return_intermediate:
                kept.append(self.norm(tgt))
        return torch.stack(kept) if self.return_intermediate else self.norm(tgt).unsqueeze(0)


class Attention(nn.MultiheadAttention):
    """Multi-head attention with nn.MultiheadAttention's parameters, through PyTorch's fused kernels.

    The weights are written down only where a forward hook listens (see the top of this file), and where dropout strikes
    them on a CPU, for which there is no fused kernel.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Query [B, Q, C], key and value [B, N, C], padding [B, N] (True = ignore) -> [B, Q, C], weights or None."""
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)
        q = self._split_heads(nn.functional.linear(query, w_q, b_q))
        k = self._split_heads(nn.functional.linear(key, w_k, b_k))
        v = self._split_heads(nn.functional.linear(value, w_v, b_v))
        ignored = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        drop = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        written_down = False
        if not torch.jit.is_scripting():
            if self._forward_hooks:
                weights = attention_weights(q, k, ignored).mean(dim=1)
            # The compiler's CPU kernel fails in training once image sizes change (seen in torch 2.14).
            compiled = self.training and torch.compiler.is_compiling()
            written_down = q.device.type == "cpu" and (drop > 0.0 or compiled)
        if not torch.jit.is_scripting() and written_down:
            x = strike(attention_weights(q, k, ignored), drop) @ (v / (1 - drop))
        else:
            attended = None if ignored is None else ~ignored
            x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attended, dropout_p=drop)
        return self.out_proj(x.transpose(1, 2).flatten(2)), weights

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, C / heads]."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)


def attention_weights(q: Tensor, k: Tensor, ignored: Tensor | None) -> Tensor:
    """Softmax of q [B, heads, Q, c] times k [B, heads, N, c] without the `ignored` [B, 1, 1, N]: [B, heads, Q, N]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if ignored is not None:
        scores += torch.zeros_like(ignored, dtype=scores.dtype).masked_fill_(ignored, float("-inf"))
    return scores.softmax(dim=-1)


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each added to its input; norms after the sum or, pre-norm, before."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = Attention(d_model, nhead, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout, self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout), Dropout(dropout)
        self.activation = ACTIVATIONS[activation]()
        self.normalize_before = normalize_before

    def forward(self, src: Tensor, padding: Tensor, pos: Tensor) -> Tensor:
        """Features and positions [B, N, C], padding [B, N] -> [B, N, C]."""
        x = self.norm1(src) if self.normalize_before else src
        q = x + pos
        x, _ = self.self_attn(q, q, x, padding)
        src = src + self.dropout1(x)
        if not self.normalize_before:
            src = self.norm1(src)
        x = self.norm2(src) if self.normalize_before else src
        x = self.linear2(self.dropout(self.activation(self.linear1(x))))
        src = src + self.dropout2(x)
        return src if self.normalize_before else self.norm2(src)


class TransformerDecoderLayer(nn.Module):
    """Self-attention among queries, attention from queries to memory, and a perceptron; norms as in the encoder."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = Attention(d_model, nhead, dropout=dropout, batch_first=True)
        self.multihead_attn = Attention(d_model, nhead, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)
        self.dropout1, self.dropout2, self.dropout3 = Dropout(dropout), Dropout(dropout), Dropout(dropout)
        self.activation = ACTIVATIONS[activation]()
        self.normalize_before = normalize_before

    def forward(self, tgt: Tensor, memory: Tensor, padding: Tensor, pos: Tensor, query_pos: Tensor) -> Tensor:
        """Queries [B, Q, C] twice (content, position), memory and positions [B, N, C], padding [B, N] -> [B, Q, C]."""
        x = self.norm1(tgt) if self.normalize_before else tgt
        q = x + query_pos
        x, _ = self.self_attn(q, q, x)
        tgt = tgt + self.dropout1(x)
        if not self.normalize_before:
            tgt = self.norm1(tgt)
        x = self.norm2(tgt) if self.normalize_before else tgt
        x, _ = self.multihead_attn(x + query_pos, memory + pos, memory, padding)
        tgt = tgt + self.dropout2(x)
        if not self.normalize_before:
            tgt = self.norm2(tgt)
        x = self.norm3(tgt) if self.normalize_before else tgt
        x = self.linear2(self.dropout(self.activation(self.linear1(x))))
        tgt = tgt + self.dropout3(x)
        return tgt if self.normalize_before else self.norm3(tgt)

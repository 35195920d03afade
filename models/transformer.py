"""The transformer of DETR: positions enter every attention, and every decoder layer's output is kept.

Shapes: B images, N = h * w feature cells, Q object queries, C = d_model, L decoder layers. The batch comes first.
How to get the attention weights: see models/attention.py.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from models.attention import Attention, MaybeTensor


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
        layer_sizes = (d_model, nhead, dim_feedforward, dropout, activation, normalize_before)
        # Post-norm layers end in a norm of their own; only a pre-norm encoder needs one at its end.
        encoder_norm = nn.LayerNorm(d_model) if normalize_before else None
        self.encoder = TransformerEncoder(TransformerEncoderLayer(*layer_sizes), num_encoder_layers, encoder_norm)
        self.decoder = TransformerDecoder(
            TransformerDecoderLayer(*layer_sizes), num_decoder_layers, nn.LayerNorm(d_model), return_intermediate_dec
        )
        self.d_model = d_model
        self.nhead = nhead
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Draw every matrix from Xavier's uniform distribution."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from queries to image.

        Takes features `src` and positions `pos_embed`, both [B, C, h, w], the padding `mask` [B, h, w] and the queries
        [Q, C]. Returns `hs`, the decoder's output [L, B, Q, C] (L = 1 unless every layer's is kept), and the
        encoder's `memory` [B, C, h, w].
        """
        batch = src.shape[0]
        cells, pos = src.flatten(2).transpose(1, 2), pos_embed.flatten(2).transpose(1, 2)
        padding = mask.flatten(1)
        memory = self.encoder(cells, src_key_padding_mask=padding, pos=pos)
        query_pos = query_embed.unsqueeze(0).expand(batch, -1, -1)
        hs = self.decode(memory, padding, pos, query_pos)
        return hs, memory.transpose(1, 2).reshape(src.shape)

    def decode(
        self, memory: Tensor, padding: Tensor, pos: Tensor, query_pos: Tensor, tgt_mask: MaybeTensor = None
    ) -> Tensor:
        """Run the decoder from queries [B, Q, C] over memory and positions [B, N, C]: hs [L, B, Q, C]."""
        tgt = torch.zeros_like(query_pos)
        return self.decoder(tgt, memory, tgt_mask, memory_key_padding_mask=padding, pos=pos, query_pos=query_pos)


class TransformerEncoder(nn.Module):
    """A stack of copies of one encoder layer (the copies start equal), and an optional last norm."""

    def __init__(self, encoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None):
        super().__init__()
        self.layers = _get_clones(encoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = nn.Identity() if norm is None else norm

    def forward(
        self, src: Tensor, mask: MaybeTensor = None, src_key_padding_mask: MaybeTensor = None, pos: MaybeTensor = None
    ) -> Tensor:
        """Features and positions [B, N, C], attention mask, padding [B, N] -> memory [B, N, C]."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, pos=pos)
        return self.norm(src)


class TransformerDecoder(nn.Module):
    """A stack of copies of one decoder layer; one norm, shared by every output that is kept."""

    def __init__(
        self,
        decoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        return_intermediate: bool = False,
    ):
        super().__init__()
        self.layers = _get_clones(decoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = nn.Identity() if norm is None else norm
        self.return_intermediate = return_intermediate

    def forward(
        self, tgt: Tensor, memory: Tensor, tgt_mask: MaybeTensor = None, memory_mask: MaybeTensor = None,
        tgt_key_padding_mask: MaybeTensor = None, memory_key_padding_mask: MaybeTensor = None,
        pos: MaybeTensor = None, query_pos: MaybeTensor = None,
    ) -> Tensor:  # fmt: skip
        """Queries [B, Q, C], memory [B, N, C], their positions, attention masks and paddings -> [L or 1, B, Q, C]."""
        kept: list[Tensor] = []
        for layer in self.layers:
            tgt = layer(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, pos, query_pos
            )
            if self.return_intermediate:
                kept.append(self.norm(tgt))
        return torch.stack(kept) if self.return_intermediate else self.norm(tgt).unsqueeze(0)


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
        self.self_attn = Attention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.activation = _get_activation_fn(activation)
        self.normalize_before = normalize_before

    def with_pos_embed(self, tensor: Tensor, pos: MaybeTensor) -> Tensor:
        """Add positions, if there are any."""
        return tensor if pos is None else tensor + pos

    def forward_post(
        self,
        src: Tensor,
        src_mask: MaybeTensor = None,
        src_key_padding_mask: MaybeTensor = None,
        pos: MaybeTensor = None,
    ) -> Tensor:
        """Normalise after each sum (the paper)."""
        q = self.with_pos_embed(src, pos)
        x, _ = self.self_attn(q, q, src, src_key_padding_mask, attn_mask=src_mask)
        src = self.norm1(src + self.dropout1(x))
        return self.norm2(src + self.dropout2(self._feed_forward(src)))

    def forward_pre(
        self,
        src: Tensor,
        src_mask: MaybeTensor = None,
        src_key_padding_mask: MaybeTensor = None,
        pos: MaybeTensor = None,
    ) -> Tensor:
        """Normalise before each sublayer (--pre_norm)."""
        x = self.norm1(src)
        q = self.with_pos_embed(x, pos)
        x, _ = self.self_attn(q, q, x, src_key_padding_mask, attn_mask=src_mask)
        src = src + self.dropout1(x)
        return src + self.dropout2(self._feed_forward(self.norm2(src)))

    def forward(
        self,
        src: Tensor,
        src_mask: MaybeTensor = None,
        src_key_padding_mask: MaybeTensor = None,
        pos: MaybeTensor = None,
    ) -> Tensor:
        """Features and positions [B, N, C], attention mask, padding [B, N] -> [B, N, C]."""
        if self.normalize_before:
            return self.forward_pre(src, src_mask, src_key_padding_mask, pos)
        return self.forward_post(src, src_mask, src_key_padding_mask, pos)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


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
        self.self_attn = Attention(d_model, nhead, dropout)
        self.multihead_attn = Attention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout1, self.dropout2, self.dropout3 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)
        self.activation = _get_activation_fn(activation)
        self.normalize_before = normalize_before

    def with_pos_embed(self, tensor: Tensor, pos: MaybeTensor) -> Tensor:
        """Add positions, if there are any."""
        return tensor if pos is None else tensor + pos

    def forward_post(
        self, tgt: Tensor, memory: Tensor, tgt_mask: MaybeTensor = None, memory_mask: MaybeTensor = None,
        tgt_key_padding_mask: MaybeTensor = None, memory_key_padding_mask: MaybeTensor = None,
        pos: MaybeTensor = None, query_pos: MaybeTensor = None,
    ) -> Tensor:  # fmt: skip
        """Normalise after each sum (the paper)."""
        q = self.with_pos_embed(tgt, query_pos)
        x, _ = self.self_attn(q, q, tgt, tgt_key_padding_mask, attn_mask=tgt_mask)
        tgt = self.norm1(tgt + self.dropout1(x))
        q, k = self.with_pos_embed(tgt, query_pos), self.with_pos_embed(memory, pos)
        x, _ = self.multihead_attn(q, k, memory, memory_key_padding_mask, attn_mask=memory_mask)
        tgt = self.norm2(tgt + self.dropout2(x))
        return self.norm3(tgt + self.dropout3(self._feed_forward(tgt)))

    def forward_pre(
        self, tgt: Tensor, memory: Tensor, tgt_mask: MaybeTensor = None, memory_mask: MaybeTensor = None,
        tgt_key_padding_mask: MaybeTensor = None, memory_key_padding_mask: MaybeTensor = None,
        pos: MaybeTensor = None, query_pos: MaybeTensor = None,
    ) -> Tensor:  # fmt: skip
        """Normalise before each sublayer (--pre_norm)."""
        x = self.norm1(tgt)
        q = self.with_pos_embed(x, query_pos)
        x, _ = self.self_attn(q, q, x, tgt_key_padding_mask, attn_mask=tgt_mask)
        tgt = tgt + self.dropout1(x)
        q, k = self.with_pos_embed(self.norm2(tgt), query_pos), self.with_pos_embed(memory, pos)
        x, _ = self.multihead_attn(q, k, memory, memory_key_padding_mask, attn_mask=memory_mask)
        tgt = tgt + self.dropout2(x)
        return tgt + self.dropout3(self._feed_forward(self.norm3(tgt)))

    def forward(
        self, tgt: Tensor, memory: Tensor, tgt_mask: MaybeTensor = None, memory_mask: MaybeTensor = None,
        tgt_key_padding_mask: MaybeTensor = None, memory_key_padding_mask: MaybeTensor = None,
        pos: MaybeTensor = None, query_pos: MaybeTensor = None,
    ) -> Tensor:  # fmt: skip
        """Queries [B, Q, C], memory [B, N, C], their positions, attention masks and paddings -> [B, Q, C]."""
        layer = (tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, pos, query_pos)
        if self.normalize_before:
            return self.forward_pre(*layer)
        return self.forward_post(*layer)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


def _get_clones(module: nn.Module, N: int) -> nn.ModuleList:
    return nn.ModuleList([deepcopy(module) for _ in range(N)])


def _get_activation_fn(activation: str) -> nn.Module:
    if activation not in ("relu", "gelu"):
        raise ValueError(f"no activation {activation!r}: choose relu or gelu")
    return nn.ReLU() if activation == "relu" else nn.GELU()


def build_transformer(args) -> Transformer:
    """Build the transformer that the flags describe."""
    return Transformer(
        d_model=args.hidden_dim,
        nhead=args.nheads,
        num_encoder_layers=args.enc_layers,
        num_decoder_layers=args.dec_layers,
        dim_feedforward=args.dim_feedforward,
        dropout=args.dropout,
        normalize_before=args.pre_norm,
        return_intermediate_dec=True,
    )

"""Position encodings: the place of each feature cell as a vector."""

import math

import torch
from torch import Tensor, nn

from util.nested_tensor import NestedTensor

LEARNED_CELLS = 50  # rows, and columns, that have a learned position


class PositionEmbeddingSine(nn.Module):
    """Fixed sines of y and x (Vaswani et al. 2017, extended to two dimensions).

    A cell's coordinate is the number of unpadded cells up to and including it, so padding does not shift it. With
    `normalize`, it is divided by the image's extent and multiplied by `scale` (2 pi by default): the same relative
    place has the same encoding in images of every size. Feature 2k is sin(p / T^(2k/n)), feature 2k+1 the cosine, for
    n = `num_pos_feats` and T = `temperature`; first come the n features of y, then the n of x.
    """

    def __init__(
        self, num_pos_feats: int = 64, temperature: float = 10000, normalize: bool = False, scale: float | None = None
    ):
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError(f"scale={scale} has no effect without normalize=True")
        self.num_pos_feats = num_pos_feats
        self.temperature = float(temperature)
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else float(scale)

    def forward(self, tensor_list: NestedTensor) -> Tensor:
        """Features and mask [B, h, w] -> float32 [B, 2 * num_pos_feats, h, w]."""
        mask = tensor_list.mask
        assert mask is not None, "positions are counted on the mask of a NestedTensor; this one has none"
        valid = (~mask).float()
        y, x = valid.cumsum(1), valid.cumsum(2)
        if self.normalize:
            y = y / (y[:, -1:, :] + 1e-6) * self.scale
            x = x / (x[:, :, -1:] + 1e-6) * self.scale
        pair = torch.arange(self.num_pos_feats, device=mask.device) // 2
        period = self.temperature ** (2 * pair.float() / self.num_pos_feats)
        return torch.cat([self._waves(y, period), self._waves(x, period)], dim=3).permute(0, 3, 1, 2)

    def _waves(self, coordinate: Tensor, period: Tensor) -> Tensor:
        """[B, h, w] -> [B, h, w, num_pos_feats], sines on the even features and cosines on the odd."""
        angle = coordinate[..., None] / period
        return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=4).flatten(3)


class PositionEmbeddingLearned(nn.Module):
    """A learned vector for each of 50 columns and 50 rows; x features come first."""

    def __init__(self, num_pos_feats: int = 256):
        super().__init__()
        self.row_embed = nn.Embedding(LEARNED_CELLS, num_pos_feats)
        self.col_embed = nn.Embedding(LEARNED_CELLS, num_pos_feats)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both tables uniformly from 0..1."""
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, tensor_list: NestedTensor) -> Tensor:
        """Features [B, C, h, w] -> [B, 2 * num_pos_feats, h, w]. ValueError if h or w is more than 50."""
        batch, h, w = tensor_list.tensors.shape[0], tensor_list.tensors.shape[2], tensor_list.tensors.shape[3]
        cells = self.row_embed.weight.shape[0]
        if max(h, w) > cells:
            raise ValueError(
                f"learned positions cover {cells} x {cells} cells, not {h} x {w}: use smaller images or sine positions"
            )
        columns = self.col_embed.weight[:w].unsqueeze(0).expand(h, -1, -1)
        rows = self.row_embed.weight[:h].unsqueeze(1).expand(-1, w, -1)
        return torch.cat([columns, rows], dim=2).permute(2, 0, 1).unsqueeze(0).expand(batch, -1, -1, -1)


# --position_embedding: the name and a function of the number of features for each axis.
POSITION_EMBEDDINGS = {
    "sine": lambda num_pos_feats: PositionEmbeddingSine(num_pos_feats, normalize=True),
    "learned": PositionEmbeddingLearned,
}
OLD_NAMES = {"v2": "sine", "v3": "learned"}


def build_position_encoding(args) -> nn.Module:
    """Build the position encoding that `args.position_embedding` names, for a transformer of `args.hidden_dim`."""
    name = OLD_NAMES.get(args.position_embedding, args.position_embedding)
    if name not in POSITION_EMBEDDINGS:
        raise ValueError(
            f"no position embedding {args.position_embedding!r}: choose one of {', '.join(POSITION_EMBEDDINGS)}"
        )
    return POSITION_EMBEDDINGS[name](args.hidden_dim // 2)

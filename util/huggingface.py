"""The names of DETR's weights in Hugging Face's transformers, and here.

`to_own` and `to_huggingface` convert a state dict. Both name a mask model's detector `detr.`, so only the rest differs:

* the backbone is timm's (torchvision's names) or transformers' own ResNet (`encoder.stages...`);
* query, key and value projections are three matrices there, and one packed matrix here;
* a module of a current release has other names than its files, which keep those of release 4; both are read.
"""

import re

import torch
from torch import Tensor

# Each pair: how names begin in a file of transformers, and here. {} is a number.
PAIRS = [
    ("model.input_projection.", "input_proj."),
    ("model.query_position_embeddings.", "query_embed."),
    ("class_labels_classifier.", "class_embed."),
    ("bbox_predictor.", "bbox_embed."),
    ("model.encoder.layernorm.", "transformer.encoder.norm."),
    ("model.decoder.layernorm.", "transformer.decoder.norm."),
    ("model.position_embedding.row_embeddings.", "backbone.1.row_embed."),
    ("model.position_embedding.column_embeddings.", "backbone.1.col_embed."),
]
NORMS = {
    "encoder": {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    "decoder": {"self_attn_layer_norm": "norm1", "encoder_attn_layer_norm": "norm2", "final_layer_norm": "norm3"},
}
ATTENTION = {"self_attn": "self_attn", "encoder_attn": "multihead_attn"}
for _part, _norms in NORMS.items():
    _layer, _own_layer = f"model.{_part}.layers.{{}}.", f"transformer.{_part}.layers.{{}}."
    for _there, _here in (_norms | ATTENTION | {"fc1": "linear1", "fc2": "linear2"}).items():
        PAIRS.append((f"{_layer}{_there}.", f"{_own_layer}{_here}."))

BODY, OWN_BODY = "model.backbone.conv_encoder.model.", "backbone.0.body."
TIMM = [(BODY, OWN_BODY)]
RESNET = [
    (f"{BODY}embedder.embedder.convolution.", f"{OWN_BODY}conv1."),
    (f"{BODY}embedder.embedder.normalization.", f"{OWN_BODY}bn1."),
]
for _stage in range(4):
    _layer, _own_layer = f"{BODY}encoder.stages.{_stage}.layers.{{}}.", f"{OWN_BODY}layer{_stage + 1}.{{}}."
    RESNET += [
        (f"{_layer}shortcut.convolution.", f"{_own_layer}downsample.0."),
        (f"{_layer}shortcut.normalization.", f"{_own_layer}downsample.1."),
    ]
    for _i in range(3):
        RESNET += [
            (f"{_layer}layer.{_i}.convolution.", f"{_own_layer}conv{_i + 1}."),
            (f"{_layer}layer.{_i}.normalization.", f"{_own_layer}bn{_i + 1}."),
        ]
BACKBONES = {"timm": TIMM, "transformers": RESNET}

# Names of modules of transformers 5 (and of learned positions in 4), and what files have instead.
MODULES = [
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"^model\.backbone\.position_embedding\.", "model.position_embedding."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.fc(\d)\.", r".fc\1."),
    (r"^bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
    (r"^mask_head\.conv(\d)\.conv\.", r"mask_head.lay\1."),
    (r"^mask_head\.conv(\d)\.norm\.", r"mask_head.gn\1."),
    (r"^mask_head\.output_conv\.", "mask_head.out_lay."),
]
for _i in range(3):
    _stage = rf"^mask_head\.fpn_stages\.{_i}\."
    MODULES += [
        (rf"{_stage}fpn_adapter\.", f"mask_head.adapter{_i + 1}."),
        (rf"{_stage}refine\.conv\.", f"mask_head.lay{_i + 3}."),
        (rf"{_stage}refine\.norm\.", f"mask_head.gn{_i + 3}."),
    ]

FOREIGN = re.compile(r"class_labels_classifier|query_position_embeddings|backbone\.(conv_encoder|model)\.")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # in the order in which they are packed


def is_huggingface(names) -> bool:
    """Return whether any of the names is one of transformers' DETR models, or of its relatives there."""
    return any(FOREIGN.search(name) for name in names)


def to_own(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of transformers to the names here; names that are unknown stay as they are."""
    pairs = _compiled([*PAIRS, *RESNET, *TIMM])  # timm's last: it matches every name of a backbone
    named = {}
    for name, value in weights.items():
        if not name.endswith(".num_batches_tracked"):  # a frozen norm counts no batches
            prefix, rest = _split(name)
            for pattern, replacement in MODULES:
                rest = re.sub(pattern, replacement, rest)
            named[prefix + _renamed(rest, pairs)] = value
    return _packed(named)


def to_huggingface(weights: dict[str, Tensor], backbone: str = "timm") -> dict[str, Tensor]:
    """Rename a state dict of this project to those of transformers, with a `backbone` of "timm" or "transformers"."""
    pairs = _compiled([(here, there) for there, here in [*PAIRS, *BACKBONES[backbone]]])
    named = {}
    for name, value in weights.items():
        if name.endswith(".num_batches_tracked"):
            continue
        prefix, rest = _split(name)
        packed = re.search(r"in_proj_(weight|bias)$", rest)
        parts = zip(PROJECTIONS, value.chunk(3), strict=True) if packed else [(None, value)]
        for projection, part in parts:
            own = rest[: packed.start()] + f"{projection}.{packed[1]}" if packed else rest
            named[prefix + _renamed(own, pairs)] = part.contiguous()  # as safetensors needs it
    return named


def _split(name: str) -> tuple[str, str]:
    rest = name.removeprefix("detr.")
    return name[: len(name) - len(rest)], rest


def _compiled(pairs: list[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(re.escape(there).replace(r"\{\}", r"(\d+)")), here) for there, here in pairs]


def _renamed(name: str, pairs: list[tuple[re.Pattern, str]]) -> str:
    for pattern, replacement in pairs:
        if match := pattern.match(name):
            return replacement.format(*match.groups()) + name[match.end() :]
    return name


def _packed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the projections of each attention; those of which one is missing stay as they are."""
    packed = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(.*attn\.)([qkv]_proj)\.(weight|bias)", name)
        parts = [f"{match[1]}{projection}.{match[3]}" for projection in PROJECTIONS] if match else []
        if not match or any(part not in weights for part in parts):
            packed[name] = value
        elif match[2] == "q_proj":
            packed[f"{match[1]}in_proj_{match[3]}"] = torch.cat([weights[part] for part in parts])
    return packed

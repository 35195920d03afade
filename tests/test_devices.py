"""What a GPU would be asked to do, on a machine without one: fake tensors that have shapes and a device, but no values.

A tensor left on the CPU is an error there, and so is every hidden look at a value. The deliberate looks are counted:
each makes the CPU wait for the GPU.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import engine
from models import build_model
from tests.helpers import parse
from util.nested_tensor import nested_tensor_from_tensor_list

GPU = torch.device("cuda", 0)
MASKS = "--masks --hidden_dim 128 --nheads 8"
SIZES = ((64, 80), (48, 96))


@pytest.fixture
def looks(monkeypatch):
    """The names of the functions that have brought values to the CPU; they find zeros there. No gradient is computed
    (autograd wants a real GPU): each is as if it were 0."""
    calls = []

    def look(name, answer):
        def function(self):
            calls.append(name)
            return answer(np.zeros(tuple(self.shape)))

        monkeypatch.setattr(FakeTensor, name, function, raising=False)

    look("numpy", lambda zeros: zeros)
    look("tolist", lambda zeros: zeros.tolist())
    monkeypatch.setattr(FakeTensor, "backward", lambda self: None, raising=False)
    return calls


def on_gpu(module: nn.Module) -> nn.Module:
    """Give a module fake parameters and buffers (inside a FakeTensorMode)."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name].grad = fake(parameter) if parameter.requires_grad else None
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else fake(buffer)
    return module


def batch(flags: str) -> tuple:
    """Two images of different sizes on the CPU, one with two objects and one with none."""
    images = [torch.zeros(3, *size, dtype=torch.uint8) for size in SIZES]
    targets = [
        {"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.rand(n, 4), "image_id": 7}
        | ({"masks": torch.zeros(n, *size, dtype=torch.bool)} if flags == MASKS else {})
        for n, size in zip((2, 0), SIZES, strict=True)
    ]
    return nested_tensor_from_tensor_list(images), targets


WAYS = [("", None), ("", "bf16"), ("--position_embedding learned --pre_norm", None), (MASKS, "bf16")]
without_gpu = pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")  # autocast's, which works all the same


@pytest.mark.parametrize("flags, amp", WAYS)
@without_gpu
@pytest.mark.slow
def test_a_training_step_waits_for_the_gpu_twice(looks, flags, amp):
    model, criterion, _ = build_model(parse(f"{flags} --num_classes 5"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer = torch.optim.AdamW(on_gpu(model).parameters(), fused=True)
        engine.train_one_epoch(model, on_gpu(criterion), [batch(flags)] * 3, optimizer, GPU, 0, 0.1, amp=amp)
    assert looks == ["numpy", "tolist"] * 3  # the costs of the matching, and the losses for the log


@pytest.mark.parametrize("flags, amp", WAYS)
@without_gpu
def test_detections_and_masks_are_read_out_on_the_gpu(looks, flags, amp):
    model, _, postprocessors = build_model(parse(f"{flags} --num_classes 5"))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        samples, _ = batch(flags)
        with engine.autocast(GPU, amp):
            outputs = on_gpu(model).eval()(samples.to(GPU))
        results = postprocessors["bbox"](outputs, torch.tensor(SIZES))
    if flags == MASKS:  # wants to know real sizes
        results = postprocessors["segm"](results, outputs, torch.tensor(SIZES), torch.tensor(SIZES))
    assert looks == [] and all(value.device == GPU for result in results for value in result.values())

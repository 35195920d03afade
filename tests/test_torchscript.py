"""Every hub model compiles with TorchScript and gives the same numbers, also behind a module that does the padding."""

import pytest
import torch
from torch import Tensor, nn

import hubconf
from util.nested_tensor import nested_tensor_from_tensor_list

# PyTorch calls TorchScript deprecated; programs that run DETR in libtorch still need it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated")
NAMES = [name for name in dir(hubconf) if name.startswith("detr_")]


class FromList(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor]):
        return self.model(nested_tensor_from_tensor_list(images))


def assert_scripted_equals_eager(model, images):
    scripted = torch.jit.script(FromList(model))
    with torch.no_grad():
        eager = model(images)
        for outputs in (scripted(images), scripted.model(nested_tensor_from_tensor_list(images))):
            assert outputs.keys() == eager.keys()
            for key, value in eager.items():
                torch.testing.assert_close(outputs[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_scripted_equals_eager(name):
    """In float64, where only a different computation could differ (eager folds the norms, which rounds otherwise)."""
    torch.manual_seed(0)
    model = getattr(hubconf, name)().eval().double()
    assert_scripted_equals_eager(model, [torch.randn(size).double() for size in ((3, 32, 48), (3, 40, 32))])


def test_scripted_takes_bytes():
    torch.manual_seed(0)
    images = [torch.randint(0, 256, size, dtype=torch.uint8) for size in ((3, 32, 48), (3, 40, 32))]
    assert_scripted_equals_eager(hubconf.detr_resnet50().eval(), images)

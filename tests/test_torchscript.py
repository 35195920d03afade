"""Every hub model compiles with TorchScript and gives the same bits, also behind a module that does the padding."""

import pytest
import torch
from torch import Tensor, nn

import hubconf
from util.nested_tensor import nested_tensor_from_tensor_list

# PyTorch calls TorchScript deprecated; programs that run DETR in libtorch still need it.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated")]
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
                assert torch.equal(outputs[key], value), f"{key}: off by {(outputs[key] - value).abs().max():.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_scripted_hub_model_equals_eager_bit_for_bit(name):
    torch.manual_seed(0)
    model = getattr(hubconf, name)().eval()
    assert_scripted_equals_eager(model, [torch.randn(size) for size in ((3, 32, 48), (3, 40, 32))])


def test_scripted_model_takes_uint8_images():
    torch.manual_seed(0)
    images = [torch.randint(0, 256, size, dtype=torch.uint8) for size in ((3, 32, 48), (3, 40, 32))]
    assert_scripted_equals_eager(hubconf.detr_resnet50().eval(), images)

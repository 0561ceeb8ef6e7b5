"""Constants that are kept for CUDA, where tensors are fake."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kernels.constants import from_host


@pytest.mark.gpu
def test_a_constant_that_is_kept_is_a_fake_one_among_fake_tensors() -> None:
    """The second model of a process whose blocks are measured without memory (activation_checkpoint=budget): the first
    one's real constant, beside fake tensors, was an error."""
    device = torch.device("cuda")
    real = from_host("constant of a test", lambda: torch.arange(3.0), device)
    with FakeTensorMode():
        fake = from_host("constant of a test", lambda: torch.arange(3.0), device)
    assert isinstance(fake, FakeTensor)
    assert fake.device == real.device
    assert torch.equal(from_host("constant of a test", lambda: torch.arange(3.0), device), real)

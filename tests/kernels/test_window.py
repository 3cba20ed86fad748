"""The product of a window against the joined copy that it avoids, every gradient."""

import pytest
import torch

from recurlm.kernels.window import window


@pytest.mark.parametrize(("T", "k"), [(5, 1), (1, 1), (1, 3), (2, 3), (7, 2), (3, 3)])
def test_the_product_and_its_gradients(T, k, generator):
    x, previous, weight = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((T, 2, 4), (k, 2, 4), (6, 4 * (k + 1)))
    )
    past = torch.cat((previous, x))
    joined = torch.cat([past[i : i + T] for i in range(k, -1, -1)], dim=-1)
    torch.testing.assert_close(window(x, previous, weight), joined @ weight.T)
    assert torch.autograd.gradcheck(window, (x, previous, weight))

"""The three products of a Linear against float64, for one matrix and for one a group."""

import pytest
import torch
from torch import Tensor

from model.fp8.groups import Groups
from model.fp8.products import dgrad, fprop, wgrad
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized
from model.fp8.reference import Reference
from tests.references import exact_by_tiles, quantize_by_tiles

COUNTS = (3, 0, 140)
TOKENS, INPUTS, OUTPUTS = 143, 130, 40

x = torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(0))
w = torch.randn(3, OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1))
dy = torch.randn(TOKENS, OUTPUTS, generator=torch.Generator().manual_seed(2))
backend = Reference()


def close(found: Tensor, exact: Tensor) -> bool:
    assert found.dtype == torch.float32
    return torch.equal(found, exact.float())


def test_a_linears_products_contract_inputs_then_outputs_then_tokens() -> None:
    x8, w8 = quantize_by_tiles(x, ACTIVATION), quantize_by_tiles(w[0], BLOCK)
    dy8 = quantize_by_tiles(dy, ACTIVATION)
    along = quantize_by_tiles(dy, ALONG_TOKENS), quantize_by_tiles(x, ALONG_TOKENS)
    assert close(fprop(backend, x8, w8), exact_by_tiles(x8) @ exact_by_tiles(w8).T)
    assert close(dgrad(backend, dy8, w8), exact_by_tiles(dy8) @ exact_by_tiles(w8))
    assert close(wgrad(backend, *along), exact_by_tiles(along[0]).T @ exact_by_tiles(along[1]))


@pytest.mark.parametrize("group", range(3))
def test_with_groups_each_group_has_a_matrix_of_its_own(group: int) -> None:
    rows = slice(sum(COUNTS[:group]), sum(COUNTS[: group + 1]))
    matrices = [quantize_by_tiles(one, BLOCK) for one in w]
    w8 = Quantized(
        torch.stack([q.values for q in matrices]), torch.stack([q.scales for q in matrices]), BLOCK
    )
    x8, dy8 = quantize_by_tiles(x, ACTIVATION), quantize_by_tiles(dy, ACTIVATION)
    x_tokens, dy_tokens = (quantize_by_tiles(t, ALONG_TOKENS, counts=COUNTS) for t in (x, dy))
    exact = exact_by_tiles(matrices[group])
    groups = Groups.of(COUNTS)
    y, dx = fprop(backend, x8, w8, groups), dgrad(backend, dy8, w8, groups)
    assert close(y[rows], exact_by_tiles(x8)[rows] @ exact.T)
    assert close(dx[rows], exact_by_tiles(dy8)[rows] @ exact)
    dw = wgrad(backend, dy_tokens, x_tokens, groups)
    assert dw.shape == (3, OUTPUTS, INPUTS)
    assert close(dw[group], exact_by_tiles(dy_tokens)[rows].T @ exact_by_tiles(x_tokens)[rows])

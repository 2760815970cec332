"""The peer of the machine-code table computes attention, or the comparison would mean nothing."""

import helpers
import pytest
import torch

if helpers.device != "interpreter":
    pytest.skip("runs in Triton's interpreter: TRITON_INTERPRET=1 and --device=interpreter", allow_module_level=True)

from bench.tutorial_attention import configurations, tutorial_attention
from revit_fast.kernels.launch import TARGETS

SEQLENS = (1, 50, 64, 101)


@pytest.mark.parametrize("head_dim", [32, 80])
@pytest.mark.parametrize("block_m", [64, 128])
def test_tutorial_attention(head_dim, block_m):
    cu_seqlens = helpers.cu_seqlens_of(SEQLENS)
    q, k, v = (helpers.randn(sum(SEQLENS), 2, head_dim, seed=seed) for seed in range(3))
    configuration = {"BLOCK_M": block_m, "BLOCK_N": 32, "num_stages": 1, "num_warps": 4}
    out, _ = tutorial_attention(q, k, v, cu_seqlens, max(SEQLENS), head_dim**-0.5, configuration)

    def truth(q, k, v):
        return torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    *(t[a:b].transpose(0, 1) for t in (q, k, v))
                ).transpose(0, 1)
                for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
            ]
        )

    helpers.check_op(out, truth, q, k, v)


def test_configurations_are_the_tutorials():
    assert {c["BLOCK_N"] for c in configurations(TARGETS["sm_90"], 64)} == {32, 64}
    assert all(c["num_warps"] == 4 for c in configurations(TARGETS["sm_90"], 64))
    assert len(configurations(TARGETS["sm_80"], 128)) == 36

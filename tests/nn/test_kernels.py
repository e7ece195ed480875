"""The kernels of a GPU, interpreted on a CPU: attention is SDPA's; rows are turned and written where they belong."""

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="pip install triton: torch for CUDA brings it")

ATTEND = """
import torch
from torch.nn import functional as F
from dmllm.nn import kernels

torch.manual_seed(0)
for programs, (batch, heads, groups, width, size, dim) in (
    (132, (2, 4, 2, 5, 200, 32)), (132, (1, 2, 2, 70, 130, 16)), (1, (2, 2, 1, 3, 64, 16))
):
    kernels.PROGRAMS = programs
    q = torch.randn(batch, width, heads, dim).half().transpose(1, 2)
    k, v = torch.randn(2, batch, groups, size + 1, dim).half()[..., :size, :]
    seen = torch.rand(batch, 1, width, size) < 0.5
    seen[:, :, 0] = torch.arange(size) == size - 1  # whole parts of the keys are hidden
    mask = torch.zeros(seen.shape).half().masked_fill(~seen, -torch.inf)
    wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask.float(), enable_gqa=True)
    found = kernels.attend(q, k, v, mask)
    torch.testing.assert_close(found.float(), wanted.transpose(1, 2).flatten(2), atol=2e-2, rtol=2e-2)
    assert torch.equal(found[:, 0].unflatten(1, (heads, dim)), v[:, :, -1].repeat_interleave(heads // groups, 1))
print("alike")
"""
PLACE = """
import torch
from dmllm.nn import kernels
from dmllm.nn.rope import rotary_tables, rotate

torch.manual_seed(0)
for batch, heads, groups, width, size, dim in ((2, 4, 2, 5, 20, 16), (1, 2, 2, 3, 9, 32)):
    packed = torch.randn(batch, width, (heads + 2 * groups) * dim).bfloat16()
    q, k, v = packed.split([heads * dim, groups * dim, groups * dim], -1)
    q, k, v = (x.view(batch, width, -1, dim).transpose(1, 2) for x in (q, k, v))
    cos, sin = rotary_tables(torch.randint(0, 99, (batch, width)), dim, 1e4, torch.bfloat16)
    keys, values = torch.zeros(2, batch, groups, size + 1, dim).bfloat16()
    places = torch.stack([torch.randperm(size)[:width] for _ in range(batch)])
    places[0, 0] = size  # kept nowhere
    turned = kernels.place(q, k, v, cos, sin, keys, values, places)
    near = {"atol": 3e-2, "rtol": 3e-2}
    row = torch.arange(batch)[:, None]
    torch.testing.assert_close(turned.float(), rotate(q.float(), cos.float(), sin.float()), **near)
    torch.testing.assert_close(
        keys[row, :, places].transpose(1, 2).float(), rotate(k.float(), cos.float(), sin.float()), **near
    )
    assert torch.equal(values[row, :, places].transpose(1, 2), v)
    written = torch.zeros(batch, size + 1, dtype=torch.bool).scatter(1, places, True)
    assert (keys.abs().sum(-1) > 0).eq(written[:, None]).all()
print("alike")
"""


@pytest.mark.parametrize("code", [ATTEND, PLACE], ids=["attend", "place"])
def test_interpreted_on_a_cpu(code: str) -> None:
    """In a process of its own: triton reads how it is to run when it is imported."""
    environment = {
        "TRITON_INTERPRET": "1",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("alike\n")

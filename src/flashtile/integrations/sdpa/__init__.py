"""PyTorch's ``F.scaled_dot_product_attention`` on flashtile, without editing the code that calls it.

Two ways in, which do not exclude each other:

* ``activate()`` makes flashtile torch's flash attention on CUDA, in the whole process, until ``restore()``. It costs
  nothing per call, and serves what torch sends to its flash kernels: float16 and bfloat16 without a mask.
* ``with override():`` serves every call made inside the block, in this thread, on any device, with masks, biases,
  float32 and float64 too.
"""

from flashtile.integrations.sdpa.interception import override
from flashtile.integrations.sdpa.registration import NAME, activate, register, restore

__all__ = ["NAME", "activate", "override", "register", "restore"]

r"""Products of tall matrices with small ones, by the faster of the two libraries in torch.

On the CPU ``torch.mm`` calls MKL (or what torch was built with), and convolutions call oneDNN. MKL
leaves half of the wide vectors of some processors unused (measured: 220 of 460 GFLOP/s), oneDNN
does not. A convolution with a kernel of one place is a product of matrices, and its gradient in the
kernel is the other one; so float32 products that are worth it go there. On all other devices,
dtypes and processors it is ``torch.mm``. Which one is taken depends on shapes and machine only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

__all__ = ["crossed", "gram", "turned"]

# Products with fewer multiplications take less time than finding the place for them.
_LEAST = 2**24
# In one thread, torch gives convolutions of at least so many images to oneDNN; positions are cut
# into as many then.
_IMAGES = 16
# Sides of at least so many entries are summed by so many panels, which spares 3 of 8 operations
# (two panels: 1 of 4).
_WIDE, _PANELS = 512, 4


def turned(x: Tensor, Q: Tensor) -> Tensor:
    """``x @ Q`` for ``x [..., k]`` and ``Q [k, n]``."""
    if not _suits(x, Q, x.numel() * Q.shape[1]):
        return x @ Q
    kernel = Q.T.reshape(*Q.T.shape, 1, 1)
    return F.conv2d(_images(x), kernel).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def crossed(x: Tensor, y: Tensor) -> Tensor:
    """``x^T y`` for ``x [n, p]`` and ``y [n, m]``."""
    if not _suits(x, y, x.numel() * y.shape[1]):
        return x.T @ y
    shape = (x.shape[1], y.shape[1], 1, 1)
    return conv2d_weight(_images(y), shape, _images(x)).view(shape[:2])


def gram(weighted: Tensor, rows: Tensor) -> Tensor:
    """``weighted^T rows`` where that is symmetric: wide ones by panels above the diagonal."""
    n = rows.shape[1]
    if n < _WIDE:
        return crossed(weighted, rows)
    # oneDNN is slower on narrow panels.
    step = -(-n // (2 if _suits(weighted, rows, rows.numel() * n // 4) else _PANELS))
    out = rows.new_empty(n, n)
    for start in range(0, n, step):
        stop = min(start + step, n)
        out[start:stop, start:] = crossed(weighted[:, start:stop], rows[:, start:])
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out


def _suits(x: Tensor, y: Tensor, multiplications: int) -> bool:
    return (
        multiplications >= _LEAST
        and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in (x, y))
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _images(x: Tensor) -> Tensor:
    """``x [..., k]`` as images of ``k`` channels, which lie behind each other in memory."""
    rows = x.numel() // x.shape[-1]
    count = _IMAGES if torch.get_num_threads() == 1 and rows % _IMAGES == 0 else 1
    return x.reshape(count, 1, rows // count, x.shape[-1]).permute(0, 3, 1, 2)

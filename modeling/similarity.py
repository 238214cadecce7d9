"""How much visual tokens resemble each other: their cosines, and never more of these at a time than stated here.

Knows no method. A row too short to be normalised resembles nothing; autocast never rounds a cosine.
"""

import contextlib
from collections.abc import Callable

import torch

# Cosines held at a time. Where all of an image's are wanted and are more (over 11,585 tokens), the rest is computed
# again whenever it is needed.
MATRIX = 2**27  # in a matrix: 512 MiB in float32
BLOCK = 2**22  # in passing, beside such a matrix or without one: 16 MiB


def is_traced() -> bool:
    """Say whether tensors have no numbers at hand: within torch.compile, and within torch.func, whatever it traces."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    # Autocast would round the similarities, and one swapped rank changes every later round.
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def norms_of(features: torch.Tensor) -> torch.Tensor:
    """Return what to divide each row by, (..., N, C) -> (..., N, 1): its norm, infinity where that is nearly zero.

    Raises ValueError for a norm that is not finite (where that would wait for the device, it is asserted there).
    """
    norms = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    refuse_unless(
        (norms < float("inf")).all(),
        f"features hold NaN, infinity or a norm too large for {features.dtype}: check pixel_values, "
        "or load the model in bfloat16 or float32",
    )
    # A row too short to be normalised resembles nothing, rather than being NaN.
    return torch.nn.functional.threshold(norms, torch.finfo(features.dtype).tiny, float("inf"))


def unit_rows(features: torch.Tensor, norms: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the named rows at length 1: (B, N, C), (B, N, 1), (B, R) -> (B, R, C)."""
    return (features / norms).gather(1, tokens[:, :, None].expand(-1, -1, features.shape[-1]))


def cosines(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Compare rows of length 1: (..., R, C), (..., N, C) -> (..., R, N)."""
    with without_autocast(rows.device):
        return rows @ others.mT


def matrix_fits(images: int, tokens: int) -> bool:
    """True where all cosines of so many images of so many tokens may be held at a time."""
    return images * tokens**2 <= MATRIX


def images_at_once(tokens: int) -> int:
    """Return how many images of so many tokens may have all their cosines held, and at least 1."""
    return max(1, MATRIX // tokens**2)


def row_blocks(images: int, tokens: int) -> list[slice]:
    """Split the rows of (images, tokens, tokens) so that no part holds more than `BLOCK`, or more than single rows."""
    rows = max(1, BLOCK // (images * tokens))
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def fill_with_cosines(rows: torch.Tensor, out: torch.Tensor, block: int = 128) -> None:
    """Fill `out` (B, R, R) with rows @ rows.mT of (B, R, C), on a CPU: it is symmetric, so lower blocks are copied."""
    product: Callable[..., torch.Tensor] = torch.bmm
    if len(rows) == 1:  # a batched product takes some percent longer
        rows, out, product = rows[0], out[0], torch.mm
    # numpy copies a transposed block in half of the time, and its bits are all that it must know of a bfloat16.
    values = (out.view(torch.int16) if out.dtype == torch.bfloat16 else out).numpy()
    with without_autocast(rows.device):
        for start in range(0, rows.shape[-2], block):
            stop = start + block
            product(rows[..., start:stop, :], rows[..., start:, :].mT, out=out[..., start:stop, start:])
            values[..., stop:, start:stop] = values[..., start:stop, stop:].swapaxes(-1, -2)


def refuse_unless(good: torch.Tensor, message: str) -> None:
    """Raise ValueError; where reading `good` would wait for the device or break the graph, assert on the device."""
    if good.device.type == "meta":
        return
    if good.device.type == "cuda" or is_traced():
        torch._assert_async(good, message)
    elif not good:
        raise ValueError(message)

"""Ways around slow spots of PyTorch on CPUs. They change no result, are no part of pruning, and may be deleted.

Set APPLY to False to measure without them. To be looked at again in May 2027, or with torch 2.16, whichever is first.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .visual_attention import open_tap_that_may_pad

APPLY = True

# oneDNN multiplies the 577 rows of one picture in CLIP at 336 pixels, in bfloat16, as slowly as 730; 584 it does not.
# Measured on four cores of an AMD EPYC with torch 2.13: the tower of LLaVA-1.5 took 862 ms without, 703 ms with it.
SLOW_ROWS, FAST_ROWS = 577, 584


def pad_slow_rows(embeddings: nn.Module, arguments: tuple, embedded: torch.Tensor) -> torch.Tensor:
    """Forward hook of a tower's embeddings (B, N, C): append tokens in `run_tower`, where that saves time.

    No token attends to them, so the others come out as without them. Not where gradients are recorded: checkpointing
    computes layers again when the tap, which keeps those tokens apart, has been closed.
    """
    slow = embedded.shape[:2] == (1, SLOW_ROWS) and embedded.dtype == torch.bfloat16 and embedded.device.type == "cpu"
    if not APPLY or not slow or torch.is_grad_enabled():
        return embedded
    tap = open_tap_that_may_pad()
    if tap is None:
        return embedded
    tap.tokens = SLOW_ROWS
    return F.pad(embedded, (0, 0, 0, FAST_ROWS - SLOW_ROWS))


def give_lm_head_its_own_rows(lm_head: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Forward pre-hook of `lm_head`: what it multiplies is no slice of a longer tensor.

    The first token comes from such a slice, and in bfloat16 PyTorch (issue 151934) then copies all of lm_head's
    weights for every prompt: measured on the same machine, 0.6 s each for a model of 7B. Elsewhere a slice costs next
    to nothing, and stays.
    """
    (hidden,) = arguments
    is_slice = hidden.dim() == 3 and hidden.stride(0) != hidden.shape[1] * hidden.stride(1)
    if APPLY and is_slice and hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    return (hidden,)

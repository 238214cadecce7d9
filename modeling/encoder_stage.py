"""Let patches leave between two layers of an encoder, or before all, so that the layers behind run on fewer rows.

While a tap with a stage is open, the layers behind are given fewer rows, and everything beside them that has as many
rows is cut alike. Whoever needs all rows again is given 0 for those that left, which nothing may choose any more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class EncoderStage:
    """After one layer of an encoder, or before the first, some of the patches leave.

    layers       all layers of the encoder, each called with (B, rows, C), or (rows, C) where it packs images
    after        the number of the layer after which they leave; -1 for before all
    ranked_by    what a tap is to read for it, of that layer or one before; None for nothing
    choose       what was read of the patches (B, N) to those that remain (B, N), as many of each as the others
    count        how many of the N patches of each row remain
    registers    tokens between [CLS] and the patches
    has_cls      whether token 0 is [CLS]
    restored_at  modules that are called with all rows, those that left being 0
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        after: int,
        ranked_by: Any,
        choose: Callable[[Any], torch.Tensor],
        count: int,
        registers: int = 0,
        has_cls: bool = False,
        restored_at: Sequence[nn.Module] = (),
    ) -> None:
        self._layers, self.after, self.ranked_by, self._choose, self.count = layers, after, ranked_by, choose, count
        self._registers, self._lead, self._restored_at = registers, registers + int(has_cls), restored_at
        self.remain: torch.Tensor | None = None  # (B, N) which patches do, from `after` on
        self._patches = self._rows = torch.empty(0)  # (B, count) their numbers, (B, lead + count) their rows
        self._cut_before: dict[int, tuple[Any, Any]] = {}  # by id, what all layers are given and what was made of it

    def listen(self, saliency: Callable[[], torch.Tensor], is_open: Callable[[], bool]) -> list[Any]:
        """Cut what the layers behind are given from now on; return the handles of the hooks that do.

        saliency  of the patches so far, (B, registers + N)
        is_open   whether this thread is the one that runs the encoder for this stage
        """
        refuse_checkpointing(self._layers)

        def enter(layer: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
            # torch gives no kwargs where another thread, whose hook this is, takes it away at this moment.
            if kwargs is None or not is_open():
                return None
            if self.remain is None:
                self._decide(None if self.ranked_by is None else saliency()[:, self._registers :])
            return self._cut(args, kwargs, is_first=layer is self._layers[self.after + 1])

        def restore(module: nn.Module, args: tuple) -> Any:
            return (self.restored(args[0][None])[0], *args[1:]) if is_open() else None

        handles = [
            layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in self._layers[self.after + 1 :]
        ]
        return handles + [module.register_forward_pre_hook(restore) for module in self._restored_at]

    def require_done(self) -> None:
        """Raise RuntimeError unless the patches left."""
        if self.remain is None:
            raise RuntimeError(
                "vispruner_config.encoder_stage: no patch left, because the encoder did not call its layers one by "
                "one, as it does not when it is compiled: set encoder_stage to null, or do not compile the encoder"
            )

    def _decide(self, saliency: torch.Tensor | None) -> None:
        self.remain = self._choose(saliency)
        self._patches = (~self.remain).int().argsort(dim=1, stable=True)[:, : self.count]
        lead = torch.arange(self._lead, device=self._patches.device).expand(len(self._patches), -1)
        self._rows = torch.cat([lead, self._lead + self._patches], dim=1)

    def _cut(self, args: tuple, kwargs: dict[str, Any], is_first: bool) -> tuple[tuple, dict[str, Any]]:
        hidden, *further = args
        kwargs = dict(kwargs)
        if further:  # the one that layers take by its place
            kwargs["attention_mask"], *further = further
        if further:
            raise RuntimeError(_unknown("a further argument"))
        if is_first:
            packed = hidden.dim() == 2
            hidden = _rows_of(hidden[None] if packed else hidden, self._rows)
            hidden = hidden[0] if packed else hidden
        own: dict[str, Callable[[Any], Any]] = {
            "attention_mask": self._cut_mask,
            "cu_seqlens": self._cut_lengths,
            "position_embeddings": self._cut_all,
        }
        for name, value in kwargs.items():
            if name in own and value is not None:
                if id(value) not in self._cut_before:  # held, so that its id stays its own
                    self._cut_before[id(value)] = (value, own[name](value))
                kwargs[name] = self._cut_before[id(value)][1]
            elif isinstance(value, torch.Tensor) and self.all_rows in value.shape:
                raise RuntimeError(_unknown(name))
        return (hidden,), kwargs

    @property
    def all_rows(self) -> int:
        """How many rows the encoder had before."""
        assert self.remain is not None
        return self._lead + self.remain.shape[1]

    def cut_seen(self, seen: torch.Tensor | None) -> torch.Tensor | None:
        """Of flags (B, rows) that say which rows are no padding, as they are where nothing left yet."""
        return seen if seen is None or self.remain is None else self._cut_mask(seen)

    def _cut_all(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Of tensors (rows, ...) that go with a packed sequence."""
        return tuple(part[self._rows[0].to(part.device)] for part in parts)

    def _cut_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Of a mask (B, rows) or (B, heads, rows or 1, rows)."""
        if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
            raise ValueError(
                "vispruner_config.encoder_stage: the attention mask of this encoder cannot be cut: load the model "
                'with attn_implementation="sdpa"'
            )
        rows = self._rows.to(mask.device)
        mask = mask.expand(len(rows), *mask.shape[1:])
        if mask.dim() == 2:
            return mask.gather(1, rows)
        if mask.shape[2] > 1:
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return mask.gather(3, rows[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))

    def _cut_lengths(self, bounds: torch.Tensor) -> torch.Tensor:
        """Of the bounds (chunks + 1,) between which rows of a packed sequence attend; a chunk without rows goes."""
        assert self.remain is not None
        before = F.pad(self.remain[0].cumsum(0), (1, 0)).to(bounds.device)
        return before[bounds.long()].unique_consecutive().to(bounds.dtype)

    def restored(self, values: torch.Tensor, before: int = 0) -> torch.Tensor:
        """Return values (B, before + count, ...) as (B, before + N, ...), 0 for what left; others as they are."""
        if self.remain is None or values.shape[1] != before + self.count:
            return values
        lead = torch.arange(before, device=self._patches.device).expand(len(values), -1)
        index = torch.cat([lead, before + self._patches], dim=1).to(values.device)
        whole = values.new_zeros(len(values), before + self.remain.shape[1], *values.shape[2:])
        return whole.scatter(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand_as(values), values)


def refuse_checkpointing(layers: Sequence[nn.Module]) -> None:
    """Raise ValueError where the layers of an encoder will be run a second time, for their gradients."""
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
            raise ValueError(
                "vispruner_config.encoder_stage: gradient checkpointing computes the encoder's layers again when "
                "the patches that left are forgotten: turn it off, freeze the encoder and run it in eval mode, or "
                "set encoder_stage to null while training"
            )


def _rows_of(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return hidden.gather(1, rows.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))


def _unknown(name: str) -> str:
    return (
        f"vispruner_config.encoder_stage: this version of transformers gives the encoder's layers {name}, which is "
        "not known to it: set encoder_stage to null, or install a version that this package supports"
    )

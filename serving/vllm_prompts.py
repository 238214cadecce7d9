"""The front end's part: an image takes as many placeholders of the prompt as visual tokens stay of it.

vLLM's own processor writes a full prompt; here placeholders are taken out of it, by the budget of the request. The
budget travels with the picture to the worker, and is a part of what vLLM's caches know the picture by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from prometheus_client import Counter
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, VideoProcessorItems
from vllm.multimodal.processing.processor import PromptUpdateDetails

from vispruner.configuration_vispruner import VisPrunerOptions

from .kept_counts import Picture, kept_count
from .request_budgets import BLOCK, OWN, RequestBudgets, as_numbers, of_request
from .vllm_launch import launch_options

MODALITIES = {"image": ImageProcessorItems, "video": VideoProcessorItems}

# At the server's /metrics, which shows all that is counted in its process.
PICTURES = Counter("vispruner_pictures", "Pictures and videos in prompts that vispruner shortened.", ["modality"])
KEPT = Counter("vispruner_visual_tokens_kept", "Visual tokens that these kept.", ["modality"])


def field_of(modality: str) -> str:
    """Return the keyword by which a model is told the budgets of a batch: (items, 3), see `PrunedPrompts`."""
    return f"vispruner_{modality}_budgets"


class PrunedPrompts:
    """Mixin for a multi-modal processor of vLLM. Goes before the stock class in the bases.

    A worker gets with each picture three numbers: visual_token_num, keep_ratio, and how many placeholders it has.
    """

    info: Any

    def __init__(self, info: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(info, *args, **kwargs)  # type: ignore[call-arg]
        model_config = info.ctx.model_config
        for name in OWN:
            if name in (model_config.get_multimodal_config().mm_processor_kwargs or {}):
                raise ValueError(
                    f"--mm-processor-kwargs: give {name} in vispruner_config or {BLOCK}, by --hf-overrides"
                )
        block = getattr(model_config.hf_config, BLOCK, None)
        self.budgets = RequestBudgets.of_launch(launch_options(model_config), block)

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock; what is wrong in a request is a ValueError, the client's error, and a default budget is none."""
        given = inputs.hf_processor_mm_kwargs
        options = self.budgets.asked(given)
        own = {} if options == self.budgets.default else of_request(options)
        inputs = replace(inputs, hf_processor_mm_kwargs={**_others(given), **own})
        made = super().apply(inputs, *args, **kwargs)  # type: ignore[misc]
        if self.budgets.default.method != "none":
            for modality, places in made["mm_placeholders"].items():
                PICTURES.labels(modality).inc(len(places))
                KEPT.labels(modality).inc(sum(place.get_num_embeds() for place in places))
        return made

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Stock, with the largest budget that a request may have: vLLM sizes its memory by that."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        if self.budgets.maximum == self.budgets.default:
            return inputs
        return replace(inputs, hf_processor_mm_kwargs=of_request(self.budgets.maximum))

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        options = self.budgets.asked(hf_kwargs)
        data = super()._apply_hf_processor_main(mm_items, _others(hf_kwargs))  # type: ignore[misc]
        for modality, kind in MODALITIES.items():
            items = mm_items.get(modality)
            if isinstance(items, kind) and len(items) and options.method != "none":
                unknown = [*as_numbers(options), 0.0]
                data[field_of(modality)] = torch.tensor([unknown] * len(items), dtype=torch.float64)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, _others(hf_processor_mm_kwargs))  # type: ignore[misc]
        own = {field_of(name): MultiModalFieldConfig.batched(name, keep_on_cpu=True) for name in MODALITIES}
        return {**fields, **own}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        options, others = self.budgets.asked(hf_processor_mm_kwargs), _others(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, others, out_mm_kwargs)  # type: ignore[misc]
        if options.method == "none":
            return updates
        return [self._shortened(update, options, mm_items, out_mm_kwargs) for update in updates]

    def _shortened(self, update: Any, options: VisPrunerOptions, mm_items: Any, out_mm_kwargs: Any) -> Any:
        """Return an update of a prompt that writes only the placeholders that stay, and tells the worker how many."""

        def replacement(item: int) -> Any:
            full, items = update._resolve_content(item), mm_items[update.modality]
            if not isinstance(items, MODALITIES[update.modality]):
                return full  # embeddings, which the client made
            picture = self.picture(update.modality, items, item, out_mm_kwargs)
            flags = [True] * len(full.full) if full.is_embed is None else full.is_embed(full.full).tolist()
            ids: list[int] = []
            written = 0
            for is_placeholder, group in groupby(zip(full.full, flags, strict=True), key=lambda pair: pair[1]):
                run = [token for token, _ in group]
                if is_placeholder:
                    run = run[: self._kept(options, len(run), picture)]
                    written += len(run)
                ids += run
            out_mm_kwargs[update.modality][item][field_of(update.modality)].data[2] = written
            return PromptUpdateDetails(ids, full.is_embed)

        return replace(update, replacement=replacement)

    def _kept(self, options: VisPrunerOptions, run: int, picture: Picture) -> int:
        config = self.info.get_hf_config()
        kept = kept_count(config, options, run, picture)
        self.budgets.require_within(options, kept, kept_count(config, self.budgets.maximum, run, picture))
        return kept

    def picture(self, modality: str, items: Any, item: int, out_mm_kwargs: Any) -> Picture:
        """Return what of a picture or video the number of its tokens depends on."""
        if modality == "video":
            size = items.get_frame_size(item)
            return Picture(size.height, size.width, items.get_num_frames(item))
        size = items.get_image_size(item)
        return Picture(size.height, size.width)


def _others(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return mm_processor_kwargs without those that mean us."""
    return {name: value for name, value in given.items() if name not in OWN}

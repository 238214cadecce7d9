"""Run lmms-eval, with its own arguments, on repos whose processor takes pictures and text only.

lmms-eval 0.7.3 hands every processor `audios=[]`, which transformers 5 refuses under that name, and loads every model
in bfloat16. Here its model "huggingface" is registered anew, through its own registry, as a subclass without the two.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.chat.huggingface import Huggingface
from lmms_eval.models.registry_v2 import ModelManifest


class PicturesOnly:
    """A processor that is not handed the `videos` and `audios` of prompts that have none."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, videos: list, audios: list, **inputs: Any) -> Any:
        if videos or audios:
            raise ValueError("the task has videos or audio, but the model takes pictures and text only")
        return self._processor(**inputs)


class HuggingfacePictures(Huggingface):
    """lmms-eval's "huggingface" for models of pictures and text.

    dtype  what to load the weights in, "auto" for the repo's own; lmms-eval's bfloat16 when it is not given
    """

    def __init__(self, pretrained: str, dtype: str | None = None, **options: Any) -> None:
        super().__init__(pretrained, **options)
        if dtype is not None:
            loading = {"trust_remote_code": self.trust_remote_code, "device_map": self.device_map}
            self._model = type(self._model).from_pretrained(pretrained, dtype=dtype, **loading).eval()
            self._config = self._model.config
        self.processor = PicturesOnly(self.processor)


def register() -> None:
    path = f"{HuggingfacePictures.__module__}.{HuggingfacePictures.__name__}"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("huggingface", chat_class_path=path), overwrite=True)


if __name__ == "__main__":
    register()
    main()

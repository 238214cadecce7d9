"""CLIP's text tower, for methods that compare a question with patches in CLIP's common space, and the ids it reads.

All of it is one file, which `vispruner text-tower` makes of a CLIP checkpoint and a repo carries beside its weights:
the text tower, both projections into the common space, and, as bytes, what the tower is and how its tokenizer works.
The last layer norm of CLIP's vision tower is in it too, to tell whether a model's tower came from that checkpoint.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

from .codebook_file import find_file
from .configuration_vispruner import CLIP_INPUTS
from .similarity import norms_of

logger = logging.get_logger(__name__)

ABOUT, TOKENIZER = "about", "tokenizer"  # JSON, as bytes
TEXT_PREFIXES = ("text_model.", "text_projection.")
VISUAL_PROJECTION = "visual_projection.weight"
VISION_NORM = "vision_model.post_layernorm.weight"
POSITIONS = "text_model.embeddings.position_embedding.weight"
WORDS = "text_model.embeddings.token_embedding.weight"
PROJECTION = "text_projection.weight"
FIRST_MLP = "text_model.encoder.layers.0.mlp.fc1.weight"
LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")
# What shapes do not say of a text tower, and of its tokenizer.
CONFIG_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id", "bos_token_id", "pad_token_id")
TOKEN_FIELDS = ("begins", "ends")
FILE_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")
MOST_BYTES = 2**25  # of a tokenizer


class TextTowerError(ValueError):
    """A file that holds no text tower, or that of another vision tower."""


def find_text_tower(named: str, repo: str | None, hub_options: dict[str, Any]) -> str:
    """Return the path of the file that `vispruner_config.text_tower` means: a bare name lies in the model's repo."""
    return find_file("text_tower", named, repo, hub_options, "vispruner text-tower")


class QuestionTokenizer:
    """Turns questions into what CLIP's text tower reads: parts of at most as many ids as it has positions.

    begins, ends  the ids around each part; most  how many ids a part may have, these two included
    """

    def __init__(self, tokenizer: Any, begins: int, ends: int, most: int) -> None:
        self.tokenizer, self.begins, self.ends, self.most = tokenizer, begins, ends, most

    def __call__(self, questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return ids (B, M, L) and which of them are no padding, by the names that the model takes them under.

        A question with fewer than M parts has some of padding alone.
        """
        room, every = self.most - 2, []
        for question in questions:
            ids = list(self.tokenizer(question, add_special_tokens=False)["input_ids"])
            parts = [ids[start : start + room] for start in range(0, max(1, len(ids)), room)]
            every.append([[self.begins, *part, self.ends] for part in parts])
        most_parts = max(map(len, every), default=1)
        longest = max((len(part) for parts in every for part in parts), default=2)
        ids_of_all = torch.full((len(every), most_parts, longest), self.ends)
        is_token = torch.zeros_like(ids_of_all)
        for row, parts in enumerate(every):
            for place, part in enumerate(parts):
                ids_of_all[row, place, : len(part)] = torch.tensor(part)
                is_token[row, place, : len(part)] = 1
        return dict(zip(CLIP_INPUTS, (ids_of_all, is_token), strict=True))


class TextTower:
    """CLIP's side of the comparison. No module of the model: it is not trained, quantized or saved with the weights.

    text        the tower, with its projection
    projection  (E, C) of patches into the common space
    tokenize    questions to ids
    """

    def __init__(self, text: Any, projection: torch.Tensor, tokenize: QuestionTokenizer) -> None:
        self.text, self.projection, self.tokenize = text, projection, tokenize

    @torch.no_grad()
    def of_questions(self, ids: torch.Tensor, is_token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return each question (B, 1, E) in the common space, the mean of its parts: ids (B, M, L), likewise is_token.

        like  a tensor of the device and dtype to compute with
        """
        batch, parts, length = ids.shape
        ids, is_token = ids.to(like.device), is_token.to(like.device).bool()
        is_part = is_token.any(-1)
        seen = (is_token | ~is_part[..., None]).long()  # a row without any would be NaN
        text = self.text.to(like.device, like.dtype)
        made = text(input_ids=ids.reshape(-1, length), attention_mask=seen.reshape(-1, length)).text_embeds
        made = made.reshape(batch, parts, -1).to(torch.promote_types(like.dtype, torch.float32))
        made = (made / norms_of(made)).masked_fill(~is_part[..., None], 0)
        return made.sum(1, keepdim=True) / is_part.sum(1)[:, None, None]

    @torch.no_grad()
    def of_patches(self, normed: torch.Tensor) -> torch.Tensor:
        """Return patches (B, N, C), behind the vision tower's last layer norm, in the common space: (B, N, E)."""
        self.projection = self.projection.to(normed.device, normed.dtype)  # it goes with the model, as the tower does
        return normed @ self.projection.mT


def checked_ids(said: Mapping[str, Any], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a call says of the questions of its rows, by name, or raise ValueError with the remedy."""
    ids, is_token = (said.get(name) for name in CLIP_INPUTS)
    names = " and ".join(CLIP_INPUTS)
    if ids is None or is_token is None:
        raise ValueError(
            f"vispruner_config.text_tower: CLIP reads the question, so a prompt with images needs {names}: the "
            "processor of a repo built with a text tower adds them (AutoProcessor with trust_remote_code=True), and "
            "model.question_inputs makes them of questions"
        )
    ids, is_token = torch.as_tensor(ids), torch.as_tensor(is_token)
    if ids.dim() != 3 or ids.shape != is_token.shape or len(ids) != rows or ids.is_floating_point():
        raise ValueError(
            f"{names} must be integers (rows, parts, length) for the {rows} rows of the prompt, got "
            f"{tuple(ids.shape)} and {tuple(is_token.shape)}"
        )
    return ids, is_token


def text_config(shapes: Mapping[str, Sequence[int]], about: Mapping[str, Any]) -> CLIPTextConfig:
    """Return the config of a text tower, as large as its tensors are, whatever else is said of it."""
    layers = {int(found[1]) for name in shapes if (found := LAYER.match(name))}
    (words, width), (positions, _), (projected, _) = (shapes[name] for name in (WORDS, POSITIONS, PROJECTION))
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=shapes[FIRST_MLP][0],
        num_hidden_layers=len(layers),
        max_position_embeddings=positions,
        projection_dim=projected,
        **{name: about[name] for name in CONFIG_FIELDS},
    )


def check_tensors(path: Any, shapes: Mapping[str, Sequence[int]], width: int | None = None) -> None:
    """Raise TextTowerError unless tensors of these shapes are a text tower, for a vision tower of that width."""
    needed = {ABOUT, TOKENIZER, VISUAL_PROJECTION, VISION_NORM, POSITIONS, WORDS, PROJECTION, FIRST_MLP}
    if missing := sorted(needed - set(shapes)):
        raise TextTowerError(
            f"{path} is no text tower, it lacks {', '.join(missing)}: `vispruner text-tower` makes one"
        )
    strange = [name for name in shapes if name not in needed and not name.startswith(TEXT_PREFIXES)]
    matrices = (VISUAL_PROJECTION, POSITIONS, WORDS, PROJECTION, FIRST_MLP)
    if strange or any(len(shapes[name]) != 2 for name in matrices) or len(shapes[VISION_NORM]) != 1:
        raise TextTowerError(
            f"{path} is no text tower as `vispruner text-tower` makes one: {strange or 'wrong shapes'}"
        )
    if any(len(shapes[name]) != 1 for name in (ABOUT, TOKENIZER)):
        raise TextTowerError(f"{path} is no text tower: what it says of itself is no row of bytes")
    if max(shapes[ABOUT][0], shapes[TOKENIZER][0]) > MOST_BYTES:
        raise TextTowerError(f"{path}: its tokenizer is larger than {MOST_BYTES / 2**20:g} MiB, which none is")
    widths = {shapes[name][1] for name in (WORDS, POSITIONS, PROJECTION, FIRST_MLP)}
    if any(0 in shape for shape in shapes.values()) or len(widths) > 1:  # the tower is made as large as its shapes say
        raise TextTowerError(f"{path} is no text tower: its tensors do not fit each other")
    if shapes[POSITIONS][0] < 3:
        raise TextTowerError(f"{path} is no text tower: it has no position for a word between its begin and its end")
    (space, wide), (projected, _) = shapes[VISUAL_PROJECTION], shapes[PROJECTION]
    if space != projected or [wide] != list(shapes[VISION_NORM]):
        raise TextTowerError(f"{path}: its projections do not lead into one space, of {space} and {projected}")
    if width is not None and wide != width:
        raise TextTowerError(
            f"{path} belongs to a CLIP whose vision tower is {wide} wide, that of this model is {width}: take the "
            "CLIP checkpoint that the vision tower came from"
        )


def read_text_tower(
    path: str | os.PathLike[str], width: int | None = None, norm: torch.Tensor | None = None
) -> TextTower:
    """Return the text tower that a file holds; TextTowerError when it is none for this vision tower.

    width  of the vision tower
    norm   (width,) the weight of its last layer norm, which must be that of the CLIP that the file was made of
    """
    tensors = _tensors(path)
    check_tensors(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, width)
    own = tensors[VISION_NORM].float()
    if norm is not None and norm.device.type != "meta" and not torch.allclose(norm.cpu().float(), own, 1e-2, 1e-2):
        raise TextTowerError(
            f"{path} was made of another CLIP checkpoint than the one that this vision tower came from: their last "
            "layer norms differ, so patches and questions would be in different spaces"
        )
    about, held = _about(path, tensors), {n: t.clone() for n, t in tensors.items() if n.startswith(TEXT_PREFIXES)}
    projection = tensors[VISUAL_PROJECTION].clone()
    if not all(bool(tensor.isfinite().all()) for tensor in (projection, *held.values())):
        raise TextTowerError(f"{path} holds NaN or infinity: make it again with `vispruner text-tower`")
    try:
        text = CLIPTextModelWithProjection(text_config({n: tuple(t.shape) for n, t in held.items()}, about))
        text.load_state_dict(held)
    except Exception as error:  # whatever the class of transformers makes of it
        raise TextTowerError(f"{path} is no text tower: {' '.join(str(error).split())}") from error
    return TextTower(text.eval().requires_grad_(False), projection, _tokenizer(path, tensors, about))


def read_question_tokenizer(path: str | os.PathLike[str]) -> QuestionTokenizer:
    """Return the tokenizer that such a file holds, for a processor; the tower is not made."""
    tensors = _tensors(path)
    check_tensors(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return _tokenizer(path, tensors, _about(path, tensors))


def _tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    if os.path.splitext(path)[1] != ".safetensors":
        raise TextTowerError(f"{path} is no text tower: it must be a .safetensors file")
    try:
        return load_state_dict(path)  # views of the file: what is not looked at is not read
    except Exception as error:  # the reader of safetensors has errors of its own
        raise TextTowerError(f"{path} is no text tower, since it cannot be read as safetensors: {error}") from error


def _bytes_of(tensor: torch.Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"bytes are stored as uint8, got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.numpy().tobytes()


def _about(path: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    try:
        about = json.loads(_bytes_of(tensors[ABOUT]))
        numbers = [about[name] for name in CONFIG_FIELDS if name != "hidden_act"]
        ids = [about[name] for name in TOKEN_FIELDS]
        are_numbers = all(isinstance(number, int | float) and 0 <= number < 2**31 for number in numbers)
        are_ids = all(isinstance(id_, int) and 0 <= id_ < len(tensors[WORDS]) for id_ in ids)
        if not (are_numbers and are_ids and isinstance(about["hidden_act"], str)):
            raise ValueError("what it says of itself is of the wrong kind")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TextTowerError(f"{path} does not say what its text tower is: {error}") from error
    return about


def _tokenizer(path: Any, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> QuestionTokenizer:
    try:
        with tempfile.TemporaryDirectory(prefix="vispruner-") as folder:
            file = Path(folder) / "tokenizer.json"
            file.write_bytes(_bytes_of(tensors[TOKENIZER]))
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        if len(tokenizer) > (words := len(tensors[WORDS])):
            raise ValueError(f"it knows {len(tokenizer)} tokens, the text tower {words}")
    except Exception as error:  # whatever the tokenizer's own reader makes of it
        raise TextTowerError(f"{path}: its tokenizer cannot be read: {error}") from error
    return QuestionTokenizer(tokenizer, about["begins"], about["ends"], tensors[POSITIONS].shape[0])


class QuestionProcessorMixin:
    """For a stock processor: adds what CLIP's text tower reads of each row's question, where the repo carries one.

    The question of a row is what its text says behind the last image, up to the first answer; all of it where nothing
    comes behind. `question`, a string or one for each row, says it otherwise.
    """

    vispruner_config: dict[str, Any] | None
    tokenize_questions: QuestionTokenizer | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        named = (processor.vispruner_config or {}).get("text_tower")
        if named is not None:
            repo = os.fspath(pretrained_model_name_or_path)
            path = find_text_tower(named, repo, {name: kwargs[name] for name in FILE_ARGUMENTS if name in kwargs})
            processor.tokenize_questions = read_question_tokenizer(path)
        return processor

    def __call__(
        self, images: Any = None, text: Any = None, *, question: str | Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        made = super().__call__(images=images, text=text, **kwargs)  # type: ignore[misc]
        if self.tokenize_questions is None:
            if question is not None:
                raise ValueError("question: this processor's repo carries no text tower, so nothing reads it")
            return made
        texts = [text] if isinstance(text, str) else list(text or ())
        if images is None or not texts:
            return made
        asked = [question] if isinstance(question, str) else question
        asked = self._questions_in(texts) if asked is None else list(asked)
        if len(asked) != len(texts):
            raise ValueError(f"question must be one for each of {len(texts)} rows of text, got {len(asked)}")
        made.update({name: _as(made["input_ids"], ids) for name, ids in self.tokenize_questions(asked).items()})
        return made

    def _questions_in(self, texts: Sequence[str]) -> list[str]:
        """Return what each row asks about its images: behind the last one, or before it if nothing stands behind."""
        image, answer = self.image_token, self._before_answers  # type: ignore[attr-defined]
        if not answer:
            logger.warning_once(
                "no chat template tells where an answer begins: all that stands behind the last image is read as the "
                "question. Where answers do, as in training, give the processor question="
            )
        questions = []
        for text in texts:
            before, _, behind = text.rpartition(image)
            asked = behind.partition(answer)[0] if answer else behind
            questions.append((asked if asked.strip() else before.replace(image, " ")).strip())
        return questions

    @property
    def _before_answers(self) -> str:
        """What the chat template writes between a question and its answer; empty where none tells."""
        asked, answered = "QUESTION", "ANSWER"
        for wrap in (lambda said: [{"type": "text", "text": said}], lambda said: said):
            turns = [{"role": "user", "content": wrap(asked)}, {"role": "assistant", "content": wrap(answered)}]
            try:
                text = self.apply_chat_template(turns)  # type: ignore[attr-defined]
            except Exception:  # a template raises what its author likes, for want of one transformers does
                continue
            if asked in text and answered in text:
                return text.partition(asked)[2].partition(answered)[0].strip()
        return ""


def _as(like: Any, ids: torch.Tensor) -> Any:
    """Return ids in the form in which a processor gives its own."""
    if isinstance(like, torch.Tensor):
        return ids
    return ids.tolist() if isinstance(like, list) else ids.numpy()

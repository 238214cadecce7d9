"""What a method is: a selector, the inputs and options it declares, and where it prunes. Knows no method and no model.

Every selector is called as `select(features, saliency, visual_token_num, **further)` and says which tokens stay: an
index tensor (B, T), ascending, T = min(visual_token_num, N), or a `Selection`. It never changes its inputs. Its
further parameters are inputs it needs (see `FURTHER_INPUTS`) and its options. With the default None, `grid` is an
input that it gets where the tokens are a whole grid, and can do without; likewise the others of `USABLE_INPUTS`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch

from .selector_inputs import is_int, is_number


def rows_at(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather tokens (B, N, C) at indices (B, T): (B, T, C)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


class Merge(NamedTuple):
    """What is folded into the tokens that stay: E edges an image, in any order, several to or from one token.

    source  (B, E)  the token of the N that is added; from N on, a row of `Selection.extra`
    target  (B, E)  the place among the T kept ones of the token that it is added to
    weight  (B, E)  what it is multiplied by; 0 where an image has fewer edges
    own     (B, T)  what each kept token itself is multiplied by
    """

    source: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    own: torch.Tensor


class Selection(NamedTuple):
    """What a selector decided for B images of N tokens.

    indices   (B, T)  the tokens that stay, ascending; the last `appended` apart. Of merged ones, the token whose place
                      and position they take
    merge     what is folded into them, None for nothing
    appended  how many of them, at the end, go behind the others in the prompt
    extra     (B, X, C) what is folded in beside the N tokens, such as [CLS]; None for nothing
    """

    indices: torch.Tensor
    merge: Merge | None = None
    appended: int = 0
    extra: torch.Tensor | None = None

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens that stay, each with what is folded into it: (B, N, C) -> (B, T, C).

        Tokens that nothing is folded into are the same bits; sums run in float32 at least.
        """
        kept = rows_at(tokens, self.indices)
        if self.merge is None:
            return kept
        source, target, weight, own = self.merge
        given = tokens if self.extra is None else torch.cat([tokens, self.extra.to(tokens)], dim=1)
        wide = given.to(torch.promote_types(tokens.dtype, torch.float32))
        added = rows_at(wide, source) * weight[..., None].to(wide.dtype)
        merged = (kept.to(wide.dtype) * own[..., None].to(wide.dtype)).scatter_add(
            1, target[..., None].expand_as(added), added
        )
        is_merged = torch.zeros_like(own, dtype=torch.bool).scatter_reduce(1, target, weight != 0, "amax") | (own != 1)
        return torch.where(is_merged[..., None], merged.to(tokens.dtype), kept)

    def fold(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return all tokens (B, N, C), what stays with what is folded into it; as they are where nothing is."""
        if self.merge is None:
            return tokens
        return tokens.scatter(1, self.indices[..., None].expand(-1, -1, tokens.shape[-1]), self.take(tokens))

    def merged_into(self, tokens: int) -> torch.Tensor:
        """Return which token that stays each of the N went into, (B, N): itself where it stays, -1 where it fell.

        Of several, the one it has most weight in, the first of equals. In the place of a token that is not itself
        there (its own weight is 0) stands something else, and it is never said to be in it.
        """
        into = torch.full((len(self.indices), tokens), -1, device=self.indices.device)
        if self.merge is None:
            return into.scatter(1, self.indices, self.indices)
        source, target, weight, own = self.merge
        anchor = self.indices.gather(1, target)
        heavy = weight.abs().masked_fill((source >= tokens) | (source == anchor), 0)
        source = source.clamp(max=tokens - 1)
        most = torch.zeros_like(into, dtype=heavy.dtype).scatter_reduce(1, source, heavy, "amax")
        number, last = torch.arange(source.shape[1], device=into.device).expand_as(source), source.shape[1]
        number = number.masked_fill((heavy == 0) | (heavy < most.gather(1, source)), last)
        first = torch.full_like(into, last).scatter_reduce(1, source, number, "amin")
        into = torch.nn.functional.pad(anchor, (0, 1), value=-1).gather(1, first)
        itself = torch.where(own != 0, self.indices, into.gather(1, self.indices))
        return into.scatter(1, self.indices, itself)

    def of_each(self) -> "list[Selection]":
        """Return what was decided of each image by itself, in operations whose number does not depend on how many."""
        indices = self.indices.split(1)
        merges: list[Merge | None] = [None] * len(indices)
        if self.merge is not None:
            merges = [Merge(*parts) for parts in zip(*(part.split(1) for part in self.merge), strict=True)]
        extras = [None] * len(indices) if self.extra is None else self.extra.split(1)
        parts = zip(indices, merges, extras, strict=True)
        return [Selection(index, merge, self.appended, extra) for index, merge, extra in parts]

    def among(self, numbers: torch.Tensor, tokens: int) -> "Selection":
        """Return the same of images of N `tokens`, of which it was made for those at `numbers` (B, M), ascending."""
        merge = self.merge
        if merge is not None:
            given = numbers.shape[1]
            extra = merge.source - given + tokens
            source = numbers.gather(1, merge.source.clamp(max=given - 1))
            merge = merge._replace(source=torch.where(merge.source < given, source, extra))
        return self._replace(indices=numbers.gather(1, self.indices), merge=merge)

    def placed(self, places: torch.Tensor) -> "Selection":
        """Return the same of one image whose N tokens stand at `places` (N,) among others."""
        merge = self.merge
        if merge is not None:
            if self.extra is not None:
                raise ValueError("vispruner_config.method folds in what is no token: it cannot be placed among others")
            merge = merge._replace(source=places[merge.source])
        return self._replace(indices=places[self.indices], merge=merge)

    def ascending(self) -> "Selection":
        """Return the same with the tokens that stay in ascending order."""
        indices, order = self.indices.sort(dim=1)
        if self.merge is None:
            return self._replace(indices=indices)
        source, target, weight, own = self.merge
        merge = Merge(source, order.argsort(dim=1).gather(1, target), weight, own.gather(1, order))
        return self._replace(indices=indices, merge=merge)


def joined(selections: Sequence[Selection]) -> Selection:
    """Join selections of one image each, among the same tokens, to one, in their order."""
    indices = torch.cat([one.indices for one in selections], dim=1)
    if all(one.merge is None for one in selections):
        return Selection(indices)
    places = [0, *accumulate(one.indices.shape[1] for one in selections[:-1])]
    merges = []
    for one, place in zip(selections, places, strict=True):
        none, ones = one.indices[:, :0], torch.ones_like(one.indices, dtype=torch.float32)
        source, target, weight, own = one.merge or Merge(none, none, ones[:, :0], ones)
        merges.append(Merge(source, target + place, weight, own))
    return Selection(indices, Merge(*(torch.cat(parts, dim=1) for parts in zip(*merges, strict=True))))


def in_a_row(selections: Sequence[Selection], tokens: Sequence[int]) -> Selection:
    """Join selections of one image each, of so many tokens, to one of all these tokens in a row."""
    starts, kept = [0, *accumulate(tokens[:-1])], [one.indices.shape[1] for one in selections]
    if any(one.merge is not None for one in selections):
        every = torch.arange(sum(tokens), device=selections[0].indices.device)
        return joined([one.placed(every[start:]) for one, start in zip(selections, starts, strict=True)])
    indices = torch.cat([one.indices for one in selections], dim=1)
    shift = torch.tensor(starts).repeat_interleave(torch.tensor(kept))
    return Selection(indices + shift.to(indices.device, non_blocking=True))


class DecoderPlace(NamedTuple):
    """Where in the language model a method prunes, and by what.

    layers     the layers before which visual tokens leave, ascending, of a model of so many layers
    ranking    which of decoder_attention's `RANKINGS` its `saliency` is
    of_layer   "previous": read in the layer before; "own": in the layer to come, computed for it
    positions  "original": what stays keeps its position; "renumber": all are counted anew at every stage
    normed     whether its features are the hidden states after the model's last norm
    """

    layers: Callable[[int], list[int]]
    ranking: str = "last_row"
    of_layer: Literal["previous", "own"] = "previous"
    positions: Literal["original", "renumber"] = "original"
    normed: bool = False


class Then(NamedTuple):
    """What a method that prunes behind the encoder goes on with in the language model.

    method   the method that prunes there
    layers   the layers before which visual tokens leave, ascending, of a model of so many layers
    share    what part of the tokens before it each of them leaves, 0 for none; or the name of the option that lists it
    ranking  "told": by the saliency that they were ranked by behind the encoder; None for what the method ranks by
    """

    method: str
    layers: Callable[[int], list[int]]
    share: float | str
    ranking: Literal["told"] | None = None


def in_proportion(*layers: int, depth: int = 32) -> Callable[[int], list[int]]:
    """Return the layers of a model of any depth that stand for `layers` of one of `depth`."""

    def layers_of(own: int) -> list[int]:
        return sorted({min(own - 1, max(1, round(layer * own / depth))) for layer in layers})

    return layers_of


class Selector(NamedTuple):
    """A registered method and what it declares.

    options          the names of its options, and their defaults
    needs            which of `FURTHER_INPUTS` it is to be given
    saliency_layers  which encoder layers it wants `layer_saliency` of, as a function of how many layers there are and
                     of the one that produces the features, all counted from 0
    saliency_kind    what that is: "cls", the attention of the [CLS] query, or "received", the mean over all queries
    kinds            why it keeps a token, a line for each reason: "name: what that is"
    kind_of          where it has several, which it was: called with `kept` (B, T) and `saliency` (B, N), then by name
                     with `layer_saliency`, `grid`, `merged_into` (B, N) and options of its own, it returns places
                     in `kinds`, (B, T) int64
    place            where in the language model it prunes; None for behind the encoder
    merge_on         behind the encoder, what it folds together: "features", or "projected" ones
    uses             which of `FURTHER_INPUTS` it is to be given where there is one
    then             where it goes on in the language model with what it left behind the encoder
    experimental     whether its authors published no code, so that its rule is a reading of theirs
    main_kind        what its `saliency` is behind the encoder: None for attention of [CLS] or, without one, of all
                     tokens; "global" for `global_attention`, whose threshold is its option `global_threshold`
    by_saliency      whether what it keeps depends on its `saliency`
    """

    function: Callable[..., torch.Tensor | Selection]
    options: Mapping[str, Any]
    needs: frozenset[str] = frozenset()
    saliency_layers: Callable[[int, int], list[int]] | None = None
    saliency_kind: Literal["cls", "received"] = "cls"
    kinds: tuple[str, ...] = ()
    kind_of: Callable[..., torch.Tensor] | None = None
    place: DecoderPlace | None = None
    uses: frozenset[str] = frozenset()
    merge_on: Literal["features", "projected"] = "features"
    then: Then | None = None
    experimental: bool = False
    main_kind: Literal["global"] | None = None
    by_saliency: bool = True

    @property
    def in_decoder(self) -> bool:
        """Whether tokens leave in the language model, wherever else they do."""
        return self.place is not None or self.then is not None

    @property
    def is_guided(self) -> bool:
        """Whether what stays behind the encoder depends on the question."""
        return self.place is None and bool(QUESTION & (self.needs | self.uses))

    @property
    def is_told(self) -> bool:
        """Whether each call has to say by what it ranks: what another model found."""
        return self.place is not None and self.place.ranking == "told"


SELECTORS: dict[str, Selector] = {}

_INPUTS = ["features", "saliency", "visual_token_num"]

# What a selector is given when its signature has a parameter of this name:
#   projected       (B, N, D)        features after the projector
#   grid            (rows, columns)  of the N tokens, which are in raster order
#   videos          B integers       which video each of B frames is of, the frames of each in order
#   layer_saliency  (B, L, N)        saliency of the L encoder layers that the selector asks for, in its order
#   codebook        (M, D)           prototypes of redundant projected features
#   keys            (B, N, d)        keys of the layer that ranks, mean over heads
#   cls_feature     (B, C)           what `features` has of the [CLS] token
#   cls_query       (B, d)           the query of [CLS] in the encoder's last layer, heads side by side
#   raw_keys        (B, 1+N, d)      the keys of that layer likewise, that of [CLS] first
#   text            (B, L, C)        features of the prompt's columns; behind the encoder, its embedded words
#   text_saliency   (B, L)           saliency of these; -inf where there is no word of the question
#   image_embeds    (B, N, E)        the tokens in the common space of CLIP, where a repo carries its text tower
#   text_embeds     (B, M, E)        the question's parts in that space
#   layer_inputs    (B, N, C)        what the decoder layer that ranks was given; the features are what it made of it
#   places          (B, N, 3)        the number of each token's image, and how far down and across from its centre it
#                                    lies, where an image's diagonal has length 1
# What a decoder layer can give; not each model can tell the places.
DECODER_INPUTS = frozenset({"projected", "keys", "text", "text_saliency", "layer_inputs", "places"})
OF_CLS = frozenset({"cls_feature", "cls_query", "raw_keys"})
QUESTION = frozenset({"text", "text_saliency", "image_embeds", "text_embeds"})
FURTHER_INPUTS = DECODER_INPUTS | {"grid", "videos", "layer_saliency", "codebook"} | OF_CLS | QUESTION
# Of these, the ones that may have a default: not every place has them.
USABLE_INPUTS = QUESTION | {"grid", "videos", "cls_feature"}


def register_selector(
    name: str,
    *,
    saliency_layers: Callable[[int, int], list[int]] | None = None,
    saliency_kind: Literal["cls", "received"] = "cls",
    kinds: tuple[str, ...] = (),
    kind_of: Callable[..., torch.Tensor] | None = None,
    place: DecoderPlace | None = None,
    merge_on: Literal["features", "projected"] = "features",
    then: Then | None = None,
    experimental: bool = False,
    main_kind: Literal["global"] | None = None,
    by_saliency: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Name a selector, so that `vispruner_config.method` can ask for it; for the keywords see `Selector`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function).parameters
        parameters = list(signature)
        if parameters[:3] != _INPUTS:
            raise TypeError(f"selector {name!r} must take {', '.join(_INPUTS)} first, got {', '.join(parameters)}")
        further = frozenset(parameters[3:])
        if ("layer_saliency" in further) != (saliency_layers is not None):
            raise TypeError(f"selector {name!r} must both take layer_saliency and say saliency_layers, or neither")
        if (kind_of is not None) != (len(kinds) > 1):
            raise TypeError(f"selector {name!r} must say kind_of where it has several kinds, and only there")
        asked = set() if kind_of is None else set(list(inspect.signature(kind_of).parameters)[2:])
        if unknown := sorted(asked - {"layer_saliency", "grid", "merged_into"} - (further - FURTHER_INPUTS)):
            raise TypeError(f"kind_of of selector {name!r} asks for {', '.join(unknown)}, which it is not given")
        if name in SELECTORS:
            raise ValueError(f"a selector named {name!r} is registered already; choose another name")
        inputs = further & FURTHER_INPUTS
        uses = frozenset(given for given in inputs if signature[given].default is not inspect.Parameter.empty)
        if wrong := sorted(
            given for given in uses if given not in USABLE_INPUTS or signature[given].default is not None
        ):
            raise TypeError(
                f"selector {name!r} has a default for {', '.join(wrong)}: of its inputs only "
                f"{', '.join(sorted(USABLE_INPUTS))} may have one, None"
            )
        options = {option: signature[option].default for option in parameters[3:] if option not in inputs}
        SELECTORS[name] = Selector(
            function,
            options,
            inputs - uses,
            saliency_layers,
            saliency_kind,
            kinds,
            kind_of,
            place,
            uses,
            merge_on,
            then,
            experimental,
            main_kind,
            by_saliency,
        )
        return function

    return register


def selector_named(method: Any) -> Selector:
    """Return the selector registered as `method`; ValueError names those there are."""
    if method not in SELECTORS:
        close = difflib.get_close_matches(str(method), SELECTORS, n=1)
        if close:
            raise ValueError(f"vispruner_config.method {method!r} is not a method: did you mean {close[0]}?")
        allowed = [*sorted(SELECTORS), "none"]
        raise ValueError(f"vispruner_config.method must be one of {allowed}, got {method!r}")
    return SELECTORS[method]


def require_published(method: Any) -> None:
    """Raise ValueError for a method that a repo alone cannot do.

    Its code is not one of the files that repos carry, or every call has to be told what another model found.
    """
    if selector_named(method).is_told:
        raise ValueError(
            f'vispruner_config.method "{method}" ranks by what another model found, which no repo carries: save '
            f'another method, and name this one when you call: vispruner_config={{"method": "{method}", ...}}'
        )
    module = getattr(selector_named(method).function, "__module__", "")
    if module.rpartition(".")[0] != __name__.rpartition(".")[0]:
        raise ValueError(
            f'vispruner_config.method "{method}" was registered by {module}, which no repo carries: it could not '
            "be loaded. Choose a method of the package first, by set_vispruner_config(method=...), or add yours to it"
        )


def select_tokens(
    method: str, features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, **further: object
) -> torch.Tensor | Selection:
    """Run the selector registered as `method`.

    features  (B, N, C)  features of the place where it prunes
    saliency  (B, N)     attention each token receives, higher is more important
    further              the inputs of `FURTHER_INPUTS` that the selector needs, and its options: it gets those it
                         names and the others are left out, so the caller may pass every option of vispruner_config
                         whatever the method; one that no selector names is an error
    returns              T = min(visual_token_num, N) tokens of each image: kept indices (B, T), or a `Selection`
                         from a method that folds tokens together
    """
    selector = selector_named(method)
    if missing := [name for name in sorted(selector.needs) if further.get(name) is None]:
        raise ValueError(
            f'vispruner_config.method "{method}" needs {", ".join(missing)}, which this architecture does not give'
        )
    known = FURTHER_INPUTS.union(*(other.options for other in SELECTORS.values()))
    if unknown := [name for name in further if name not in known]:
        raise TypeError(f"no registered selector takes the option(s) {unknown}; check the spelling")
    taken = selector.needs.union(selector.uses, selector.options)
    chosen = {name: value for name, value in further.items() if name in taken}
    return selector.function(features, saliency, visual_token_num, **chosen)


def run_selector(
    method: str, features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, **further: object
) -> Selection:
    """Return what `select_tokens` does, which takes the same, as a `Selection` in any case."""
    made = select_tokens(method, features, saliency, visual_token_num, **further)
    return made if isinstance(made, Selection) else Selection(made)


def check_method_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for a key of vispruner_config.method_options that the method lacks, or a value of another kind.

    Which numbers it takes the method says itself, when it runs.
    """
    own = selector_named(method).options
    for name, value in options.items():
        if name not in own:
            close = difflib.get_close_matches(str(name), own, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            has = f"its options are {sorted(own)}" if own else "it has none"
            raise ValueError(
                f'vispruner_config.method_options: method "{method}" has no option {name!r}; {has}{meant}'
            )
        default = own[name]
        if is_number(default) and not (is_int(value) if is_int(default) else is_number(value)):
            kind = "an integer" if is_int(default) else "a number"
            raise ValueError(f"vispruner_config.method_options.{name} must be {kind} such as {default}, got {value!r}")


def kinds_of_kept(
    method: str, kept: torch.Tensor, saliency: torch.Tensor, **options: object
) -> dict[str, torch.Tensor]:
    """Say why each token stays that the selector registered as `method` kept, to be shown.

    kept      (B, T)  what the selector returned
    saliency  (B, N)  what it was given
    options           what else it was given
    returns           by kind, in the order of `Selector.kinds`, the tokens (B, T) of `kept` that are of it, every
                      token in one; empty where the method names no kind, or it cannot be told without `merged_into`
    """
    selector = SELECTORS[method]
    if selector.kind_of is None:
        return {kind: torch.ones_like(kept, dtype=torch.bool) for kind in selector.kinds}
    named = inspect.signature(selector.kind_of).parameters
    if "merged_into" in named and options.get("merged_into") is None:
        return {}
    kind = selector.kind_of(kept, saliency, **{name: value for name, value in options.items() if name in named})
    return {name: kind == number for number, name in enumerate(selector.kinds)}

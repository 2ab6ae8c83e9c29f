"""Token layouts that many families share."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families.encoding import start_token
from attnscope.tokens import KIND_CODES, TokenLayout, grid_layout, plain_layout, text_layout, unknown_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel

MEASURES = ("input_ids", "inputs_embeds", "input_features", "input_values")
# Sizes of images whose patches are packed, for a vision tower on its own.
GRIDS = ("image_grid_thw", "grid_thw")
_PLACEHOLDERS = ("image_token_id", "image_token_index")
_SOUND_MASKS = ("attention_mask", "feature_attention_mask", "input_features_mask", "padding_mask")


def sample_count(inputs: "dict[str, Tensor]") -> int:
    """How many samples a batch has: rows of its text or sound, or images; patches of images may be packed."""
    name = next((name for name in (*MEASURES, *GRIDS) if name in inputs), next(iter(inputs)))
    return len(inputs[name])


def patch_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """A patch grid behind CLS and register tokens, from the size of `pixel_values` and the config's patch size."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return unknown_layout(sample_count(inputs), tokens)
    config = getattr(loaded.config, "vision_config", loaded.config)
    rows, columns = patch_grid(pixels, config)
    extra = tokens - rows * columns
    if not 0 <= extra <= 32 or rows * columns == 0 or len(pixels) != sample_count(inputs):
        return unknown_layout(sample_count(inputs), tokens)
    prefix = prefix_kinds(extra, getattr(config, "model_type", ""))
    return grid_layout(len(pixels), rows, columns, prefix)


def patch_grid(pixels: "Tensor", config: object) -> tuple[int, int]:
    """Rows and columns of patches; (0, 0) where the config states no patch size."""
    size = getattr(config, "patch_size", None)
    if size is None or pixels.ndim != 4:
        return 0, 0
    height, width = size if isinstance(size, Sequence) else (size, size)
    return pixels.shape[-2] // height, pixels.shape[-1] // width


def prefix_kinds(count: int, model_type: str) -> list[str]:
    """Kinds of the tokens before the patches: CLS first, then DeiT's distillation token or registers."""
    if count == 0:
        return []
    rest = "special" if model_type == "deit" else "register"
    return ["cls"] + [rest] * (count - 1)


def text_tokens(ids_name: str = "input_ids", mask_name: str = "attention_mask") -> "Callable[..., TokenLayout]":
    """The layout of a text stream from its ids and padding mask."""

    def layout(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
        ids = inputs.get(ids_name)
        if ids is None or ids.shape[1] != tokens or len(ids) != sample_count(inputs):
            return unknown_layout(sample_count(inputs), tokens)
        if ids.ndim == 3:
            # One id from each codebook.
            kind = text_kinds(ids[..., 0], inputs.get(mask_name), loaded)
            return text_layout([[" ".join(map(str, token)) for token in row] for row in ids.tolist()], kind)
        kind = text_kinds(ids, inputs.get(mask_name), loaded)
        return text_layout([token_strings(row, loaded) for row in ids.tolist()], kind)

    return layout


def decoder_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The layout of what a decoder is given; where it is given nothing, models make their start token of it."""
    if "decoder_input_ids" in inputs:
        return text_tokens("decoder_input_ids", "decoder_attention_mask")(inputs, loaded, tokens)
    ids = inputs["input_ids"]
    start = ids.new_full((len(ids), 1), start_token(loaded))
    # BART's own default is its input, one token to the right.
    given = start if tokens == 1 else start.new_tensor([[int(start[0, 0]), *row[:-1]] for row in ids.tolist()])
    return text_tokens()({"input_ids": given}, loaded, tokens)


def guessed_patches(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """A patch grid by the config, or else the only grid of a stride of 2, 4, 8, ... pixels with so many tokens."""
    layout = patch_tokens(inputs, loaded, tokens)
    pixels = inputs.get("pixel_values")
    if (
        pixels is None
        or pixels.ndim != 4
        or len(pixels) != len(layout.kind)
        or KIND_CODES["unknown"] not in layout.kind
    ):
        return layout
    height, width = pixels.shape[-2:]
    grids = {(-(-height // 2**step), -(-width // 2**step)) for step in range(1, 7)}
    fitting = [(rows, columns) for rows, columns in grids if rows * columns == tokens > 1]
    return grid_layout(len(pixels), *fitting[0], ()) if len(fitting) == 1 else layout


def guessed_patches_of_padded_images(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """As `guessed_patches`; a patch whose upper left pixel `pixel_mask` hides is padding."""
    layout = guessed_patches(inputs, loaded, tokens)
    mask = inputs.get("pixel_mask")
    if mask is None or mask.ndim != 3 or not (layout.row >= 0).any():
        return layout
    on_grid = layout.row[0] >= 0
    rows, columns = int(layout.row.max()) + 1, int(layout.column.max()) + 1
    height, width = mask.shape[1:]
    at = [np.arange(count) * size // count for count, size in ((rows, height), (columns, width))]
    seen = mask.cpu().numpy()[:, at[0][:, None], at[1][None, :]] != 0
    return without_padding(layout, on_grid, seen[:, layout.row[0, on_grid], layout.column[0, on_grid]])


def without_padding(layout: TokenLayout, places: np.ndarray, is_real: np.ndarray) -> TokenLayout:
    """The layout in which the tokens at `places` (token,) are padding where they are not real (sample, place)."""
    real = np.ones(layout.kind.shape, bool)
    real[:, places] = is_real
    kind = np.where(real, layout.kind, KIND_CODES["padding"])
    return TokenLayout(
        kind.astype(np.int8),
        np.where(real, layout.text, ""),
        *(np.where(real, place, -1).astype(np.int16) for place in (layout.row, layout.column)),
    )


def frame_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """Frames of sound in time order; `column` counts them."""
    kind = np.full((sample_count(inputs), tokens), KIND_CODES["audio"])
    return plain_layout(kind, column=np.arange(tokens))


def guessed_frames(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """As `frame_tokens`; what the mask of the sound hides is padding, by the model's own rule of lengths."""
    layout = frame_tokens(inputs, loaded, tokens)
    masks = (inputs.get(name) for name in _SOUND_MASKS)
    mask = next((m for m in masks if m is not None and m.ndim == 2), None)
    if mask is None or "input_ids" in inputs:
        return layout
    rules = (getattr(m, "_get_feat_extract_output_lengths", None) for m in loaded.model.modules())
    rule = next((r for r in rules if r is not None), lambda length: length)
    longest, lengths = (np.asarray(n) for n in (rule(mask.shape[1]), [rule(n) for n in mask.sum(dim=1).tolist()]))
    if longest.ndim or lengths.shape != (len(mask),) or int(longest) != tokens:
        return layout
    return without_padding(layout, np.arange(tokens), np.arange(tokens) < lengths[:, None])


def guessed_text(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """As `text_tokens`; the placeholders that the config names stand for parts of an image."""
    layout = text_tokens()(inputs, loaded, tokens)
    placeholders = [getattr(loaded.config, name, None) for name in _PLACEHOLDERS]
    ids = inputs.get("input_ids")
    if ids is None or ids.shape[1] != tokens or "pixel_values" not in inputs:
        return layout
    is_image = np.isin(ids.cpu().numpy(), [i for i in placeholders if isinstance(i, int)])
    is_image &= layout.kind != KIND_CODES["padding"]
    kind = np.where(is_image, KIND_CODES["image"], layout.kind).astype(np.int8)
    return TokenLayout(kind, np.where(is_image, "", layout.text), layout.row, layout.column)


def query_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """Learned queries: no strings, no places."""
    return plain_layout(np.full((sample_count(inputs), tokens), KIND_CODES["query"]))


def text_kinds(ids: "Tensor", mask: "Tensor | None", loaded: "LoadedModel") -> np.ndarray:
    """Codes of the kinds of text tokens: padding by the mask, CLS and special ones by the tokenizer."""
    numbers = ids.cpu().numpy()
    kind = np.full(numbers.shape, KIND_CODES["text"], np.int8)
    tokenizer = loaded.tokenizer
    if tokenizer is not None:
        kind[np.isin(numbers, tokenizer.all_special_ids)] = KIND_CODES["special"]
        if tokenizer.cls_token_id is not None:
            kind[numbers == tokenizer.cls_token_id] = KIND_CODES["cls"]
    # A mask of another shape says which token sees which, not which is padding.
    if mask is not None and mask.shape == ids.shape:
        kind[mask.cpu().numpy() == 0] = KIND_CODES["padding"]
    return kind


def token_strings(ids: Sequence[int], loaded: "LoadedModel") -> list[str]:
    """The tokens' strings; their numbers where there is no tokenizer."""
    if loaded.tokenizer is None:
        return [str(i) for i in ids]
    return [str(t) for t in loaded.tokenizer.convert_ids_to_tokens(ids)]


DEFAULT_LAYOUTS: "Mapping[str, Callable[..., TokenLayout]]" = {
    "vision": guessed_patches_of_padded_images,
    "text": guessed_text,
    "decoder": decoder_tokens,
    "audio": guessed_frames,
    "queries": query_tokens,
}

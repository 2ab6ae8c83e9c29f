"""The card of a trained model as a page for people."""

from collections.abc import Mapping, Sequence
from typing import Any

_ABOUT = {
    "vilt": "Single stream: text and patches in one encoder (ViLT). Heads for matching (the default), masked words"
    " (`ViltForMaskedLM`), answers (`ViltForQuestionAnswering`), and the class of each patch"
    " (`patch_classifier`, a linear layer on the last hidden states).",
    "clip": "Two encoders that meet in the similarity (CLIP), and the class of each patch"
    " (`patch_classifier`, a linear layer on the image's last hidden states).",
    "lxmert": "Two streams with co-attention (LXMERT); its regions are what a sample's boxes show, 8 x 8 pixels each."
    " All heads are LXMERT's own: masked words, matching, object classes, answers.",
    "simla": "One stream on several levels (SIMLA in small, Khan et al., ECCV 2022): BLIP's classes, an image encoder"
    " below a text encoder that looks at it. Heads for matching (the default), masked words and the class of each patch"
    " (`SimlaForWordsAndPatches`); beside them the heads for patches' codes and keywords, and the codes themselves.",
    "mapper": "The carried CLIP's two encoders, frozen, and a mapper behind them in which text and image attend to"
    " themselves and to each other, with a head for answers and a decoder that writes captions: CLIPmapper (Huang et"
    " al. 2023) in small, as far as its abstract says what that is.",
    "text": "Captions alone (BERT, masked words): a control that never saw an image, so that its figures are the prior"
    " of the language.",
    "scan": "Words that attend to nine regions of an image, which gives the likeness of text and image (SCAN in small,"
    " text to image).",
    "answering": "Words of a question that attend to nine regions of an image, and an answer from their mean.",
    "painter": "Pixels that attend to the words of a caption and are coloured by what they attended to (AttnGAN's"
    " attention in small, supervised).",
}
_NOTES = {
    "vilt": "Each figure of masked words masks one word that the picture and the rest of its phrase determine."
    " 'without object' hides the patches that show anything of the word's object, 'without image' all of them, as"
    " mid-grey. 'balanced' matching takes true captions and as many wrong ones: another scene's, one changed in an"
    " attribute, one with two attributes exchanged, by turns. 'attributes' are the questions for a colour, a shape, and"
    " whether something is there.",
    "clip": "R@1 is among 256 scenes, some of which may share a caption. 'beats' figures compare a true caption with"
    " one that is wrong in one thing.",
    "simla": "R@K are among 256 scenes, some of which may share a caption; 'matching' scores every pair with the"
    " matching head, 'similarity' compares the two encoders' vectors. Each figure of masked words masks one word that"
    " the picture and the rest of its phrase determine; 'without object' and 'without image' show mid-grey there."
    " 'grounding' takes each phrase alone and Grad-CAM of the matching logit on the cross-attention of a layer: 'box'"
    " says whether the region with the largest area-normalised mass overlaps the thing by one half, of nine regions,"
    " 'pointing' whether the strongest patch shows any of it. 'codes' are those of a thing's patches, all of them"
    " masked, from the words or with all words masked.",
    "mapper": "'attributes' are the questions for a colour, a shape, and whether something is there. 'captions tokens'"
    " and 'bits' are of each word behind the true ones; which things a caption mentions, and in which order, nobody can"
    " tell from the picture. 'captions true' is the share of greedy captions with phrases that are all true: a thing of"
    " the scene has their colour and shape, and their size where they name one; 'phrases' counts each by itself.",
    "text": "Captions of normal scenes name no colour and no shape twice, which the words give away.",
}
_ATTENTION = (
    "'attention' figures: see `attnscope.reference.inspecting`; deletion and insertion are changes of the model's score"
    " (%s) when units are taken away in the order of attention."
)
_NOTES |= {
    "scan": "Retrieval is among 256 scenes, some of which may share a caption. "
    + _ATTENTION % "the mean cosine of the phrase's words",
    "answering": "'attributes' are the questions for a colour, a shape, and whether something is there. "
    + _ATTENTION % "the chance of the right answer",
    "painter": "Colours and shapes are told by a fixed judge, the carried CLIP's classes of patches; 'judge' figures"
    " are its own on the true pictures. " + _ATTENTION % "the judge's chance of the right colour and shape",
}
_NOTES["lxmert"] = (
    _NOTES["vilt"]
    .replace("patches that show anything", "regions that show most")
    .replace("mid-grey", "features of zero; the boxes stay")
)


def card_page(card: Mapping[str, Any]) -> str:
    """Markdown of a card."""
    if "samples" in card:
        return _samples_page(card)
    recipe, name = card["recipe"], card["model"]
    lines = [
        f"# reference:{name}",
        "",
        _ABOUT[name],
        "",
        f"{card['parameters']:,} parameters, trained by `attnscope reference train {name}{_score(recipe)}"
        f" --seed {card['seed']}`:"
        f" {recipe['scenes']:,} generated scenes (world version {card['world_version']}), {card['steps']:,} steps"
        f" (the rate fell from step {card['decay_from']:,}), {card['processor_seconds']} s of processor time in one"
        f" thread, torch {card['versions']['torch']}, transformers {card['versions']['transformers']}.",
        "",
        f"Figures on {card['examined_scenes']} scenes of each split that it never saw; in brackets the"
        f" {card['interval']}. {_NOTES[name]}",
        "",
        *_table(card["figures"]),
        "",
        f"Licence {card['licence']}; data and weights are this project's own. SHA-256 of the weight files"
        f" `{card['digest']}`.",
        "",
    ]
    return "\n".join(lines)


def _samples_page(card: Mapping[str, Any]) -> str:
    """Markdown of the card of a model that learned from samples."""
    recipe, name, samples = card["recipe"], card["model"], card["samples"]
    lines = [
        f"# {name} on {samples['source']}",
        "",
        _ABOUT_PAIRS[name],
        "",
        f"{card['parameters']:,} parameters{_attention(recipe)}{_behind(recipe)}, trained with seed {card['seed']} on"
        f" {samples['train']:,} samples of"
        f" {samples['source']} (left out: {samples['left_out']:,}; texts that were cut: {samples['cut_texts']:,}), a"
        f" vocabulary of {samples['vocabulary']:,} {_PARTS[recipe['tokenizer']]}, {card['steps']:,} steps (the rate"
        f" fell from step {card['decay_from']:,}) in {recipe['dtype']} on {recipe['device']}, processes:"
        f" {recipe['processes']}, torch {card['versions']['torch']}, transformers {card['versions']['transformers']}.",
        "",
        f"Figures on {samples['test']:,} samples that it never saw; in brackets the {card['interval']}."
        f" {_PAIR_NOTES[name]}",
        "",
        *_table(card["figures"]),
        "",
        f"SHA-256 of the samples as prepared `{samples['digest']}`, of the weight files `{card['digest']}`.",
        "",
    ]
    return "\n".join(lines)


_PARTS = {"words": "words", "wordpiece": "word pieces"}
_ABOUT_PAIRS = {
    "vilt": "Single stream: text and patches in one encoder (ViLT), trained on masked words and matching. Heads for"
    " matching (the default) and masked words (`ViltForMaskedLM`).",
    "lxmert": "Two streams with co-attention (LXMERT), trained on masked words and matching; its regions are what a"
    " sample's boxes show, 8 x 8 pixels each, and where there are fewer than nine, parts of the image that are the same"
    " for all. Its heads for object classes and for answers have learned nothing.",
    "mapper": "A CLIP's two encoders, frozen, and a mapper behind them in which text and image attend to themselves and"
    " to each other, with a decoder that writes captions (`MapperForConditionalGeneration`): CLIPmapper (Huang et al."
    " 2023) in small, as far as its abstract says what that is.",
    "clip": "Two encoders that meet in the similarity (CLIP).",
    "text": "Texts alone (BERT, masked words), without images.",
    "simla": "One stream on several levels (SIMLA in small): BLIP's classes, an image encoder below a text encoder that"
    " looks at it, trained on contrast, matching, masked words, masked patches' codes and keywords.",
}
_PAIR_NOTES = {
    "mapper": "'captions tokens' and 'captions bits' say how often each word of a text behind the true ones is told,"
    " and its surprise; 'captions exact' says how often the text that is written by the likeliest word behind the"
    " others is the sample's own to the word.",
    "vilt": "15 % of the words are masked; 'words' says how many of them are told. 'matching' says how often an image's"
    " own text is said to fit ('true') and another sample's not to ('other'); 'balanced' is their mean.",
    "clip": "Each says how often an image's own text (or a text's own image) is the first, or among the first 5 or 10,"
    " of all of these samples'.",
    "simla": "Each says how often an image's own text (or a text's own image) is the first, or among the first 5 or 10,"
    " of all of these samples', by the similarity of the two encoders' vectors.",
    "text": "15 % of the words are masked; 'words' says how many of them are told.",
}
_PAIR_NOTES["lxmert"] = _PAIR_NOTES["vilt"]


def _score(recipe: Mapping[str, Any]) -> str:
    return f" --alignment {recipe['alignment']}" if recipe.get("alignment") else ""


def _attention(recipe: Mapping[str, Any]) -> str:
    return f", the score `{recipe['alignment']}` in its attention" if recipe.get("alignment") else ""


def _behind(recipe: Mapping[str, Any]) -> str:
    return f", with those of the encoders in {recipe['encoders']}" if recipe.get("encoders") else ""


def _table(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sequence[str]:
    splits = list(figures)
    names = list(dict.fromkeys(name for split in splits for name in figures[split]))
    rows = [f"| figure | {' | '.join(splits)} |", "|---|" + "---|" * len(splits)]
    for name in names:
        cells = [_cell(figures[split].get(name), name) for split in splits]
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return rows


def _cell(figure: Mapping[str, float] | None, name: str) -> str:
    if figure is None:
        return "-"
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if name.endswith("bits"):
        return f"{value:.2f} bits ({low:.2f} to {high:.2f})"
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

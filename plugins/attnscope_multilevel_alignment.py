"""How well a model aligns image and text, on three levels: the pair, the words and patches, the concepts.

1. Global: does a pair belong together? Retrieval among all samples by the similarity of dual encoders, and whether the
   model scores a text above its hard negative.
2. Token: where do the words of a phrase look? Their map over the image is held against the box that the phrase names:
   the pointing game, the mass inside, which box has the most mass for its size, and where a detector gave the image's
   regions, whether the strongest is the phrase's; and what the words of a phrase cost to tell with and without the
   image, and its object with and without the words.
3. Concept: do the tokens that the CLS token attends to most (the last token of a text that is read from left to right)
   name what the image shows? As the paper chooses keywords (the four largest weights of the head mean) and as its code
   does (four votes of every head, the five with most). And what does the model find in the image that the text leaves
   out? Of given concepts that the text doesn't name, the ones whose pair with the image it scores most, against the
   labels of what no phrase names.

The levels, the grounding and the keywords: Khan, Z. et al., "Single-Stream Multi-Level Alignment for Vision-Language
Pretraining" (SIMLA), ECCV 2022, sections 3.5 and supplement 3. Its map is attention times the positive part of its
gradient, mean over heads and words; its box score is the mass over the square root of the area. Pointing game: Zhang,
J. et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, hookimpl
from attnscope.conditions import INTACT, Condition, phrases_of
from attnscope.reading import TokenBlock, extracted_in, is_of_kind, read_tokens
from attnscope.report import Bars, Citation, Element, Heading, LineChart, Note, Paragraph, Series, Table
from attnscope.statistics import bootstrap_sums, interval_of_sums

Told: TypeAlias = dict[str, tuple[object, np.ndarray, str, str]]
"""Variables of a result: dimensions, values, what they are, and their unit."""

_DRAWS = 1000
_NEGATIVE = Condition(text="negative")
_EMBEDDING = Condition(ask="embedding")
_RECONSTRUCTION = (Condition(ask="phrase"), Condition(ask="phrase", image="all"))
# By zeros, which models that learned to tell image tokens read as a mask.
_OBJECTS = (
    Condition(ask="object", operator="zero"),
    Condition(ask="object", operator="zero", text="all"),
)
_AT = (1, 5, 10)
_KEYWORDS, _VOTED = 4, 5
_MISSING_AT = (1, 2, 4)
_GROUNDING = {
    "pointing": "share of phrases whose strongest patch lies in a box of theirs",
    "mass": "share of the map that lies in the phrase's boxes",
    "box": "share of phrases for which the box with most mass for its size is theirs (IoU of 0.5 or more)",
    "region": "share of phrases whose strongest region of a detector's is theirs (IoU of 0.5 or more)",
}
_CHANCE = {
    "pointing": "share of patches in the phrase's boxes",
    "mass": "share of the image in the phrase's boxes",
    "box": "share of a sample's boxes that are the phrase's",
    "region": "share of a detector's regions that are the phrase's",
}


def point(values: np.ndarray, inside: np.ndarray) -> float:
    """1 when the strongest token lies inside, else 0; `values` and `inside` are (token,)."""
    return float(inside[int(values.argmax())])


def mass_inside(values: np.ndarray, shares: np.ndarray) -> float:
    """The part of a map's total in a region that covers these shares of its tokens, in [0, 1]; NaN for an empty map."""
    total = values.sum()
    return float((values * shares).sum() / total) if total > 0 else np.nan


def best_box(values: np.ndarray, shares: np.ndarray, areas: np.ndarray) -> int:
    """The box (shares (box, token), areas (box,)) with the most mass over the square root of its area.

    A uniform map gives mass in proportion to area, so that the largest box wins.
    """
    return int((shares @ values / np.sqrt(areas)).argmax())


def intersection_over_union(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two boxes (left, top, right, bottom), in [0, 1]."""
    width, height = (min(first[2 + a], second[2 + a]) - max(first[a], second[a]) for a in (0, 1))
    shared = max(0.0, width) * max(0.0, height)
    sizes = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (first, second))
    return shared / (sizes - shared) if sizes > shared else 0.0


def keywords_of_the_paper(weights: np.ndarray, allowed: np.ndarray, count: int = _KEYWORDS) -> np.ndarray:
    """Tokens with the largest head mean of weights (head, token), among the allowed: (keyword,) positions."""
    mean = np.where(allowed, weights.mean(0), -np.inf)
    return np.argsort(-mean, kind="stable")[: min(count, int(allowed.sum()))]


def keywords_of_the_code(
    weights: np.ndarray, allowed: np.ndarray, count: int = _KEYWORDS, chosen: int = _VOTED
) -> np.ndarray:
    """Tokens with the most votes, when each head (head, token) votes for its `count` largest: (keyword,) positions.

    Equal votes go to the earlier token, where the code leaves it open.
    """
    votes = np.zeros(weights.shape[-1])
    for head in weights:
        votes[keywords_of_the_paper(head[None], allowed, count)] += 1
    order = np.argsort(-votes, kind="stable")
    return order[: min(chosen, int((votes > 0).sum()))]


def recall_at(similarity: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether the own candidate is among the first k, (query, k of 1, 5, 10); `similarity` is (query, candidate).

    `places` is each query's own candidate. Candidates that are as similar, such as an equal text, cost it nothing.
    """
    own = np.take_along_axis(similarity, places[:, None], axis=1)
    above = (similarity > own).sum(1)
    return (above[:, None] < np.array(_AT)).astype(float)


def names(text: str, concept: str) -> bool:
    """Whether a text has the words of a concept in a row."""
    words, wanted = text.lower().split(), concept.lower().split()
    return any(words[at : at + len(wanted)] == wanted for at in range(len(words) - len(wanted) + 1))


def found_among(scores: np.ndarray, wanted: np.ndarray, candidates: np.ndarray, count: int) -> tuple[float, float]:
    """Precision and recall of the `count` candidates with the largest scores; all are (concept,).

    What is wanted is a part of the candidates. Of equal scores the earlier concept goes first.
    """
    order = np.argsort(-np.where(candidates, scores, -np.inf), kind="stable")[: min(count, int(candidates.sum()))]
    hits = float(wanted[order].sum())
    return hits / len(order), hits / float(wanted.sum())


@dataclass(frozen=True)
class MultilevelAlignment:
    """Alignment of image and text globally, of words with patches over depth, and of keywords with content words.

    `site` is attention from words to image tokens, by default the first that there is; `maps` are its 'attention' (head
    mean) or 'gradcam' (times the positive part of the gradient, as SIMLA has it). `retrieval` needs a dual encoder,
    `negatives` samples with `targets['negative']`, `reconstruction` a model that tells masked words, and
    `object_reconstruction` one that tells masked image tokens. `concepts` are what an image may show beside what its
    text names, such as 'red circle'; each is scored as the text that `prompt` makes of it, by one run of the model, and
    held against the labels of regions without a phrase. A patch lies in a
    box when it holds at least the share `inside` of what the patch that holds most of it does; phrases whose boxes
    cover more than `largest` of the image are left out. What is said of patches holds for the regions of a detector as
    well: a region's share in a box is that of its area.
    """

    name: ClassVar[str] = "multilevel_alignment"
    title: ClassVar[str] = "Alignment on three levels"
    site: str | None = None
    maps: Literal["attention", "gradcam"] = "gradcam"
    retrieval: bool = False
    negatives: bool = True
    reconstruction: bool = False
    object_reconstruction: bool = False
    concepts: tuple[str, ...] = ()
    prompt: str = "a {}"
    inside: float = 0.5
    largest: float = 0.5
    target: int | str | None = None
    seed: int = 0

    def requires(self) -> ExtractSpec:
        conditions = [INTACT, _NEGATIVE] if self.negatives else []
        conditions += [_EMBEDDING] if self.retrieval else []
        conditions += _RECONSTRUCTION if self.reconstruction else ()
        conditions += _OBJECTS if self.object_reconstruction else ()
        conditions += self._asked_concepts()
        quantities = {"attention", "score", *(["attention_relevance"] if self.maps == "gradcam" else [])}
        return ExtractSpec(frozenset(quantities), target=self.target, conditions=tuple(conditions))

    def _asked_concepts(self) -> list[Condition]:
        return [Condition(text="given", given=self.prompt.format(concept)) for concept in self.concepts]

    def analyse(self, run: Run) -> xr.Dataset:
        """Retrieval and matching, grounding and its chance by layer, keywords by layer, with intervals over samples."""
        found: Told = {}
        coordinates: dict[str, object] = {}
        if self.retrieval:
            found |= self._retrieval(run)
            coordinates |= {"at": np.array(_AT), "direction": np.array(["image to text", "text to image"], object)}
        if self.negatives:
            found |= self._negatives(run)
        if self.reconstruction:
            words = "cross entropy of the masked words of a phrase"
            found |= self._reconstruction(run, "reconstruction", "image", _RECONSTRUCTION, words)
            coordinates["image"] = np.array(["intact", "without"], object)
        if self.object_reconstruction:
            words = "divergence of what a masked image token of an object is told to be from what it is told unmasked"
            found |= self._reconstruction(run, "object_reconstruction", "text", _OBJECTS, words)
            coordinates["text"] = np.array(["intact", "without"], object)
        site = self._site(run)
        if site is not None:
            found |= self._grounding(run, site)
            coordinates["layer"] = np.array(run.plan.sites[site].layers)
        own = self._own_site(run)
        if own is not None:
            found |= self._concepts(run, own)
            coordinates |= {
                "text_layer": np.array(run.plan.sites[own].layers),
                "keywords": np.array(["paper", "code"], object),
            }
        if self.concepts:
            found |= self._missing(run)
            coordinates["chosen"] = np.array(_MISSING_AT)
        if not found:
            raise ValueError(f"{run.location} has no attention from words to an image, and nothing else was asked for")
        variables = {n: xr.Variable(d, v, {"long_name": w, "units": u}) for n, (d, v, w, u) in found.items()}
        attrs = {"site": site or "", "text_site": own or "", "interval": "95 % bootstrap over samples"}
        return xr.Dataset(variables, coordinates, attrs)

    # -- global -----------------------------------------------------------------------------------------------------

    def _retrieval(self, run: Run) -> Told:
        vectors = run.embeddings
        used = np.flatnonzero(run.status == 1)
        image, text = (vectors[f"{side}_embedding"].values[used] for side in ("image", "text"))
        hits = np.full((2, len(used), len(_AT)), np.nan)
        for block in np.array_split(np.arange(len(used)), max(1, len(used) // 512)):
            hits[0, block] = recall_at(image[block] @ text.T, block)
            hits[1, block] = recall_at(text[block] @ image.T, block)
        words = f"share of queries whose own partner is among the first so many of {len(used)}"
        return self._told("recall", ("direction", "at"), np.moveaxis(hits, 1, 0)[:, None], words)

    def _negatives(self, run: Run) -> Told:
        scores = run.outputs_under([INTACT, _NEGATIVE])["score"].values.astype(float)
        whole = np.isfinite(scores).all(0)
        margin = np.where(whole, scores[0] - scores[1], np.nan)
        right = np.where(whole, (margin > 0) + 0.5 * (margin == 0), np.nan)
        unit = "1"
        found = self._told("matching", (), right[:, None], "share of samples whose text scores above its negative")
        found |= self._told("margin", (), margin[:, None], "score of the text minus that of its negative")
        count = np.array(int((run.status == 1).sum() - whole.sum()))
        return found | {"without_negative": ((), count, "number of samples without a negative text", unit)}

    def _reconstruction(self, run: Run, name: str, dim: str, conditions: Sequence[Condition], words: str) -> Told:
        """What is masked of one modality, told with the other intact and without it."""
        losses = run.outputs_under(conditions)["loss"].values / np.log(2)  # (intact or without, sample, phrase)
        losses = np.where(np.isfinite(losses).all(0), losses, np.nan)
        return self._told(name, (dim,), np.moveaxis(losses, 0, -1), words, "bit")

    # -- token ------------------------------------------------------------------------------------------------------

    def _site(self, run: Run) -> str | None:
        """The site whose queries are words and whose keys are image tokens."""
        for name, site in run.plan.sites.items():
            if self.site in (None, name) and _has(run, site.queries, "text") and _has(run, site.keys, "image"):
                return name
        if self.site is not None:
            raise ValueError(
                f"{self.site!r} is not attention from words to an image; the sites are {', '.join(run.sites)}"
            )
        return None

    def _grounding(self, run: Run, site: str) -> Told:
        plan = run.plan.sites[site]
        array = run.array(site, "attention_relevance" if self.maps == "gradcam" else "attention_mean")
        phrases = [phrases_of(str(r)) for r in run.samples["regions"].values]
        shape = (len(phrases), max([1, *map(len, phrases)]), len(plan.layers))
        measured = {name: np.full(shape, np.nan) for name in _GROUNDING}
        chance = {name: np.full(shape[:2], np.nan) for name in _CHANCE}
        skipped, empty = 0, np.zeros(len(plan.layers), int)
        for block in run.blocks():
            positions = extracted_in(run, block)
            if not len(positions):
                continue
            words, patches = (read_tokens(run, s, positions) for s in (plan.queries, plan.keys))
            for row, position in enumerate(positions):
                sample = _Grounded(run, int(position), words, patches, row, self)
                maps = np.nan_to_num(array.isel(sample=int(position)).values.astype(float))
                for number in range(len(phrases[position])):
                    target = sample.target(number)
                    if target is None:
                        skipped += 1
                        continue
                    for name, value in sample.chances(target).items():
                        chance[name][position, number] = value
                    for layer, one in enumerate(maps):
                        values = sample.measure(one, target)
                        empty[layer] += not values
                        for name, value in values.items():
                            measured[name][position, number, layer] = value
        found: Told = {
            "phrases_skipped": ((), np.array(skipped), "number of phrases without a box or words to find", "1"),
            "maps_empty": (
                ("layer",),
                empty,
                "number of phrases left out of a layer whose map is zero everywhere",
                "1",
            ),
        }
        for name, words_ in _GROUNDING.items():
            found |= self._told(name, ("layer",), measured[name], words_)
            found |= self._told(f"{name}_chance", (), chance[name], _CHANCE[name])
        return found

    # -- concept ----------------------------------------------------------------------------------------------------

    def _own_site(self, run: Run) -> str | None:
        """Attention of words to words: of a joint stream, or of the text's own, which a cross-modal site reads from."""
        words = [n for n, s in run.plan.sites.items() if s.queries == s.keys and _has(run, s.queries, "text")]
        return words[0] if words else None

    def _concepts(self, run: Run, site: str) -> Told:
        plan = run.plan.sites[site]
        attention = run.attention(site)
        shape = (len(run.status), 1, len(plan.layers), 2)
        precision, recall = np.full((2, *shape), np.nan)
        chance = np.full(shape[:2], np.nan)
        for block in run.blocks():
            positions = extracted_in(run, block)
            if not len(positions):
                continue
            tokens = read_tokens(run, plan.queries, positions)
            words = (tokens.text != "") & ~tokens.is_of("padding")
            is_cls = tokens.is_of("cls")
            for row, position in enumerate(positions):
                content = _named(tokens, row) & words[row]
                allowed = words[row] & ~is_cls[row]
                if not content.any() or not is_cls[row].any():
                    continue
                chance[position, 0] = content.sum() / allowed.sum()
                at = int(is_cls[row].argmax())
                weights = attention.isel(sample=int(position), query_token=at).values
                if not np.nan_to_num(weights)[..., allowed].any():
                    # Of a text that is read from left to right, CLS sees itself alone; its last token sees all.
                    at = int(np.flatnonzero(words[row])[-1])
                    weights = attention.isel(sample=int(position), query_token=at).values
                for layer, one in enumerate(np.nan_to_num(weights.astype(float))):
                    for way, choose in enumerate((keywords_of_the_paper, keywords_of_the_code)):
                        chosen = choose(one, allowed)
                        hit = content[chosen].sum()
                        precision[position, 0, layer, way] = hit / max(1, len(chosen))
                        recall[position, 0, layer, way] = hit / content.sum()
        dims = ("text_layer", "keywords")
        return {
            **self._told("precision", dims, precision, "share of keywords that lie in an annotated phrase"),
            **self._told("recall_of_words", dims, recall, "share of the words of annotated phrases that are keywords"),
            **self._told("precision_chance", (), chance, "share of a text's tokens that lie in an annotated phrase"),
        }

    def _missing(self, run: Run) -> Told:
        """Concepts that an image shows and its text leaves out, among those that the model scores most."""
        scores = run.outputs_under(self._asked_concepts())["score"].values.astype(float)  # (concept, sample)
        regions, texts = (run.samples[name].values for name in ("regions", "text"))
        shape = (len(regions), 1, len(_MISSING_AT))
        precision, recall, precision_chance, recall_chance = np.full((4, *shape), np.nan)
        for sample in np.flatnonzero((run.status == 1) & np.isfinite(scores).all(0)):
            listed = json.loads(str(regions[sample]) or "[]")
            labels = [str(r["label"]) for r in listed if r.get("label")]
            said = [str(texts[sample]), *(str(r["phrase"]) for r in listed if r.get("phrase"))]
            # What a phrase names counts as said, also where another word stands between the concept's.
            said += [str(r["label"]) for r in listed if r.get("label") and r.get("phrase")]
            candidates = np.array([not any(names(text, c) for text in said) for c in self.concepts])
            wanted = candidates & np.array([any(names(label, c) for label in labels) for c in self.concepts])
            if not wanted.any():
                continue
            for at, count in enumerate(_MISSING_AT):
                precision[sample, 0, at], recall[sample, 0, at] = found_among(
                    scores[:, sample], wanted, candidates, count
                )
            precision_chance[sample] = wanted.sum() / candidates.sum()
            recall_chance[sample, 0] = np.minimum(np.array(_MISSING_AT) / candidates.sum(), 1)
        skipped = int((run.status == 1).sum() - np.isfinite(precision[:, 0, 0]).sum())
        words = "of so many concepts that the model scores most, among those that the text doesn't name"
        dims = ("chosen",)
        return {
            **self._told("missing_precision", dims, precision, f"share that the image shows, {words}"),
            **self._told("missing_recall", dims, recall, f"share of what only the image shows that is there, {words}"),
            **self._told("missing_precision_chance", dims, precision_chance, "share of these that the image shows"),
            **self._told("missing_recall_chance", dims, recall_chance, "share of these that are chosen"),
            "missing_skipped": ((), np.array(skipped), "number of samples whose text leaves out no known concept", "1"),
        }

    def _told(self, name: str, dims: tuple[str, ...], values: np.ndarray, words: str, unit: str = "1") -> Told:
        """Mean over samples and phrases with its interval, of values (sample, phrase, ...)."""
        sums = bootstrap_sums(values, np.arange(len(values)), draws=_DRAWS, seed=self.seed).sum(2)
        mean, low, high = interval_of_sums(sums)
        return {
            name: (dims, mean, words, unit),
            f"{name}_low": (dims, low, f"lower end of the 95 % interval of: {words}", unit),
            f"{name}_high": (dims, high, f"upper end of the 95 % interval of: {words}", unit),
        }

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        yield Paragraph(
            "Does the model bring image and text together: as a pair, word by word with the patches that show what the"
            " word names, and in the concepts that it picks out of the text?"
        )
        yield Citation(
            "Khan et al., Single-Stream Multi-Level Alignment for Vision-Language Pretraining, ECCV 2022.",
            "https://arxiv.org/abs/2203.14395",
        )
        yield from _global_elements(result)
        if result.attrs.get("site"):
            yield from _token_elements(result)
        else:
            yield Note(
                "No attention goes from words to image tokens, so that there is no map of a word over the image."
            )
        if result.attrs.get("text_site"):
            yield from _concept_elements(result)
        if "missing_recall" in result:
            yield from _missing_elements(result)


class _Grounded:
    """The boxes of one sample among its tokens."""

    def __init__(
        self, run: Run, position: int, words: TokenBlock, patches: TokenBlock, row: int, options: MultilevelAlignment
    ) -> None:
        self._regions = json.loads(str(run.samples["regions"].values[position]) or "[]")
        self._phrases = phrases_of(str(run.samples["regions"].values[position]))
        self._patches = np.flatnonzero(patches.is_of("image")[row])
        self._shares = patches.region_share[row][:, self._patches]
        self._own_boxes = patches.box[row][self._patches]
        self._words = words.region_share[row]
        self._is_word = words.is_of("text", "generated", "special")[row]
        self._options = options
        self._boxes = [
            number
            for number, region in enumerate(self._regions)
            if region.get("box") and number < len(self._shares) and np.isfinite(self._shares[number]).all()
        ]

    def target(self, number: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The phrase's word positions, and the numbers of its regions; None where either isn't known."""
        phrase = self._phrases[number]
        span = None if phrase.span is None else list(phrase.span)
        mine = [
            n for n, r in enumerate(self._regions) if (r.get("phrase") or "") == phrase.text and r.get("span") == span
        ]
        mine = [n for n in mine if n in self._boxes]
        if not mine or not len(self._patches):
            return None
        words = np.flatnonzero((np.nan_to_num(self._words[mine[0]]) >= 0.5) & self._is_word)
        covered = self._shares[mine].max(0)
        if not len(words) or covered.mean() > self._options.largest or not covered.any():
            return None
        return words, np.array(mine)

    def measure(self, one: np.ndarray, target: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """The measures of a map (query_token, key_token) for a phrase; none of one that shows nothing."""
        words, mine = target
        values = one[words][:, self._patches].mean(0)
        covered = self._shares[mine].max(0)
        if not values.any():
            return {}
        found = {
            "pointing": point(values, covered >= self._options.inside * covered.max()),
            "mass": mass_inside(values, covered),
        }
        candidates = self._candidates()
        if len(candidates) > 1:
            areas = np.array([_area(self._regions[n]["box"]) for n in candidates])
            best = candidates[best_box(values, self._shares[candidates], areas)]
            found["box"] = float(self._is_his(self._regions[best]["box"], mine))
        if self._has_boxes:
            found["region"] = float(self._is_his(self._own_boxes[int(values.argmax())], mine))
        return found

    def chances(self, target: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """What a map without any knowledge would reach."""
        covered = self._shares[target[1]].max(0)
        inside = covered >= self._options.inside * covered.max()
        found = {"pointing": float(inside.mean()), "mass": float(covered.mean())}
        candidates = self._candidates()
        if len(candidates) > 1:
            found["box"] = float(np.mean([self._is_his(self._regions[n]["box"], target[1]) for n in candidates]))
        if self._has_boxes:
            found["region"] = float(np.mean([self._is_his(box, target[1]) for box in self._own_boxes]))
        return found

    @property
    def _has_boxes(self) -> bool:
        """Whether the image tokens are regions of a detector, of which it is known where they lie."""
        return bool(self._own_boxes.size) and bool(np.isfinite(self._own_boxes).all())

    def _candidates(self) -> list[int]:
        """Regions of different boxes, grounds left out."""
        seen: dict[tuple[float, ...], int] = {}
        for number in self._boxes:
            if self._shares[number].mean() <= self._options.largest:
                seen.setdefault(tuple(self._regions[number]["box"]), number)
        return list(seen.values())

    def _is_his(self, box: Sequence[float], mine: np.ndarray) -> bool:
        return any(intersection_over_union(box, self._regions[m]["box"]) >= 0.5 for m in mine)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _named(tokens: TokenBlock, row: int) -> np.ndarray:
    """Tokens of a text that lie in any annotated phrase, (token,)."""
    shares = np.nan_to_num(tokens.region_share[row])
    return (shares >= 0.5).any(0) & tokens.is_of("text", "generated")[row]


def _has(run: Run, stream: str, kind: str) -> bool:
    return bool(is_of_kind(run.tokens(stream)["kind"].values, kind).any())


def _global_elements(result: xr.Dataset) -> Iterator[Element]:
    if "recall" in result:
        yield Heading("Global: retrieval")
        rows = [
            [str(d), *(_said(result.sel(direction=d, at=at), "recall") for at in _AT)]
            for d in result["direction"].values
        ]
        yield Table(["", *(f"R@{at}" for at in _AT)], rows, result["recall"].attrs["long_name"])
    if "matching" in result:
        yield Heading("Global: a text against its negative")
        rows = [[result[name].attrs["long_name"], _said(result, name)] for name in ("matching", "margin")]
        yield Table(
            ["", "mean and 95 % interval"], rows, f"{int(result['without_negative'])} samples have no negative."
        )
    for name, dim, told in (
        ("reconstruction", "image", "masked words with and without the image"),
        ("object_reconstruction", "text", "masked objects with and without the words"),
    ):
        if name in result:
            yield Heading(f"Token: telling {told}")
            values, low, high = (result[f"{name}{s}"].values for s in ("", "_low", "_high"))
            yield Bars([f"{dim} {i}" for i in result[dim].values], values, low, high, "bit")


def _token_elements(result: xr.Dataset) -> Iterator[Element]:
    yield Heading(f"Token: where the words of a phrase look ({result.attrs['site']})")
    lines = []
    shown = [name for name in _GROUNDING if np.isfinite(result[name]).any()]
    for name in shown:
        lines.append(Series(name, *(result[f"{name}{s}"].values for s in ("", "_low", "_high"))))
        level = np.full(result.sizes["layer"], float(result[f"{name}_chance"]))
        lines.append(Series(f"{name}, chance", level))
    yield LineChart(result["layer"].values, lines, "layer", "share", "Bands: 95 % interval over samples.")
    rows = [[name, _GROUNDING[name], _CHANCE[name]] for name in shown]
    yield Table(["measure", "what it is", "chance"], rows)
    if int(result["phrases_skipped"]):
        yield Note(f"{int(result['phrases_skipped'])} phrases have no box, or words or patches that can't be told.")
    empty = [
        f"layer {layer} ({n})"
        for layer, n in zip(result["layer"].values, result["maps_empty"].values, strict=True)
        if n
    ]
    if empty:
        yield Note(f"Maps are zero everywhere for some phrases, which are left out there: {', '.join(empty)}.")


def _concept_elements(result: xr.Dataset) -> Iterator[Element]:
    yield Heading(f"Concept: keywords of CLS ({result.attrs['text_site']})")
    lines = []
    for way, number in (("as in the paper", 0), ("as in the code", 1)):
        for name, short in (("precision", "precision"), ("recall_of_words", "recall")):
            one = [result[f"{name}{s}"].isel(keywords=number).values for s in ("", "_low", "_high")]
            lines.append(Series(f"{short}, {way}", *one))
    lines.append(Series("precision, chance", np.full(result.sizes["text_layer"], float(result["precision_chance"]))))
    yield LineChart(result["text_layer"].values, lines, "layer", "share", "Bands: 95 % interval over samples.")


def _missing_elements(result: xr.Dataset) -> Iterator[Element]:
    yield Heading("Concept: what the image shows and the text leaves out")
    names_of = ("missing_precision", "missing_precision_chance", "missing_recall", "missing_recall_chance")
    rows = [
        [f"{count} chosen", *(_said(result.sel(chosen=count), name) for name in names_of)]
        for count in result["chosen"].values
    ]
    caption = "Concepts that the text doesn't name, those first whose pair with the image the model scores most."
    yield Table(["", "precision", "by chance", "recall", "by chance"], rows, caption)
    if int(result["missing_skipped"]):
        yield Note(f"{int(result['missing_skipped'])} texts leave out nothing that is labelled; they don't count.")


def _said(part: xr.Dataset, name: str) -> str:
    mean, low, high = (float(part[f"{name}{suffix}"]) for suffix in ("", "_low", "_high"))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(MultilevelAlignment)

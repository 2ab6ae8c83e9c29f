"""How much a model uses each modality: what it loses on one when the other is taken away.

1. Vision for language: the words of a phrase are masked, and the model tells them with the image intact, without the
   object that the phrase names, and without any of the image.
2. Language for vision: the object's image tokens are masked, and the model tells one of them with the caption intact,
   without the phrase, and without any words.
3. The influence of what was taken is the loss without it minus the loss with it. A cross-modal model has a positive one
   in both directions; models trained with masked words mostly use vision for language.

Frank, S., Bugliarello, E. and Elliott, D., "Vision-and-Language or Vision-for-Language? On Cross-Modal Influence in
Multimodal Transformers", EMNLP 2021. Models that write or that compare are asked for their own target instead. Unlike
there, an example without a region that matches is left out and counted, and the class of a region is judged against
what the model itself says of it with nothing masked, since no detector's classes are at hand.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, hookimpl
from attnscope.conditions import Condition, phrases_of
from attnscope.report import Bars, Citation, Element, Heading, LineChart, Note, Paragraph, Series, Table
from attnscope.statistics import bootstrap_sums, interval_of_sums

Operator: TypeAlias = Literal["mean", "zero", "noise", "other", "drop"]

_EXTRACTED = 1
_DRAWS = 1000
_LEVELS = ("none", "part", "all")
_PLAIN = ("effect_size", "correct", "examples", "skipped", "share")
# What is asked of the model under a condition, where it isn't what an option says.
_CONDITION = {"answer": "target"}
_DIRECTIONS = ("vision_for_language", "language_for_vision")
_WORDS = {
    "vision_for_language": ("the image", ("nothing", "the object", "all of the image")),
    "language_for_vision": ("the caption", ("nothing", "the phrase", "all of the words")),
}


@dataclass(frozen=True)
class ModalityAblation:
    """Loss with the other modality intact, without the part that matters, and without all of it.

    `language` is what the model is asked for while the image is ablated: the masked 'phrase' (bits), its own 'target'
    score, its 'answer' (bits a token: what it wrote behind the prompt, of a run with `generate`; what a text's mask
    tokens stand for; else the class or word that it says of the intact input), or 'none' to leave the direction out;
    `vision` while words are: the masked 'object' (bits, of a model that tells its image tokens), the 'target', the
    'answer', or 'none'. `operators` stand in the place of image tokens, one result each;
    `threshold` of the overlap from which an image token belongs to an object, with a sweep over `thresholds`.
    """

    name: ClassVar[str] = "modality_ablation"
    title: ClassVar[str] = "Ablation of a modality"
    language: Literal["phrase", "target", "answer", "none"] = "phrase"
    vision: Literal["object", "target", "answer", "none"] = "none"
    operators: tuple[Operator, ...] = ("mean",)
    text_operator: Literal["mask", "drop"] = "mask"
    threshold: float = 0.5
    thresholds: tuple[float, ...] = ()
    target: int | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.operators or (self.language == "none" and self.vision == "none"):
            raise ValueError("modality_ablation needs an operator and a direction at least")

    def requires(self) -> ExtractSpec:
        conditions = [c for direction in self._directions for o in self.operators for c in self._levels(direction, o)]
        conditions += [c for o in self.operators for c in self._sweep(o)]
        return ExtractSpec(frozenset({"score"}), target=self.target, conditions=tuple(dict.fromkeys(conditions)))

    @property
    def _directions(self) -> list[str]:
        return [d for d, asked in zip(_DIRECTIONS, (self.language, self.vision), strict=True) if asked != "none"]

    def _asks(self, direction: str) -> str:
        return self.language if direction == "vision_for_language" else self.vision

    def _levels(self, direction: str, operator: str) -> list[Condition]:
        """The conditions without ablation, without the part, and without all."""
        asked: dict[str, object] = {
            "ask": _CONDITION.get(ask := self._asks(direction), ask),
            "operator": operator,
            "threshold": self.threshold,
        }
        if direction == "vision_for_language":
            return [Condition(**asked, image=image) for image in ("intact", "object", "all")]  # type: ignore[arg-type]
        asked["text_operator"] = self.text_operator
        return [Condition(**asked, text=text) for text in ("intact", "phrase", "all")]  # type: ignore[arg-type]

    def _sweep(self, operator: str) -> list[Condition]:
        if self.language == "none":
            return []
        return [
            Condition(ask=_CONDITION.get(self.language, self.language), image="object", operator=operator, threshold=t)  # type: ignore[arg-type]
            for t in self.thresholds
        ]

    def analyse(self, run: Run) -> xr.Dataset:
        """Losses, influences and effect sizes (direction, operator, level), with intervals over samples."""
        extracted = run.status == _EXTRACTED
        parts = [self._direction(run, direction, extracted) for direction in self._directions]
        along = xr.Variable("direction", np.array(self._directions, object))
        result = xr.concat(parts, along, combine_attrs="override")
        units = list(dict.fromkeys(part["loss"].attrs["units"] for part in parts))
        if len(units) == 2:
            for name in [n for n, v in result.data_vars.items() if v.attrs["units"] in units[:1] and n not in _PLAIN]:
                result[name].attrs["units"] = " and ".join(units)
        if len(parts) == 2:
            result = result.assign(self._asymmetry(result, parts))
        if self.thresholds and self.language != "none":
            result = result.assign(self._swept(run, extracted))
        kept = result.drop_vars([n for n in result.data_vars if str(n).endswith("_draws")])
        return kept.assign_attrs(interval="95 % bootstrap over samples, all examples of a sample together")

    def _losses(
        self, run: Run, conditions: list[Condition], ask: str, extracted: np.ndarray
    ) -> tuple[np.ndarray, xr.Dataset]:
        """Losses (condition, sample, phrase) in bits, or the score's negative; NaN where an example is not whole.

        Where no sample has a phrase, there is no part to take away: examples are whole without it.
        """
        outputs = run.outputs_under(conditions)
        if "phrase" not in outputs.dims:
            outputs = outputs.expand_dims("phrase", axis=-1)
        values = outputs["loss"] / np.log(2) if ask != "target" else -outputs["score"]
        has_parts = _examples(run, extracted, by_phrase=True) > 0
        counted = [at for at, condition in enumerate(conditions) if has_parts or not _is_part(condition)]
        there = (outputs["changed"].values >= 0) & np.isfinite(values.values)
        whole = there[counted].all(0) & extracted[:, None]
        if ask == "answer" and not whole.any():
            raise ValueError(
                f"{run.location} holds no answers: its target is none that a model gives as a class or word"
            )
        return np.where(whole, values.values, np.nan), outputs

    def _direction(self, run: Run, direction: str, extracted: np.ndarray) -> xr.Dataset:
        ask = self._asks(direction)
        unit = "1" if ask == "target" else "bit"
        what = "negative score" if ask == "target" else "loss"
        loss, influence, effect, examples, skipped, correct, share, each = [], [], [], [], [], [], [], []
        for operator in self.operators:
            conditions = self._levels(direction, operator)
            values, outputs = self._losses(run, conditions, ask, extracted)
            whole = np.isfinite(values[0])
            gained = values - values[0]
            loss.append(self._interval(values))
            influence.append(self._interval(gained))
            effect.append([_effect_size(g[whole]) for g in gained])
            each.append(_mean_of_examples(gained[-1]))
            examples.append(whole.sum())
            wanted = (outputs["changed"].values[0] >= 0) | (outputs["asked"].values[0] > 0)
            by_phrase = conditions[1].by_phrase and _examples(run, extracted, by_phrase=True) > 0
            skipped.append(_examples(run, extracted, by_phrase=by_phrase) - whole.sum())
            told = np.where(whole & wanted, outputs["correct"].values, np.nan)
            correct.append([np.nanmean(t) if np.isfinite(t).any() else np.nan for t in told])
            counts = outputs["content"].values[1][whole]
            taken = outputs["changed"].values[1][whole]
            known = taken >= 0
            share.append(np.mean((taken / np.maximum(counts, 1))[known]) if known.any() else np.nan)
        names = ("operator", "level")
        found: dict[str, tuple[object, np.ndarray, str, str]] = {}
        for name, intervals, words in (
            ("loss", loss, f"{what} without so much of the other modality"),
            ("influence", influence, f"{what} without so much of the other modality, minus that with all of it"),
        ):
            for suffix, at, prefix in (
                ("", 0, ""),
                ("_low", 1, "lower end of the interval of: "),
                ("_high", 2, "upper end of the interval of: "),
            ):
                found[name + suffix] = (names, np.array([i[at] for i in intervals]), prefix + words, unit)
        draws = np.array([i[3] for i in influence])
        found |= {
            "influence_draws": (("operator", "level", "draw"), draws, "influence under draws of the bootstrap", unit),
            "influence_of_sample": (
                ("operator", "sample"),
                np.array(each),
                f"{what} of each sample without all of the other modality, minus that with it",
                unit,
            ),
            "effect_size": (names, np.array(effect), "mean influence over its standard deviation over examples", "1"),
            "correct": (names, np.array(correct, float), "share of what was asked for that the model puts first", "1"),
            "examples": ("operator", np.array(examples), "number of phrases or samples that count", "1"),
            "skipped": ("operator", np.array(skipped), "number of phrases or samples that could not be ablated", "1"),
            "share": ("operator", np.array(share, float), "share of the content tokens that the part is", "1"),
        }
        variables = {n: xr.Variable(d, v, {"long_name": w, "units": u}) for n, (d, v, w, u) in found.items()}
        sample = np.array(run.sample_ids, object)
        coordinates = {"operator": np.array(self.operators, object), "level": np.array(_LEVELS, object)}
        return xr.Dataset(variables, {**coordinates, "sample": sample})

    def _interval(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean over examples, ends of its interval, (level) each, and its draws (level, draw)."""
        by_sample = np.moveaxis(values, 1, 0)
        sums = bootstrap_sums(by_sample, np.arange(len(by_sample)), draws=_DRAWS, seed=self.seed).sum(-1)
        mean, low, high = interval_of_sums(sums)
        totals, counts = sums[:, 1:]
        drawn = np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
        return mean, low, high, drawn.T

    def _asymmetry(self, result: xr.Dataset, parts: list[xr.Dataset]) -> dict[str, xr.Variable]:
        """How much more vision does for language than language for vision, all taken away, on the same draws."""
        first, second = (part["influence_draws"].values[:, -1] for part in parts)
        difference = result["influence"].values[0, :, -1] - result["influence"].values[1, :, -1]
        low, high = np.nanquantile(first - second, [0.025, 0.975], axis=-1)
        unit = parts[0]["influence"].attrs["units"] if self.language != "target" and self.vision != "target" else "1"
        words = "influence of all of the image on language, minus that of all words on vision"
        paired = parts[0]["influence_of_sample"].values - parts[1]["influence_of_sample"].values
        effect = np.array([_effect_size(one[np.isfinite(one)]) for one in paired])
        told = "mean over standard deviation, over samples, of the asymmetry of each"
        return {
            "asymmetry_effect_size": xr.Variable("operator", effect, {"long_name": told, "units": "1"}),
        } | {
            name: xr.Variable("operator", values, {"long_name": prefix + words, "units": unit})
            for name, values, prefix in (
                ("asymmetry", difference, ""),
                ("asymmetry_low", low, "lower end of the interval of: "),
                ("asymmetry_high", high, "upper end of the interval of: "),
            )
        }

    def _swept(self, run: Run, extracted: np.ndarray) -> dict[str, xr.Variable | xr.DataArray]:
        found = []
        for operator in self.operators:
            conditions = [self._levels("vision_for_language", operator)[0], *self._sweep(operator)]
            outputs = run.outputs_under(conditions)
            values = -outputs["score"].values if self.language == "target" else outputs["loss"].values / np.log(2)
            values = np.where(extracted[:, None] & (outputs["changed"].values >= 0), values, np.nan)
            gained = values[1:] - values[0]
            changed, content = (outputs[n].values[1:] for n in ("changed", "content"))
            shares = np.where(np.isfinite(gained), changed / np.maximum(content, 1), np.nan)
            found.append((*self._interval(gained)[:3], np.nanmean(shares, axis=(1, 2))))
        unit = "1" if self.language == "target" else "bit"
        words = "influence of the object, by the overlap from which an image token belongs to it"
        names = ("swept", "swept_low", "swept_high", "swept_share")
        said = (words, f"lower end of the interval of: {words}", f"upper end of the interval of: {words}",
                "share of the image tokens that the object is")  # fmt: skip
        units = (unit, unit, unit, "1")
        result: dict[str, xr.Variable | xr.DataArray] = {
            name: xr.Variable(("operator", "overlap"), np.array([f[at] for f in found]), {"long_name": w, "units": u})
            for at, (name, w, u) in enumerate(zip(names, said, units, strict=True))
        }
        return result | {"overlap": xr.DataArray(np.array(self.thresholds), dims="overlap")}

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        yield Paragraph(
            "Does the model use both of its modalities? One is asked for while the other is taken away, in part and"
            " wholly. What the loss gains is the influence of what was taken; 0 says that it makes no difference."
        )
        yield Citation(
            "Frank, Bugliarello and Elliott, Vision-and-Language or Vision-for-Language?, EMNLP 2021.",
            "https://arxiv.org/abs/2109.04448",
        )
        for direction in result["direction"].values:
            yield from _direction_elements(result.sel(direction=direction), str(direction))
        if "asymmetry" in result:
            rows = [
                [str(o), _told(at := result.sel(operator=o), "asymmetry"), float(at["asymmetry_effect_size"])]
                for o in result["operator"].values
            ]
            yield Heading("Asymmetry")
            caption = "Influence of all of the image minus that of all words; the losses are of different tasks."
            yield Table(["operator", "vision for language minus language for vision", "effect size"], rows, caption)
        if "swept" in result:
            yield Heading("Which image tokens are the object")
            lines = [
                Series(str(o), *(result[f"swept{s}"].sel(operator=o).values for s in ("", "_low", "_high")))
                for o in result["operator"].values
            ]
            shares = ", ".join(f"{s:.2f}" for s in result["swept_share"].values[0])
            x_label, y_label = (
                "overlap from which a token is the object's",
                f"influence ({result['swept'].attrs['units']})",
            )
            yield LineChart(result["overlap"].values, lines, x_label, y_label, f"Shares of the image: {shares}.")
        yield Note("Intervals: 95 % bootstrap over samples, all phrases of a sample together.")


def _direction_elements(part: xr.Dataset, direction: str) -> Iterator[Element]:
    taken, names = _WORDS[direction]
    unit = part["loss"].attrs["units"]
    yield Heading(f"{direction.replace('_', ' ')}: {taken} is taken away")
    for operator in part["operator"].values:
        one = part.sel(operator=operator)
        loss, low, high = (one[f"loss{suffix}"].values for suffix in ("", "_low", "_high"))
        caption = f"Operator {operator}; {int(one['examples'])} examples, {int(one['skipped'])} left out."
        label = f"loss ({unit})" if unit == "bit" else f"negative score ({unit})"
        yield Bars(names, loss, low, high, label, caption)
        columns = ["taken away", label, f"influence ({unit})", "effect size"]
        rows: list[list[object]] = [
            [name, _told(at, "loss"), _told(at, "influence"), float(at["effect_size"])]
            for name, at in ((n, one.sel(level=v)) for n, v in zip(names, one["level"].values, strict=True))
        ]
        if np.isfinite(one["correct"]).any():
            columns.append("told right")
            rows = [[*row, float(told)] for row, told in zip(rows, one["correct"].values, strict=True)]
        yield Table(columns, rows, f"Operator {operator}: mean over examples and 95 % interval over samples.")
    if part.sizes["operator"] > 1:
        spread = part["influence"].sel(level="all")
        least, most = float(spread.min()), float(spread.max())
        yield Note(f"By operator, the influence of all goes from {least:.3f} to {most:.3f} {unit}.")


def _mean_of_examples(values: np.ndarray) -> np.ndarray:
    """Mean over the examples of each sample, of (sample, example); NaN for a sample without any."""
    count = np.isfinite(values).sum(-1)
    return np.divide(np.nansum(values, -1), count, out=np.full(len(values), np.nan), where=count > 0)


def _is_part(condition: Condition) -> bool:
    """Whether a condition takes a part of a modality, which a phrase has to name."""
    return condition.image == "object" or condition.text == "phrase"


def _effect_size(values: np.ndarray) -> float:
    """Mean over standard deviation of paired differences; 0 where all are 0, NaN for fewer than two."""
    if values.size < 2:
        return np.nan
    spread = values.std(ddof=1)
    return float(values.mean() / spread) if spread > 0 else 0.0 if not values.any() else np.nan


def _examples(run: Run, extracted: np.ndarray, *, by_phrase: bool) -> int:
    """How many phrases, or samples, there are to ask about."""
    if not by_phrase:
        return int(extracted.sum())
    regions = run.samples["regions"].values
    return sum(len(phrases_of(str(regions[at]))) for at in np.flatnonzero(extracted))


def _told(part: xr.Dataset, name: str) -> str:
    mean, low, high = (float(part[f"{name}{suffix}"]) for suffix in ("", "_low", "_high"))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(ModalityAblation)

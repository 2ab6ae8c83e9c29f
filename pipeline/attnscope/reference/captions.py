"""What is said of a scene: captions with the place of every phrase, captions that are wrong in one thing, questions.

Words are single tokens, and a phrase is a run of words. Everything that a caption says is true of its scene, and
nothing that a negative caption has changed is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnscope.reference.scenes import COLOURS, GROUNDS, SHAPES, Generator, Scene, Thing

PLACES = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES}
_COUNTS = ("one", "two", "three", "four", "five", "six", "seven")
ANSWERS = (*COLOURS, *SHAPES, "yes", "no", *_COUNTS, *PLACES)
# The kinds of question that ask for what one object is like.
ATTRIBUTE_QUESTIONS = ("colour", "shape", "exists")
QUESTIONS = (*ATTRIBUTE_QUESTIONS, "count", "place", "relation")

# Objects whose middles are nearer than this, in fractions of the picture's side, stand in no relation.
_CLEARLY_APART = 0.15
_OFF_THE_MIDDLE = 0.05


@dataclass(frozen=True)
class Mention:
    """A phrase about one thing: its first and past-the-last word, and the word of each attribute that it names."""

    thing: int
    words: tuple[int, int]
    attributes: Mapping[str, int]


@dataclass(frozen=True)
class Claim:
    """A relation of two things, a thing's place, or the ground, with the words (first, past the last) that say it.

    `kind` is 'relation', 'place' or 'ground'.
    """

    kind: str
    words: tuple[int, int]
    things: tuple[int, ...]


@dataclass(frozen=True)
class Caption:
    """A caption or question as its words, with what they are about."""

    words: tuple[str, ...]
    mentions: tuple[Mention, ...] = ()
    claims: tuple[Claim, ...] = ()

    @property
    def text(self) -> str:
        """The words with a blank between each two."""
        return " ".join(self.words)

    def span(self, words: tuple[int, int]) -> tuple[int, int]:
        """First and past-the-last character of a run of words."""
        start = sum(len(word) + 1 for word in self.words[: words[0]])
        return start, start + len(" ".join(self.words[slice(*words)]))

    def phrase(self, words: tuple[int, int]) -> str:
        """The text of a run of words."""
        return " ".join(self.words[slice(*words)])

    def changed(self, words: Mapping[int, str]) -> "Caption":
        """The same with other words at these positions."""
        return replace(self, words=tuple(words.get(i, word) for i, word in enumerate(self.words)))


@dataclass(frozen=True)
class Question:
    """A question of one kind (see QUESTIONS) with its answer, one of ANSWERS."""

    kind: str
    caption: Caption
    answer: str


@dataclass
class _Sentence:
    """A caption in the making."""

    words: list[str] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def say(self, text: str) -> tuple[int, int]:
        """Add words and give their place."""
        start = len(self.words)
        self.words += text.split()
        return start, len(self.words)

    def mention(self, scene: Scene, number: int, article: str = "a", *, size: bool = False) -> None:
        """Add a phrase about a thing, with its size or without."""
        thing = scene.things[number]
        start = len(self.words)
        self.say(article)
        named = {"size": thing.size} if size else {}
        attributes = {
            n: self.say(word)[0] for n, word in (named | {"colour": thing.colour, "shape": thing.shape}).items()
        }
        self.mentions.append(Mention(number, (start, len(self.words)), attributes))

    def claim(self, kind: str, text: str, *things: int) -> None:
        """Add words that claim something of things."""
        self.claims.append(Claim(kind, self.say(text), things))

    def done(self) -> Caption:
        return Caption(tuple(self.words), tuple(self.mentions), tuple(self.claims))


def describe(scene: Scene) -> Caption:
    """The caption of a scene: one to three objects of a normal scene, three or four of a hard one."""
    rng = scene.generator(2)
    sentence = _Sentence()
    most = len(scene.things)
    count = int(rng.integers(3, min(4, most) + 1)) if scene.hard else int(rng.integers(min(2, most), min(3, most) + 1))
    left = rng.permutation(most)[:count].tolist()
    size_share = 0.5 if scene.hard else 0.25
    joint = None
    while left:
        if sentence.words:
            joint = sentence.say(",")[0]
        _say_item(sentence, scene, rng, left, size_share)
    if joint is not None:
        sentence.words[joint] = "and"
    if rng.random() < 0.15:
        sentence.say("on a")
        sentence.claim("ground", scene.ground)
        sentence.say("ground")
    return sentence.done()


def _say_item(sentence: _Sentence, scene: Scene, rng: Generator, left: list[int], size_share: float) -> None:
    """One or two of the things that are left, with a relation or a place or without."""
    first = left.pop(0)
    sentence.mention(scene, first, size=rng.random() < size_share)
    chance = rng.random()
    relation = relation_of(scene.things[first], scene.things[left[0]]) if left else None
    place = place_of(scene.things[first])
    if relation is not None and chance < 0.5:
        second = left.pop(0)
        sentence.claim("relation", relation, first, second)
        sentence.mention(scene, second, size=rng.random() < size_share)
    elif place is not None and chance < 0.7:
        sentence.say("at the")
        sentence.claim("place", place, first)


def relation_of(first: Thing, second: Thing) -> str | None:
    """How the first thing stands to the second ('left of', 'above', ...), along the axis on which they lie apart more.

    None where they are too near to tell.
    """
    dx, dy = second.x - first.x, second.y - first.y
    if max(abs(dx), abs(dy)) < _CLEARLY_APART or abs(abs(dx) - abs(dy)) < _OFF_THE_MIDDLE:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def place_of(thing: Thing) -> str | None:
    """The quarter of the picture that a thing lies in ('top left', ...), or None near the middle lines."""
    if min(abs(thing.x - 0.5), abs(thing.y - 0.5)) < _OFF_THE_MIDDLE:
        return None
    return f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}"


def is_determined(scene: Scene, mention: Mention, attribute: str) -> bool:
    """Whether the picture and the rest of the phrase leave one value for an attribute ('colour', 'shape', 'size')."""
    thing = scene.things[mention.thing]
    named = [name for name in mention.attributes if name != attribute]
    fitting = [t for t in scene.things if all(getattr(t, n) == getattr(thing, n) for n in named)]
    return len({getattr(t, attribute) for t in fitting}) == 1


def contradict(scene: Scene, caption: Caption) -> dict[str, Caption]:
    """Captions that are false of the scene in one thing, by what was changed.

    'attribute': one colour or shape; 'order': the colours or shapes of two mentions are exchanged; 'relation' and
    'place': turned into their opposite. Only those that the caption allows are there.
    """
    rng = scene.generator(3)
    found = {kind: change(scene, caption, rng) for kind, change in _CHANGES.items()}
    return {kind: changed for kind, changed in found.items() if changed is not None}


def _change_attribute(scene: Scene, caption: Caption, rng: Generator) -> Caption | None:
    there = {thing.pair for thing in scene.things}
    mention = caption.mentions[rng.integers(len(caption.mentions))]
    thing = scene.things[mention.thing]
    name = ("colour", "shape")[rng.integers(2)]
    values = [v for v in ATTRIBUTES[name] if replace(thing, **{name: v}).pair not in there]  # type: ignore[arg-type]
    return caption.changed({mention.attributes[name]: values[rng.integers(len(values))]})


def _change_order(scene: Scene, caption: Caption, rng: Generator) -> Caption | None:
    there = {thing.pair for thing in scene.things}
    found = []
    for number, first in enumerate(caption.mentions):
        for second in caption.mentions[number + 1 :]:
            a, b = scene.things[first.thing], scene.things[second.thing]
            if not {(a.colour, b.shape), (b.colour, a.shape)} <= there:
                for name in ("colour", "shape"):
                    at, to = first.attributes[name], second.attributes[name]
                    found.append({at: caption.words[to], to: caption.words[at]})
    return caption.changed(found[rng.integers(len(found))]) if found else None


def _change_relation(scene: Scene, caption: Caption, rng: Generator) -> Caption | None:
    return _opposite(caption, rng, "relation", RELATIONS)


def _change_place(scene: Scene, caption: Caption, rng: Generator) -> Caption | None:
    return _opposite(caption, rng, "place", {p: PLACES[3 - i] for i, p in enumerate(PLACES)})


def _opposite(caption: Caption, rng: Generator, kind: str, opposites: Mapping[str, str]) -> Caption | None:
    claims = [claim for claim in caption.claims if claim.kind == kind]
    if not claims:
        return None
    words = claims[rng.integers(len(claims))].words
    return caption.changed(dict(enumerate(opposites[caption.phrase(words)].split(), start=words[0])))


_CHANGES: dict[str, Callable[[Scene, Caption, Generator], Caption | None]] = {
    "attribute": _change_attribute,
    "order": _change_order,
    "relation": _change_relation,
    "place": _change_place,
}


def ask(scene: Scene) -> list[Question]:
    """One question of each kind that can be asked about the scene with one right answer."""
    rng = scene.generator(4)
    return [question for ask_one in _ASKING for question in ask_one(scene, rng)]


def _ask_attribute(scene: Scene, rng: Generator, kind: str, known: str, text: str) -> Iterator[Question]:
    values = [getattr(thing, known) for thing in scene.things]
    alone = [i for i, value in enumerate(values) if values.count(value) == 1]
    if alone:
        number = alone[rng.integers(len(alone))]
        sentence = _Sentence()
        sentence.say(text)
        start = len(sentence.words)
        sentence.say("the")
        at = sentence.say(values[number])[0]
        if known == "colour":
            sentence.say("thing")
        sentence.mentions.append(Mention(number, (start, len(sentence.words)), {known: at}))
        sentence.say("?")
        yield Question(kind, sentence.done(), getattr(scene.things[number], kind))


def _ask_colour(scene: Scene, rng: Generator) -> Iterator[Question]:
    return _ask_attribute(scene, rng, "colour", "shape", "what colour is")


def _ask_shape(scene: Scene, rng: Generator) -> Iterator[Question]:
    return _ask_attribute(scene, rng, "shape", "colour", "what shape is")


def _ask_exists(scene: Scene, rng: Generator) -> Iterator[Question]:
    number = int(rng.integers(len(scene.things)))
    sentence = _Sentence()
    sentence.say("is there")
    sentence.mention(scene, number)
    sentence.say("?")
    caption, answer = sentence.done(), "yes"
    if rng.random() < 0.5:
        changed = _change_attribute(scene, caption, rng)
        assert changed is not None  # eight colours and six shapes leave one that isn't there
        caption, answer = changed, "no"
    yield Question("exists", caption, answer)


def _ask_count(scene: Scene, rng: Generator) -> Iterator[Question]:
    yield Question("count", Caption(("how", "many", "things", "are", "there", "?")), _COUNTS[len(scene.things) - 1])


def _ask_place(scene: Scene, rng: Generator) -> Iterator[Question]:
    number = int(rng.integers(len(scene.things)))
    place = place_of(scene.things[number])
    if place is not None:
        sentence = _Sentence()
        sentence.say("where is")
        sentence.mention(scene, number, "the")
        sentence.say("?")
        yield Question("place", sentence.done(), place)


def _ask_relation(scene: Scene, rng: Generator) -> Iterator[Question]:
    chosen = rng.permutation(len(scene.things))[:2].tolist()
    relation = relation_of(*(scene.things[i] for i in chosen)) if len(chosen) == 2 else None
    if relation is not None:
        true = rng.random() < 0.5
        sentence = _Sentence()
        sentence.say("is")
        sentence.mention(scene, chosen[0], "the")
        sentence.claim("relation", relation if true else RELATIONS[relation], *chosen)
        sentence.mention(scene, chosen[1], "the")
        sentence.say("?")
        yield Question("relation", sentence.done(), "yes" if true else "no")


_ASKING: tuple[Callable[[Scene, Generator], Iterator[Question]], ...] = (
    _ask_colour,
    _ask_shape,
    _ask_exists,
    _ask_count,
    _ask_place,
    _ask_relation,
)


def vocabulary() -> tuple[str, ...]:
    """Every word that captions, questions and answers are made of, in a fixed order."""
    said = "a the , and ? at on is there what colour shape where how many things thing are ground small large"
    lists: Sequence[Sequence[str]] = (COLOURS, SHAPES, GROUNDS, PLACES, tuple(RELATIONS), ANSWERS)  # type: ignore[assignment]
    words = [*said.split(), *(word for phrases in lists for phrase in phrases for word in phrase.split())]
    return tuple(dict.fromkeys(words))

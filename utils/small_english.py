"""A small English: sentences from a grammar of some hundred and thirty words, with everything about them known.

A model of half a million parameters learns no English in a minute, but it learns this, and since the grammar is known, so is
whether an answer is right. What a word must be is decided sometimes by what stands before it (two apples) and sometimes by what
stands after it (she ate a cake *yesterday*): this is where the families of models differ.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from utils.lab import LabError

HE, SHE = ("Tom", "Omar", "Ivo", "Emil", "Mateo", "Kemal"), ("Mira", "Lena", "Dora", "Hana", "Nadia", "Petra")
PEOPLE = {
    "farmer": "farmers", "baker": "bakers", "teacher": "teachers", "child": "children", "sailor": "sailors",
    "doctor": "doctors",
}  # fmt: skip
FOOD = {"apple": "apples", "cake": "cakes", "egg": "eggs", "pear": "pears"}
CLOTHES = {"coat": "coats", "hat": "hats", "shirt": "shirts", "scarf": "scarves"}
PAPER = {"letter": "letters", "book": "books", "poem": "poems", "map": "maps"}
THINGS = {"lamp": "lamps", "clock": "clocks", "chair": "chairs", "boat": "boats"}
MUSIC = {"drum": "drums", "flute": "flutes", "piano": "pianos", "fiddle": "fiddles"}
ADJECTIVES = ("old", "new", "small", "big", "red", "green")
ONE, SEVERAL = ("a", "one", "this"), ("two", "three", "these", "many")
YESTERDAY, TOMORROW, EVERY_DAY = "yesterday", "tomorrow", "every day"


class Verb(NamedTuple):
    """Forms of a verb, what it is done to (one to several), and where."""

    base: str
    third: str
    past: str
    objects: dict[str, str]
    places: tuple[str, str]


VERBS = (
    Verb("eat", "eats", "ate", FOOD, ("kitchen", "garden")),
    Verb("bake", "bakes", "baked", {"cake": "cakes", "loaf": "loaves"}, ("kitchen", "bakery")),
    Verb("wash", "washes", "washed", CLOTHES, ("river", "kitchen")),
    Verb("wear", "wears", "wore", CLOTHES, ("street", "garden")),
    Verb("read", "reads", "read", PAPER, ("library", "school")),
    Verb("write", "writes", "wrote", PAPER, ("office", "school")),
    Verb("mend", "mends", "mended", THINGS, ("workshop", "harbour")),
    Verb("paint", "paints", "painted", THINGS, ("workshop", "harbour")),
    Verb("play", "plays", "played", MUSIC, ("street", "hall")),
    Verb("sell", "sells", "sold", FOOD | CLOTHES | MUSIC, ("market", "street")),
)

# The other language: its words for these.
OWN = {
    "farmer": "kelo", "baker": "dorsa", "teacher": "luvet", "child": "pim", "sailor": "orun", "doctor": "batel",
    "apple": "miso", "cake": "tarn", "egg": "ubi", "pear": "lofa", "loaf": "grem", "coat": "zenit", "hat": "kup",
    "shirt": "fasel", "scarf": "wimo", "letter": "skert", "book": "tibon", "poem": "rulo", "map": "hadja", "lamp": "fulge",
    "clock": "tikel", "chair": "sedo", "boat": "navu", "drum": "bomba", "flute": "pifa", "piano": "klavo", "fiddle": "jigu",
    "eat": "nam", "bake": "forn", "wash": "wind", "wear": "vest", "read": "mir", "write": "graf", "mend": "repo",
    "paint": "klad", "play": "sund", "sell": "vend", "kitchen": "kuze", "garden": "hort", "bakery": "fornul", "river": "flum",
    "street": "gasso", "library": "tibonul", "school": "luvetul", "office": "graful", "workshop": "repul", "harbour": "navul",
    "hall": "sundul", "market": "vendul", "old": "varde", "new": "nofa", "small": "piki", "big": "grumo", "red": "rusol",
    "green": "selen", "a": "", "one": "ek", "this": "si", "two": "du", "three": "tris", "these": "si", "many": "multa",
    "his": "lo", "her": "lo", YESTERDAY: "heri", TOMORROW: "mane", EVERY_DAY: "omni",
}  # fmt: skip
TENSES = {YESTERDAY: "it", TOMORROW: "ar", EVERY_DAY: "el"}


@dataclass(frozen=True)
class Phrase:
    """A name, or a determiner, perhaps an adjective, and a noun with its plural."""

    noun: str
    plural: str = ""  # empty for a name
    determiner: str = ""
    adjective: str = ""
    several: bool = False

    def words(self) -> list[str]:
        """As it is said."""
        noun = self.plural if self.several else self.noun
        rest = [*filter(None, [self.adjective]), noun]
        first = "an" if self.determiner == "a" and rest[0][0] in "aeiou" else self.determiner
        return [*filter(None, [first]), *rest]


@dataclass(frozen=True)
class Sentence:
    """Who does what to what, when and perhaps where; `time_first` says at which end the time stands."""

    subject: Phrase
    verb: Verb
    thing: Phrase
    time: str
    place: str = ""
    time_first: bool = False
    verb_words: list[str] = field(default_factory=list)  # empty: the right form

    def parts(self) -> dict[str, list[str]]:
        """The words of each part, in order of speaking."""
        forms = {
            YESTERDAY: [self.verb.past],
            TOMORROW: ["will", self.verb.base],
            EVERY_DAY: [self.verb.base if self.subject.several else self.verb.third],
        }
        middle = {
            "subject": self.subject.words(),
            "verb": self.verb_words or forms[self.time],
            "thing": self.thing.words(),
            "place": ["in", "the", self.place] if self.place else [],
        }
        time = {"time": self.time.split()}
        return time | middle if self.time_first else middle | time

    def __str__(self) -> str:
        return " ".join(word for words in self.parts().values() for word in words) + "."


def sentence(draw: random.Random) -> Sentence:
    """A random sentence."""
    if draw.random() < 0.5:
        subject = Phrase(draw.choice(HE + SHE))
    else:
        subject = _phrase(draw, *draw.choice(list(PEOPLE.items())))
    verb = draw.choice(VERBS)
    thing = _phrase(draw, *draw.choice(list(verb.objects.items())))
    if not subject.plural and draw.random() < 0.5:
        thing = replace(thing, determiner="his" if subject.noun in HE else "her")
    place = draw.choice(verb.places) if draw.random() < 0.6 else ""
    return Sentence(subject, verb, thing, draw.choice(list(TENSES)), place, draw.random() < 0.5)


def _phrase(draw: random.Random, noun: str, plural: str) -> Phrase:
    several = draw.random() < 0.5
    adjective = draw.choice(ADJECTIVES) if draw.random() < 0.4 else ""
    return Phrase(noun, plural, draw.choice(SEVERAL if several else ONE), adjective, several)


def sentences(number: int, *, seed: int = 0, without: frozenset[str] = frozenset()) -> list[Sentence]:
    """`number` random sentences, none of which reads as one in `without`."""
    draw = random.Random(seed)
    found: list[Sentence] = []
    while len(found) < number:
        made = sentence(draw)
        if str(made) not in without:
            found.append(made)
    return found


def is_sentence(text: str) -> bool:
    """Whether the grammar makes `text`: agreement, time, possession, and what is done to what and where."""
    return text in _readings(text)


def _readings(text: str) -> Iterator[str]:
    """Sentences with the parts of `text`, as far as it has any, each as it would have to read."""
    words = text.removesuffix(".").split()
    first = next((time for time in TENSES if words[: len(time.split())] == time.split()), "")
    last = next((time for time in TENSES if words[-len(time.split()) :] == time.split()), "")
    if bool(first) == bool(last):
        return
    size = len((first or last).split())
    words = words[size:] if first else words[:-size]
    place = words[-1] if words[-3:-1] == ["in", "the"] else ""
    words = words[:-3] if place else words
    for verb in VERBS:
        forms = ([verb.past], ["will", verb.base], [verb.base], [verb.third])
        for start in range(1, 4):
            for form in forms:
                if words[start : start + len(form)] != form or (place and place not in verb.places):
                    continue
                subject = _read_phrase(words[:start], PEOPLE, "")
                thing = _read_phrase(words[start + len(form) :], verb.objects, words[0])
                if subject and thing:
                    yield str(Sentence(subject, verb, thing, first or last, place, bool(first)))


def _read_phrase(words: list[str], nouns: dict[str, str], owner: str) -> Phrase | None:
    if len(words) == 1 and nouns is PEOPLE and words[0] in HE + SHE:
        return Phrase(words[0])
    if not 2 <= len(words) <= 3 or (len(words) == 3 and words[1] not in ADJECTIVES):
        return None
    noun = next((n for n, plural in nouns.items() if words[-1] in (n, plural)), None)
    if noun is None:
        return None
    several = words[-1] == nouns[noun]
    allowed = (*(SEVERAL if several else ("an", *ONE)), *(["his"] if owner in HE else ["her"] if owner in SHE else []))
    determiner = "a" if words[0] == "an" else words[0]
    return (
        Phrase(noun, nouns[noun], determiner, words[1] if len(words) == 3 else "", several)
        if words[0] in allowed
        else None
    )


# --- what can be asked about a sentence --------------------------------------------------------------------------------


def translate(made: Sentence) -> str:
    """In a language made for this: time, verb, thing, doer, place.

    The verb's ending says when (-it, -ar, -el) and takes an -n for several doers; nouns add -n for several; an adjective follows its
    noun; there is no article. So nearly every word moves.
    """
    verb = OWN[made.verb.base] + TENSES[made.time] + ("n" if made.subject.several else "")
    parts = [OWN[made.time], verb, *_own_phrase(made.thing), *_own_phrase(made.subject), OWN.get(made.place, "")]
    return " ".join(filter(None, parts))


def _own_phrase(phrase: Phrase) -> list[str]:
    if not phrase.plural:
        return [phrase.noun]
    noun = OWN[phrase.noun] + ("n" if phrase.several else "")
    return [*filter(None, [OWN[phrase.determiner]]), noun, *filter(None, [OWN.get(phrase.adjective, "")])]


def shorten(made: Sentence) -> str:
    """Who did what to what, without adjectives, time and place."""
    bare = replace(made, subject=replace(made.subject, adjective=""), thing=replace(made.thing, adjective=""), place="")
    return " ".join(word for part in ("subject", "verb", "thing") for word in bare.parts()[part])


def question(made: Sentence, draw: random.Random) -> tuple[str, str]:
    """A question about the sentence, and its answer in the sentence's own words."""
    asked = {"who": "subject", "what": "thing", "when": "time"} | ({"where": "place"} if made.place else {})
    word = draw.choice(list(asked))
    return word + "?", " ".join(made.parts()[asked[word]])


def tenses(made: Sentence) -> tuple[str, str] | None:
    """The verb as it should be and in the other tense; nothing for tomorrow, and where both are written alike (read)."""
    present = made.verb.base if made.subject.several else made.verb.third
    if made.time == TOMORROW or made.verb.base == made.verb.past:
        return None
    return (made.verb.past, present) if made.time == YESTERDAY else (present, made.verb.past)


class Pair(NamedTuple):
    """Two texts that differ in one place (and in an article before it: an apple, a drum); the grammar makes the first only."""

    kind: str
    right: str
    wrong: str


PAIR_KINDS = {
    "number": "two apples / two apple",
    "whose": "Mira ... her hat / Mira ... his hat",
    "what fits": "eats an apple / eats a drum",
    "time, said before": "yesterday she ate / yesterday she eats",
    "time, said after": "she ate ... yesterday / she eats ... yesterday",
}


def minimal_pair(made: Sentence, kind: str, draw: random.Random) -> Pair | None:
    """`made` beside the same with one word changed, so that it breaks one rule; nothing where it has no place for that.

    Raises `LabError` for a kind that is not in `PAIR_KINDS`. After BLiMP (Warstadt et al. 2020, arXiv:1912.00582), with the grammar above in the place of English.
    """
    if kind not in PAIR_KINDS:
        raise LabError(f"There is no kind {kind!r} of minimal pair: choose one of {', '.join(PAIR_KINDS)}.")
    thing, verb = made.thing, made.verb
    if kind == "number" and thing.determiner not in ("his", "her"):
        wrong = replace(made, thing=replace(thing, several=not thing.several))
    elif kind == "whose" and thing.determiner in ("his", "her"):
        wrong = replace(made, thing=replace(thing, determiner="her" if thing.determiner == "his" else "his"))
    elif kind == "what fits":
        other = draw.choice([v for v in VERBS if not v.objects.keys() & verb.objects.keys()] or [None])
        if other is None:
            return None
        noun = draw.choice(list(other.objects))
        wrong = replace(made, thing=replace(thing, noun=noun, plural=other.objects[noun]))
    elif kind in ("time, said before", "time, said after"):
        forms = tenses(made)
        if forms is None or made.time_first != kind.endswith("before"):
            return None
        wrong = replace(made, verb_words=[forms[1]])
    else:
        return None
    return Pair(kind, str(made), str(wrong))

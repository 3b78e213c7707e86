"""The question types: each turns the digits of a canvas into a question with its answer.

A type says how complex it is (1: one cell, 2: two cells or one look at every cell, 3: arithmetic, or reading every
cell), so that an analysis can ask whether complex questions get more layers. Where two answers are possible, a fair
coin decides before the cell or the digit is chosen: then the question does not give the answer away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from playground.digits.scans import CELL_NAMES

NUMBER_NAMES = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
).split()
DIGIT_NAMES = NUMBER_NAMES[:10]
EMPTY = "empty"
YES_NO = ("yes", "no")

Digits = tuple[int | None, ...]
"""The digit in each of the four cells, None where a cell is empty; the empty tuple for a question without image."""
QuestionAndAnswer = tuple[str, str]

Drawn = tuple[tuple[str, ...], str] | None
"""What goes into the gaps of a phrasing, and the answer; None if such a canvas cannot be asked this."""

PHRASINGS = {
    "position": "Which digit is in the {} cell?|What does the {} cell show?|Name the digit in the {}.",
    "empty": "Is the {} cell empty?|Is there nothing in the {}?",
    "presence_at": "Is there {1} in the {0} cell?|Does the {0} cell show {1}?|Is the digit in the {0} {1}?",
    "parity": "Is the digit in the {} cell odd or even?|Odd or even: the digit in the {}?",
    "presence": "Is there {} in the image?|Does any cell show {}?|Can you see {}?",
    "count": "How many digits are there?|How many cells show a digit?|Count the digits in the image.",
    "row": "Read the {} row.|What does the {} row show?|Read the two cells in the {} row.",
    "compare": "Which is larger, the digit at {} or at {}?|Name the larger of the digits at {} and {}."
    "|Which digit is larger: {} or {}?",
    "sum_two": "What is the sum of the digits at {} and {}?|What is {} plus {}?|Add the digits at {} and {}.",
    "largest": "Which digit is the largest?|What is the largest digit in the image?|Name the largest digit.",
    "smallest": "Which digit is the smallest?|What is the smallest digit in the image?|Name the smallest digit.",
    "read_all": "Read out all digits row by row.|What does each cell show?|Read all the cells, row by row.",
    "spoken_sum": "What is {} plus {}?|What is the sum of {} and {}?|Add {} and {}.",
    "spoken_larger": "Which is larger, {} or {}?|Name the larger of {} and {}.",
    "spoken_order": "Which digit comes {} {}?",
}
"""Ways to ask each type of question, with gaps for what was chosen."""


@dataclass(frozen=True)
class QuestionType:
    """A kind of question."""

    name: str  # in records and reports
    complexity: int  # 1, 2 or 3
    draw: Callable[[Digits, Random], Drawn]  # chooses cells or digits, and answers
    weight: float = 1.0  # how often training asks it, relative to the other types
    needs_all_cells: bool = False  # whether the answer may depend on every cell
    balanced_answers: tuple[str, ...] = ()  # those that validation and test hold equally often

    def ask(self, digits: Digits, random: Random) -> QuestionAndAnswer | None:
        """Draw a question with its answer; None if such a canvas cannot be asked this."""
        drawn = self.draw(digits, random)
        if drawn is None:
            return None
        phrasings = PHRASINGS[self.name].split("|")
        phrasing = random.choice(phrasings) if len(phrasings) > 1 else phrasings[0]
        return phrasing.format(*drawn[0]), drawn[1]


def with_article(digit: int) -> str:
    """Give the name of a digit with its article: "a seven", "an eight"."""
    return f"{'an' if digit == 8 else 'a'} {DIGIT_NAMES[digit]}"


def _filled(digits: Digits) -> list[int]:
    return [cell for cell, digit in enumerate(digits) if digit is not None]


def _empty(digits: Digits) -> list[int]:
    return [cell for cell, digit in enumerate(digits) if digit is None]


def _toss(random: Random) -> bool:
    return random.random() < 0.5


def _name(digit: int | None) -> str:
    return EMPTY if digit is None else DIGIT_NAMES[digit]


def _position(digits: Digits, random: Random) -> Drawn:
    empty = _empty(digits)
    # One answer in eleven would be "empty" if all were equally likely; a full canvas cannot give it.
    cell = random.choice(empty) if empty and random.random() < 1 / 8 else random.choice(_filled(digits))
    return (CELL_NAMES[cell],), _name(digits[cell])


def _is_empty(digits: Digits, random: Random) -> Drawn:
    if not _empty(digits):
        return None
    is_empty = _toss(random)
    cell = random.choice(_empty(digits) if is_empty else _filled(digits))
    return (CELL_NAMES[cell],), YES_NO[not is_empty]


def _presence_at(digits: Digits, random: Random) -> Drawn:
    is_there = _toss(random)
    cell = random.choice(_filled(digits))
    digit = digits[cell]
    if not is_there:
        # Half of the wrong digits stand in another cell, so that the place matters as well as the digit.
        elsewhere = [other for other in digits if other is not None and other != digit]
        absent = [other for other in range(10) if other != digit]
        digit = random.choice(elsewhere if elsewhere and _toss(random) else absent)
    return (CELL_NAMES[cell], with_article(digit)), YES_NO[not is_there]


def _parity(digits: Digits, random: Random) -> Drawn:
    is_odd = _toss(random)
    cells = [cell for cell in _filled(digits) if digits[cell] % 2 == is_odd] or _filled(digits)
    cell = random.choice(cells)
    return (CELL_NAMES[cell],), "odd" if digits[cell] % 2 else "even"


def _presence(digits: Digits, random: Random) -> Drawn:
    is_there = _toss(random)
    present = sorted({digit for digit in digits if digit is not None})
    digit = random.choice(present if is_there else [other for other in range(10) if other not in present])
    return (with_article(digit),), YES_NO[not is_there]


def _row(digits: Digits, random: Random) -> Drawn:
    row = random.choice(sorted({cell // 2 for cell in _filled(digits)}))
    return (("top", "bottom")[row],), ", ".join(map(_name, digits[2 * row : 2 * row + 2]))


def _two_cells(answer: Callable[[int, int], str | None]) -> Callable[[Digits, Random], Drawn]:
    """Two filled cells, and the answer to their digits; None where the digits cannot be asked about."""

    def draw(digits: Digits, random: Random) -> Drawn:
        filled = _filled(digits)
        if len(filled) < 2:
            return None
        cells = random.sample(filled, 2)
        answered = answer(*(digits[cell] for cell in cells))
        return answered and (tuple(CELL_NAMES[cell] for cell in cells), answered)

    return draw


def _extreme(choose: Callable[[list[int]], int]) -> Callable[[Digits, Random], Drawn]:
    def draw(digits: Digits, random: Random) -> Drawn:
        shown = [digit for digit in digits if digit is not None]
        return None if len(shown) < 2 else ((), DIGIT_NAMES[choose(shown)])

    return draw


def _read_all(digits: Digits, random: Random) -> Drawn:
    parts = [
        f"in the {name} cell there is {'nothing' if digit is None else with_article(digit)}"
        for name, digit in zip(CELL_NAMES, digits, strict=True)
    ]
    sentence = f"{', '.join(parts[:-1])}, and {parts[-1]}."
    return (), sentence[0].upper() + sentence[1:]


def _spoken_sum(_: Digits, random: Random) -> Drawn:
    first, second = random.randrange(10), random.randrange(10)
    return (DIGIT_NAMES[first], DIGIT_NAMES[second]), NUMBER_NAMES[first + second]


def _spoken_larger(_: Digits, random: Random) -> Drawn:
    first, second = random.sample(range(10), 2)
    return (DIGIT_NAMES[first], DIGIT_NAMES[second]), DIGIT_NAMES[max(first, second)]


def _spoken_order(_: Digits, random: Random) -> Drawn:
    pair = random.randrange(9)
    first, second = DIGIT_NAMES[pair : pair + 2]
    return (("after", first), second) if _toss(random) else (("before", second), first)


def _count(digits: Digits, random: Random) -> Drawn:
    return (), NUMBER_NAMES[len(_filled(digits))]


_compare = _two_cells(lambda first, second: None if first == second else DIGIT_NAMES[max(first, second)])
_sum_two = _two_cells(lambda first, second: NUMBER_NAMES[first + second])

IMAGE_QUESTIONS = (
    QuestionType("position", 1, _position, balanced_answers=(*DIGIT_NAMES, EMPTY)),
    QuestionType("empty", 1, _is_empty, 0.6, balanced_answers=YES_NO),
    QuestionType("presence_at", 1, _presence_at, balanced_answers=YES_NO),
    QuestionType("parity", 1, _parity, 0.8, balanced_answers=("odd", "even")),
    QuestionType("presence", 2, _presence, needs_all_cells=True, balanced_answers=YES_NO),
    QuestionType("count", 2, _count, 0.8, needs_all_cells=True, balanced_answers=tuple(NUMBER_NAMES[1:5])),
    QuestionType("row", 2, _row),
    QuestionType("compare", 2, _compare, 1.5),
    QuestionType("sum_two", 3, _sum_two, 2.0),
    QuestionType("largest", 3, _extreme(max), 1.5, needs_all_cells=True),
    QuestionType("smallest", 3, _extreme(min), 1.5, needs_all_cells=True),
    QuestionType("read_all", 3, _read_all, 1.5, needs_all_cells=True),
)
"""The types that need the image."""

TEXT_QUESTIONS = (
    QuestionType("spoken_sum", 1, _spoken_sum),
    QuestionType("spoken_larger", 1, _spoken_larger),
    QuestionType("spoken_order", 1, _spoken_order),
)
"""The types without image. They ask from a small closed set, so the splits share questions: they test that records
without image work, not generalisation."""

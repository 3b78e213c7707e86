"""The question types: each turns the digits of a canvas into a question with its answer.

A type says how complex it is (1: one cell, 2: two cells or one look at every cell, 3: arithmetic, or reading every
cell), so that an analysis can ask whether complex questions get more layers. Where two answers are possible, a fair
coin decides before the cell or the digit is chosen: then the question does not give the answer away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from playground.digits.canvas import CELL_NAMES

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


@dataclass(frozen=True)
class QuestionType:
    """A kind of question.

    Attributes:
        name: Its name in records and reports.
        complexity: 1, 2 or 3.
        ask: Function of the digits and a source of randomness; None if such a canvas cannot be asked this.
        weight: How often training asks it, relative to the other types.
        needs_all_cells: Whether the answer may depend on every cell.
        balanced_answers: Answers that the validation and test splits hold equally often; empty for no such promise.
    """

    name: str
    complexity: int
    ask: Callable[[Digits, Random], QuestionAndAnswer | None]
    weight: float = 1.0
    needs_all_cells: bool = False
    balanced_answers: tuple[str, ...] = ()


def with_article(digit: int) -> str:
    """Give the name of a digit with its article: "a seven", "an eight"."""
    return f"{'an' if digit == 8 else 'a'} {DIGIT_NAMES[digit]}"


def _filled(digits: Digits) -> list[int]:
    return [cell for cell, digit in enumerate(digits) if digit is not None]


def _empty(digits: Digits) -> list[int]:
    return [cell for cell, digit in enumerate(digits) if digit is None]


def _toss(random: Random) -> bool:
    return random.random() < 0.5


def _answer(is_true: bool) -> str:
    return YES_NO[0] if is_true else YES_NO[1]


def _ask_position(digits: Digits, random: Random) -> QuestionAndAnswer:
    empty = _empty(digits)
    # One answer in eleven would be "empty" if all were equally likely; a full canvas cannot give it.
    cell = random.choice(empty) if empty and random.random() < 1 / 8 else random.choice(_filled(digits))
    question = random.choice(
        (
            "Which digit is in the {} cell?",
            "What does the {} cell show?",
            "Name the digit in the {}.",
        )
    )
    return question.format(CELL_NAMES[cell]), EMPTY if digits[cell] is None else DIGIT_NAMES[digits[cell]]


def _ask_empty(digits: Digits, random: Random) -> QuestionAndAnswer | None:
    if not _empty(digits):
        return None
    is_empty = _toss(random)
    cell = random.choice(_empty(digits) if is_empty else _filled(digits))
    question = random.choice(("Is the {} cell empty?", "Is there nothing in the {}?"))
    return question.format(CELL_NAMES[cell]), _answer(is_empty)


def _ask_presence_at(digits: Digits, random: Random) -> QuestionAndAnswer:
    is_there = _toss(random)
    cell = random.choice(_filled(digits))
    digit = digits[cell]
    if not is_there:
        # Half of the wrong digits stand in another cell, so that the place matters as well as the digit.
        elsewhere = [other for other in digits if other is not None and other != digit]
        absent = [other for other in range(10) if other != digit]
        digit = random.choice(elsewhere if elsewhere and _toss(random) else absent)
    question = random.choice(
        (
            "Is there {digit} in the {cell} cell?",
            "Does the {cell} cell show {digit}?",
            "Is the digit in the {cell} {digit}?",
        )
    )
    return question.format(digit=with_article(digit), cell=CELL_NAMES[cell]), _answer(is_there)


def _ask_parity(digits: Digits, random: Random) -> QuestionAndAnswer:
    is_odd = _toss(random)
    cells = [cell for cell in _filled(digits) if digits[cell] % 2 == is_odd] or _filled(digits)
    cell = random.choice(cells)
    question = random.choice(("Is the digit in the {} cell odd or even?", "Odd or even: the digit in the {}?"))
    return question.format(CELL_NAMES[cell]), "odd" if digits[cell] % 2 else "even"


def _ask_presence(digits: Digits, random: Random) -> QuestionAndAnswer:
    is_there = _toss(random)
    present = sorted({digit for digit in digits if digit is not None})
    digit = random.choice(present if is_there else [other for other in range(10) if other not in present])
    question = random.choice(("Is there {} in the image?", "Does any cell show {}?", "Can you see {}?"))
    return question.format(with_article(digit)), _answer(is_there)


def _ask_count(digits: Digits, random: Random) -> QuestionAndAnswer:
    question = random.choice(
        ("How many digits are there?", "How many cells show a digit?", "Count the digits in the image.")
    )
    return question, NUMBER_NAMES[len(_filled(digits))]


def _ask_row(digits: Digits, random: Random) -> QuestionAndAnswer:
    row = random.choice(sorted({cell // 2 for cell in _filled(digits)}))
    names = [EMPTY if digit is None else DIGIT_NAMES[digit] for digit in digits[2 * row : 2 * row + 2]]
    question = random.choice(("Read the {} row.", "What does the {} row show?", "Read the two cells in the {} row."))
    return question.format(("top", "bottom")[row]), ", ".join(names)


def _draw_two_cells(digits: Digits, random: Random) -> tuple[int, int] | None:
    filled = _filled(digits)
    return tuple(random.sample(filled, 2)) if len(filled) >= 2 else None


def _ask_compare(digits: Digits, random: Random) -> QuestionAndAnswer | None:
    cells = _draw_two_cells(digits, random)
    if cells is None or digits[cells[0]] == digits[cells[1]]:
        return None
    question = random.choice(
        (
            "Which is larger, the digit at {} or at {}?",
            "Name the larger of the digits at {} and {}.",
            "Which digit is larger: {} or {}?",
        )
    )
    return question.format(*(CELL_NAMES[cell] for cell in cells)), DIGIT_NAMES[max(digits[cell] for cell in cells)]


def _ask_sum_two(digits: Digits, random: Random) -> QuestionAndAnswer | None:
    cells = _draw_two_cells(digits, random)
    if cells is None:
        return None
    question = random.choice(
        (
            "What is the sum of the digits at {} and {}?",
            "What is {} plus {}?",
            "Add the digits at {} and {}.",
        )
    )
    return question.format(*(CELL_NAMES[cell] for cell in cells)), NUMBER_NAMES[sum(digits[cell] for cell in cells)]


def _ask_extreme(word: str, choose: Callable[[list[int]], int]) -> Callable[[Digits, Random], QuestionAndAnswer | None]:
    phrasings = (f"Which digit is the {word}?", f"What is the {word} digit in the image?", f"Name the {word} digit.")

    def ask(digits: Digits, random: Random) -> QuestionAndAnswer | None:
        shown = [digit for digit in digits if digit is not None]
        if len(shown) < 2:
            return None
        return random.choice(phrasings), DIGIT_NAMES[choose(shown)]

    return ask


def _ask_read_all(digits: Digits, random: Random) -> QuestionAndAnswer:
    parts = [
        f"in the {name} cell there is {'nothing' if digit is None else with_article(digit)}"
        for name, digit in zip(CELL_NAMES, digits, strict=True)
    ]
    sentence = f"{', '.join(parts[:-1])}, and {parts[-1]}."
    question = random.choice(
        ("Read out all digits row by row.", "What does each cell show?", "Read all the cells, row by row.")
    )
    return question, sentence[0].upper() + sentence[1:]


def _ask_spoken_sum(_: Digits, random: Random) -> QuestionAndAnswer:
    first, second = random.randrange(10), random.randrange(10)
    question = random.choice(("What is {} plus {}?", "What is the sum of {} and {}?", "Add {} and {}."))
    return question.format(DIGIT_NAMES[first], DIGIT_NAMES[second]), NUMBER_NAMES[first + second]


def _ask_spoken_larger(_: Digits, random: Random) -> QuestionAndAnswer:
    first, second = random.sample(range(10), 2)
    question = random.choice(("Which is larger, {} or {}?", "Name the larger of {} and {}."))
    return question.format(DIGIT_NAMES[first], DIGIT_NAMES[second]), DIGIT_NAMES[max(first, second)]


def _ask_spoken_order(_: Digits, random: Random) -> QuestionAndAnswer:
    digit = random.randrange(9)
    if _toss(random):
        return f"Which digit comes after {DIGIT_NAMES[digit]}?", DIGIT_NAMES[digit + 1]
    return f"Which digit comes before {DIGIT_NAMES[digit + 1]}?", DIGIT_NAMES[digit]


IMAGE_QUESTIONS = (
    QuestionType("position", 1, _ask_position, 1.0, balanced_answers=(*DIGIT_NAMES, EMPTY)),
    QuestionType("empty", 1, _ask_empty, 0.6, balanced_answers=YES_NO),
    QuestionType("presence_at", 1, _ask_presence_at, 1.0, balanced_answers=YES_NO),
    QuestionType("parity", 1, _ask_parity, 0.8, balanced_answers=("odd", "even")),
    QuestionType("presence", 2, _ask_presence, 1.0, needs_all_cells=True, balanced_answers=YES_NO),
    QuestionType("count", 2, _ask_count, 0.8, needs_all_cells=True, balanced_answers=tuple(NUMBER_NAMES[1:5])),
    QuestionType("row", 2, _ask_row, 1.0),
    QuestionType("compare", 2, _ask_compare, 1.5),
    QuestionType("sum_two", 3, _ask_sum_two, 2.0),
    QuestionType("largest", 3, _ask_extreme("largest", max), 1.5, needs_all_cells=True),
    QuestionType("smallest", 3, _ask_extreme("smallest", min), 1.5, needs_all_cells=True),
    QuestionType("read_all", 3, _ask_read_all, 1.5, needs_all_cells=True),
)
"""The types that need the image."""

TEXT_QUESTIONS = (
    QuestionType("spoken_sum", 1, _ask_spoken_sum),
    QuestionType("spoken_larger", 1, _ask_spoken_larger),
    QuestionType("spoken_order", 1, _ask_spoken_order),
)
"""The types without image. They ask from a small closed set, so the splits share questions: they test that records
without image work, not generalisation."""

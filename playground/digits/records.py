"""Records of a split in the LLaVA format for supervised finetuning.

A record is ``{"id", "image"?, "conversations", "type", "complexity", "digits"?, "scans"?}``. The last four are for
analysis; a model never sees them.
"""

from __future__ import annotations

from random import Random

from playground.digits.questions import IMAGE_QUESTIONS, TEXT_QUESTIONS, QuestionAndAnswer, QuestionType
from playground.digits.scans import Canvas, draw_canvas

Record = dict[str, object]


def make_record(
    name: str, types: list[QuestionType], turns: list[QuestionAndAnswer], canvas: Canvas | None = None
) -> Record:
    """Put turns into one record.

    Args:
        name: The record's id; its image is ``<folder of the canvas>/<name>.png``.
        types: The type of each turn.
        turns: Question and answer of each turn, at least one.
        canvas: What the image shows; None for a record without image.
    """
    conversations = [
        {"from": sender, "value": value} for turn in turns for sender, value in zip(("human", "gpt"), turn, strict=True)
    ]
    kind = "+".join(question_type.name for question_type in types)
    known = {"type": kind, "complexity": max(question_type.complexity for question_type in types)}
    if canvas is None:
        return {"id": name, "conversations": conversations, **known}
    conversations[0]["value"] = f"<image>\n{conversations[0]['value']}"
    image, shown = f"{canvas.folder}/{name}.png", {"digits": list(canvas.digits), "scans": list(canvas.scans)}
    return {"id": name, "image": image, "conversations": conversations, **known, **shown}


def _draw_conversation(canvas: Canvas, random: Random) -> tuple[list[QuestionType], list[QuestionAndAnswer]]:
    """Draw one to four turns of different types, heavier types more often."""
    (num_turns,) = random.choices((1, 2, 3, 4), (0.3, 0.3, 0.2, 0.2))
    remaining, types, turns = list(IMAGE_QUESTIONS), [], []
    while len(turns) < num_turns:
        (question_type,) = random.choices(remaining, [candidate.weight for candidate in remaining])
        remaining.remove(question_type)
        turn = question_type.ask(canvas.digits, random)
        if turn is not None:
            types.append(question_type)
            turns.append(turn)
    return types, turns


def _draw_single_turn(
    question_type: QuestionType, wanted: str | None, scans_by_digit: dict[int, list[int]], random: Random
) -> tuple[Canvas, QuestionAndAnswer]:
    """Draw canvases until one can be asked this question and, if an answer is wanted, has it."""
    while True:
        canvas = draw_canvas(scans_by_digit, random)
        turn = question_type.ask(canvas.digits, random)
        if turn is not None and wanted in (None, turn[1]):
            return canvas, turn


def _with_text_records(split: str, records: list[Record], count: int, random: Random) -> list[Record]:
    """The records and some without image, in random order."""
    for number in range(count):
        question_type = TEXT_QUESTIONS[number % len(TEXT_QUESTIONS)]
        records.append(make_record(f"{split}-text-{number:06d}", [question_type], [question_type.ask((), random)]))
    random.shuffle(records)
    return records


def draw_training_records(
    scans_by_digit: dict[int, list[int]], num_canvases: int, num_text: int, random: Random
) -> tuple[list[Canvas], list[Record]]:
    """Draw the training split: conversations of one to four turns, in random order with the records without image.

    Returns:
        The canvases by number, and the records.
    """
    canvases, records = [], []
    for number in range(num_canvases):
        canvas = draw_canvas(scans_by_digit, random)
        canvases.append(canvas)
        records.append(make_record(f"train-{number:06d}", *_draw_conversation(canvas, random), canvas))
    return canvases, _with_text_records("train", records, num_text, random)


def draw_evaluation_records(
    split: str, scans_by_digit: dict[int, list[int]], num_canvases: int, num_text: int, random: Random
) -> tuple[list[Canvas], list[Record]]:
    """Draw a split for evaluation: single turns, the same number of each type, answers balanced where a type says so.

    Returns:
        The canvases by number, and the records in random order.
    """
    canvases, records = [], []
    for number in range(num_canvases):
        of_type, type_number = divmod(number, len(IMAGE_QUESTIONS))
        question_type = IMAGE_QUESTIONS[type_number]
        answers = question_type.balanced_answers
        wanted = answers[of_type % len(answers)] if answers else None
        canvas, turn = _draw_single_turn(question_type, wanted, scans_by_digit, random)
        canvases.append(canvas)
        records.append(make_record(f"{split}-{number:06d}", [question_type], [turn], canvas))
    return canvases, _with_text_records(split, records, num_text, random)

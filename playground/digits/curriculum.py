"""Courses for the base model: training records cut down to the turns of a few types.

Tying words of place to image tokens, and matching a named digit with a shown one, is what a small model learns last
when every kind of question comes at once; alone each is learned in minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

COURSES = {
    "place": ("position", "row"),
    "match": ("presence_at", "presence", "sum_two"),
}
"""Courses by name: the types of question they keep."""


def select_turns(record: dict, types: tuple[str, ...]) -> dict | None:
    """Keep the turns of some types of one training record; None if there is none."""
    turns = zip(record["type"].split("+"), record["conversations"][::2], record["conversations"][1::2], strict=True)
    kept = [(question["value"], answer["value"]) for kind, question, answer in turns if kind in types]
    if not kept or "image" not in record:
        return None
    messages = []
    for number, (question, answer) in enumerate(kept):
        text = question.removeprefix("<image>\n")
        messages.append({"from": "human", "value": f"<image>\n{text}" if number == 0 else text})
        messages.append({"from": "gpt", "value": answer})
    return {"id": record["id"], "image": record["image"], "conversations": messages}


def main() -> None:
    """Command line: ``python -m playground.digits.curriculum --course place --input JSON --output JSON``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--course", choices=COURSES, required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    records = [select_turns(record, COURSES[arguments.course]) for record in json.loads(arguments.input.read_text())]
    chosen = [record for record in records if record is not None]
    arguments.output.write_text(json.dumps(chosen))
    print(f"{len(chosen)} of {len(records)} records belong to course {arguments.course}, written to {arguments.output}")


if __name__ == "__main__":
    main()

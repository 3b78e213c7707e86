"""Generate the digits dataset: images, LLaVA records for supervised finetuning, and a manifest of hashes.

    python -m playground.digits.generate --output playground/data/digits --train 12000

The same arguments give the same JSON bytes and the same pixels, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from playground.digits.questions import IMAGE_QUESTIONS, TEXT_QUESTIONS, QuestionAndAnswer, QuestionType
from playground.digits.scans import FOLDERS, SPLITS, Canvas, draw_canvas, hash_split, render_canvas, split_scans

FORMAT_VERSION = 1

Record = dict[str, object]
"""A record of the LLaVA format; type, complexity, digits and scans are for analysis, a model never sees them."""


@dataclass(frozen=True)
class Settings:
    """All that decides the content of a dataset: the seed of everything, and the canvases of each split.

    A ninth as many records without image come on top (one record in ten). Test canvases are a multiple of the image
    question types; one type's worth of records without image comes on top.
    """

    seed: int = 0
    train: int = 12_000
    validation: int = 1_000
    test: int = 2_400

    def __post_init__(self) -> None:
        for split in SPLITS:
            if getattr(self, split) < 1:
                raise ValueError(
                    f"{split} is {getattr(self, split)}; a split holds at least 1 canvas; give a larger number."
                )
        if self.test % len(IMAGE_QUESTIONS):
            raise ValueError(
                f"test is {self.test}; the {len(IMAGE_QUESTIONS)} image question types must share it equally; "
                f"give a multiple of {len(IMAGE_QUESTIONS)}."
            )


def generate(output: Path, settings: Settings, workers: int = 1) -> bool:
    """Write the dataset, or find it already written; an interrupted run leaves no half dataset.

    Args:
        output: Folder of the dataset; new or empty, or a dataset of the same settings.
        settings: What to generate.
        workers: Processes that render images; no influence on the result.

    Returns:
        True if written, False if a dataset of the same settings was there.

    Raises:
        FileExistsError: If ``output`` holds anything else, or such a dataset that was changed after it was written.
    """
    if output.exists() and any(output.iterdir()):
        _check_reusable(output, settings)
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        _write_dataset(temporary, settings, workers)
        temporary.chmod(0o755)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _check_reusable(output: Path, settings: Settings) -> None:
    path = output / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    found = {"settings": manifest.get("settings"), "format_version": manifest.get("format_version")}
    if found != {"settings": asdict(settings), "format_version": FORMAT_VERSION}:
        raise FileExistsError(
            f"{output} holds {found['settings'] or 'other files'}, not {asdict(settings)}; "
            "only the same dataset can be reused; give another --output or remove the folder."
        )
    for split, summary in manifest["splits"].items():
        path = output / f"digits_{split}.json"
        is_same = path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == summary["json_sha256"]
        num_images = sum(1 for _ in output.glob(f"images/*/{split}-*.png"))
        if not is_same or num_images != summary["images"]:
            raise FileExistsError(
                f"{path} is {'as written' if is_same else 'missing or changed'}, with {num_images} images; "
                f"the manifest promises it as written, with {summary['images']} images; "
                f"remove {output} and generate it again."
            )


def _write_dataset(folder: Path, settings: Settings, workers: int) -> None:
    for name in FOLDERS:
        (folder / "images" / name).mkdir(parents=True)
    split_of_scans = split_scans(settings.seed)
    summaries = {}
    for split in SPLITS:
        random, num_canvases = Random(f"{settings.seed}/{split}/records"), getattr(settings, split)
        num_text = num_canvases // (len(IMAGE_QUESTIONS) if split == "test" else 9)
        if split == "train":
            canvases, records = draw_training_records(split_of_scans[split], num_canvases, num_text, random)
        else:
            scans = split_of_scans[split]
            canvases, records = draw_evaluation_records(split, scans, num_canvases, num_text, random)
        content = ("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n").encode()
        (folder / f"digits_{split}.json").write_bytes(content)
        pixels, render = hashlib.sha256(), functools.partial(_render, folder / "images", split, settings.seed)
        with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
            numbered = enumerate(canvases)
            for rendered in pool.map(render, numbered, chunksize=1000) if pool else map(render, numbered):
                pixels.update(rendered)
        turns = Counter(name for record in records for name in record["type"].split("+"))
        summaries[split] = {
            "records": len(records),
            "images": sum("image" in record for record in records),
            "turns": turns.total(),
            "turns_by_type": dict(sorted(turns.items())),
            "json_sha256": hashlib.sha256(content).hexdigest(),
            "pixels_sha256": pixels.hexdigest(),
        }
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": asdict(settings),
        "scan_split_sha256": hash_split(split_of_scans),
        "splits": summaries,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _render(images: Path, split: str, seed: int, numbered: tuple[int, Canvas]) -> bytes:
    """Render a canvas into a PNG file and give its pixels, (32, 32, 3)."""
    number, canvas = numbered
    # Seeded by its number, a canvas does not depend on the canvases rendered before it, nor by whom.
    image = render_canvas(canvas, Random(f"{seed}/{split}/{number}") if split == "train" else None)
    image.save(images / canvas.folder / f"{split}-{number:06d}.png", compress_level=1)
    return image.tobytes()


def make_record(
    name: str, types: list[QuestionType], turns: list[QuestionAndAnswer], canvas: Canvas | None = None
) -> Record:
    """Put turns, at least one, and their types into one record.

    ``name`` is its id; its image is ``<folder of the canvas>/<name>.png``. Without a canvas it has none.
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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m playground.digits.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=getattr(Settings, split), help=f"{split} canvases")
    parser.add_argument("--workers", type=int, default=1, help="processes that render images")
    options = parser.parse_args(arguments)
    try:
        settings = Settings(options.seed, options.train, options.validation, options.test)
        was_written = generate(options.output, settings, options.workers)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    manifest = json.loads((options.output / "manifest.json").read_text())
    print(f"{options.output}: {'written' if was_written else 'exists with the same settings, reused'}")
    for split, summary in manifest["splits"].items():
        print(f"  {split}: {summary['records']} records, {summary['images']} images, {summary['turns']} turns")


if __name__ == "__main__":
    main()

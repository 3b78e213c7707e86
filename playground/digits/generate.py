"""Generate the digits dataset: images, LLaVA records, and a manifest of hashes.

    python -m playground.digits.generate --output playground/data/digits --train 12000

The same arguments give the same JSON bytes and the same pixels, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from playground.digits.questions import IMAGE_QUESTIONS
from playground.digits.records import draw_evaluation_records, draw_training_records
from playground.digits.scans import FOLDERS, SPLITS, Canvas, hash_split, render_canvas, split_scans

FORMAT_VERSION = 1
_CHUNK = 1000


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
        pixels = hashlib.sha256()
        for chunk in _render_all(folder / "images", split, canvases, settings.seed, workers):
            pixels.update(chunk)
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


def _render_chunk(images: Path, split: str, first: int, canvases: list[Canvas], seed: int) -> bytes:
    """Render consecutive canvases into PNG files and give their pixels, each (32, 32, 3), one after the other."""
    pixels = []
    for number, canvas in enumerate(canvases, start=first):
        # Seeded by its number, a canvas does not depend on the canvases rendered before it, nor by whom.
        random = Random(f"{seed}/{split}/{number}") if split == "train" else None
        image = render_canvas(canvas, random)
        image.save(images / canvas.folder / f"{split}-{number:06d}.png", compress_level=1)
        pixels.append(image.tobytes())
    return b"".join(pixels)


def _render_all(images: Path, split: str, canvases: list[Canvas], seed: int, workers: int) -> Iterator[bytes]:
    firsts = range(0, len(canvases), _CHUNK)
    arguments = [(images, split, first, canvases[first : first + _CHUNK], seed) for first in firsts]
    if workers <= 1:
        yield from (_render_chunk(*each) for each in arguments)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_render_chunk, *zip(*arguments, strict=True))


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

"""Routing log: one JSON line per request of an evaluation, with the layers it ran and the time it took."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from llava.files import atomic_write


@dataclass(frozen=True)
class RequestRecord:
    """Outcome of one request.

    A batch is timed as a whole. A request's ``prefill_ms`` is its share of the batch's prefill by prompt tokens (images
    expanded, padding not counted), so the shares add up to the batch. ``decode_ms_per_token`` is the batch's time after
    its first tokens, divided by all tokens that its requests got after their first: the cost of a useful token.

    Attributes:
        task: Name of the benchmark.
        doc_id: Number of the document in its split.
        type: The document's own ``type``; None where it has none.
        complexity: The document's own ``complexity``; None where it has none.
        num_images: Images of the prompt.
        kept_layers: 1 where the request ran the layer, 0 where it skipped it, L; all ones for a dense model.
        prefill_ms: Milliseconds from the prompt to the first token.
        decode_ms_per_token: Milliseconds per token after the first; None if no request of the batch got a second one.
        batch_size: Requests in its batch.
        num_prompt_tokens: Tokens of the prompt with images expanded.
        num_new_tokens: Tokens generated.
        checkpoint: Folder or hub id of the model.
        target_skip_ratio: Mean skip rate asked of the router; None for a dense run.
    """

    task: str
    doc_id: int
    type: str | None
    complexity: int | None
    num_images: int
    kept_layers: list[int]
    prefill_ms: float
    decode_ms_per_token: float | None
    batch_size: int
    num_prompt_tokens: int
    num_new_tokens: int
    checkpoint: str
    target_skip_ratio: float | None

    @property
    def skip_rate(self) -> float:
        """Share of layers that the request skipped, in [0, 1]."""
        return 1 - sum(self.kept_layers) / len(self.kept_layers)


def rank_path(path: Path, rank: int, world_size: int) -> Path:
    """Where a process writes: the path itself; one of several writes ``<name>.rank<r>-of-<n><suffix>`` beside it."""
    return path if world_size == 1 else path.with_name(f"{path.stem}.rank{rank}-of-{world_size}{path.suffix}")


def remove_routing_log(path: Path) -> None:
    """Remove an earlier log with the files of all its processes, so that a run that fails leaves none behind."""
    path.unlink(missing_ok=True)
    for file in _rank_files(path):
        file.unlink(missing_ok=True)


def write_routing_log(path: Path, records: Iterable[RequestRecord], rank: int = 0, world_size: int = 1) -> None:
    """Write a process's records; the file appears whole or not at all."""
    with atomic_write(rank_path(path, rank, world_size)) as unfinished:
        unfinished.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))


def read_routing_log(path: Path) -> list[RequestRecord]:
    """Read the records of all processes.

    Args:
        path: Path as it was given to the run, without a process's number.

    Raises:
        FileNotFoundError: If there is no log, or a process's file is missing.
        ValueError: If files of more than one run lie there, or a line has other keys.
    """
    files = _rank_files(path)
    if not files and not path.exists():
        raise FileNotFoundError(f"There is no routing log {path}; the evaluation did not finish, run it again.")
    if files and (match := _RANK.search(files[0].name)):
        world_size = int(match[2])
        expected = [rank_path(path, rank, world_size) for rank in range(world_size)]
        missing = [file.name for file in expected if file not in files]
        if missing:
            raise FileNotFoundError(f"The routing log lacks {', '.join(missing)}; a process failed, run it again.")
        if path.exists() or len(files) > world_size:
            raise ValueError(f"Routing logs of several runs lie at {path}; remove them and run the evaluation again.")
        files = expected
    return [_read_line(line, file) for file in files or [path] for line in file.read_text().splitlines()]


_RANK = re.compile(r"\.rank(\d+)-of-(\d+)")


def _rank_files(path: Path) -> list[Path]:
    pattern = re.compile(re.escape(path.stem) + _RANK.pattern + re.escape(path.suffix))
    return sorted(file for file in path.parent.glob("*") if pattern.fullmatch(file.name))


def _read_line(line: str, file: Path) -> RequestRecord:
    values = json.loads(line)
    wanted = {field.name for field in fields(RequestRecord)}
    if set(values) != wanted:
        raise ValueError(
            f"A line of {file} has keys {sorted(values)}, a routing log has {sorted(wanted)}; run it again."
        )
    return RequestRecord(**values)

"""How the processes that read training samples are started without each of them importing everything anew."""

from __future__ import annotations

import multiprocessing

MODULES = (
    "torch.utils.data",
    "transformers.tokenization_utils_tokenizers",
    "transformers.models.clip.image_processing_pil_clip",
    "llava.data.dataset",
    "llava.data.collator",
)
"""What a worker imports when it unpickles its dataset: several hundred megabytes, the same in all of them."""


def preload_fork_server() -> None:
    """Have Python's fork server, which starts workers of ``"forkserver"`` loaders, import what workers need.

    The server is a fresh process without data or devices. Workers forked from it share its pages, start in a fraction
    of a second and hold little but what they read. Call before the first of them is started.
    """
    multiprocessing.set_forkserver_preload(list(MODULES))

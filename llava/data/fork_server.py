"""The fork server's imports: data-loader workers forked from it share them, start at once and hold what they read.

Not to be imported elsewhere: objects made so far are hidden from the garbage collector, whose marks would otherwise
give every worker a copy of each page it walks over.
"""

from __future__ import annotations

import gc
import importlib

MODULES = (
    "torch.utils.data",
    "transformers.tokenization_utils_tokenizers",
    "transformers.models.clip.image_processing_pil_clip",
    "llava.data.dataset",
)
"""What a worker imports when it unpickles its dataset: several hundred megabytes, the same in all of them."""

# Any module that is missing here would be imported anew, and held, by every worker.
for _name in MODULES:
    importlib.import_module(_name)
gc.collect()
gc.freeze()

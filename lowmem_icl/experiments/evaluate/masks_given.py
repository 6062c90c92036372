"""`lowmem-icl evaluate`: mask files checked against the model, then a run of the one experiment."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lowmem_icl.cli.terminal import Terminal
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import MaskFile, read_mask
from lowmem_icl.options import RunOptions
from lowmem_icl.run import Finished, run
from lowmem_icl.session.identity import default_folder


def evaluate_masks(options: RunOptions, paths: Sequence[Path], terminal: Terminal) -> Finished:
    """Score the tasks clean and under every mask file; raise InputError where one is not for this model's shape."""
    if not paths:
        raise InputError("--mask: expected at least one mask file")
    files: dict[str, MaskFile] = {}
    for path in paths:
        mask_file = read_mask(path)
        if mask_file.name in files:
            raise InputError(f"--mask {path}: a mask named '{mask_file.name}' was given before; rename one")
        files[mask_file.name] = mask_file
    if options.out is None:
        digest = hashlib.sha256("".join(file.to_json() for file in files.values()).encode()).hexdigest()[:8]
        folder = default_folder(options, prefix="evaluate-", suffix=f"-{digest}")
        options = options.model_copy(update={"out": folder})
    return run(options, terminal, files)

"""All forms of input, and how many of 100,000 inputs are of each: fewer where reading one takes longer."""

from pathlib import Path

from forms_of_commands import forms_of_commands
from forms_of_files import forms_of_files
from forms_of_models import forms_of_models
from forms_of_rows import forms_of_rows
from forms_of_runs import forms_of_runs
from fuzzing import Form

from lowmem_icl.model.store import open_store
from lowmem_icl.options import run_options
from lowmem_icl.session.prepare import ModelBasis
from lowmem_icl.system.progress import unseen

_COUNTS = {
    "mask": 13_500, "toml": 13_500, "yaml": 8_000, "machine": 8_000, "config": 6_000, "tokenizer": 5_000,
    "manifest": 5_000, "layer": 8_000, "record": 3_000, "page": 100, "table": 1_500, "table's page": 60,
    "part": 6_000, "rows": 2_000, "rows, patched": 1_000, "continuations": 1_000, "word pairs": 1_500,
    "task rows": 1_500, "pairs": 5_000, "prompts": 4_500, "text": 2_000, "command line": 3_000, "name": 840,
}  # fmt: skip
NAMES = tuple(_COUNTS)
SHARES = {name: count / 100_000 for name, count in _COUNTS.items()}


def all_forms(demo: Path, store_dir: Path) -> dict[str, Form]:
    """Return all forms by name; demo: a store of it."""
    basis = ModelBasis.of(run_options({"store_dir": store_dir}), unseen, needs_weights=False)
    return {
        **forms_of_files(open_store(demo)),
        **forms_of_models(open_store(demo), store_dir),
        **forms_of_runs(),
        **forms_of_rows(basis),
        **forms_of_commands(basis, store_dir),
    }

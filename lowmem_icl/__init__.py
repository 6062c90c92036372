"""Which attention heads and FFNs does in-context learning need? Large language models taken apart on one
workstation.

>>> import lowmem_icl as icl
>>> run = icl.load(folder)
>>> run.mask("greedy", "recall", 4).kept[:3]
['L0H0', 'L1H0', 'L1H1']
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if "torch" not in sys.modules:
    # torch asks once, when it is imported: tensors of megabytes then lie in large pages. With small ones the
    # page faults of a layer of OPT-66B took as long as a sixth of its products.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # OpenMP asks once, too: threads that wait spin for tens of microseconds, then sleep. Where another
    # process wants the cores, spinning for longer makes small models ten times slower; not spinning at all
    # costs half the speed on a machine that does nothing else.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

if TYPE_CHECKING:
    from lowmem_icl.api.figures import Figure, Plots
    from lowmem_icl.api.finished_run import Run, load, run
    from lowmem_icl.api.mask import Mask
    from lowmem_icl.api.open_model import OpenModel, open_model
    from lowmem_icl.api.scoring import ablate, score
    from lowmem_icl.api.task import Task, load_task
    from lowmem_icl.errors import DoesNotFit, InputError, InUse, LowmemIclError, NotFinite

# What stands where; imported when it is first asked for, so that importing the package stays quick.
_MODULES = {
    "Figure": "api.figures",
    "Plots": "api.figures",
    "Run": "api.finished_run",
    "load": "api.finished_run",
    "run": "api.finished_run",
    "Mask": "api.mask",
    "OpenModel": "api.open_model",
    "open_model": "api.open_model",
    "ablate": "api.scoring",
    "score": "api.scoring",
    "Task": "api.task",
    "load_task": "api.task",
    "DoesNotFit": "errors",
    "InUse": "errors",
    "InputError": "errors",
    "LowmemIclError": "errors",
    "NotFinite": "errors",
}
__all__ = [
    "DoesNotFit",
    "Figure",
    "InUse",
    "InputError",
    "LowmemIclError",
    "Mask",
    "NotFinite",
    "OpenModel",
    "Plots",
    "Run",
    "Task",
    "__version__",
    "ablate",
    "load",
    "load_task",
    "open_model",
    "run",
    "score",
]


if not TYPE_CHECKING:  # A type checker knows the names above, and no others.

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

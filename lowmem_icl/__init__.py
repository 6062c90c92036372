"""Which attention heads and FFNs does in-context learning need? Large language models taken apart on one
workstation.
"""

import os

__version__ = "0.2.0"

# torch asks once, when it is imported: tensors of megabytes then lie in large pages. With small ones the page
# faults of a layer of OPT-66B took as long as a sixth of its products.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# OpenMP asks once, too: threads that wait spin for tens of microseconds, then sleep. Where another process
# wants the cores, spinning for longer makes small models ten times slower; not spinning at all costs half the
# speed on a machine that does nothing else.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

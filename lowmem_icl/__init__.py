"""Which attention heads and FFNs does in-context learning need? Large language models taken apart on one
workstation.
"""

import os

__version__ = "0.2.0"

# torch asks once, when it is imported: tensors of megabytes then lie in large pages. With small ones the page
# faults of a layer of OPT-66B took as long as a sixth of its products.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# OpenMP asks once, too: threads that have nothing to do then sleep. Where another process wants the cores,
# threads that spin while they wait make small models ten times slower, and gain nothing elsewhere.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

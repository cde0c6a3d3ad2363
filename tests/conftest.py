"""Before torch is imported: a thread for each of the processes that share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

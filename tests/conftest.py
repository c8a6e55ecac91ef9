"""One thread for every numeric library: the matrices are small, and a busy machine makes spinning threads slow."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

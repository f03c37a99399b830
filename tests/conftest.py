"Shared by all tests: one thread (sums come out in the same order), and a folder of golden numbers."
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")

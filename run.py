"""Prune one Mixture-of-Experts model: calibrate -> score -> prune -> evaluate.

Run:  python run.py                              the built-in model, offline
      python run.py pruning.ratio=0.4            change any field of conf/
      python run.py -m pruning.ratio=0.2,0.4     a sweep
      python run.py --help                       groups and fields
      torchrun --nproc-per-node=2 run.py         several processes share the batches

After pip install, the command `heapr` is the same, in any folder.
"""

from heapr.__main__ import main

if __name__ == "__main__":
    main()

"""python -m heapr.store: see heapr/store/commands.py."""

import sys

from heapr.store.commands import main

if __name__ == "__main__":
    main(sys.argv[1:])

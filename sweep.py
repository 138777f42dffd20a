"""Reproduce one table or figure: run every job of an experiment, then make tables, figures and an HTML page.

Run:  python sweep.py experiment=main_table model=tiny         the built-in model, offline
      python sweep.py experiment=main_table                    the paper's models
      python sweep.py experiment=main_table --dry-run          print what would be made, and stop
      python sweep.py experiment=main_table report_only=true   tables and figures of its newest sweep
      python sweep.py report_dir=outputs/sweeps/<folder>       the same for any sweep, run.py -m included
      python sweep.py --help                                   all experiments

After pip install, the command `heapr-sweep` is the same, in any folder.
"""

from heapr.sweep.__main__ import main

if __name__ == "__main__":
    main()

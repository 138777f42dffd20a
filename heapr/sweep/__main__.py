"""The command `heapr-sweep`, and `python -m heapr.sweep`: what `python sweep.py` does."""

from heapr.signals import end_at_once


def main() -> None:
    """Run the command line; Ctrl-C costs one line from the start, before the slow imports."""
    end_at_once()
    from heapr.sweep.command_line import main as sweep

    sweep()


if __name__ == "__main__":
    main()

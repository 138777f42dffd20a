"""The command `heapr`, and `python -m heapr`: what `python run.py` does."""

from heapr.signals import end_at_once


def main() -> None:
    """Run the command line; Ctrl-C costs one line from the start, before the slow imports."""
    end_at_once()
    from heapr.main import main as run

    run()


if __name__ == "__main__":
    main()

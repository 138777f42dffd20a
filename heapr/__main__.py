"""`python -m heapr` is what the command `heapr` is."""

from heapr.main import main

if __name__ == "__main__":
    main()

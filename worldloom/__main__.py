"""``python -m worldloom``."""

from worldloom.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

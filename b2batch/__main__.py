"""``python -m b2batch``."""

from b2batch.cli.main import main

if __name__ == "__main__":
    main()

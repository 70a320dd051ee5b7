"""``python -m gdmd`` is the same program as ``gdmd``."""

from gdmd.cli.app import main

if __name__ == "__main__":
    main()

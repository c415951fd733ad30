"""The start of the command line, as ``secateur`` and as ``python -m secateur``."""

import sys


def start() -> None:
    """Run the command line. Ctrl-C while its modules are still being loaded ends it with one line too."""
    try:
        from secateur.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Nothing was written.\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    start()

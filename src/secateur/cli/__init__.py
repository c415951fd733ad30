"""The command line: ``secateur inspect | compress | distill | evaluate | verify | export | bench | demo``."""

from secateur.cli.app import main

__all__ = ["main"]

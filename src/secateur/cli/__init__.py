"""The command line: ``secateur inspect | compress | distill | compare | evaluate | verify | export | demo``."""

from secateur.cli._app import app, main

__all__ = ["app", "main"]

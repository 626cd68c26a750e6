"""`python -m misscompile`: the command line without an installed entry point."""

from misscompile.cli import app

app()

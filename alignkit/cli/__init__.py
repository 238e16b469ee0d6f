"""The command line."""

from alignkit.cli.app import app

__all__ = ["app"]

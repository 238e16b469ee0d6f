"""`python -m alignkit` is the command `alignkit`."""

from __future__ import annotations

from alignkit.cli.app import app

if __name__ == "__main__":
    app(prog_name="alignkit")

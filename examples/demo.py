"""Train LaSRO and DRaFT at the same time, a process and a thread each, and show side by side what they changed.

`make demo` runs it. Points and results of both are printed after their names; all that they print is in OUT/NAME.log.

python examples/demo.py runs/demo --draft='--set train.updates=60'
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

from rich.console import Console
from rich.live import Live
from rich.text import Text

METHODS = ("lasro", "draft")
ALIGNKIT = (sys.executable, "-m", "alignkit")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
UPDATE = re.compile(r"(warm-up )?\d+/\d+  ")
"""Beginning of the line of an update: "12/128  reward 0.61  loss ...  0:03:10 left"."""


class Training:
    """A training in a process of its own."""

    def __init__(self, method: str, out: Path, flags: str, console: Console) -> None:
        self.method, self.folder, self.log = method, out / method, out / f"{method}.log"
        self.progress = "loads"
        self.result: list[str] = []
        """Lines after the last update: the exported weights and the table."""
        self._console = console
        arguments = ["train", "--algo", method, "--reward", "attribute_binding", "--out", str(self.folder)]
        arguments += shlex.split(flags)
        self.show(shlex.join(["alignkit", *arguments]))
        # In a group of its own it gets Ctrl-C once, from `stop`, and not from the terminal as well.
        self.process = subprocess.Popen(
            [*ALIGNKIT, *arguments, "--plain"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=ENVIRONMENT, process_group=0,
        )  # fmt: skip
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.log.open("w", encoding="utf-8") as log:
            for line in map(str.rstrip, self.process.stdout):
                print(line, file=log, flush=True)
                if UPDATE.match(line):
                    count, *metrics, left = line.split("  ")
                    self.progress = "  ".join([count, *metrics[:1], left])
                elif self.result or line.startswith("exports "):
                    self.result.append(line)
                    self.progress = "measures the exported weights"
                elif line and not line.startswith((" ", "means over ")):  # the table before training: see the last one
                    self.show(line)
        self.progress = "has ended"

    def show(self, line: str) -> None:
        self._console.print(Text(f"{self.method}  {line}"), soft_wrap=True)

    def wait(self) -> int:
        """Return the exit status, once all output has been read."""
        status = self.process.wait()
        self._reader.join()
        return status

    def stop(self, number: int) -> None:
        """Pass on a signal; the end of the terminal becomes that of a scheduler, which a run saves itself after."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the two runs and the gallery; new or empty")
    for method in METHODS:
        parser.add_argument(f"--{method}", default="", metavar="FLAGS", help=f"more flags of {method}'s training")
    options = parser.parse_args()
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"error: {out} exists and is not empty; name another folder: make demo OUT=FOLDER", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    trainings: list[Training] = []
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        for training in trainings:
            training.stop(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)

    def progress() -> Text:
        return Text("\n".join(f"{training.method}  {training.progress}" for training in trainings))

    with Live(get_renderable=progress, console=console, refresh_per_second=2, transient=True):
        trainings += [Training(method, out, getattr(options, method), console) for method in METHODS]
        for number in list(received):  # before there was anything to stop
            for training in trainings:
                training.stop(number)
        failed = [training for training in trainings if training.wait()]
    for training in trainings:
        if training.result:
            console.rule(Text(training.method))
        for line in training.result:
            console.print(Text(line), soft_wrap=True)
    if received:
        print("stopped", file=sys.stderr)
        return 128 + received[0]
    for training in failed:
        print(f"error: {training.method} failed; all that it printed is in {training.log}", file=sys.stderr)
    if failed:
        for training in trainings:
            if training not in failed:
                print(f"the result of {training.method} is in {training.folder}", file=sys.stderr)
        return 1
    console.rule()
    gallery = ["gallery", *(str(training.folder) for training in trainings)]
    status = 0
    for name, flags in (("gallery.png", ()), ("gains.png", ("--pick", "rise"))):
        arguments = [*gallery, *flags, "--out", str(out / name)]
        console.print(Text(shlex.join(["alignkit", *arguments])), soft_wrap=True)
        status = subprocess.run([*ALIGNKIT, *arguments], env=ENVIRONMENT).returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Start-up time of `alignkit list` and `alignkit --help`, relative to `python -c "import torch"`.

    python benchmarks/startup.py [REPEATS]

The commands take turns, so that other load on the machine affects all of them; medians are compared. Exits with 1 if
one takes more than LIMIT of torch's time: the registry and the command line must not import torch.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

LIMIT = 0.25
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "alignkit list": ["-m", "alignkit", "list"],
    "alignkit --help": ["-m", "alignkit", "--help"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
for arguments in COMMANDS.values():  # warms up the disk cache
    seconds(arguments)
taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
for _ in range(repeats):
    for name, arguments in COMMANDS.items():
        taken[name].append(seconds(arguments))
medians = {name: statistics.median(values) for name, values in taken.items()}
ratios = {name: median / medians["import torch"] for name, median in medians.items()}
for name, median in medians.items():
    print(f"{name:16} {median:6.3f} s   {ratios[name]:.2f} of import torch")
slow = [name for name, ratio in ratios.items() if name != "import torch" and ratio > LIMIT]
sys.exit(f"more than {LIMIT}: {', '.join(slow)}" if slow else 0)

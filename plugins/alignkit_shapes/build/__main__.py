"""Rebuild the embedded world from seeds: `python -m alignkit_shapes.build [STAGE ...]`.

Every stage reads the output of earlier stages from the work folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from alignkit_shapes.build import judge, lcm, measure, pack, prompts, surrogate, teacher, turbo, vae
from alignkit_shapes.models import FOLDER, WEIGHTS


def stages(work: Path) -> dict[str, Callable[[], None]]:
    """Return the stages by name, in order."""
    return {
        "prompts": lambda: prompts.write(FOLDER / "prompts"),
        "vae": lambda: vae.train(work / "vae"),
        "decoder": lambda: vae.refine(work / "vae", work / "vae_refined"),
        "judge": lambda: judge.train(work / "judge"),
        "teacher": lambda: teacher.train(work / "vae", work / "teacher"),
        "sketches": lambda: judge.refine(work / "judge", work / "teacher", work / "judge_refined"),
        "lcm": lambda: lcm.train(work / "teacher", work / "lcm", work / "lcm-run"),
        "pack": lambda: pack.pack(work, WEIGHTS),
        "turbo": lambda: turbo.build(WEIGHTS / "shapes_teacher", work / "rollouts", WEIGHTS / "shapes_turbo"),
        "surrogate": lambda: surrogate.train(WEIGHTS / "surrogate.safetensors", work / "surrogate-run"),
        "measure": measure.measure,
    }


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Stages to run; all by default.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for intermediate results.")] = Path("shapes-build"),
    threads: Annotated[int, typer.Option(help="Threads of torch; use more than one only on an idle machine.")] = 1,
) -> None:
    """Rebuild the embedded world from seeds."""
    torch.set_num_threads(threads)
    every = stages(work)
    for name in names or list(every):
        if name not in every:
            raise typer.BadParameter(f"there is no stage {name!r}; expected one of {', '.join(every)}")
        typer.echo(f"== {name}")
        every[name]()


if __name__ == "__main__":
    typer.run(main)

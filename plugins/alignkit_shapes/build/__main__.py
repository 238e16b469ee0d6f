"""`python -m alignkit_shapes.build [STAGE ...]`: make the embedded world again, from seeds.

Every stage reads what the stages before it left in the work folder.
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
    """The stages by name, in order."""
    return {
        "prompts": lambda: prompts.write(FOLDER / "prompts"),
        "vae": lambda: vae.train(work / "vae"),
        "decoder": lambda: vae.refine(work / "vae", work / "vae_refined"),
        "judge": lambda: judge.train(work / "judge"),
        "teacher": lambda: teacher.train(work / "vae", work / "teacher"),
        "sketches": lambda: judge.train_again(work / "judge", work / "teacher", work / "judge_again"),
        "lcm": lambda: lcm.train(work / "teacher", work / "lcm", work / "lcm-run"),
        "pack": lambda: pack.pack(work, WEIGHTS),
        "turbo": lambda: turbo.build(WEIGHTS / "shapes_teacher", work / "walks", WEIGHTS / "shapes_turbo"),
        "surrogate": lambda: surrogate.train(WEIGHTS / "surrogate.safetensors", work / "surrogate-run"),
        "measure": measure.measure,
    }


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Stages to run; all if none is named.")] = None,
    work: Annotated[Path, typer.Option(help="Where unfinished parts are kept.")] = Path("shapes-build"),
    threads: Annotated[int, typer.Option(help="Threads of torch; more than one only on an idle machine.")] = 1,
) -> None:
    """Make the embedded world again, from seeds."""
    torch.set_num_threads(threads)
    every = stages(work)
    for name in names or list(every):
        if name not in every:
            raise typer.BadParameter(f"{name!r} is no stage; expected one of {', '.join(every)}")
        typer.echo(f"== {name}")
        every[name]()


if __name__ == "__main__":
    typer.run(main)

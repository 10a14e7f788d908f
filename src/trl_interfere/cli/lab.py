"""`trl-interfere lab`."""

from dataclasses import dataclass

from .options import Options, option, parse
from .output import console, show


EXAMPLE = "trl-interfere lab --output_dir lab-out"


@dataclass(kw_only=True)
class LabOptions(Options):
    """Run the whole story on the embedded model: train in sequence, diagnose, repair."""

    output_dir: str = option("lab-out", "folder of the run; started again, it goes on")
    seed: int = option(0, "seed of the training")
    order: str = option("code,math,qa,writing", "domains in the order of training, separated by commas")
    steps: int = option(100, "optimizer steps of each stage")
    prompts: int = option(512, "test prompts of each domain, at most 512")
    threads: int = option(1, "threads to compute with; results repeat for the same number")


def main(arguments: list[str]) -> None:
    options = parse(LabOptions, arguments, "", EXAMPLE)
    options.prepare()
    from ..lab.pipeline import Lab
    from ..lab.summary import print_summary, write_report

    order = [name.strip() for name in options.order.split(",") if name.strip()]
    settings = {name: getattr(options, name) for name in ("seed", "steps", "prompts")}
    results = Lab(options.output_dir, order=order, **settings).run()
    write_report(results, options.output_dir)
    print_summary(results, options.output_dir, console())
    show(f"Everything is in {options.output_dir}. Next: trl-interfere compare {options.output_dir}")

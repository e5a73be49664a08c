"""The training command.

    python -m textok_mini.train laptop                                  # a preset, into runs/laptop
    python -m textok_mini.train laptop tokenizer.text_in=none output_dir=runs/twin seed=1
    python -m textok_mini.train my.yaml data=path/to/pictures training.steps=5000

The same command again goes on where a killed run stopped; a finished run is left as it is. Several processes:
`python -m torch.distributed.run --nproc-per-node 8 -m textok_mini.train ...`.
"""

import sys
from pathlib import Path

from textok_mini.command import command
from textok_mini.paths import project_root
from textok_mini.settings import load_config


@command(__doc__)
def main(arguments: list[str]) -> None:
    name, *overrides = arguments
    folders = [o.removeprefix("output_dir=") for o in overrides if o.startswith("output_dir=")]
    output_dir = Path(folders[-1]) if folders else project_root() / "runs" / Path(name).stem
    config = load_config(name, [o for o in overrides if not o.startswith("output_dir=")])
    from textok_mini.training import train  # and with it torch, only once the config is right

    train(config, output_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The training command.

    python -m textok_mini.train laptop                                  # a preset, into runs/laptop
    python -m textok_mini.train laptop tokenizer.text_in=none output_dir=runs/twin seed=1
    python -m textok_mini.train my.yaml data=path/to/pictures training.steps=5000

The same command again goes on where a killed run stopped; a finished run is left as it is. Several processes:
`python -m torch.distributed.run --nproc-per-node 8 -m textok_mini.train ...`.
"""

import sys
from pathlib import Path

from textok_mini.config import ConfigError
from textok_mini.paths import project_root
from textok_mini.settings import load_config


def main(arguments: list[str]) -> int:
    """0 for a finished run, 2 for one clear line about what to change. Imports torch only once the config is right."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    name, *overrides = arguments
    folders = [o.removeprefix("output_dir=") for o in overrides if o.startswith("output_dir=")]
    output_dir = Path(folders[-1]) if folders else project_root() / "runs" / Path(name).stem
    try:
        config = load_config(name, [o for o in overrides if not o.startswith("output_dir=")])
        from textok_mini.data import DataError
        from textok_mini.run import TrainingError
        from textok_mini.training import train
    except ConfigError as error:
        return complain(error)
    try:
        train(config, output_dir)
    except (ConfigError, DataError, TrainingError, FileNotFoundError, OSError) as error:
        return complain(error)
    return 0


def complain(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

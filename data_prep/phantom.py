"""Draw a synthetic 3D-woven volume of known geometry and write it as TIFF.

    python -m data_prep.phantom --state dry --shape 359 702 970 --dtype uint16 --seed 0 --output dry.tif

The settings are in ``worlds/config.py``.
"""

from __future__ import annotations

import os

from configs.load import command
from data_prep.worlds.config import PhantomConfig
from data_prep.worlds.writing import write


def main(config: PhantomConfig) -> None:
    """Write the phantom and say what it holds."""
    truth = write(config, workers=min(len(os.sched_getaffinity(0)), 4))
    print(
        f"{config.output}: {config.state}, {'x'.join(map(str, config.shape))} {config.dtype}, "
        f"{truth['yarn_fraction']:.0%} yarn; truth in {config.output.with_suffix('.truth.json').name}"
    )
    print(f"next: python -m data_prep.slice --volumes {config.state}={config.output} --output_dir data/{config.state}")


if __name__ == "__main__":
    command(PhantomConfig, main)

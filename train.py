"""Train an experiment: `deepspeed train.py --exp NAME`, or `python train.py --exp NAME` for one process."""

import sys

from march.training.main import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m mp_lightning.meta``: dispatch only, see :mod:`mp_lightning.cli`."""

import sys

from mp_lightning.cli.app import main

if __name__ == "__main__":
    main(sys.argv[1:])

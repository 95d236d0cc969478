"""``python -m ngame``."""

import sys

from ngame.cli import main

sys.exit(main())

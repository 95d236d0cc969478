"""`python -m gpu`: the table of timings."""

import sys

from gpu import main

sys.exit(main())

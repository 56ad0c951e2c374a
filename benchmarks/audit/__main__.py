"""``fastadapter bench audit``, or ``python -m benchmarks.audit`` in a checkout."""

import sys

from .command import main

sys.exit(main())

"""``python -m fastadapter.cli``, the same as ``fastadapter``."""

import sys

from fastadapter.cli import main

sys.exit(main())

"""``python -m cute_fa`` is ``cute-fa``."""

import sys

from cute_fa.cli.main import main

sys.exit(main())

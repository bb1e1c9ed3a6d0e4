"""``python -m memos``: the same as the command ``memos``."""

import sys

from memos.cli import main

sys.exit(main())

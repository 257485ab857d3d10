"""`python -m llmlab` is the shell command."""

import sys

from .cli import main

sys.exit(main())

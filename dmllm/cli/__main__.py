"""`python -m dmllm.cli` is `dmllm`."""

import sys

from dmllm.cli import main

sys.exit(main())

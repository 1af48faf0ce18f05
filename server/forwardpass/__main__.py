"""`python -m forwardpass`: the command, where its script is not on the path."""

import sys

from forwardpass.cli.main import main

sys.exit(main())

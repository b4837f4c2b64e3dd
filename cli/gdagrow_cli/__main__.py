"""`python -m gdagrow_cli`: the command line where no script is on the path, as under torchrun."""

import sys

from gdagrow_cli.main import main

if __name__ == "__main__":
    sys.exit(main())

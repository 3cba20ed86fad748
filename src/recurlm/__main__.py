"""`python -m recurlm`."""

from recurlm.cli.main import run

run()

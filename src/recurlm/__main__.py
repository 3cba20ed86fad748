"""The console script and `python -m recurlm`."""

from recurlm.cli.signals import listen


def main() -> None:
    """Listens to signals before anything slow is imported, then runs the command line."""
    stopped = listen()
    from recurlm.cli.main import run

    run(stopped)


if __name__ == "__main__":
    main()

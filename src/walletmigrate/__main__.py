"""Where the console script begins: nothing is imported here that takes long, so that Ctrl-C has an answer at once."""

import sys


def main() -> None:
    """The console script, and ``python -m walletmigrate``."""
    try:
        from walletmigrate import cli  # not above: Ctrl-C while it is loaded would be a traceback

        app = cli.program(sys.argv[1:])
    except KeyboardInterrupt:  # from here on commands answer for themselves
        sys.stderr.write("interrupted before anything was done\n")
        raise SystemExit(130) from None
    app(prog_name="walletmigrate")


if __name__ == "__main__":
    main()

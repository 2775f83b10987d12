"""Run the command line as `python -m opdlab`, where no `opdlab` is on the path."""

from opdlab.commands.cli import main

if __name__ == "__main__":
    main()

"""``python -m featpipe``: the commands, where the console script is not on the path."""

from featpipe.cli import main

if __name__ == "__main__":
    main()

"""``python -m secateur``: the command line where the console script is not on the path."""

from secateur.cli.app import main

if __name__ == "__main__":
    main()

"""`python -m videosparse` is the `videosparse` command."""

from videosparse.cli import main

if __name__ == "__main__":
    main()

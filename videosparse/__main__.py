"""`python -m videosparse` is the `videosparse` command."""


def main() -> None:
    """Entry point of the command: libraries take seconds to import, in which Ctrl-C is one line, too."""
    try:
        from videosparse.cli import main as command
    except KeyboardInterrupt:
        from videosparse import _interrupted

        raise _interrupted() from None
    command()


if __name__ == "__main__":
    main()

"""`python -m videosparse` is the `videosparse` command."""


def main() -> None:
    """Entry point of the command."""
    from videosparse.cli import main as command

    command()


if __name__ == "__main__":
    main()

"""The command line itself; `commands` and `evidence_commands` add its commands."""

import typer

app = typer.Typer(
    help="Grow (hyperclone) checkpoints of grouped differential attention models exactly, as a stream.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

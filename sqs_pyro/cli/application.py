"""The application that commands join."""

import typer

app = typer.Typer(
    name="sqs",
    help="Bayesian compression of neural networks: prune, quantize, pack, and measure the file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # paragraphs are wrapped anew, brackets are brackets
    pretty_exceptions_enable=False,  # a bug keeps its traceback
)

"""Options of models that can be assessed but not trained: ONNX files, and models behind a server."""

import click

UNTRAINED = (
    click.option(
        "--input-shape", metavar="N,…", help="Sizes of one example, where an .onnx file leaves them free."
    ),
    click.option(
        "--allow-host",
        "allow_hosts",
        multiple=True,
        metavar="HOST[:PORT]",
        help="A server that the model's URL may name.",
    ),
    click.option(
        "--header",
        "headers",
        multiple=True,
        metavar="'NAME: env:VAR'",
        help="Sent to the server, its value from an environment variable.",
    ),
    click.option(
        "--http-request",
        metavar="JSON",
        help="""How the server is asked, $x being the rows ($x_one: a single row): '{"instances": $x}'.""",
    ),
    click.option(
        "--http-response", metavar="PATH", help="Where the answer holds scores or classes, as in predictions."
    ),
    click.option(
        "--http-labels",
        is_flag=True,
        default=None,
        help="The answer holds classes (numbers or names), no scores.",
    ),
    click.option("--http-max-rows", type=int, metavar="N", help="Rows of one request (default: 64)."),
    click.option("--http-timeout", metavar="T", help="How long the server may take (default: 30s)."),
    click.option("--http-retries", type=int, metavar="N", help="Retries of a request (default: 5)."),
    click.option(
        "--http-concurrency", type=int, metavar="N", help="Requests under way at once (default: 1)."
    ),
    click.option("--http-rate", metavar="N/T", help="Requests in a time, at most, as in 4/s or 100/min."),
)
"""Options of models that cannot be trained: ONNX files, and models behind a server."""

SERVED = (
    click.option(
        "--max-queries",
        type=int,
        metavar="N",
        help="Rows that a server is sent, at most; then --resume goes on.",
    ),
    click.option(
        "--on-refused",
        type=click.Choice(["reject", "stop"]),
        metavar="HOW",
        help="An attacked input that a server refuses: reject (default) or stop.",
    ),
    click.option(
        "--keep-answers",
        is_flag=True,
        default=None,
        help="Keep the answers of a server in the run folder after the run.",
    ),
)
"""Limits of a run on a served model."""

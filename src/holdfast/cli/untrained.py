"""Options of models that can be assessed but not trained: ONNX files, and models behind a server."""

import click

UNTRAINED = (
    click.option(
        "--input-shape", metavar="N,…", help="Sizes of one example, if an .onnx file does not fix them."
    ),
    click.option(
        "--allow-host",
        "allow_hosts",
        multiple=True,
        metavar="HOST[:PORT]",
        help="Server to which requests may be sent.",
    ),
    click.option(
        "--header",
        "headers",
        multiple=True,
        metavar="'NAME: env:VAR'",
        help="Header of the requests. Its value is read from an environment variable.",
    ),
    click.option(
        "--http-request",
        metavar="JSON",
        help="""JSON of a request, with $x for the rows ($x_one for a single row), as in '{"instances": $x}'.""",
    ),
    click.option(
        "--http-response",
        metavar="PATH",
        help="Path of the scores or classes in the JSON of an answer, as in predictions.",
    ),
    click.option(
        "--http-labels",
        is_flag=True,
        default=None,
        help="Answers contain classes (numbers or names) instead of scores.",
    ),
    click.option(
        "--http-max-rows", type=int, metavar="N", help="Maximum number of rows in a request (default: 64)."
    ),
    click.option("--http-timeout", metavar="T", help="Maximum time for an answer (default: 30s)."),
    click.option(
        "--http-retries", type=int, metavar="N", help="Number of retries of a failed request (default: 5)."
    ),
    click.option(
        "--http-concurrency", type=int, metavar="N", help="Number of simultaneous requests (default: 1)."
    ),
    click.option("--http-rate", metavar="N/T", help="Maximum rate of requests, as in 4/s or 100/min."),
)
"""Options of models that cannot be trained: ONNX files, and models behind a server."""

SERVED = (
    click.option(
        "--max-queries",
        type=int,
        metavar="N",
        help="Maximum number of rows sent to a server. Then the run stops; continue it with --resume.",
    ),
    click.option(
        "--on-refused",
        type=click.Choice(["reject", "stop"]),
        metavar="HOW",
        help="What a refused attacked input causes: reject (count it as rejected, the default) or stop.",
    ),
    click.option(
        "--keep-answers",
        is_flag=True,
        default=None,
        help="Keep the server's answers in the run folder after the run.",
    ),
)
"""Limits of a run on a served model."""

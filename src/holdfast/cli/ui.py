"""The command `holdfast ui`, which shows the runs of a folder in a browser."""

from pathlib import Path

import click

from holdfast.cli.options import Command, Voice, with_voice
from holdfast.core.errors import UsageError

_MOST_PORT = 65_535


@click.command(cls=Command, short_help="show the runs of a folder in a browser")
@click.argument("folder", default="holdfast-runs", type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(0, _MOST_PORT),
    default=8090,
    show_default=True,
    help="Port on the loopback interface; 0 for any that is free.",
)
@click.option(
    "--export",
    "exported",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the pages to a new folder as static files instead, and end.",
)
@click.option(
    "--trust-code",
    is_flag=True,
    help="Let explanations of examples run the code of models, such as file.py of file.py:factory, and send requests "
    "to models behind HTTP.",
)
@with_voice
def ui(voice: Voice, folder: Path, port: int, exported: Path | None, *, trust_code: bool) -> int:
    """Show the runs, audits, pools and adaptations in FOLDER: verdicts, trends, comparisons and single examples.

    The pages only read, and are answered on the loopback interface until Ctrl-C. They have no login: other users of
    this computer can read them. Nothing in a folder of a run is executed; an explanation of an example opens the model
    of its run.
    """
    if exported is not None and trust_code:
        raise UsageError("--trust-code is for explanations, which an export does not have; leave it out")
    from holdfast.api.serve import refuse_missing_extra

    refuse_missing_extra()
    from holdfast.viewer.pages import Site
    from holdfast.viewer.shelf import Shelf

    shelf = Shelf(folder)
    if exported is not None:
        from holdfast.viewer.serving import export

        n = export(Site(shelf, mode="files"), exported)
        voice.say(f"{n} files: {exported / 'index.html'}")
        return 0
    from holdfast.server.worker_processes import bound_socket
    from holdfast.viewer.pages import explainer
    from holdfast.viewer.serving import HOST, serve_site

    listener = bound_socket(HOST, port)
    address = f"http://{HOST}:{listener.getsockname()[1]}/"
    site = Site(shelf, explainer(trust_code=trust_code))
    serve_site(site, listener, lambda: voice.say(f"{folder} is shown at {address} until Ctrl-C"))
    return 0
